"""One knob at a time: what it gives is what an evaluation with that key gives; what cannot be turned says why."""

import json
from pathlib import Path

import numpy as np
import pytest

from lvdm.media import write_video
from sample.measure.configs import KNOBS
from sample.measure.doctor import HEADER, KNOB, SAYS
from sample.measure.evaluate import read_results


def waves(frames: int, height: int, width: int, number: int) -> np.ndarray:
    """uint8 (T, H, W, 3), each number moving its own way."""
    t, y, x = np.mgrid[:frames, :height, :width]
    channels = [np.sin((x + (number - 2) * t) / (5 + k + number)) * np.cos(y / (6 + 2 * k)) for k in range(3)]
    return (127.5 + 87 * np.stack(channels, -1)).astype(np.uint8)


@pytest.fixture(scope="module")
def sides(tmp_path_factory) -> dict[str, Path]:
    """Four samples of 9 frames, square; five real videos of 40 frames, wider than high, all at 24 fps."""
    folder = tmp_path_factory.mktemp("doctor")
    for name, count, shape in (("samples", 4, (9, 32, 32)), ("videos", 5, (40, 32, 48))):
        (folder / name).mkdir()
        for i in range(count):
            write_video(folder / name / f"{i}.mkv", waves(*shape, number=i), 24)
    return {name: folder / name for name in ("samples", "videos")}


@pytest.fixture(scope="module")
def examined(lvdm, sides, tmp_path_factory) -> Path:
    """The doctor's folder, of pixels."""
    out = tmp_path_factory.mktemp("out") / "doctor"
    assert lvdm("fvd doctor", **sides, features="pixels", stride=1, holdout=0.5, split="all", out=out) == 0
    return out


def test_each_knob_is_turned_or_says_why_not(examined):
    moved, skipped = read_results(examined)
    assert moved.header == HEADER and moved.rows[0][:2] == ["", "as the protocol has it"]
    turned = [row[0] for row in moved.rows[1:]]
    assert {*turned} | {row[0] for row in skipped.rows} == {*KNOBS} == {*KNOB} == {*SAYS}
    assert turned.count("stride") == 3 and turned.count("codec") == 5 and turned.count("split") == 2
    reasons = {(row[0], row[1]): row[2] for row in skipped.rows}
    assert "clips have 9" in reasons["frames", "fewer"]
    assert "no shot is long enough" in reasons["stride", "real stride 6, not 1"]
    assert reasons["batches", "mean over batches of 8"] == "fewer clips than that"


def test_rows_are_sorted_by_effect_and_consistent(examined):
    moved = read_results(examined)[0]
    base = moved.rows[0][2]
    changes = [abs(row[5]) for row in moved.rows[1:]]
    assert changes == sorted(changes, reverse=True) and changes[0] > 0
    for row in moved.rows:
        assert row[5] == pytest.approx(row[2] - base) and row[6] == pytest.approx(row[2] / base)
    by_name = {row[1]: row for row in moved.rows}
    assert by_name["samples as npy (8 bits)"][2] == pytest.approx(base, rel=1e-9)
    assert by_name["half of both sides"][7:] == [2, 2]


def test_a_turn_is_an_evaluation_with_that_key(examined, lvdm, sides, tmp_path):
    by_name = {row[1]: row for row in read_results(examined)[0].rows}
    whole = {"resize": "whole", "out": tmp_path / "whole"}
    keys = {**sides, "features": "pixels", "stride": 1, "holdout": 0.5, "split": "all"}
    assert lvdm("evaluate generation", **keys, **whole) == 0
    (table,) = read_results(tmp_path / "whole")
    assert table.rows[0][1] == pytest.approx(by_name["whole frames, aspect not kept"][2])
    assert table.protocol["preset"] == "univae, changed: features, resize"


def test_the_page_and_the_second_run(examined, lvdm, sides, capsys, monkeypatch):
    page = (examined / "index.html").read_text()
    assert "real stride 2, not 1" in page and SAYS["draw"] in page and "preset univae" in page
    before = json.loads((examined / "results.json").read_text())
    monkeypatch.setattr("sample.measure.sets.extract", None)  # all features are known
    keys = {**sides, "features": "pixels", "stride": 1, "holdout": 0.5, "split": "all", "out": examined}
    assert lvdm("fvd doctor", **keys) == 0
    assert json.loads((examined / "results.json").read_text()) == before
    assert "What moves this FVD" in capsys.readouterr().out


REFUSED = {
    "knob": ({"knobs": "strid"}, "knobs=strid: expected some of stride, frames"),
    "samples": ({"samples": "/nowhere"}, "samples=/nowhere: expected the folder that lvdm sample wrote"),
    "protocol": ({"protocol": "univea"}, "unknown preset 'univea' (did you mean 'univae'?)"),
}


@pytest.mark.parametrize("keys, message", REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(keys, message, lvdm, sides, tmp_path, capsys):
    assert lvdm("fvd doctor", **{**sides, "features": "pixels", "out": tmp_path / "out", **keys}) == 2
    error = capsys.readouterr().err
    assert message in error and len([line for line in error.splitlines() if line.startswith("error")]) == 1
