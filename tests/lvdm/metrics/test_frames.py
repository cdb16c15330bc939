import numpy as np
import pytest
import torch

from lvdm.errors import UserError
from lvdm.metrics.frames import psnr, ssim
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


def test_bad_input():
    small = torch.zeros(1, 3, 1, 10, 64)
    with pytest.raises(UserError, match="at least 11x11, got 10x64"):
        ssim(small, small)
    for metric in (psnr, ssim):
        with pytest.raises(UserError, match="one shape"):
            metric(noise(1), noise(2)[:1])
        with pytest.raises(UserError, match=r"\(B, 3, T, H, W\)"):
            metric(noise(1)[:, :, 0], noise(1)[:, :, 0])
