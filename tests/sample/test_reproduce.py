"""Tables of the papers: every one at every scale is a sound plan, and one is trained, killed, resumed and shown."""

import csv
import dataclasses
import json
import re
import shlex
import subprocess
import sys

import pytest
import torch

import vae
from lvdm import config as configs
from lvdm.errors import UserError
from lvdm.run import RunFolder
from sample import comparison, scores
from sample.configs import Reproduce
from sample.reproduce import Arm, Table, disk, load_table, models_of, over, plan_of, seconds
from sample.scores import Measure, Scores, flicker, interval, of_clips
from train.vae import check_model

TABLES = sorted(path.stem for path in (configs.configs_root() / "tables").glob("*.yaml"))
EVERY = pytest.mark.parametrize("table, scale", [(t, s) for t in TABLES for s in ("tiny", "small", "paper")])


def planned(table: str, scale: str, **keys):
    config = Reproduce(table=table, scale=scale, videos="my clips", out="here", **keys)
    return config, load_table(config), plan_of(config, load_table(config))


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def test_there_are_tables():
    assert TABLES == ["ivvae-gcconv", "odvae-fig4", "univae-fig6", "univae-norm", "univae-table3", "univae-v2"]


@EVERY
def test_every_command_is_its_step_and_every_model_takes_its_clips(table, scale):
    _, _, plan = planned(table, scale)
    outs = [step.resolve().out for step in plan.steps]
    assert len(set(outs)) == len(outs) and all(out.startswith("here/") for out in outs)
    for step in plan.steps:
        config = step.resolve()
        parsed, _ = configs.parse(type(config), shlex.split(step.command().removeprefix(f"lvdm {step.verb} ")))
        assert parsed == config
        if step.verb == "train vae" and config.seed == 0:
            with torch.device("meta"):
                check_model(config, vae.build(config.model, **config.model_args))
        for key in ("vae", "init", "source"):  # what is started from was made before
            if (start := getattr(config, key, "")).startswith("here/"):
                assert start in outs[: outs.index(config.out)]


@EVERY
def test_all_models_of_a_table_see_the_same_clips_in_the_same_batches(table, scale):
    config, loaded, plan = planned(table, scale)
    arms = [configs.to_dict(step.resolve()) for step in plan.steps[len(loaded.steps) :]]
    assert len(arms) == len(models_of(config, loaded)) == loaded.scales[scale].seeds * len(loaded.arms)
    free = {"out", "seed", "model", "model_args", "init", "vae", "inject"}
    for arm in arms[1:]:
        assert {key for key in arm if arm[key] != arms[0][key]} <= free


@EVERY
def test_lengths_fit_what_is_measured(table, scale):
    _, loaded, _ = planned(table, scale)
    chosen = loaded.scales[scale]
    factor = 8 if loaded.what == "refinement" else 4
    assert all(frames % factor == 1 for frames in chosen.frames) and chosen.size % 8 == 0
    assert chosen.frames == sorted(chosen.frames)


def test_paper_scale_takes_the_recipes_as_they_are():
    _, loaded, plan = planned("univae-table3", "paper")
    for arm, step in zip(loaded.arms, plan.steps, strict=True):
        given, recipe = configs.to_dict(step.resolve()), configs.to_dict(configs.load(step.config_class(), arm.config))
        changed = {key for key in given if given[key] != recipe[key]}
        assert changed == {"out", "videos", "labels", "holdout"}


def test_the_papers_numbers_are_the_papers():
    _, loaded, _ = planned("univae-table3", "paper")
    assert [arm.paper["PSNR"] for arm in loaded.arms] == [31.16, 34.08, 34.13]
    assert [arm.paper["SSIM"] for arm in loaded.arms] == [0.8694, 0.8785, 0.8783]
    assert [arm.paper["LPIPS"] for arm in loaded.arms] == [0.0586, 0.0527, 0.0525]


def test_seeds_come_one_after_the_other_and_the_stages_once():
    config, loaded, plan = planned("univae-v2", "tiny", seeds=2)
    assert [step.verb for step in plan.steps] == ["train vae"] + 10 * ["train refine"]
    assert [model.seed for model in models_of(config, loaded)] == 5 * [0] + 5 * [1]
    assert [step.resolve().seed for step in plan.steps] == [0] + 5 * [0] + 5 * [1]


def test_a_scale_replaces_whole_keys_and_null_leaves_them():
    assert over({"a.b": 1, "a.c": 2, "ab": 3}, {"a": {"b": 4}, "ab": None}) == {"ab": 3, "a": {"b": 4}}


def test_hours_and_disk_follow_samples_and_width():
    _, _, plan = planned("univae-table3", "paper")
    step = plan.steps[0]
    assert seconds(step, 128) == pytest.approx(3_040_000 * 25 * 256**2 * 0.631 / (8 * 17 * 128**2))
    assert seconds(step, 64) == seconds(step, 128) / 2
    assert disk(step, 128) == (3 * 16 + 4) * 240e6 == 4 * disk(step, 64)


@EVERY
def test_printing_needs_no_torch_and_writes_nothing(table, scale, tmp_path, capsys, monkeypatch, lvdm):
    if (table, scale) == ("odvae-fig4", "small"):
        words = ["reproduce", table, f"scale={scale}", "--plan"]
        heavy = {"torch", "numpy", "av", "diffusers", "accelerate"}
        code = f"import sys; from lvdm.cli import main; sys.exit(main({words}) or bool({heavy} & {{*sys.modules}}))"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
    monkeypatch.chdir(tmp_path)
    assert lvdm("reproduce", table, "--plan", scale=scale) == 0
    printed = capsys.readouterr().out
    assert re.search(r"(about|under) [\d.,]+ hours of one H200.*not measured.* GB of disk$", printed.strip())
    assert not list(tmp_path.iterdir())


def test_a_wrong_table_lists_the_right_ones(lvdm, capsys, tmp_path):
    assert lvdm("reproduce", "univae-tabel3", "--plan") == 2
    said = capsys.readouterr().err
    assert all(table in said for table in TABLES) and "did you mean 'univae-table3'?" in said
    (tmp_path / "own.yaml").write_text("base: tables/univae-norm.yaml\nclaims: none\n")
    assert lvdm("reproduce", tmp_path / "own.yaml", "--plan") == 2
    assert "unknown key 'claims'" in capsys.readouterr().err
    with pytest.raises(UserError, match="names that differ"):
        Table(arms=[Arm("A b"), Arm("a-B")])


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def test_interval_of_two_sources_is_the_exact_one():
    """Means of two draws out of {0, 1} are 0, 1/2, 1 with 1/4, 1/2, 1/4: both ends lie beyond 2.5 %."""
    assert interval(torch.tensor([0.0, 1.0]), ["a", "b"]) == (0.0, 1.0)


def test_interval_of_one_source_or_of_equal_values_has_no_width():
    assert interval(torch.tensor([1.0, 2.0, 6.0]), ["a"] * 3) == (3.0, 3.0)
    assert interval(torch.full((4,), 2.5), ["a", "b", "c", "d"]) == (2.5, 2.5)


def test_interval_of_many_sources_is_that_of_the_normal():
    """The bootstrap's variance of a mean is the population variance by n."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = interval(values, [str(i) for i in range(400)])
    half = 1.96 * values.std(correction=0).item() / 20
    assert (high - low) / 2 == pytest.approx(half, rel=0.03)
    assert (high + low) / 2 == pytest.approx(values.mean().item(), abs=0.05 * half)


def test_clips_of_one_source_stay_together():
    """Each clip twice says no more than once."""
    values, sources = torch.tensor([0.0, 1.0, 5.0, 2.0]), ["a", "b", "c", "d"]
    assert interval(values.repeat(2), sources * 2) == pytest.approx(interval(values, sources))


def test_flicker_is_of_what_changes_and_not_of_what_is_wrong():
    x = torch.rand(2, 3, 4, 8, 8) * 0.5
    assert flicker(x, x + 0.25).abs().max() < 1e-5  # an error that stands still
    y = x.clone()
    y[:, :, 1] += 2 / 255  # a level, for one frame
    torch.testing.assert_close(flicker(x, y), torch.tensor([[1.0, 1.0, 0.0]] * 2).double(), atol=1e-4, rtol=0)


def result(offset: float, videos: int = 6) -> Scores:
    """Clip k of `videos` has a PSNR of k + offset, one more, and two more."""
    psnr = [[k + offset, k + offset + 1, k + offset + 2] for k in range(videos)]
    ones = [[1.0] * 3 for _ in range(videos)]
    values = {metric: psnr if metric == "PSNR" else ones for metric in ("PSNR", "SSIM", "LPIPS", "flicker")}
    protocol = {field.name: 1 for field in dataclasses.fields(comparison.Protocol)} | {"metric": "PSNR"}
    return Scores(protocol, [str(k) for k in range(videos)], {"model": values})


def rows(*offsets: tuple[float, ...], videos: int = 6) -> list[comparison.Row]:
    """PSNR of the three models of a table, each with an offset a seed."""
    _, table, _ = planned("univae-table3", "tiny")
    runs = {arm.name: [{3: result(o, videos)} for o in own] for arm, own in zip(table.arms, offsets, strict=True)}
    return comparison.rows_of(table, runs)


def test_rows_are_paired_differences_beside_the_papers():
    found = rows((0, 0), (1, 3), (-1, 3))
    base, better, torn = [row for row in found if row.metric == "PSNR (dB)"]
    assert (base.mean, base.difference, base.clear) == (3.5, 0, False)  # the mean of 0 to 5, and 1
    assert base.low < 3.5 < base.high and base.high - base.low > 1
    assert (better.mean, better.difference, better.difference_low, better.difference_high) == (5.5, 2, 2, 2)
    assert (better.seeds, better.seed_differences, better.videos) == ([4.5, 6.5], [1, 3], 6)
    assert (better.paper, better.paper_difference) == (34.08, 2.92)
    assert comparison.order("PSNR", [base, better, torn]).startswith("PSNR, ours: F = [3, 5], then F = [3, 5, 7, 9]")
    assert [row.mean for row in found if row.metric == "PSNR, first frame"] == [2.5, 4.5, 3.5]
    assert of_clips([result(0)], "model", "PSNR").tolist() == [[1, 2, 3, 4, 5, 6]]


def test_a_difference_is_clear_only_where_seeds_agree_and_videos_suffice():
    def clear(*offsets, **keys):
        return [row.clear for row in rows(*offsets, **keys) if row.metric == "PSNR (dB)"]

    assert clear((0, 0), (1, 3), (-1, 3)) == [False, True, False]  # the last: 1 dB better, but not with every seed
    assert clear((0,), (1,), (3,)) == [False, False, False]  # one seed
    assert clear((0, 0), (1, 3), (1, 1), videos=5) == [False, False, False]


def test_measured_frames_are_the_same_at_every_length(videos, vae_of, tmp_path):
    config = Measure(str(tmp_path), vae_of(), videos=str(videos), frames=[5, 9], size=32, per_video=2)
    scores.run(config)
    found = scores.read(tmp_path)
    assert len(found[9].sources) == 6 and found[5].sources == found[9].sources
    short, long = (found[frames].values["model"] for frames in (5, 9))
    for a, b in zip(short["PSNR"], long["PSNR"], strict=True):  # an exactly causal VAE does not look ahead
        assert (len(a), len(b)) == (5, 9) and a == pytest.approx(b[:5], abs=1e-3)
    assert [len(row) for row in long["flicker"]] == 6 * [8]


# ---------------------------------------------------------------------------------------------------------------------
# A table from its first step to its page

SMOKE = """
base: tables/univae-table3.yaml
arms:
- {name: one, config: vae/univae_k3.yaml, paper: {PSNR: 31.16}}
- {name: two, config: vae/univae_k35.yaml, paper: {PSNR: 34.08}}
scales:
  tiny:
    frames: [5]
    size: 32
    per_video: 2
    set:
      train vae:
        phases: [{samples: 4, batch: 2, frames: 5, size: 32, lr: 1.0e-3}]
        lpips_weight: 0.0
        warmup: 0
        save_every: 2
        log_every: 2
"""


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "own.yaml"
    path.write_text(SMOKE)
    return path


@pytest.fixture(scope="module")
def page(smoke, lvdm, videos, tmp_path_factory):
    """The folder of a table of two models of two steps."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert lvdm("reproduce", smoke, videos=videos, scale="tiny", out=out) == 0
    return out


def test_the_page_has_all_numbers_in_all_formats(page):
    results = json.loads((page / "results.json").read_text())["results"]
    lines = list(csv.DictReader((page / "results.csv").open()))
    assert len(results) == len(lines) == 2 * 5
    for row, line in zip(results, lines, strict=True):
        assert row["low"] <= row["mean"] <= row["high"] and float(line["mean"]) == row["mean"]
    written = scores.read(page / "scores" / "two-0")[5].values["model"]["PSNR"]
    shown = next(row for row in results if (row["arm"], row["metric"]) == ("two", "PSNR (dB)"))
    assert shown["mean"] == pytest.approx(torch.tensor(written).double().mean().item())
    assert (shown["paper"], shown["paper_difference"]) == (31.16 + 2.92, 2.92)
    for name in ("index.html", "results.md"):
        text = (page / name).read_text()
        assert f"{shown['mean']:.2f} ± " in text
        for said in ("34.08", "WebVid-10M", "What these runs do not show", "lvdm train vae", "commit", "+2.92"):
            assert said in text
    assert (page / "index.html").read_text().count('<figure class="chart"') == 4


def test_the_same_command_again_trains_and_measures_nothing(page, smoke, lvdm, videos, capsys):
    before = {path: path.stat().st_mtime_ns for path in page.rglob("*/*") if path.is_file()}
    assert lvdm("reproduce", smoke, videos=videos, scale="tiny", out=page) == 0
    assert capsys.readouterr().out.count("finished before, skipped") == 2
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_killed_table_goes_on_to_the_same_numbers(page, smoke, lvdm, videos, tmp_path, monkeypatch, capsys):
    save, saved = RunFolder.save, []

    def kill(self, samples, *args):
        save(self, samples, *args)
        saved.append((self.path.name, samples))
        if saved[-1] == ("two-0", 2):
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "save", kill)
    command = {"videos": videos, "scale": "tiny", "out": tmp_path / "killed"}
    assert lvdm("reproduce", smoke, **command) == 130
    assert saved == [("one-0", 2), ("one-0", 4), ("two-0", 2)]
    assert lvdm("reproduce", smoke, **command) == 0
    assert saved[3:] == [("two-0", 4)] and "one: finished before, skipped" in capsys.readouterr().out
    whole, killed = (json.loads((out / "results.json").read_text()) for out in (page, tmp_path / "killed"))
    assert killed["results"] == whole["results"]


def test_clips_that_are_too_short_are_refused_before_training(smoke, lvdm, videos, tmp_path, capsys):
    own = tmp_path / "long.yaml"
    own.write_text(f"base: {smoke}\nscales: {{tiny: {{frames: [5, 41]}}}}\n")
    assert lvdm("reproduce", own, videos=videos, val=videos, scale="tiny", out=tmp_path / "out") == 2
    assert "no shot is long enough: 41 frames" in capsys.readouterr().err and not (tmp_path / "out").exists()
