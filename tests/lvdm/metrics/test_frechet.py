import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lvdm.errors import UserError
from lvdm.metrics.frechet import FeatureStats, frechet_distance, frechet_of_rows
from lvdm.rng import generator


def rows(n: int, dim: int, key: str = "rows") -> torch.Tensor:
    return torch.randn(n, dim, generator=generator(0, key), dtype=torch.float64)


def stats(features: torch.Tensor, batch: int = 1000) -> FeatureStats:
    gathered = FeatureStats(features.shape[1])
    for part in features.split(batch):
        gathered.update(part)
    return gathered


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    return frechet_distance(stats(x), stats(y))


def test_mean_and_covariance_are_divided_by_n():
    x = rows(50, 7) + 3
    gathered = stats(x, batch=8)
    assert gathered.count == 50
    torch.testing.assert_close(gathered.mean, x.mean(dim=0))
    torch.testing.assert_close(gathered.cov(), torch.cov(x.T, correction=0))


@pytest.mark.parametrize("n, dim", [(200, 8), (10, 60)])
def test_equal_sets_have_distance_zero(n, dim):
    x = 30 * rows(n, dim)
    assert distance(x, x) == pytest.approx(0, abs=1e-8)
    assert distance(x, x[torch.randperm(n, generator=generator(0))]) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("n, dim", [(200, 8), (10, 60)])
def test_shift_adds_its_square(n, dim):
    x, shift = rows(n, dim), rows(1, dim, "shift")
    assert distance(x, x + shift) == pytest.approx(shift.square().sum().item(), rel=1e-9)


@pytest.mark.parametrize("n, dim", [(200, 8), (10, 60)])
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_scale_about_the_mean(n, dim, scale):
    x = rows(n, dim)
    x = x - x.mean(dim=0)
    trace = torch.cov(x.T, correction=0).trace().item()
    assert distance(x, scale * x) == pytest.approx((scale - 1) ** 2 * trace, rel=1e-9)


def test_diagonal_gaussians():
    """Rows +s_i e_i and -s_i e_i give the covariance diag(s_i^2) / dim."""
    s1, s2 = torch.tensor([1.0, 2.0, 0.5, 3.0]), torch.tensor([2.0, 1.0, 4.0, 0.0])
    mean1, mean2 = torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([1.0, 1.0, 0.0, 3.0])
    x, y = (torch.cat([s.diag(), -s.diag()]) + mean for s, mean in ((s1, mean1), (s2, mean2)))
    expected = (mean1 - mean2).square().sum() + (s1 - s2).square().sum() / 4
    assert distance(x, y) == pytest.approx(expected.item(), rel=1e-9)


def test_lines_in_a_larger_space():
    """Rank one on each side, at an angle: tr(S1^1/2 S2 S1^1/2)^1/2 = |s1 s2 cos|."""
    u, v = torch.zeros(40, dtype=torch.float64), torch.zeros(40, dtype=torch.float64)
    u[0], v[0], v[1] = 3, 2 * 0.6, 2 * 0.8
    expected = 9 + 4 - 2 * 3 * 2 * 0.6
    assert distance(torch.stack([u, -u]), torch.stack([v, -v])) == pytest.approx(expected, rel=1e-9)


def test_is_symmetric_and_does_not_depend_on_the_axes():
    x, y = rows(30, 6), 2 * rows(40, 6, "other") + 1
    rotation = torch.linalg.qr(rows(6, 6, "rotation")).Q
    assert distance(y, x) == pytest.approx(distance(x, y), rel=1e-9)
    assert distance(x @ rotation, y @ rotation) == pytest.approx(distance(x, y), rel=1e-9)


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_streamed_and_merged_statistics_equal_those_of_one_batch(batch):
    x = rows(100, 5) + 1e4  # far from zero: sums of squares would cancel
    whole, streamed = stats(x), stats(x, batch)
    merged = FeatureStats(5)
    for shard in (x[:33], x[:0], x[33:]):
        merged.merge(stats(shard, batch))
    for other in (streamed, merged):
        assert other.count == whole.count
        torch.testing.assert_close(other.mean, whole.mean, rtol=1e-13, atol=0)
        torch.testing.assert_close(other.cov(), whole.cov(), rtol=1e-9, atol=1e-11)


def test_fp32_features_are_gathered_in_fp64():
    x = rows(1000, 3).float()
    torch.testing.assert_close(stats(x, 10).cov(), torch.cov(x.double().T, correction=0), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("covariance", ["N", "N-1"])
@pytest.mark.parametrize("n, m, dim", [(30, 20, 8), (6, 9, 40), (2, 50, 40)])
def test_rows_and_covariances_give_one_distance(n, m, dim, covariance):
    x, y = rows(n, dim), 2 * rows(m, dim, "other") + 1
    expected = frechet_distance(stats(x), stats(y), covariance)
    assert frechet_of_rows(x, y, covariance) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("covariance", ["N", "N-1"])
def test_is_what_scipys_square_root_gives(covariance):
    linalg = pytest.importorskip("scipy.linalg")
    x, y = rows(200, 8), 1.5 * rows(300, 8, "other") + 0.3
    cov = [torch.cov(z.T, correction=int(covariance == "N-1")) for z in (x, y)]
    root = torch.from_numpy(linalg.sqrtm((cov[0] @ cov[1]).numpy())).real.trace()
    expected = (x.mean(0) - y.mean(0)).square().sum() + cov[0].trace() + cov[1].trace() - 2 * root
    assert frechet_distance(stats(x), stats(y), covariance) == pytest.approx(expected.item(), rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(1, 12), st.floats(-50, 50), st.floats(0, 8), st.integers(0, 10**6))
def test_shift_scale_and_order_of_any_rows(n, dim, shift, scale, seed):
    """|shift|^2 added to all, (scale - 1)^2 tr(S) about the mean, and nothing for the order."""
    x = torch.randn(n, dim, generator=generator(seed), dtype=torch.float64)
    x = x - x.mean(0)
    trace = x.square().sum().item() / n
    expected = dim * shift**2 + (scale - 1) ** 2 * trace
    order = torch.randperm(n, generator=generator(seed, "order"))
    for function in (distance, frechet_of_rows):
        assert function(x, scale * x[order] + shift) == pytest.approx(expected, rel=1e-7, abs=1e-7 * (1 + trace))


def test_bad_input():
    with pytest.raises(UserError, match="at least 2 videos a side, got 5 and 1"):
        distance(rows(5, 3), rows(1, 3))
    with pytest.raises(UserError, match="at least 2 videos a side, got 1 and 5"):
        frechet_of_rows(rows(1, 3), rows(5, 3))
    with pytest.raises(UserError, match="not finite"):
        stats(torch.tensor([[1.0, float("nan")]]))
