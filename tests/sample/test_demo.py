"""The whole job at its smoke size: from an empty folder to a report, once, and nothing twice."""

import base64
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import dit
import vae
from lvdm.data.reader import iter_frames, probe
from lvdm.latents import LatentStore
from lvdm.media import write_mp4
from sample.measure import evaluate
from sample.measure.evaluate import read_results

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smoke(cache, tmp_path_factory):
    """What `lvdm demo scale=smoke` left in an empty folder, and what it said."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "lvdm", "demo", "scale=smoke"]
    environment = {**os.environ, "LVDM_CACHE": str(cache)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "demo", done


class Report(HTMLParser):
    """The addresses that a page would load, and the titles of its videos."""

    def __init__(self, page: Path):
        super().__init__()
        self.text, self.addresses, self.videos = page.read_text(), [], {}
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.addresses += [attributes[key] for key in ("src", "href", "poster", "srcset", "data") if key in attributes]
        if tag == "video":
            content = base64.b64decode(attributes["src"].removeprefix("data:video/mp4;base64,"))
            self.videos[content] = (
                attributes["aria-label"],
                int(attributes["data-frames"]),
                float(attributes["data-fps"]),
            )


@pytest.fixture(scope="module")
def report(smoke):
    return Report(smoke[0] / "report" / "index.html")


def test_it_says_where_the_report_is_and_what_is_left(smoke):
    out, done = smoke
    assert done.stdout.splitlines()[-1] == f"report: {Path('runs/demo/report/index.html')}"
    assert (out / "report" / "index.html").is_file()
    shares = [int(share) for share in re.findall(r"(\d+)% of the whole", done.stderr)]
    assert shares == sorted(shares) and shares[-1] == 100 and len(shares) > 10
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr


def test_every_part_is_there_and_fits_the_next(smoke):
    out, _ = smoke
    steps = ["vae", "refine", "latents", "dit", "samples", *(f"metrics/{m}" for m in ("reconstruction", "refinement"))]
    assert all((out / step / "finished.json").is_file() for step in [*steps, "metrics/generation"])
    one, two, transformer = vae.load(f"{out}/vae"), vae.load(f"{out}/refine"), dit.load(f"{out}/dit")
    assert one.latent_sha256() == two.latent_sha256() == transformer.config.latents["vae_sha256"]
    assert two.spec.refines and not one.spec.refines
    store = LatentStore(out / "latents")
    assert store.manifest.classes == ["bigbuckbunny", "bikes", "carphone_pristine"] and len(store) >= 8
    names = ["reconstruction", "refinement", "generation"]
    tables = [table for name in names for table in read_results(out / "metrics" / name)]
    assert len(tables) == 5 and all(value == value for table in tables for row in table.rows for value in row[1:])
    assert json.loads((out / "plan.json").read_text()).keys() >= {"VAE, stage 1", "VAE, stage 2", "DiT", "FVD"}


def test_report_is_self_contained(report):
    assert report.addresses and all(re.match(r"data:|#", address) for address in report.addresses)
    assert not re.search(r"https?://|url\((?!['\"]?data:)|@import", report.text)
    assert "default-src 'none'" in report.text


def test_report_shows_every_video_at_its_rate(smoke, report):
    out, _ = smoke
    files = sorted((out / "report").glob("*.mp4"))
    assert {file.read_bytes() for file in files} == set(report.videos)
    rates = {"heldout": {"input-half-rate": (9, 0.5), "d1": (9, 0.5), "input-native-rate": (17, 1), "d2": (17, 1)}}
    rates["generated"] = {"d1": (9, 0.5), "d2": (17, 1)}
    for file in files:
        kind, _, name = file.stem.split("-", 2)
        frames, rate = rates[kind][name]
        info = probe(file)
        assert (info.frames, info.width, info.height) == (frames, 64, 64)
        assert info.fps == pytest.approx(rate * 25, rel=0.2)  # 25, or carphone's 29.97
        assert sum(1 for _ in iter_frames(file)) == frames
        title, shown_frames, shown_fps = report.videos[file.read_bytes()]
        assert shown_frames == frames and shown_fps == pytest.approx(info.fps, rel=1e-3)
        assert f"<h3>{title}</h3>" in report.text
    for number in range(sum("heldout" in file.name for file in files) // 4):
        half, native = (probe(out / "report" / f"heldout-{number}-{name}.mp4").fps for name in ("d1", "d2"))
        assert native == pytest.approx(2 * half, rel=1e-3)


def test_report_has_the_numbers_the_protocols_and_a_warning(smoke, report):
    out, _ = smoke
    for name in ("reconstruction", "refinement", "generation"):
        for table in read_results(out / "metrics" / name):
            assert table.title in report.text and f"{table.protocol['count_real']} real" in report.text
    assert "Nothing here has learnt anything" in report.text
    assert report.text.count('<figure class="chart"') == 3 and report.text.count('class="protocol"') == 5


def test_the_same_command_again_skips_everything(smoke, lvdm, monkeypatch, capsys):
    out, _ = smoke
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and "report" not in path.parts}
    monkeypatch.chdir(out.parent.parent)
    assert lvdm("demo", scale="smoke") == 0
    names = list(json.loads((out / "plan.json").read_text()))
    skipped = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if "finished before" in line]
    assert skipped == names and len(names) == 8
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_another_scale_into_the_same_folder_is_refused(smoke, lvdm, monkeypatch, capsys):
    monkeypatch.chdir(smoke[0].parent.parent)
    assert lvdm("demo", scale="full") == 2
    assert "out=runs/demo: belongs to another config (different: scale" in capsys.readouterr().err


def test_shots_that_are_too_short_are_refused_before_training(lvdm, videos, tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    frame = next(iter_frames(videos / "left" / "a.mp4"))
    write_mp4(tmp_path / "videos" / "short.mp4", [frame] * 60, 24)  # its last fifth has 12 frames
    assert lvdm("demo", videos=tmp_path / "videos", out=tmp_path / "out", scale="smoke") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and not (tmp_path / "out").exists()
    assert (
        "17 frames at stride 1 need 17 consecutive frames in the val split, the longest shot there has 12" in errors[0]
    )


class Brightness:
    """In the place of I3D, which takes a second a clip."""

    name, weights_sha256, resize, dim, min_frames = "brightness", "0" * 64, "as it is", 1, 1

    def __call__(self, video):
        return video.mean((1, 2, 3, 4))[:, None]


def test_own_videos_by_class(real_data, lvdm, tmp_path, monkeypatch):
    """Genuine UCF101 files of two classes and two frame rates."""
    for file in ("BaseballPitch/v_BaseballPitch_g01_c01.avi", "CliffDiving/v_CliffDiving_g03_c01.avi"):
        (link := tmp_path / "videos" / file).parent.mkdir(parents=True)
        link.symlink_to(real_data / "ucf101_mini" / "UCF-101" / file)
    monkeypatch.setattr(evaluate, "make_extractor", lambda name, device, weights: Brightness())
    out = tmp_path / "demo"
    assert lvdm("demo", videos=tmp_path / "videos", labels="folder", out=out, scale="smoke") == 0
    assert LatentStore(out / "latents").manifest.classes == ["BaseballPitch", "CliffDiving"]
    lines = [json.loads(line) for line in (out / "samples" / "samples.jsonl").read_text().splitlines()]
    assert [line["class"] for line in lines] == ["BaseballPitch", "CliffDiving", "BaseballPitch"]
    page = (out / "report" / "index.html").read_text()
    assert "<h3>BaseballPitch #0, D2</h3>" in page and "<h3>CliffDiving #1, D1</h3>" in page
    assert "v_BaseballPitch_g01_c01.avi" in page and "v_CliffDiving_g03_c01.avi" in page
