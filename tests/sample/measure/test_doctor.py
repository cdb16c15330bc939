"""One knob at a time: what it gives is what an evaluation with that key gives; what cannot be turned says why."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lvdm.errors import UserError
from lvdm.media import write_video
from lvdm.metrics.features import PixelFeatures
from lvdm.metrics.protocol import preset
from lvdm.metrics.sets import FeatureSet
from sample.measure.configs import KNOBS
from sample.measure.doctor import HEADER, KNOB, RESIZED, SAYS, Skip, Turn, attempt, row_of
from sample.measure.evaluate import read_results
from sample.measure.sides import Sides


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
    monkeypatch.setattr("sample.measure.distances.extract", None)  # all features are known
    keys = {**sides, "features": "pixels", "stride": 1, "holdout": 0.5, "split": "all", "out": examined}
    assert lvdm("fvd doctor", **keys) == 0
    assert json.loads((examined / "results.json").read_text()) == before
    assert "What moves this FVD" in capsys.readouterr().out


def doctor(lvdm, out: Path, **keys: object) -> list:
    """The tables of a doctor of pixels."""
    assert lvdm("fvd doctor", **{"features": "pixels", "stride": 1, "out": out, **keys}) == 0
    return read_results(out)


def test_a_knob_turns_reconstructions_and_their_originals_together(lvdm, sides, vae_of, tmp_path):
    keys = {"videos": sides["videos"], "vae": vae_of(), "features": "pixels", "protocol": "rfvd", "size": 32}
    turns = {"the first 9, not 17": {"frames": 9}, "whole frames, aspect not kept": {"resize": "whole"}}
    turns["real stride 2, not 1"] = {"stride": 2}
    moved, *_ = doctor(lvdm, tmp_path / "doctor", knobs="frames,resize,stride", **keys)
    values = {row[1]: row[2] for row in moved.rows}
    assert "Floor" not in moved.note and "rate" not in moved.note
    for to, turned in turns.items():
        assert lvdm("evaluate generation", **keys, **turned, out=tmp_path / to) == 0
        assert read_results(tmp_path / to)[0].rows[0][1] == pytest.approx(values[to], rel=1e-6)
        assert abs(values[to] - moved.rows[0][2]) > 1


def test_what_batches_are_too_small_for_is_not_turned(lvdm, sides, tmp_path):
    keys = {"protocol": "small_batch_legacy(3)", "knobs": "count,covariance,batches", "resize": "whole"}
    moved, skipped = doctor(lvdm, tmp_path, **sides, **keys)
    assert [row[1] for row in moved.rows[1:]] == ["mean over batches of 2"]
    assert [(row[0], row[2]) for row in skipped.rows] == [
        *(("count", "5 real clips and 4 samples are too few"),) * 2,
        ("covariance", "that of a batch is always divided by N-1"),
        ("batches", "fewer clips than that"),
    ]


def test_rates_that_nobody_states_are_named_and_crop_is_a_choice(lvdm, sides, tmp_path):
    for name, count in (("samples", 4), ("videos", 5)):
        (tmp_path / name).mkdir()
        for i in range(count):
            np.save(tmp_path / name / f"{i}.npy", waves(9, 32, 32, number=i))
    own = {name: tmp_path / name for name in ("samples", "videos")}
    (moved,) = doctor(lvdm, tmp_path / "out", **own, knobs="resize", resize="whole")
    assert "The real clips and the samples do not say their frame rate" in moved.note
    assert {row[1] for row in moved.rows[1:]} == {RESIZED["crop"], RESIZED["crop_first"]}


def test_what_fails_takes_nothing_from_the_others():
    def fails(*_: object) -> None:
        raise UserError("a.mp4: its frames hold NaN or infinity")

    four, one = (SimpleNamespace(count=count, frames=9) for count in (4, 1))
    sides, network = Sides(four, four, preset("univae")), PixelFeatures()
    assert attempt(Turn("codec", "a", lambda: sides), network, lambda turn, sides: [turn.to]) == ["a"]
    for turn in (Turn("codec", "a", lambda: sides), Turn("codec", "a", fails)):
        assert attempt(turn, network, fails) == Skip("codec", "a", "a.mp4: its frames hold NaN or infinity")
    few = attempt(Turn("split", "b", lambda: Sides(one, four, preset("univae"))), network, fails)
    assert few.reason == "a set metric needs at least 2 videos a side, got 1 real and 4 samples"


def test_there_is_no_ratio_to_nothing():
    clips = FeatureSet(torch.eye(3), torch.arange(3), ["a", "b", "c"])
    cells = row_of(Turn("", "", lambda: None), preset("univae"), clips, clips, 0, base=0.0)
    assert cells[2] == cells[5] == pytest.approx(0, abs=1e-9) and cells[6] is None


REFUSED = {
    "weights": ({"weights.foo": "bar"}, "weights.foo: nobody takes it, features are pixels; files are for i3d-tor"),
    "knob": ({"knobs": "strid"}, "knobs=strid: expected some of stride, frames"),
    "samples": ({"samples": "/nowhere"}, "samples=/nowhere: expected the folder that lvdm sample wrote"),
    "protocol": ({"protocol": "univea"}, "unknown preset 'univea' (did you mean 'univae'?)"),
}


@pytest.mark.parametrize("keys, message", REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(keys, message, lvdm, sides, tmp_path, capsys):
    assert lvdm("fvd doctor", **{**sides, "features": "pixels", "out": tmp_path / "out", **keys}) == 2
    error = capsys.readouterr().err
    assert message in error and len([line for line in error.splitlines() if line.startswith("error")]) == 1
