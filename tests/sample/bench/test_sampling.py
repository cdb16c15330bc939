"""The benchmark of sampling: its parts, what they add up to, and what it refuses."""

import json
import statistics

import pytest

from lvdm import bench

TINY = {"model": "latte-s/2", "model_args": "{depth: 2, width: 32, heads: 2}", "vae_args": "{width: 16, blocks: 1}"}
KEYS = {**TINY, "size": 16, "frames": 5, "batch": 2, "steps": 2, "rounds": 2, "precision": "fp32"}


@pytest.fixture(autouse=True)
def _without_memory(monkeypatch):
    """Spares a process a work."""
    monkeypatch.setattr(bench, "_peak_of_child", lambda work: None)


def test_parts_add_up_to_videos_a_minute(lvdm, tmp_path, capsys):
    assert lvdm("bench sample", out=tmp_path / "sample.json", **KEYS) == 0
    _, *parts = json.loads((tmp_path / "sample.json").read_text())["rows"]
    assert [(row["work"], row["frames"]) for row in parts] == [("sampling", 0), ("D1", 2 * 5), ("D2", 2 * 9)]
    seconds = [statistics.median(row["seconds"]) for row in parts]
    printed = capsys.readouterr().out
    assert f"{60 * 2 / sum(seconds):.4g} videos a minute" in printed
    assert f"sampling: {100 * seconds[0] / sum(seconds):.1f} % of the time" in printed
    assert all(row["flops"] > 0 for row in parts)


def test_any_vae_renders(lvdm, tmp_path):
    """One with other channels and no streams, by D1 alone."""
    keys = {**KEYS, "vae": "cogvideox", "attention": "math"}
    tiny = "{arguments: {block_out_channels: [8,8,8,8], layers_per_block: 1, norm_num_groups: 4}}"
    assert lvdm("bench sample", **{**keys, "vae_args": tiny, "refine": "false", "out": tmp_path / "a.json"}) == 0
    assert [row["work"] for row in json.loads((tmp_path / "a.json").read_text())["rows"]][1:] == ["sampling", "D1"]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"vae": "odvae"}, "vae=odvae has no refinement decoder"),
        ({"frames": 6}, "frames=6: expected 4n+1, e.g. 5 or 9"),
        ({"size": 20}, "size=20: must be divisible by 8"),
        ({"vae": "vqgan", "vae_args": "{width: 16, blocks: 1}", "refine": "false"}, "is discrete"),
    ],
)
def test_bad_input_is_one_line(lvdm, keys, says, capsys):
    assert lvdm("bench sample", **{**KEYS, **keys}) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
