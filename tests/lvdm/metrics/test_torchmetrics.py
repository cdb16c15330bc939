"""Which of our numbers are those of torchmetrics, and which are not: the protocol decides, not the package."""

import pytest
import torch

from lvdm.metrics.frames import psnr, ssim
from lvdm.metrics.sets import FeatureSet, frechet, kernel_distance
from lvdm.rng import generator

image = pytest.importorskip("torchmetrics.functional.image")


@pytest.fixture(scope="module")
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Two clips of blotches (1, 3, 4, 40, 48) in [-1, 1], in fp64, one a noisy copy of the other."""
    coarse = torch.rand(1, 3, 4, 10, 12, generator=generator(0, "clip"), dtype=torch.float64) * 2 - 1
    x = torch.nn.functional.interpolate(coarse, (4, 40, 48), mode="trilinear")
    return x, (x + 0.1 * torch.randn(x.shape, generator=generator(0, "noise"), dtype=torch.float64)).clamp(-1, 1)


def frames(video: torch.Tensor) -> torch.Tensor:
    """(T, 3, H, W) in [0, 1]."""
    return (video[0].transpose(0, 1) + 1) / 2


def features(count: int, key: str, dim: int = 6) -> FeatureSet:
    rows = torch.randn(count, dim, generator=generator(0, key), dtype=torch.float64)
    return FeatureSet(rows, torch.arange(count), [f"{key}{i}" for i in range(count)])


def test_psnr_of_frames_is_theirs(pair):
    x, y = map(frames, pair)
    keys = {"data_range": 1.0, "reduction": "none", "dim": (1, 2, 3)}
    found = image.peak_signal_noise_ratio(y, x, **keys)
    torch.testing.assert_close(psnr(*pair)[0], found, rtol=1e-7, atol=0)  # their logarithm is rounded to fp32


def test_psnr_of_equal_frames_is_not_theirs(pair):
    x = frames(pair[0])
    assert psnr(pair[0], pair[0]).eq(100).all()  # capped, so that means over frames exist
    assert image.peak_signal_noise_ratio(x, x, data_range=1.0).isinf()


def test_ssim_is_their_map_where_the_window_fits(pair):
    """Their mean also takes the border, where the window reflects, and is another number."""
    x, y = map(frames, pair)
    mean, full = image.structural_similarity_index_measure(
        y, x, gaussian_kernel=True, sigma=1.5, kernel_size=11, data_range=1.0, reduction="none", return_full_image=True
    )
    torch.testing.assert_close(ssim(*pair)[0], full[..., 5:-5, 5:-5].mean((1, 2, 3)), rtol=1e-12, atol=0)
    assert ((ssim(*pair)[0] - mean).abs() > 1e-3).all()


class First(torch.nn.Module):
    """In the place of Inception, where their metrics take a network: features that are the images' first row."""

    num_features = 6

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :6]


def theirs(metric, real: FeatureSet, fake: FeatureSet) -> torch.Tensor:
    """Of features handed over as images."""
    for side, is_real in ((real, True), (fake, False)):
        metric.update(torch.nn.functional.pad(side.features, (0, 6)).view(-1, 3, 2, 2), real=is_real)
    return metric.compute()


def test_fid_is_theirs_at_the_covariance_of_n_minus_1():
    """Theirs has no 1/N, which StyleGAN-V and Latte divide by."""
    fid = pytest.importorskip("torchmetrics.image.fid").FrechetInceptionDistance
    real, fake = features(40, "real"), features(30, "fake")
    found = theirs(fid(First(), normalize=True).set_dtype(torch.float64), real, fake).item()
    assert frechet(real, fake, "N-1") == pytest.approx(found, rel=1e-6)
    assert frechet(real, fake, "N") != pytest.approx(found, rel=1e-2)


def test_kid_is_theirs_of_one_subset_of_all_and_not_of_their_subsets():
    """Their number is a mean over random subsets, which moves with the draw."""
    kid = pytest.importorskip("torchmetrics.image.kid").KernelInceptionDistance
    real, fake = features(40, "real"), features(40, "fake")

    def of(subsets: int, size: int) -> float:
        torch.manual_seed(0)
        return theirs(kid(First(), subsets=subsets, subset_size=size, normalize=True), real, fake)[0].item()

    assert kernel_distance(real, fake) == pytest.approx(of(1, 40), rel=1e-5)
    assert kernel_distance(real, fake) != pytest.approx(of(5, 10), rel=1e-2)
