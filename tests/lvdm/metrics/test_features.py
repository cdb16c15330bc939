import pytest
import torch
import torch.nn.functional as F

from lvdm.errors import UserError
from lvdm.metrics.features import NAMES, I3DFeatures, full_precision, make_extractor
from lvdm.metrics.frechet import FeatureStats, frechet_distance
from lvdm.rng import generator


@pytest.fixture(scope="module")
def i3d() -> I3DFeatures:
    return I3DFeatures()


@pytest.mark.parametrize("frames, fvd", [(30, 151.39235), (15, 133.908)])
def test_fvd_of_black_and_white(i3d, frames, fvd):
    """TensorFlow's original implementation gives 151.39244 for 30 frames."""
    stats = {}
    for value in (-1.0, 1.0):
        features = i3d(torch.full((1, 3, frames, 16, 16), value))
        stats[value] = FeatureStats(400)
        stats[value].update(features.expand(8, -1))
    assert frechet_distance(stats[-1.0], stats[1.0]) == pytest.approx(fvd, abs=1e-3)


def test_attributes(i3d):
    assert (i3d.name, i3d.dim, i3d.min_frames, i3d.per) == ("i3d", 400, 9, "clip")
    assert i3d.weights_sha256.startswith("af5c50f0")
    assert "224x224" in i3d.resize


def test_frames_are_resized_whole_and_rows_are_independent(i3d):
    videos = torch.rand(2, 3, 9, 40, 60, generator=generator(0)) * 2 - 1
    features = i3d(videos)
    assert features.shape == (2, 400) and features.dtype == torch.float32
    frames = F.interpolate(videos[1].transpose(0, 1), size=(224, 224), mode="bilinear", align_corners=False)
    torch.testing.assert_close(i3d(frames.transpose(0, 1)[None]), features[1:], rtol=1e-4, atol=1e-4)


def test_autocast_does_not_reach_the_features(i3d):
    videos = torch.rand(1, 3, 9, 24, 24, generator=generator(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = i3d(videos)
    assert torch.equal(features, i3d(videos))


def test_full_precision_gives_back_what_was_chosen():
    convolutions = torch.backends.cudnn.conv
    before, convolutions.fp32_precision = convolutions.fp32_precision, "tf32"
    with pytest.raises(KeyError), full_precision("cpu"):
        assert convolutions.fp32_precision == "ieee"
        raise KeyError
    chosen, convolutions.fp32_precision = convolutions.fp32_precision, before
    assert chosen == "tf32"


def test_bad_input(i3d):
    with pytest.raises(UserError, match=r"T >= 9, H, W\), got \(1, 3, 8, 16, 16\)"):
        i3d(torch.zeros(1, 3, 8, 16, 16))
    with pytest.raises(UserError, match=r"got \(1, 1, 9, 16, 16\)"):
        i3d(torch.zeros(1, 1, 9, 16, 16))
    with pytest.raises(UserError, match="got 255 to 255"):
        i3d(torch.full((1, 3, 9, 16, 16), 255.0))
    with pytest.raises(UserError, match=r"values in \[-1, 1\], got nan to nan"):
        i3d(torch.full((1, 3, 9, 16, 16), float("nan")))


def test_pixels_are_means_of_eighths():
    video = torch.zeros(1, 3, 4, 16, 16)
    video[0, 1, :2, :2, 14:] = 1
    pixels = make_extractor("pixels")
    features = pixels(video)
    assert (pixels.name, pixels.per, features.shape) == ("pixels", "clip", (1, pixels.dim))
    assert features.nonzero().tolist() == [[0, 128 + 7]] and features.max() == 1
    assert pixels(torch.zeros(2, 3, 1, 5, 5)).shape == (2, 384)


def test_names_are_made_or_listed():
    with pytest.raises(UserError, match=rf"'i3' \(did you mean 'i3d'\?\); known: {', '.join(NAMES)}"):
        make_extractor("i3")
    with pytest.raises(UserError, match=r"weights=x.pt: features=pixels takes no weights; .* i3d-torchscript"):
        make_extractor("pixels", weights="x.pt")
