"""The benchmarks run and tell the truth of what they were given."""

import json
import re

import pytest
import torch

from lvdm.data.clips import ClipPolicy, Clips
from lvdm.data.index import open_index
from sample.bench import alternate, plain, ratio


def test_runs_alternate_and_ratios_are_of_the_same_round():
    order = []
    seconds = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 3 and all(len(times) == 3 for times in seconds.values())
    assert ratio({"a": [4.0, 9.0, 2.0], "b": [2.0, 3.0, 2.0]}, "a", "b") == 2.0


def test_both_loaders_read_the_same_clip(videos):
    clips = Clips(open_index(videos), ClipPolicy(5, 2, 32, split="all", holdout=0.0), seed=0, cache_gib=0)
    for window in clips.grid(1):
        assert torch.equal(plain(clips, window), clips.read(window).video)


def test_data(lvdm, videos, tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert lvdm("bench data", videos, frames=5, size=32, clips=2, rounds=2, out=out) == 0
    text = capsys.readouterr().out
    assert re.search(r"this loader is [\d.]+ times as fast", text) and "two workers are" in text
    assert set(json.loads(out.read_text())["seconds"]) == {"this loader", "decord get_batch + resize"}


def test_latents(lvdm, store, tmp_path, capsys):
    assert lvdm("bench latents", store, steps=5, workers=0, step_ms=5, out=tmp_path / "bench.json") == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    waited = sum(result["waited"])
    assert len(result["waited"]) == 4 and result["share"] == pytest.approx(waited / (waited + 4 * 0.005))
    assert f"{100 * result['share']:.2f} % of steps of 5 ms" in capsys.readouterr().out
