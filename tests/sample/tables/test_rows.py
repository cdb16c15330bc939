"""The numbers of a table: means, paired differences, their intervals, and which of them are clear."""

import pytest
import torch

from lvdm.metrics.protocol import Protocol
from sample.measure.figures import SPREAD
from sample.measure.scores import Scores, interval, of_clips
from sample.tables import comparison
from sample.tables.configs import Reproduce
from sample.tables.rows import Row, rows_of
from sample.tables.table import load_table


def result(offset: float, videos: int = 6) -> Scores:
    """Clip k of `videos` has a PSNR of k + offset, one more, and two more."""
    psnr = [[k + offset, k + offset + 1, k + offset + 2] for k in range(videos)]
    ones = [[1.0] * 3 for _ in range(videos)]
    values = {metric: psnr if metric == "PSNR" else ones for metric in ("PSNR", "SSIM", "LPIPS", "flicker")}
    protocol = Protocol("PSNR", None, None, 3, 1, 1, "whole", videos, videos, "all", 0, "mean").to_dict()
    return Scores(protocol, [str(k) for k in range(videos)], {"model": values})


def rows(*offsets: tuple[float, ...], videos: int = 6) -> list[Row]:
    """PSNR of the three models of a table, each with an offset a seed."""
    table = load_table(Reproduce(table="univae-table3", scale="tiny"))
    runs = {name: [{3: result(o, videos)} for o in own] for name, own in zip(table.arms, offsets, strict=True)}
    return rows_of(table, runs)


def test_rows_are_paired_differences_beside_the_papers():
    found = rows((0, 0), (1, 3), (-1, 3))
    base, better, _ = [row for row in found if row.metric == "PSNR (dB)"]
    assert (base.mean, base.difference, base.clear) == (3.5, 0, [better.arm])  # the mean of 0 to 5, and 1
    assert base.low < 3.5 < base.high and base.high - base.low > 1
    change = better.difference, better.difference_low, better.difference_high
    assert better.mean == 5.5 and change == pytest.approx((2, 2, 2))
    assert (better.seeds, better.seed_differences, better.videos) == ([4.5, 6.5], [1, 3], 6)
    assert (better.paper, better.paper_difference) == (34.08, 2.92)
    assert [row.mean for row in found if row.metric == "PSNR, first frame"] == [2.5, 4.5, 3.5]
    assert of_clips([result(0)], "model", "PSNR").tolist() == [[1, 2, 3, 4, 5, 6]]


def test_positions_are_those_in_the_groups_after_the_first_frame():
    """Frame k of nine has an SSIM of k: positions are means of 1 and 5, 2 and 6, ..."""
    table = load_table(Reproduce(table="ivvae-table5", scale="tiny"))
    own = result(0.0)
    for scored in (own.values["model"], own.values.setdefault("upscaled 1/8 thumbnail", {})):
        scored |= {metric: [[float(k) for k in range(9)]] * 6 for metric in ("PSNR", "SSIM", "LPIPS", "flicker")}
    found = rows_of(table, {"baseline": [{9: own}]})
    assert [row.mean for row in found if row.metric != "PSNR (dB)"] == [3.0, 4.0, 5.0, 6.0, 3.0]
    shown = comparison.ours(Reproduce(scale="small"), table, found, own)
    assert shown.header[-1] == SPREAD and [line[-1] for line in shown.rows] == ["3.00 ± 0.00"] * 2
    assert "mean over the groups of 4 frames" in shown.protocol and shown.best[SPREAD] == "min"
    assert comparison.ours(Reproduce(scale="tiny"), table, found, own).best == {}  # where the best means nothing


def test_the_largest_difference_of_positions_has_its_interval_and_its_difference():
    """Position 1 of clip k of six has an SSIM of k above the others: the mean of six or of drawn videos."""
    table = load_table(Reproduce(table="ivvae-table5", scale="tiny"))
    runs = {}
    for name, gain in (("baseline", 1.0), ("baseline + GCConv", 0.5)):
        own = result(0.0)
        frames = [[0.0, gain * k, 0.0, 0.0, 0.0] for k in range(6)]
        own.values["model"] |= {metric: frames for metric in ("PSNR", "SSIM", "LPIPS", "flicker")}
        runs[name] = [{5: own}, {5: own}]
    first, other = [row for row in rows_of(table, runs) if row.metric == SPREAD]
    low, high = interval(torch.arange(6.0), [str(k) for k in range(6)])
    assert (first.mean, first.low, first.high) == pytest.approx((2.5, low, high))
    change = other.difference, other.difference_low, other.difference_high
    assert change == pytest.approx((-1.25, -high / 2, -low / 2))
    assert (other.paper_difference, other.clear, first.clear) == (-0.0075, ["baseline"], ["baseline + GCConv"])


def test_a_difference_is_clear_only_where_seeds_agree_and_videos_suffice():
    def clear(*offsets, **keys):
        return [row.clear for row in rows(*offsets, **keys) if row.metric == "PSNR (dB)"]

    a, b, c = load_table(Reproduce(table="univae-table3", scale="tiny")).arms
    assert clear((0, 0), (1, 3), (-1, 3)) == [[b], [a], []]  # the last: 1 dB better, but not with every seed
    assert clear((0, 0), (1, 3), (2, 4)) == [[b, c], [a, c], [a, b]]  # and from each other
    assert clear((0,), (1,), (3,)) == [[], [], []]  # one seed
    assert clear((0, 0), (1, 3), (1, 1), videos=5) == [[], [], []]


def test_interval_of_two_sources_is_the_exact_one():
    """Means of two draws out of {0, 1} are 0, 1/2, 1 with 1/4, 1/2, 1/4: both ends lie beyond 2.5 %."""
    assert interval(torch.tensor([0.0, 1.0]), ["a", "b"]) == (0.0, 1.0)


def test_interval_of_equal_values_has_no_width_and_one_source_has_none():
    assert interval(torch.tensor([1.0, 2.0, 6.0]), ["a"] * 3) == (None, None)
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
