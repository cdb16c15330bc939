"""Distances of generated videos on a page: seeds, floors, orders."""

import pytest

from lvdm.errors import UserError
from lvdm.metrics.protocol import Protocol
from sample.measure.evaluate import Table as Measured
from sample.tables.configs import Reproduce
from sample.tables.distances import Distance, grids

KINDS = (("FVD", 9.0), ("KVD", None), ("IS", 9.0))


def distance(arm: str, seed: int, value: float, metric: str = "FVD", floor: float | None = 9.0, **protocol) -> Distance:
    """Of the interval value ± 1, of 8 samples."""
    header = ["", metric, *(["- one standard deviation", "+ one"] if metric == "IS" else ["95 % from", "to"])]
    header += ["of real clips" if metric == "IS" else "floor", "N real", "N fake"]
    protocol = Protocol(metric, "i3d", None, 9, 1, 1, "whole", 8, 8, "all", 0, "mean").to_dict() | protocol
    table = Measured(metric, header, [["samples", value, value - 1, value + 1, floor, 8, 8]], protocol, "Biased.")
    return Distance("UCF101", arm, seed, metric, value, value - 1, value + 1, floor, 8, 8, value, table)


def test_two_seeds_stand_in_one_table_of_distances():
    rows = [distance(arm, seed, value + seed) for arm, value in (("a", 1), ("b", 9)) for seed in (0, 1)]
    (shown,) = grids(Reproduce(scale="small"), rows)
    assert [line[:4] for line in shown.rows] == [
        ["a", 1, 0, 2],
        ["a, seed 1", 2, 1, 3],
        ["b", 9, 8, 10],
        ["b, seed 1", 10, 9, 11],
    ]
    alike = "FVD, ours: a, then b; the paper's: a, then b (of 1 pairs 1 clear here, 1 of them as in the paper)."
    assert alike in shown.note and shown.best == {"FVD": "min"}
    (overlapping,) = grids(Reproduce(scale="small"), [*rows, distance("b", 2, 3.0)])
    assert "none clear here" in overlapping.note
    with pytest.raises(UserError, match="differ in split"):
        list(grids(Reproduce(scale="small"), [*rows, distance("c", 0, 1.0, split="val")]))


@pytest.mark.parametrize("scale, features", [("tiny", "i3d"), ("small", "pixels")])
def test_a_trial_has_no_order_of_the_paper(scale, features):
    (shown,) = grids(Reproduce(scale=scale), [distance(arm, 0, 1.0, features=features) for arm in "ab"])
    assert "the paper's" not in shown.note and shown.best == ({} if scale == "tiny" else {"FVD": "min"})


def test_a_floor_is_named_where_there_is_one_and_a_score_has_none():
    shown = grids(Reproduce(scale="small"), [distance("a", 0, 1.0, metric, floor) for metric, floor in KINDS])
    fvd, kvd, inception = ({"header": one.header, "floor": "floor: real" in one.note} for one in shown)
    counts = ["N real", "N fake"]
    assert fvd == {"header": ["", "FVD", "95 % from", "to", "floor", *counts], "floor": True}
    assert kvd == {"header": ["", "KVD", "95 % from", "to", *counts], "floor": False}
    deviation = ["- one standard deviation", "+ one", "of real clips"]
    assert inception == {"header": ["", "IS", *deviation, *counts], "floor": False}
