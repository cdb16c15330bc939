"""Tiles cover the frame once, blend to the identity, and do not care about frames they fit into."""

import itertools

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st

import vae
from lvdm.errors import UserError
from vae.adapter import DiffusersVAE
from vae.tiling import Tiling, starts, tiled

EXACT = {"rtol": 0.0, "atol": 1e-9}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@settings(max_examples=60, deadline=None, derandomize=True)
@given(length=st.integers(1, 70), tile=st.integers(1, 20), overlap=st.floats(0, 0.5))
def test_tiles_cover_the_side_and_end_at_the_border(length, tile, overlap):
    begins = starts(length, tile, overlap)
    assert begins[0] == 0 and begins == sorted(set(begins))
    if length <= tile:
        assert begins == [0]
        return
    assert begins[-1] == length - tile
    assert all(b - a <= max(1, tile - round(tile * overlap)) for a, b in itertools.pairwise(begins))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(height=st.integers(1, 9), width=st.integers(1, 9), tile=st.integers(2, 5), overlap=st.floats(0, 0.5))
def test_blending_equal_tiles_is_the_identity(height, width, tile, overlap):
    z = torch.randn(1, 2, 1, height, width, dtype=torch.float64)
    torch.testing.assert_close(tiled(lambda piece, _: piece, z, tile, overlap), z, **EXACT)

    def grow(piece, _):
        return piece.repeat_interleave(8, -1).repeat_interleave(8, -2)

    torch.testing.assert_close(tiled(grow, z, tile, overlap), grow(z, None), **EXACT)
    x = grow(z, None)
    down = tiled(lambda piece, _: piece[..., ::8, ::8], x, tile, overlap, unit=8)
    torch.testing.assert_close(down, z, **EXACT)


def test_a_seam_is_a_linear_ramp():
    """Two tiles of constants 0 and 1 that share 4 of 8 columns."""
    values = iter([0.0, 1.0])
    y = tiled(lambda piece, _: torch.full_like(piece, next(values)), torch.zeros(1, 1, 1, 8, 12), 8, 0.5)
    expected = torch.tensor([0.0] * 4 + [1 / 8, 3 / 8, 5 / 8, 7 / 8] + [1.0] * 4)
    torch.testing.assert_close(y[0, 0, 0, 3], expected)


def test_numbers_that_do_not_fit_are_user_errors():
    model = vae.build("univae", width=8, blocks=1)
    for numbers, message in (
        ({"size": 130}, "tile size=130: must be divisible by 8, e.g. 128"),
        ({"overlap": 0.7}, "overlap=0.7: expected a share from 0 to 0.5"),
        ({"frames": 1}, "frames=1: expected at least 2"),
        ({"size": 256.0}, r"tile size=256.0, frames=17: expected whole numbers"),
        ({"frames": 17.5}, r"tile size=256, frames=17.5: expected whole numbers"),
    ):
        with pytest.raises(UserError, match=message):
            model.enable_tiling(**numbers)
    assert Tiling(0, 0.0, 0).check(8)


def test_runs_of_frames_are_exact_where_streams_are_and_one_frame_apart_elsewhere():
    x = torch.rand(1, 3, 25, 16, 16, dtype=torch.float64) * 2 - 1
    exact = vae.build("univae", width=8, blocks=1, refine=True).double().eval()
    whole, z = exact.reconstruct(x), exact.encode(x).latent_dist.mean
    refined = exact.refine(z).sample
    exact.enable_tiling(size=0, frames=9)
    torch.testing.assert_close(exact.reconstruct(x), whole, **EXACT)
    torch.testing.assert_close(exact.refine(z).sample, refined, **EXACT)

    inexact = vae.build("cvvae", width=8, blocks=1).double().eval()
    runs = [inexact.encode(x[:, :, i : i + 9]).latent_dist.mean for i in (0, 8, 16)]
    expected = torch.cat([runs[0], *[run[:, :, 1:] for run in runs[1:]]], 2)
    frames = [inexact.decode(expected[:, :, i : i + 3]).sample for i in (0, 2, 4)]
    video = torch.cat([frames[0], *[part[:, :, 1:] for part in frames[1:]]], 2)
    whole = inexact.reconstruct(x)
    inexact.enable_tiling(size=0, frames=9)
    torch.testing.assert_close(inexact.encode(x).latent_dist.mean, expected, **EXACT)
    torch.testing.assert_close(inexact.decode(expected).sample, video, **EXACT)
    streamed = torch.cat([part.mean for part in inexact.stream_encode(x.split(7, 2))], 2)
    torch.testing.assert_close(streamed, expected, **EXACT)
    inexact.disable_tiling()
    torch.testing.assert_close(inexact.reconstruct(x), whole, **EXACT)
    assert (whole - video).abs().max() > 1e-4


def test_a_stream_in_tiles_is_the_whole_clip_in_tiles():
    model = vae.build("univae", width=8, blocks=1).double().eval()
    x = torch.rand(1, 3, 10, 24, 40, dtype=torch.float64) * 2 - 1
    model.reach = 0  # any tile will do
    model.enable_tiling(size=16, overlap=0.5, frames=0)
    whole = model.encode(x).latent_dist.mean
    parts = torch.cat([part.mean for part in model.stream_encode(x.split(4, 2), chunk_frames=4)], 2)
    torch.testing.assert_close(parts, whole, **EXACT)
    frames = torch.cat(list(model.stream_decode(whole.split(1, 2), chunk_frames=1)), 2)
    torch.testing.assert_close(frames, model.decode(whole).sample, **EXACT)


def test_slicing_changes_nothing():
    model = vae.build("univae", width=8, blocks=1).double().eval()
    x = torch.rand(3, 3, 5, 16, 16, dtype=torch.float64) * 2 - 1
    whole, seen = model.reconstruct(x), []
    hook = model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    model.enable_slicing()
    torch.testing.assert_close(model.reconstruct(x), whole, **EXACT)
    assert seen == [1, 1, 1]
    model.disable_slicing()
    model.reconstruct(x)
    hook.remove()
    assert seen[3:] == [3]


# ---------------------------------------------------------------------------------------------------------------------
# How far a model sees

BLOCKS_1 = 8 * (1 + 4) + (8 + 4 + 2 + 1) * 4 + (4 + 2 + 1) + 1
"""Of a decoder of four levels, counted by hand: the first convolution and the middle, two blocks a level, the
convolutions behind the three upsamplings, the last one."""


def test_reach_adds_the_convolutions_of_the_decoder():
    model = vae.build("univae", width=8, blocks=1, refine=True)
    assert (model.reach, model.least_tile) == (BLOCKS_1, 112) == (108, 112)
    with torch.device("meta"):
        full = vae.build("univae", refine=True)
    assert full.reach == BLOCKS_1 + (8 + 4 + 2 + 1) * 2
    full.enable_tiling()


def test_reach_of_parallel_convolutions_is_that_of_the_farthest():
    one, several = (vae.build("univae", width=8, blocks=1, kernels=kernels) for kernels in ((3,), (3, 5, 7, 9)))
    assert one.reach == several.reach


def test_reach_is_the_same_for_diffusers_and_while_it_recomputes():
    arguments = {"block_out_channels": [8] * 2, "norm_num_groups": 4, "latent_channels": 4}
    arguments |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    inner = AutoencoderKL(**arguments)
    by_hand = 2 * (1 + 4) + (2 + 1) * 4 + 1 + 1
    assert DiffusersVAE.wrap(inner).reach == by_hand
    model = DiffusersVAE.wrap(inner)
    model.enable_gradient_checkpointing()
    with torch.inference_mode():
        assert model.train().reach == by_hand and model.is_gradient_checkpointing and model.training


def test_what_a_convolution_sees_ends_at_the_reach():
    """By gradients, with the attention out and norms that see one pixel: nothing beyond it, something at it."""

    class Pixel(torch.nn.Identity):
        def forward(self, x, *_, **__):
            return x

    model = vae.build("univae", width=8, blocks=1)
    reach, f = model.reach, model.spec.space_factor
    for owner in list(model.decoder.modules()):
        for name, part in list(owner.named_children()):
            if type(part).__name__ in ("Norm", "FrameAttention"):
                setattr(owner, name, Pixel())
    with torch.enable_grad():
        z = torch.randn(1, 4, 1, 1, 41, requires_grad=True)
        frame = model._frames(z)
        middle = frame.shape[-1] // 2
        (gradient,) = torch.autograd.grad(frame[..., middle].sum(), z)
    seen = gradient.abs().sum((0, 1, 2, 3)).nonzero().flatten() * f
    left, right = middle - seen[0].item(), seen[-1].item() - middle
    assert reach - f <= left <= reach + f and reach - 2 * f <= right <= reach + f


def test_a_tile_that_sees_too_little_is_refused_with_the_least_that_does():
    model = vae.build("univae", width=8, blocks=1)
    message = "tile size=104: a pixel of this UniVAE sees 108 to each side through its convolutions; at least 112, or 0"
    with pytest.raises(UserError, match=message):
        model.enable_tiling(104)
    assert model._tiling is None
    model.enable_tiling(112)
    model.enable_tiling(0)
