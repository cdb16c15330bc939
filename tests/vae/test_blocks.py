"""The blocks against plain formulas: padding, receptive fields, statistics, attention, streams."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vae.blocks import (
    CausalConv3d,
    FrameAttention,
    MidBlock,
    MultiScaleDown,
    Norm,
    ResBlock,
    StreamState,
    Upsample,
)

EXACT = {"rtol": 0.0, "atol": 1e-10}
FRAMEWISE = partial(Norm, mode="frame")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def video(frames: int, channels: int = 8, size: tuple[int, int] = (4, 6), batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, channels, frames, *size, dtype=torch.float64)


def changed_frames(module: nn.Module, x: torch.Tensor, t: int) -> set[int]:
    """Which output frames notice a change of input frame `t`."""
    other = x.clone()
    other[:, :, t] = video(1)[:, :, 0]  # not a constant added: norms would take it out
    difference = (module(x) - module(other)).abs().amax((0, 1, 3, 4))
    return set(torch.nonzero(difference > 1e-9).flatten().tolist())


# ---------------------------------------------------------------------------------------------------------------------
# Convolution


@pytest.mark.parametrize("frames", [1, 2, 5, 8])
@pytest.mark.parametrize("k", [1, 3, 5, 9])
@pytest.mark.parametrize("s", [1, 2])
def test_convolution_replicates_the_first_frame_to_the_front(frames, k, s):
    conv = CausalConv3d(8, 4, (k, 3, 3), (s, 1, 1) if k > 1 else (1, 1, 1)).double()
    x = video(frames)
    padded = torch.cat([*[x[:, :, :1]] * (k - 1), x], 2)
    y = conv(x)
    torch.testing.assert_close(y, F.conv3d(padded, conv.weight, conv.bias, conv.stride, (0, 1, 1)), **EXACT)
    assert y.shape[2] == (frames - 1) // conv.stride[0] + 1


def test_strided_convolution_pads_right_and_bottom_only():
    conv = CausalConv3d(8, 4, (1, 3, 3), (1, 2, 2)).double()
    x = video(2)
    padded = F.pad(x, (0, 1, 0, 1))
    torch.testing.assert_close(conv(x), F.conv3d(padded, conv.weight, conv.bias, (1, 2, 2)), **EXACT)
    assert conv(x).shape[-2:] == (2, 3)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(k=st.sampled_from([3, 5, 7, 9]), s=st.sampled_from([1, 2]), plan=st.lists(st.integers(1, 5), max_size=4))
def test_convolution_streams_with_k_minus_s_frames_of_memory(k, s, plan):
    conv, state = CausalConv3d(8, 4, (k, 3, 3), (s, 1, 1)).double(), StreamState()
    sizes = [1, *(n * s for n in plan)]
    x, parts = video(sum(sizes)), []
    for part in x.split(sizes, 2):
        parts.append(conv(part, state))
        assert state[conv].shape[2] == k - s
    torch.testing.assert_close(torch.cat(parts, 2), conv(x), **EXACT)


# ---------------------------------------------------------------------------------------------------------------------
# Norm, attention, residual blocks


@pytest.mark.parametrize(("channels", "groups"), [(3, 1), (8, 2), (16, 4), (64, 16), (128, 32), (512, 32)])
def test_norm_has_32_groups_or_groups_of_four(channels, groups):
    assert Norm(channels, "frame").num_groups == groups


def test_norm_takes_the_statistics_of_a_frame_or_of_the_clip():
    x = video(3) * torch.tensor([1.0, 5.0, 0.2]).view(3, 1, 1) + torch.tensor([0.0, 3.0, -1.0]).view(3, 1, 1)
    for mode, over in (("frame", (2, 4, 5)), ("clip", (2, 3, 4, 5))):
        y = Norm(8, mode).double()(x).unflatten(1, (2, 4))
        assert y.mean(over).abs().max() < 1e-9
        torch.testing.assert_close(y.var(over, correction=0), torch.ones_like(y.mean(over)), rtol=0, atol=1e-4)
    assert changed_frames(Norm(8, "frame").double(), x, 1) == {1}
    assert changed_frames(Norm(8, "clip").double(), x, 1) == {0, 1, 2}


def test_attention_is_softmax_attention_over_the_pixels_of_each_frame():
    attention, x = FrameAttention(8, FRAMEWISE).double(), video(3)
    h = attention.norm(x).permute(0, 2, 3, 4, 1).flatten(2, 3)  # (B, T, H*W, C)
    q, k, v = (h @ to.weight[:, :, 0, 0, 0].T + to.bias for to in (attention.to_q, attention.to_k, attention.to_v))
    h = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
    h = h @ attention.to_out.weight[:, :, 0, 0, 0].T + attention.to_out.bias
    torch.testing.assert_close(attention(x), x + h.unflatten(2, (4, 6)).permute(0, 4, 1, 2, 3), **EXACT)
    assert changed_frames(attention, x, 1) == {1}


def test_residual_block_is_two_convolutions_on_a_shortcut():
    block, x = ResBlock(8, 12, kind="3d", norm=FRAMEWISE).double(), video(5)
    h = block.conv1(F.silu(block.norm1(x)))
    h = block.conv2(F.silu(block.norm2(h)))
    torch.testing.assert_close(block(x), block.shortcut(x) + h, **EXACT)
    nn.init.zeros_(block.conv2.weight)
    nn.init.zeros_(block.conv2.bias)
    torch.testing.assert_close(block(x), block.shortcut(x), **EXACT)
    assert isinstance(ResBlock(8, 8, kind="3d", norm=FRAMEWISE).shortcut, nn.Identity)


def test_receptive_fields_in_time():
    x = video(9)
    assert changed_frames(ResBlock(8, 8, kind="2d", norm=FRAMEWISE).double(), x, 2) == {2}
    assert changed_frames(ResBlock(8, 8, kind="3d", norm=FRAMEWISE).double(), x, 2) == {2, 3, 4, 5, 6}
    assert changed_frames(MidBlock(8, "3d", FRAMEWISE, partial(FrameAttention, norm=FRAMEWISE)).double(), x, 2) == set(
        range(2, 9)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Down and up


def test_each_scale_sees_its_channels_and_its_window():
    """Output j of group i is a function of frames 2j - (t_i - 1) .. 2j of that group (UniVAE eq. 1)."""
    kernels, x = (3, 5, 7, 9), video(13)
    down = MultiScaleDown(8, kernels, "none").double()
    assert down(x).shape == (2, 8, 7, 2, 3)
    assert sum(p.numel() for p in down.parameters()) == sum(9 * t * 2 * 2 + 2 for t in kernels)
    for (i, kernel), t in itertools.product(enumerate(kernels), (1, 4, 5)):
        other = x.clone()
        other[:, 2 * i : 2 * i + 2, t] += 1.0
        difference = (down(x) - down(other)).abs().amax((0, 3, 4))  # (C, T)
        group = difference[2 * i : 2 * i + 2].amax(0)
        assert difference.amax(1).gt(1e-9).tolist() == [channel // 2 == i for channel in range(8)]
        assert group.gt(1e-9).tolist() == [2 * j - (kernel - 1) <= t <= 2 * j for j in range(7)]


def test_one_kernel_of_three_is_one_strided_convolution():
    down, x = MultiScaleDown(8, (3,), "none").double(), video(9)
    conv = CausalConv3d(8, 8, (3, 3, 3), (2, 2, 2)).double()
    conv.load_state_dict(down.branches[0].state_dict())
    torch.testing.assert_close(down(x), conv(x), **EXACT)


def test_fusion_starts_as_the_identity_and_can_mix_groups():
    plain, fused = (MultiScaleDown(8, (3, 5), fuse).double() for fuse in ("none", "conv1x1"))
    fused.load_state_dict(plain.state_dict(), strict=False)
    x = video(5)
    torch.testing.assert_close(fused(x), plain(x), **EXACT)
    assert fused.fuse.weight.shape == (8, 8, 1, 1, 1)


@pytest.mark.parametrize("mode", ["nearest", "trilinear"])
@pytest.mark.parametrize("time", [1, 2, 4])
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_upsampling_keeps_the_first_frame_single(mode, time, frames):
    up, x = Upsample(8, time, mode).double(), video(frames)
    assert up(x).shape == (2, 8, 1 + time * (frames - 1), 8, 12)
    nn.init.dirac_(up.conv.weight)  # the tap at offset 0 of a symmetric kernel ...
    up.conv.weight.copy_(up.conv.weight.roll(int(time > 1), 2))  # ... is the last one of a causal kernel
    nn.init.zeros_(up.conv.bias)
    y = up(x)
    torch.testing.assert_close(y[:, :, :1], up._grow(x[:, :, :1], 1, 2), **EXACT)
    if mode == "nearest":
        repeated = torch.cat([x[:, :, :1], x[:, :, 1:].repeat_interleave(time, 2)], 2)
        torch.testing.assert_close(y, repeated.repeat_interleave(2, 3).repeat_interleave(2, 4), **EXACT)


def test_only_trilinear_upsampling_looks_ahead():
    x = video(5)
    assert min(changed_frames(Upsample(8, 2, "nearest").double(), x, 2)) == 3  # 0 | 1 2 | 3 4 | ...
    assert min(changed_frames(Upsample(8, 2, "trilinear").double(), x, 2)) == 2
    assert 0 not in changed_frames(Upsample(8, 2, "trilinear").double(), x, 1)


def test_states_and_modules_are_apart():
    modules = [CausalConv3d(4, 4), CausalConv3d(4, 4)]
    first, second = StreamState(), StreamState()
    modules[0].double()(video(3, 4), first)
    modules[1].double()(video(3, 4), first)
    assert set(first) == first.begun == set(modules) and not second and not second.begun
