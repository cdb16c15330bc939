import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lvdm.errors import UserError
from lvdm.metrics.frechet import frechet_distance
from lvdm.metrics.sets import (
    FeatureSet,
    batchwise_frechet,
    floor,
    frechet,
    inception_score,
    interval,
    kernel_distance,
)
from lvdm.rng import generator


def clips(features: torch.Tensor, per_video: int = 1) -> FeatureSet:
    """A row a clip, `per_video` clips a video."""
    n = len(features)
    return FeatureSet(features, torch.arange(n), [f"video{i // per_video}" for i in range(n)])


def gauss(n: int, dim: int, key: str = "real", per_video: int = 1) -> FeatureSet:
    made = clips(torch.randn(n, dim, generator=generator(0, key)), per_video)
    return replace(made, sources=[f"{key}-{source}" for source in made.sources])


# ---------------------------------------------------------------------------------------------------------------------
# Sets


def test_clips_are_taken_in_the_order_asked_for_with_all_their_rows():
    both = FeatureSet(torch.arange(6.0).view(6, 1), torch.tensor([0, 0, 1, 1, 2, 2]), ["a", "b", "c"])
    part = both.of([2, 0])
    assert (part.features.flatten().tolist(), part.clips.tolist()) == ([4, 5, 0, 1], [0, 0, 1, 1])
    assert (part.sources, part.count) == (["c", "a"], 2)


def test_parts_joined_are_the_whole():
    whole = gauss(9, 4)
    joined = FeatureSet.join([whole.of(range(4)), whole.of([]), whole.of(range(4, 9))])
    assert torch.equal(joined.features, whole.features) and torch.equal(joined.clips, whole.clips)
    assert joined.sources == whole.sources


def test_a_clip_with_nan_is_named():
    features = torch.zeros(3, 2)
    features[1, 1] = torch.nan
    with pytest.raises(UserError, match=r"^video1: features are not finite"):
        clips(features)


def test_streamed_merged_and_whole_statistics_agree():
    whole = gauss(50, 6)
    merged = FeatureSet(
        whole.features, whole.clips, whole.sources, (whole.of(range(20)), whole.of(range(20, 50)))
    ).stats
    assert frechet_distance(merged, whole.stats) == pytest.approx(0, abs=1e-12)
    assert merged.count == 50


def test_without_a_group_statistics_are_merged_and_equal_those_of_the_rows():
    whole = gauss(23, 4, per_video=2)
    rests = list(whole.without(5))
    assert len(rests) == 5 and sum(23 - rest.count for rest in rests) == 23
    assert not {*rests[0].sources} & ({*whole.sources} - {*rests[0].sources})
    for rest in rests:
        gathered = FeatureSet(rest.features, rest.clips, rest.sources).stats
        torch.testing.assert_close(rest.stats.cov(), gathered.cov(), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(rest.stats.mean, gathered.mean, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


@pytest.mark.parametrize("n, m, dim", [(7, 5, 40), (300, 200, 3)])
def test_frechet_takes_the_smaller_matrix_and_gives_the_same(n, m, dim):
    real, fake = gauss(n, dim), gauss(m, dim, "fake")
    expected = frechet_distance(real.stats, fake.stats, "N-1")
    assert frechet(real, fake, "N-1") == pytest.approx(expected, rel=1e-7)


def test_batchwise_frechet_is_the_mean_over_whole_batches():
    real, fake = gauss(11, 3), gauss(12, 3, "fake")
    parts = [frechet(real.of(range(i, i + 5)), fake.of(range(i, i + 5)), "N-1") for i in (0, 5)]
    assert batchwise_frechet(real, fake, 5) == pytest.approx(sum(parts) / 2, rel=1e-12)
    assert batchwise_frechet(real, fake, 2) > 3 * frechet(real, fake, "N-1")  # the bias it is named for
    for batch in (0, 1, 12):
        with pytest.raises(UserError, match=rf"batches of {batch} clips: expected 2 to 11"):
            batchwise_frechet(real, fake, batch)


@pytest.mark.parametrize("n, m, dim", [(2, 2, 1), (5, 9, 400), (30, 20, 7)])
def test_kernel_distance_of_ones_and_twos_is_79(n, m, dim):
    """2^3 + 5^3 - 2 * 3^3, in TATS's definition, whatever the dimension and the counts."""
    assert kernel_distance(clips(torch.ones(n, dim)), clips(2 * torch.ones(m, dim))) == 79


def test_kernel_distance_is_the_unbiased_estimate_and_blocks_do_not_matter():
    real, fake = gauss(17, 5), gauss(12, 5, "fake")
    x, y = real.features.double().numpy(), fake.features.double().numpy()

    def mean(a, b, same):
        return np.mean(
            [(p @ q / 5 + 1) ** 3 for i, p in enumerate(a) for j, q in enumerate(b) if not (same and i == j)]
        )

    expected = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    for block in (1, 5, 1024):
        assert kernel_distance(real, fake, block) == pytest.approx(expected, rel=1e-10)


def test_kernel_distance_of_one_distribution_is_around_zero_and_not_clamped():
    values = torch.tensor([kernel_distance(gauss(20, 4, f"a{i}"), gauss(20, 4, f"b{i}")) for i in range(200)])
    assert values.min() < 0 < values.max()
    assert values.mean().abs() < 3 * values.std() / 200**0.5


def test_frames_of_a_clip_are_no_pair_of_the_kernel_distance():
    """They are alike whatever the distribution: with pairs of them equal sets would be far from 0."""

    def frames(key: str) -> FeatureSet:
        of_clip = torch.randn(12, 1, 8, generator=generator(0, key)).expand(-1, 6, -1)
        rows = of_clip + 0.1 * torch.randn(12, 6, 8, generator=generator(1, key))
        return FeatureSet(rows.flatten(0, 1), torch.arange(12).repeat_interleave(6), [f"{key}{i}" for i in range(12)])

    pairs = [(frames(f"a{i}"), frames(f"b{i}")) for i in range(60)]
    values = torch.tensor([kernel_distance(*pair) for pair in pairs])
    error = values.std() / 60**0.5
    assert values.mean().abs() < 2 * error
    alone = [tuple(clips(side.features) for side in pair) for pair in pairs]  # every frame a clip of its own
    assert torch.tensor([kernel_distance(*pair) for pair in alone]).mean() > 10 * error


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 30), st.integers(1, 10), st.integers(0, 10**6))
def test_kernel_distance_does_not_see_order_and_is_symmetric(n, dim, seed):
    x, y = (clips(torch.randn(n, dim, generator=generator(seed, key))) for key in "xy")
    order = torch.randperm(n, generator=generator(seed))
    value = kernel_distance(x, y)
    assert kernel_distance(x.of(order), y) == pytest.approx(value, rel=1e-9, abs=1e-9)
    assert kernel_distance(y, x) == pytest.approx(value, rel=1e-9, abs=1e-9)


def test_inception_score_of_closed_forms():
    assert inception_score(torch.zeros(100, 101)) == pytest.approx((1, 0), abs=1e-12)
    certain = 1e4 * torch.nn.functional.one_hot(torch.arange(700) % 7, 101).float()
    assert inception_score(certain, splits=1)[0] == pytest.approx(7, rel=1e-9)
    assert inception_score(certain[:1].expand(50, -1)) == pytest.approx((1, 0), abs=1e-12)


def test_inception_score_is_stylegan_vs():
    logits = 3 * torch.randn(103, 11, generator=generator(0), dtype=torch.float64)
    probabilities = logits.softmax(1).numpy()
    np.random.RandomState(42).shuffle(probabilities)
    scores = []
    for i in range(10):
        part = probabilities[i * 103 // 10 : (i + 1) * 103 // 10]
        scores.append(np.exp((part * np.log(part / part.mean(0))).sum(1).mean()))
    assert inception_score(logits) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-9)
    assert inception_score(logits.log_softmax(1)) == pytest.approx(inception_score(logits), rel=1e-12)


def test_too_few_clips():
    with pytest.raises(UserError, match="kernel distance needs at least 2 videos a side, got 1 and 5"):
        kernel_distance(gauss(1, 3), gauss(5, 3))
    with pytest.raises(UserError, match="10 splits needs as many videos, got 9"):
        inception_score(torch.zeros(9, 3))


# ---------------------------------------------------------------------------------------------------------------------
# Intervals and floors


def gap(real: FeatureSet, fake: FeatureSet) -> float:
    """The difference of means: its variance is known."""
    return (fake.features.double().mean() - real.features.double().mean()).item()


def test_the_jackknife_of_a_mean_is_its_standard_error():
    real, fake = gauss(12, 1), gauss(20, 1, "fake")
    low, high = interval(gap, real, fake)
    variance = real.features.double().var() / 12 + fake.features.double().var() / 20
    assert (low + high) / 2 == pytest.approx(gap(real, fake), rel=1e-12)
    assert (high - low) / 2 == pytest.approx(2.201 * variance.sqrt().item(), rel=2e-3)  # t of 11 degrees of freedom


@pytest.mark.parametrize("videos, t", [(2, 12.7062), (3, 4.3027), (4, 3.1824), (5, 2.7764), (6, 2.5706), (20, 2.0930)])
def test_the_interval_of_few_videos_is_students(videos, t):
    real, fake = gauss(videos, 1), gauss(40, 1, "fake")
    low, high = interval(lambda a, b: a.features.double().mean().item(), real, fake)
    error = (real.features.double().var() / videos).sqrt().item()
    assert (high - low) / 2 == pytest.approx(t * error, rel=1e-2 if videos > 5 else 1e-4)


def test_the_clips_of_a_video_go_together():
    """Five equal clips a video tell no more than one."""
    real, fake = gauss(10, 1), gauss(10, 1, "fake")
    five = [
        FeatureSet(s.features.repeat_interleave(5, 0), torch.arange(50), [x for x in s.sources for _ in range(5)])
        for s in (real, fake)
    ]
    assert interval(gap, *five) == pytest.approx(interval(gap, real, fake), rel=1e-9)


def test_reconstructions_are_paired_with_their_originals():
    """A gap that is the same in every clip is certain, however the clips differ."""
    real = gauss(40, 1)
    fake = replace(real, features=real.features + 3)
    assert interval(gap, real, fake, paired=True) == pytest.approx((3, 3), abs=1e-6)
    low, high = interval(gap, real, fake)  # equal names alone pair nothing
    assert low < 2.9 and high > 3.1


def test_the_interval_is_as_wide_as_distances_scatter():
    pairs = [(gauss(60, 3, f"r{i}"), gauss(60, 3, f"f{i}")) for i in range(40)]
    moved = [(r, replace(f, features=1.5 * f.features + 1)) for r, f in pairs]
    scatter = np.std([frechet(*pair) for pair in moved], ddof=1)
    bounds = [interval(frechet, *pair) for pair in moved]
    width = np.mean([high - low for low, high in bounds])
    assert width == pytest.approx(2 * 2.093 * scatter, rel=0.2)  # t of 19 degrees of freedom
    assert bounds[0] == interval(frechet, *moved[0])


def test_the_floor_is_of_disjoint_halves():
    seen = []

    def metric(a: FeatureSet, b: FeatureSet) -> float:
        seen.append((set(a.sources), set(b.sources)))
        return frechet(a, b)

    real = gauss(40, 3, per_video=2)
    found = floor(metric, real, 10, 10)
    assert found.real == found.fake == 10 and found.low <= found.mean <= found.high and found.low < found.high
    assert all(not a & b for a, b in seen) and len({frozenset(a) for a, _ in seen}) == 5
    assert floor(frechet, real, 10, 10) == found


def test_the_floor_says_how_many_clips_it_has_and_falls_with_them():
    real = gauss(400, 3)
    floors = [floor(frechet, real, count, count) for count in (10, 50, 2048)]
    assert [(f.real, f.fake) for f in floors] == [(10, 10), (50, 50), (200, 200)]
    assert floors[0].low > floors[1].high and floors[1].low > floors[2].high
    parts = [floor(frechet, real, *counts) for counts in ((2048, 10), (380, 20), (390, 20), (10, 2048))]
    assert [(f.real, f.fake) for f in parts] == [(390, 10), (380, 20), (380, 20), (10, 200)]


def test_a_perfect_generator_scores_the_floor_whatever_the_counts():
    """Real clips and samples of one Gaussian: many against few is nearer than few against few."""
    numbers, floors = [], []
    for i in range(12):
        real, fake, more = gauss(300, 16, f"r{i}"), gauss(30, 16, f"f{i}"), gauss(30, 16, f"m{i}")
        numbers.append(frechet(real, fake))
        floors.append(floor(frechet, FeatureSet.join([real, more]), real.count, fake.count))
    assert all((f.real, f.fake) == (300, 30) for f in floors)
    spread = floor(frechet, gauss(3000, 16), 300, 30)
    assert spread.low < np.mean(numbers) < spread.high
    assert np.mean(numbers) == pytest.approx(np.mean([f.mean for f in floors]), rel=0.1)
    assert floor(frechet, gauss(300, 16), 30, 30).low > max(numbers)


def test_too_few_clips_have_no_interval_and_no_floor():
    assert all(math.isnan(x) for x in interval(frechet, gauss(2, 3), gauss(9, 3, "fake")))
    assert all(math.isnan(x) for x in interval(gap, gauss(8, 3, per_video=8), gauss(9, 3, "fake")))
    found = floor(frechet, gauss(3, 3), 2048, 2048)
    assert math.isnan(found.mean) and (found.real, found.fake) == (2, 1)
