import numpy as np
import pytest
import torch

from lvdm.errors import UserError
from lvdm.metrics.frames import by_group_position, flicker, pooled_psnr, preserved, psnr, ssim
from lvdm.rng import generator


def constant(value: float, size: int = 16) -> torch.Tensor:
    """A clip of the value `value` on the scale [0, 1]."""
    return torch.full((2, 3, 2, size, size), 2 * value - 1)


def noise(*keys: int, size: tuple[int, ...] = (2, 3, 4, 16, 20)) -> torch.Tensor:
    return torch.rand(size, generator=generator(0, *keys)) * 2 - 1


@pytest.mark.parametrize("gap, db", [(1.0, 0.0), (0.1, 20.0), (0.01, 40.0), (0.5, 6.020599913)])
def test_psnr_of_constants(gap, db):
    value = psnr(constant(0.0).double(), constant(gap).double())
    assert value.shape == (2, 2) and value.dtype == torch.float64
    torch.testing.assert_close(value, torch.full((2, 2), db, dtype=torch.float64), atol=1e-4, rtol=0)


def test_psnr_is_capped():
    assert psnr(noise(1), noise(1)).eq(100).all()
    x = noise(1).double()
    assert psnr(x, x + 2e-6).eq(100).all()  # error 1e-12
    torch.testing.assert_close(psnr(x, x + 4e-5)[0, 0].item(), 93.9794, atol=1e-3, rtol=0)  # error 4e-10


def test_psnr_is_of_single_frames():
    x = noise(1)
    y = x.clone()
    y[1, :, 2] = -y[1, :, 2]
    assert (psnr(x, y) < 100).nonzero().tolist() == [[1, 2]]


def test_ssim_of_equal_frames_is_one():
    torch.testing.assert_close(ssim(noise(1), noise(1)), torch.ones(2, 4, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("a, b", [(0.0, 1.0), (0.25, 0.75), (0.5, 0.625)])
def test_ssim_of_constants(a, b):
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    value = ssim(constant(a), constant(b))
    torch.testing.assert_close(value, torch.full((2, 2), expected, dtype=torch.float64), atol=1e-10, rtol=0)


def test_ssim_of_black_and_white():
    assert ssim(constant(0), constant(1))[0, 0].item() == pytest.approx(9.999e-5, rel=1e-6)


def test_ssim_of_one_window():
    x, y = noise(1, size=(1, 3, 1, 11, 11)), noise(2, size=(1, 3, 1, 11, 11))
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    values = []
    for a, b in zip((x[0, :, 0].double().numpy() + 1) / 2, (y[0, :, 0].double().numpy() + 1) / 2, strict=True):
        mean_a, mean_b = (window * a).sum(), (window * b).sum()
        var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
        cov = (window * (a - mean_a) * (b - mean_b)).sum()
        luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
        values.append(luminance * (2 * cov + 9e-4) / (var_a + var_b + 9e-4))
    assert ssim(x, y).item() == pytest.approx(np.mean(values), rel=1e-9)


def test_ssim_is_symmetric_and_of_single_frames():
    x, y = noise(1), noise(2)
    torch.testing.assert_close(ssim(x, y), ssim(y, x))
    torch.testing.assert_close(ssim(x, y)[1:, 2:3], ssim(x[1:, :, 2:3], y[1:, :, 2:3]))
    assert ssim(x, y).shape == (2, 4)


def test_pooled_psnr_is_of_all_frames_together_and_at_most_the_mean():
    x = constant(0.0).double()
    y = x.clone()
    y[:, :, 1] += 2 * 0.1  # errors 0 and 0.01
    torch.testing.assert_close(pooled_psnr(x, y), torch.full((2,), 10 * np.log10(200), dtype=torch.float64))
    x, y = noise(1), noise(2)
    assert (pooled_psnr(x, y) < psnr(x, y).mean(1)).all()
    assert pooled_psnr(x, x).eq(100).all()


def test_the_sums_of_information_preservation():
    x = noise(1)
    whole = preserved(x, x)[:, 1]
    torch.testing.assert_close(whole, x.double().abs().sum((1, 2, 3, 4)))
    for y, share in ((x, 1), (torch.zeros_like(x), 0), (0.75 * x, 0.75), (-x, -1)):  # grey holds nothing
        torch.testing.assert_close(preserved(x, y), torch.stack([share * whole, whole], 1))


def test_flicker_is_of_errors_that_move():
    x = noise(1)
    assert flicker(x, x).shape == (2, 3)
    torch.testing.assert_close(flicker(x.double(), x.double() + 0.25), torch.zeros(2, 3, dtype=torch.float64))
    y = x.double()
    y[:, :, 1] += 10 / 127.5  # one frame is 10 levels brighter: two differences are
    torch.testing.assert_close(flicker(x.double(), y), torch.tensor([[10.0, 10.0, 0.0]] * 2).double())


def test_by_group_position():
    values = torch.arange(9.0).view(1, 9)
    assert by_group_position(values).tolist() == [[3.0, 4.0, 5.0, 6.0]]  # of 1..8: (1 + 5) / 2, ...
    assert by_group_position(values, group=8).tolist() == [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]]
    for frames in (1, 4, 8, 10):
        with pytest.raises(UserError, match=rf"frames={frames}: expected 4n\+1, such as 17"):
            by_group_position(torch.zeros(1, frames))


def test_bad_input():
    small = torch.zeros(1, 3, 1, 10, 64)
    with pytest.raises(UserError, match="at least 11x11, got 10x64"):
        ssim(small, small)
    for metric in (psnr, pooled_psnr, ssim, preserved, flicker):
        with pytest.raises(UserError, match="one shape"):
            metric(noise(1), noise(2)[:1])
        with pytest.raises(UserError, match=r"\(B, 3, T, H, W\)"):
            metric(noise(1)[:, :, 0], noise(1)[:, :, 0])
