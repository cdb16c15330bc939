"""Open-Sora-Plan 1.0 and 1.1: sizes, the steps in time, what sees what."""

import pytest
import torch
import torch.nn.functional as F

from lvdm.errors import UserError
from vae.ospvae import OSPVAE, TimeDown, TimeUp

EXACT = {"rtol": 0.0, "atol": 1e-12}
TINY = {"width": 8, "blocks": 1}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("release", "encoder", "decoder"),
    [("1.0", 93_816_456, 135_353_347), ("1.1", 97_349_258, 149_510_149)],
)
def test_parameters(release, encoder, decoder):
    with torch.device("meta"):
        model = OSPVAE(release=release)
    assert count(model.encoder) == encoder and count(model.decoder) == decoder + 4 * 5  # and the post-quant convolution
    assert count(model) == encoder + decoder + 92 == {"1.0": 229_169_895, "1.1": 246_859_499}[release]


@pytest.mark.parametrize("release", ["1.0", "1.1"])
@pytest.mark.parametrize("frames", [1, 5, 9])
def test_lengths(release, frames):
    model = OSPVAE(release=release, **TINY).eval()
    z = model.encode(torch.rand(1, 3, frames, 16, 24) * 2 - 1, pad=False).latent_dist.mode()
    assert z.shape == (1, *model.spec.latent_shape(frames, 16, 24)) == (1, 4, (frames - 1) // 4 + 1, 2, 3)
    assert model.decode(z).sample.shape == (1, 3, frames, 16, 24)
    assert model.spec.latent_std == (1 / 0.18215,) * 4 and not model.spec.exact_streaming


def test_time_is_halved_by_means_of_three_frames():
    down, x = TimeDown(2, blend=False), torch.randn(1, 2, 5, 3, 3, dtype=torch.float64)
    a, b, c, d, e = x.unbind(2)
    torch.testing.assert_close(down(x), torch.stack([a, (a + b + c) / 3, (c + d + e) / 3], 2), **EXACT)
    assert count(down) == 0


def test_time_is_doubled_by_linear_interpolation_after_the_first_frame():
    up, x = TimeUp(2, blend=False), torch.randn(1, 2, 3, 3, 3, dtype=torch.float64)
    a, b, c = x.unbind(2)
    torch.testing.assert_close(up(x), torch.stack([a, b, (3 * b + c) / 4, (b + 3 * c) / 4, c], 2), **EXACT)
    assert torch.equal(up(x[:, :, :1]), x[:, :, :1]) and count(up) == 0


def test_the_blend_with_a_convolution():
    x = torch.randn(1, 4, 5, 6, 6, dtype=torch.float64)
    for make, stride in ((TimeDown, 2), (TimeUp, 1)):
        plain, step = make(4, blend=False)(x), make(4, blend=True).double()
        assert step.mix_factor.item() == 2.0
        step.mix_factor.fill_(-0.3)
        share = torch.tensor(-0.3, dtype=torch.float64).sigmoid()
        source = x if stride == 2 else plain  # the convolution in the decoder sees the interpolated frames
        source = torch.cat([source[:, :, :1], source[:, :, :1], source], 2)
        h = F.conv3d(source, step.conv.weight, step.conv.bias, (stride, 1, 1), (0, 1, 1))
        torch.testing.assert_close(step(x), share * plain + (1 - share) * h, **EXACT)


def test_2d_blocks_norm_a_frame_and_3d_blocks_the_clip():
    x = torch.rand(1, 3, 5, 16, 16, dtype=torch.float64)
    changed = x.clone()
    changed[:, :, 4] += torch.randn_like(changed[:, :, 4])
    for release, moves in (("1.0", True), ("1.1", False)):
        encoder = OSPVAE(release=release, **TINY).double().encoder
        one, other = (encoder.levels[0][0](encoder.conv_in(clip)) for clip in (x, changed))
        assert bool((one - other)[:, :, 0].abs().max() > 1e-6) == moves


def test_only_the_first_release_mixes_up_time_and_channels():
    assert OSPVAE(release="1.0", **TINY).decoder.mid.attention.legacy_reshape
    assert not OSPVAE(release="1.1", **TINY).decoder.mid.attention.legacy_reshape


def test_a_release_may_be_a_number_and_must_be_known():
    assert OSPVAE(release=1.0, **TINY).state_dict().keys() == OSPVAE(release="1.0", **TINY).state_dict().keys()
    with pytest.raises(UserError, match=r"release=1\.2: expected one of 1\.0, 1\.1; OD-VAE \(odvae\) is 1\.2"):
        OSPVAE(release="1.2")
    with pytest.raises(UserError, match="mult="):
        OSPVAE(mult=(1, 2))
