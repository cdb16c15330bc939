"""CV-VAE: sizes, what sees what in time, the layers of its own."""

import pytest
import torch
import torch.nn.functional as F

import vae
from vae.blocks import CentredConv3d
from vae.cvvae import ChannelUpsample, SpaceTimeAttention

EXACT = {"rtol": 0.0, "atol": 1e-10}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("half_3d", "encoder", "decoder"), [(True, 68_748_936, 113_697_539), (False, 100_009_608, 155_869_955)]
)
def test_parameters(half_3d, encoder, decoder):
    with torch.device("meta"):
        model = vae.build("cvvae", half_3d=half_3d)
    assert (count(model.encoder), count(model.decoder)) == (encoder, decoder)
    assert count(model) == encoder + decoder == (182_446_475 if half_3d else 255_879_563)


def test_the_decoder_looks_ahead():
    """(That the encoder's norms do, too, hides that its convolutions are causal; those have their own tests.)"""
    model = vae.build("cvvae", width=8, blocks=1).double().eval()
    z = torch.randn(1, 4, 4, 2, 1, dtype=torch.float64)
    changed = z.clone()
    changed[:, :, 3] += torch.randn_like(changed[:, :, 3])
    moved = (model.decode(changed).sample - model.decode(z).sample).abs().amax((0, 1, 3, 4))
    assert moved.shape == (13,) and moved.min() > 1e-9


def test_a_centred_convolution_pads_zeros_or_its_end_frames():
    x = torch.randn(2, 4, 3, 5, 6, dtype=torch.float64)
    zeros, ends = CentredConv3d(4, 4).double(), CentredConv3d(4, 4, replicate=True).double()
    torch.testing.assert_close(zeros(x), F.conv3d(x, zeros.weight, zeros.bias, padding=1), **EXACT)
    longer = torch.cat([x[:, :, :1], x, x[:, :, -1:]], 2)
    torch.testing.assert_close(ends(x), F.conv3d(longer, ends.weight, ends.bias, padding=(0, 1, 1)), **EXACT)


def test_time_grows_out_of_the_channels_and_the_first_frame_stays_one():
    up, x = ChannelUpsample(4, 2).double(), torch.randn(1, 4, 3, 2, 2, dtype=torch.float64)
    y = up(x)
    assert y.shape == (1, 4, 5, 4, 4)
    both = up.conv(F.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest"))
    frames = [both[:, :4, 0], both[:, 4:, 0], both[:, :4, 1], both[:, 4:, 1], both[:, :4, 2], both[:, 4:, 2]]
    torch.testing.assert_close(y, torch.stack(frames[1:], 2), **EXACT)
    assert ChannelUpsample(4, 1).double()(x).shape == (1, 4, 3, 4, 4)


def test_attention_in_time_reaches_all_frames_of_a_pixel():
    attention = SpaceTimeAttention(8, lambda channels: torch.nn.Identity()).double()
    x = torch.randn(1, 8, 3, 2, 2, dtype=torch.float64)
    changed = x.clone()
    changed[:, :, 2, 0, 0] += 1.0
    moved = (attention(changed) - attention(x)).abs().amax((0, 1))
    assert (moved > 1e-9).all()  # over its frame by the first attention, over time by the second
