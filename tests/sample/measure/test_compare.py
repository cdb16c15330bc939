"""Models side by side: the same clips for all, differences that add up, clips worth seeing, and what is refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import vae
from lvdm.errors import UserError
from lvdm.media import write_video
from sample.measure.compare import is_generator
from sample.measure.compare_generators import classes_of, require_apart
from sample.measure.compare_vaes import chosen, text
from sample.measure.configs import EvaluateReconstruction
from sample.measure.evaluate import Table
from sample.measure.figures import SPREAD, best_of, good_end
from sample.measure.scores import Measure, clips_of, label_of
from sample.measure.sets import Files, Reconstructed
from sample.measure.views import AMPLIFY, difference, labels

KEYS = {"size": 32, "frames": 9, "metrics": "psnr,flicker"}


@pytest.fixture(scope="module")
def discrete(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tats")
    vae.build("tats", **vae.registry.entry("tats").tiny).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def compared(lvdm, vae_of, videos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("compared") / "out"
    assert lvdm("compare", vae_of(), vae_of(seed=1), videos=videos, out=out, show=2, **KEYS) == 0
    return out


def stored(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def test_differences_and_wins_are_those_of_the_clips(compared):
    found = stored(compared)
    assert len(found["clips"]) == 3 and all(
        re.match(r"(left|right)/\w.mp4, frame \d+", clip) for clip in found["clips"]
    )
    assert len(found["results"]) == 4  # two models, PSNR and flicker
    first, second = found["models"]
    for result in found["results"]:
        own, base = (np.array(found["values"][result["metric"]][name]) for name in (result["model"], first))
        better = own > base if result["metric"] == "PSNR" else own < base
        assert result["mean"] == pytest.approx(own.mean()) and result["difference"] == pytest.approx(
            (own - base).mean()
        )
        assert result["better_on"] == better.sum()
        assert result["difference_low"] <= result["difference"] <= result["difference_high"]
        assert not result["clear"], "three videos are too few"
    other = next(r for r in found["results"] if r["model"] == second)
    assert other["difference"] != 0


def test_one_more_model_measures_that_one_only(compared, lvdm, vae_of, discrete, videos, capsys):
    """Even a discrete one: it has reconstructions."""
    before, files = stored(compared), {path: path.stat().st_mtime_ns for path in (compared / "scores").iterdir()}
    assert lvdm("compare", vae_of(), vae_of(seed=1), discrete, videos=videos, out=compared, show=2, **KEYS) == 0
    printed = capsys.readouterr().out
    assert printed.count("measured before") == 2 and printed.count("measured now") == 1
    after = stored(compared)
    assert all(path.stat().st_mtime_ns == at for path, at in files.items())
    assert list(after["models"])[:2] == list(before["models"]) and len(after["models"]) == 3
    for metric, by_model in before["values"].items():
        assert {name: after["values"][metric][name] for name in by_model} == by_model
    codes = after["models"][labels([vae_of(), vae_of(seed=1), discrete])[2]]
    assert codes["latents of 9x32x32"] == "3x4x4 codes" and codes["streams exactly"] == "no"
    page = (compared / "index.html").read_text()
    assert len(list((compared / "clips").iterdir())) == page.count("<video") == 2 * 7
    assert "takes 4n frames: each clip of 9 goes in as 12" in page


def test_page_in_a_browser(compared, browser):
    """Its dots lead to players of all models, whose one slider moves them all; the table of clips sorts."""
    browser.open(compared / "index.html")
    anchors = browser.run("[...document.querySelectorAll('.scatter a')].map(a => a.getAttribute('href'))")
    ids = browser.run("[...document.querySelectorAll('.players')].map(figure => figure.id)")
    assert len(ids) == 2 and set(anchors) == {f"#{name}" for name in ids}
    assert browser.run("document.querySelectorAll('.scatter option').length") == 2  # PSNR and flicker
    browser.run("globalThis.figure = document.querySelector('.players')")
    count = browser.run("figure.querySelectorAll('video').length")
    assert count in (5, 7)  # the original, two or three models, their errors
    browser.run(
        "document.querySelector(`.scatter a[href='#${figure.id}'] circle`).dispatchEvent(new MouseEvent('click',"
        " {bubbles: true})); new Promise(done => setTimeout(done, 300))"
    )
    assert browser.run("document.activeElement === figure")
    browser.run(
        "figure.querySelector('input').value = 4; figure.querySelector('input').dispatchEvent(new Event('input'))"
    )
    fps = 24
    times = browser.run("[...figure.querySelectorAll('video')].map(video => video.currentTime)")
    assert times == pytest.approx([4.5 / fps] * count, abs=1e-3)
    table = "[...document.querySelectorAll('table')].at(-1)"
    cells = f"[...{table}.tBodies[0].rows].map(row => +row.cells[1].dataset.value)"
    browser.run(f"{table}.querySelectorAll('th button')[1].click()")
    assert browser.run(cells) == sorted(stored(compared)["values"]["PSNR"][next(iter(stored(compared)["models"]))])


def test_the_worst_clips_and_those_that_differ_most_are_shown():
    values = torch.tensor([[10.0, 20.0, 30.0, 25.0, 26.0], [12.0, 11.0, 38.0, 25.0, 26.0]])
    assert chosen(values, ["a", "b"], 3) == {
        0: ["worst of a"],
        1: ["worst of b", "a leads b most"],
        2: ["b leads a most"],
    }
    assert list(chosen(values, ["a", "b"], 2)) == [0, 1]
    assert len(chosen(values, ["a", "b"], 9)) == 5


def test_names_are_as_short_as_they_can_be():
    assert labels(["runs/a", "runs/b/export"]) == ["a", "b"]
    assert labels(["runs/a/vae", "runs/b/vae/"]) == ["a/vae", "b/vae"]
    assert labels(["owner/name", "name"]) == ["owner/name", "name"]


def test_every_metric_has_its_good_end():
    metrics = [metric for metric in EvaluateReconstruction.known if metric not in ("group", "rfvd")]
    assert {m for m in metrics if good_end(label_of(m)) == "max"} == {"psnr", "pooled_psnr", "ssim", "ip"}
    assert best_of(["IS", "FVD", "parameters (M)", SPREAD]) == {"IS": "max", "FVD": "min", SPREAD: "min"}


def test_models_of_equal_weights_and_other_options_are_two(lvdm, vae_of, videos, tmp_path, capsys):
    """The norm has no weights of its own, and decides what a model draws."""
    other = vae.build("univae", width=16, blocks=1, norm="clip")
    other.load_state_dict(vae.load(vae_of()).state_dict())
    other.save_pretrained(tmp_path / "other")
    assert lvdm("compare", vae_of(), tmp_path / "other", videos=videos, out=tmp_path / "out", show=1, **KEYS) == 0
    assert capsys.readouterr().out.count("measured now") == 2
    (change,) = (r["difference"] for r in stored(tmp_path / "out")["results"][1:2])
    assert change != 0 and len(list((tmp_path / "out" / "scores").iterdir())) == 2
    clips = clips_of(Measure(videos=str(videos), frames=[9], size=32))
    real = Files(clips, clips.grid(1))
    keys = [Reconstructed(real, vae.load(str(spec))).key([0]) for spec in (vae_of(), tmp_path / "other", vae_of())]
    assert keys[0] == keys[2] != keys[1], "features of one would be served for the other"


def test_the_terminal_shows_the_distance_of_sets_too():
    rows = [("a", 12.345, 10.0, 15.0), ("b", 9.0, None, None)]
    said = text([], [Table("rFVD", ["", "FVD"], [list(row)], {}, "") for row in rows])
    assert said.splitlines() == ["rFVD     a: 12.35 [10, 15]", "rFVD     b: 9"]


def test_errors_are_grey_where_there_are_none():
    x = torch.rand(3, 2, 4, 4) * 2 - 1
    assert torch.equal(difference(x, x), torch.zeros_like(x))
    assert difference(x, x + 0.02) == pytest.approx(AMPLIFY * 0.02, abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Generators


@pytest.fixture(scope="module")
def generators(tmp_path_factory) -> list[Path]:
    """Real clips, the same ones as a generator that copies, and noise: six of 9 frames of 32x32 each."""
    made = []
    for name in ("real", "copies", "noise"):
        folder = tmp_path_factory.mktemp("sets") / name
        folder.mkdir()
        made.append(folder)
        for i in range(6):
            random = np.random.default_rng((i, name == "noise"))
            steps = np.cumsum(random.integers(-9, 10, (9, 1, 1, 3)), 0) + 128
            frames = (
                random.integers(0, 256, (9, 32, 32, 3)) if name == "noise" else np.broadcast_to(steps, (9, 32, 32, 3))
            )
            write_video(folder / f"{i:06d}.mkv", frames.astype(np.uint8), 12)
    return made


def test_generators_are_measured_in_one_protocol(lvdm, generators, tmp_path, capsys):
    real, copies, noise = generators
    out = tmp_path / "out"
    assert lvdm("compare", copies, noise, videos=real, out=out, features="pixels", show=2) == 0
    found = stored(out)
    fvd, kvd = ({name: rows[i]["value"] for name, rows in found.items()} for i in (0, 1))
    assert fvd["copies"] == pytest.approx(0, abs=1e-6) and fvd["noise"] > 0.01 and kvd["noise"] > kvd["copies"]
    assert all(row["protocol"]["count_fake"] == 6 and row["low"] <= row["high"] for r in found.values() for row in r)
    page = (out / "index.html").read_text()
    assert page.count("<video") == 4 and "no. 2" in page and "biased" in page
    assert "floor N real / fake" in page and page.count(">3 / 3<") == 4  # six real clips
    floor = found["copies"][0]["floor"]
    assert f"FVD copies: {fvd['copies']:.4g} [" in (said := capsys.readouterr().out)
    assert f", floor {floor['mean']:.4g} (N 3 / 3)" in said


def test_sets_of_different_sizes_are_refused(lvdm, generators, tmp_path, capsys):
    real, copies, noise = generators
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for path in sorted(noise.iterdir())[:4]:
        (fewer / path.name).symlink_to(path)
    assert lvdm("compare", copies, fewer, videos=real, out=tmp_path / "out", features="pixels") == 2
    assert "set count=4" in capsys.readouterr().err
    assert lvdm("compare", copies, fewer, videos=real, out=tmp_path / "out", features="pixels", count=4) == 0


def test_what_cannot_be_compared_is_refused_before_anything_is_looked_at(
    lvdm, generators, tmp_path, capsys, monkeypatch
):
    """Clips of other lengths, and files that lost something beside files that did not."""
    real, copies, _ = generators
    monkeypatch.setattr("sample.measure.compare_generators.measure", None)
    for name, frames, suffix in (("shorter", 5, "mkv"), ("lossy", 9, "mp4")):
        (tmp_path / name).mkdir()
        for i in range(6):
            write_video(tmp_path / name / f"{i:06d}.{suffix}", np.zeros((frames, 32, 32, 3), np.uint8), 12)
    keys = {"videos": real, "features": "pixels", "out": tmp_path / "out"}
    assert lvdm("compare", copies, tmp_path / "shorter", **keys) == 2
    assert "shorter has 5 frames: their distances cannot be compared; set frames=5" in capsys.readouterr().err
    assert lvdm("compare", copies, tmp_path / "lossy", **keys) == 2
    assert "copies is kept as without loss, lossy is kept as mp4" in capsys.readouterr().err
    assert lvdm("compare", copies, tmp_path / ".." / tmp_path.name / "lossy", tmp_path / "lossy", **keys) == 2
    assert "lossy is the same folder" in capsys.readouterr().err
    with pytest.raises(UserError, match="a: is there twice"):
        require_apart(["a", "b", "a"])


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"id": 1, "class": "a"}',
        '{"id": 1, "class": "a", "fps": "abc"}',
        '{"id": 1, "fps": 9}',
        '{"class": "a", "fps": 9}',
    ],
)
def test_notes_that_lack_something_are_one_line(tmp_path, line):
    (tmp_path / "samples.jsonl").write_text(f'{{"id": 0, "class": null, "fps": 12.0}}\n{line}\n')
    with pytest.raises(UserError, match=r"samples\.jsonl, line 2: expected what lvdm sample writes"):
        classes_of(str(tmp_path))


def test_samples_stand_beside_each_other_by_class(lvdm, samples, videos, tmp_path):
    other = tmp_path / "other"
    (other / "d1").mkdir(parents=True)
    lines = (samples / "samples.jsonl").read_text().splitlines()
    for i, line in enumerate(reversed(lines)):  # the same videos in another order
        with open(other / "samples.jsonl", "a") as file:
            file.write(json.dumps({**json.loads(line), "id": i}) + "\n")
        (other / "d1" / f"{i:06d}.mp4").symlink_to(samples / "d1" / f"{len(lines) - 1 - i:06d}.mp4")
    out = tmp_path / "out"
    assert lvdm("compare", samples, other, videos=videos, out=out, features="pixels", show=2, stride=2) == 0
    titles = re.findall(r"<h3>(\w+, no. \d)</h3>", (out / "index.html").read_text())
    assert sorted(titles) == ["left, no. 1", "right, no. 1"]


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


def test_kinds_are_told_apart(refiner, samples, videos, tmp_path):
    assert is_generator(str(samples)) and is_generator(str(videos))
    assert not is_generator(refiner) and not is_generator(str(tmp_path)) and not is_generator("owner/name")


@pytest.mark.parametrize(
    "models, keys, message",
    [
        (["vae"], {}, "expected two or more"),
        (["vae", "vae"], {}, "encodes and decodes as"),
        (["vae", "with_d2"], {}, "a D2 is measured by lvdm evaluate refinement"),
        (["vae", "videos"], {}, "compare VAEs, or generators"),
        (["vae", "other"], {"protocol": "latte"}, "protocol=latte: is for generators"),
        (["vae", "other"], {"fps": 12}, "fps=12.0: is for generators"),
        (["vae", "other"], {"metrics": "rfvd", "frames": 5}, "metrics=rfvd: frames=5: i3d needs at least 9"),
        (["vae", "other"], {"metrics": "fvd"}, "metrics=fvd: expected, of VAEs, some of psnr"),
        (["vae", "other"], {"size": 36}, "size=36"),
        (["vae", "other"], {"size": 8, "metrics": "ssim"}, "size=8: ssim needs at least 11"),
        (["vae", "other"], {"frames": 1}, "frames=1: flicker is of neighbours"),
        (["vae", "other"], {"frames": 99}, "no shot is long enough"),
        (["vae", "other"], {"videos": "/nowhere"}, "/nowhere"),
        (["vae", "/nowhere"], {}, "/nowhere: no such folder"),
    ],
)
def test_mistakes_are_one_line(lvdm, vae_of, videos, tmp_path, capsys, models, keys, message):
    places = {"vae": vae_of(), "other": vae_of(seed=1), "videos": videos, "with_d2": vae_of(refine=True)}
    words = [places.get(model, model) for model in models]
    assert lvdm("compare", *words, **{"videos": videos, "out": tmp_path / "out", **KEYS, **keys}) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
