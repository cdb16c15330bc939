"""The benchmarks of reading run and tell the truth of what they were given."""

import json
import sys

import pytest
import torch

from lvdm.bench import ratio
from lvdm.data.clips import ClipPolicy, Clips
from lvdm.data.index import open_index
from lvdm.errors import UserError
from lvdm.weights import cache_dir
from sample.bench.data import ahead, plain


def test_both_loaders_read_the_same_clip(videos):
    clips = Clips(open_index(videos), ClipPolicy(5, 2, 32, split="all", holdout=0.0), seed=0, cache_gib=0)
    for window in clips.grid(1):
        assert torch.equal(plain(clips, window), clips.read(window).video)


def test_data(lvdm, videos, tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert lvdm("bench data", videos, frames=5, size=32, clips=2, rounds=2, out=out) == 0
    text = capsys.readouterr().out
    seconds = json.loads(out.read_text())
    alone = ratio(seconds, "decord get_batch + resize", "this loader")
    assert f"this loader is {alone:.2f} times as fast as decord" in text and "LVDM_DECODER=pyav is" in text
    for what, names in (("two workers are", "clips by"), ("two processes of plain arithmetic are", "sums by")):
        assert f"{what} {ratio(seconds, f'{names} 1', f'{names} 2'):.2f} times as fast as one" in text
    assert len(seconds) == 7 and all(len(times) == 2 for times in seconds.values())


def test_index(lvdm, videos, tmp_path, capsys):
    """Every file is looked at anew in every round, and nothing of it stays."""
    before = sorted(cache_dir().rglob("*"))
    assert lvdm("bench index", videos, files=7, rounds=2, out=tmp_path / "bench.json") == 0
    seconds = json.loads((tmp_path / "bench.json").read_text())
    printed = capsys.readouterr()
    assert f"takes {ratio(seconds, 'this index', 'bare probes'):.2f} times as long" in printed.out
    assert len(seconds["this index"]) == 2 and min(map(min, seconds.values())) > 0.01
    assert "broken" not in printed.err and sorted(cache_dir().rglob("*")) == before


def test_batches_fetched_ahead_are_the_same_and_errors_come_through():
    def batches():
        yield from range(1, 4)
        raise UserError("the disk is away")

    found = ahead(batches())
    assert [next(found) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(UserError, match="the disk is away"):
        next(found)
    assert list(ahead(iter(range(1, 10)))) == list(range(1, 10))


def test_without_decord_there_is_one_line(lvdm, videos, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "decord", None)
    assert lvdm("bench data", videos, frames=5, size=32, clips=1, rounds=1) == 2
    assert "pip install decord" in capsys.readouterr().err


def test_latents(lvdm, store, tmp_path, capsys):
    assert lvdm("bench latents", store, steps=5, workers=0, step_ms=5, out=tmp_path / "bench.json") == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    waited = sum(result["waited"])
    assert len(result["waited"]) == 4 and result["share"] == pytest.approx(waited / (waited + 4 * 0.005))
    assert f"{100 * result['share']:.2f} % of steps of 5 ms" in capsys.readouterr().out
