"""IV-VAE: sizes, group causality, the two halves of every feature, exact streams."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lvdm.errors import UserError
from lvdm.rng import generator
from vae.blocks import GroupCausalConv3d, StreamState
from vae.ivvae import IVVAE, Down, KTCConv, PyramidHead, RMSNorm, Up, select_frames

EXACT = {"rtol": 0.0, "atol": 1e-9}
TINY = {"dim": 4, "blocks": 1}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> IVVAE:
    """A small model in double precision, away from its start, where half of the time kernels are zero."""
    torch.manual_seed(0)
    model = IVVAE(**TINY).double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Down | Up):
                for parameter in module.parameters():
                    parameter += 0.1 * torch.randn_like(parameter)
    return model


def clip(frames: int, batch: int = 1) -> torch.Tensor:
    return 2 * torch.rand(batch, 3, frames, 16, 8, generator=generator(0, "clip", frames), dtype=torch.float64) - 1


def features(frames: int, channels: int = 8, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, channels, frames, 4, 6, dtype=torch.float64)


def changed_frames(module: nn.Module, x: torch.Tensor, t: int) -> list[int]:
    """Which output frames notice a change of input frame `t`."""
    other = x.clone()
    other[:, :, t] = torch.randn_like(other[:, :, t])
    moved = (module(x) - module(other)).abs().amax((0, 1, 3, 4)) > 1e-9
    return torch.nonzero(moved).flatten().tolist()


def streamed(run, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    state, parts = StreamState(), []
    for piece in x.split(sizes, 2):
        parts.append(run(piece, state))
    return torch.cat(parts, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Size and spec


@pytest.mark.parametrize(
    ("z", "dim", "parameters"),
    [(4, 64, 107_170_842), (8, 64, 107_379_150), (16, 64, 107_798_550), (16, 96, 241_854_742)],
)
def test_parameters_of_the_published_networks(z, dim, parameters):
    with torch.device("meta"):
        model = IVVAE(z=z, dim=dim)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("z", "dim", "scale", "mean"),
    [(4, 64, 1.3196, 0.1250), (8, 64, 1.0940, -0.0322), (16, 64, 0.9697, -0.1553), (16, 96, 0.7619, -0.0483)],
)
def test_latents_are_normalised_as_published(z, dim, scale, mean):
    with torch.device("meta"):
        spec, own = IVVAE(z=z, dim=dim).spec, IVVAE(z=z, dim=dim, latent_mean=[1.0] * z, latent_std=[2.0] * z).spec
    assert spec.latent_mean == (mean,) * z and spec.latent_std == pytest.approx((1 / scale,) * z)
    assert own.latent_mean == (1.0,) * z and own.latent_std == (2.0,) * z
    assert spec.exact_streaming and spec.frame_rule == "4n+1" and not spec.refines


def test_other_sizes_have_no_published_normalisation():
    spec = IVVAE(z=6, **TINY).spec
    assert spec.latent_mean == (0.0,) * 6 and spec.latent_std == (1.0,) * 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"z": 5}, "z=5: expected an even number, e.g. 6"),
        ({"dim": 7}, "dim=7: expected an even number"),
        ({"blocks": 0}, "blocks=0: expected a whole number"),
        ({"mult": (1, 2, 4)}, "mult=.*: expected 4 whole multipliers"),
    ],
)
def test_options_that_make_no_model_are_user_errors(options, message):
    with pytest.raises(UserError, match=message):
        IVVAE(**{**TINY, **options})


def test_it_is_saved_and_loaded(tmp_path):
    saved = IVVAE(z=6, **TINY)
    saved.save_pretrained(tmp_path)
    loaded = IVVAE.from_pretrained(tmp_path)
    assert loaded.spec == saved.spec and loaded.latent_sha256() == saved.latent_sha256()


# ---------------------------------------------------------------------------------------------------------------------
# Group causal convolution


def group_by_group(conv: GroupCausalConv3d, x: torch.Tensor) -> torch.Tensor:
    """The definition, a group at a time: the frames before it, the group, zeros."""
    n, out, start = conv.kernel_size[0] // 2, [], 0
    padded = torch.cat([x[:, :, :1]] * n + [x], 2)  # frame t of x is frame t + n
    for size in [1] + [conv.group] * ((x.shape[2] - 1) // conv.group):
        window = torch.cat(
            [padded[:, :, start : start + n + size], torch.zeros_like(x[:, :, :1]).repeat_interleave(n, 2)], 2
        )
        out.append(F.conv3d(window, conv.weight, conv.bias, padding=(0, 1, 1)))
        start += size
    return torch.cat(out, 2)


@pytest.mark.parametrize("frames", [1, 5, 13])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_group_causal_convolution_is_a_convolution_of_each_group(group, kernel, frames):
    conv, x = GroupCausalConv3d(8, 6, (kernel, 3, 3), group=group).double(), features(frames)
    torch.testing.assert_close(conv(x), group_by_group(conv, x), **EXACT)


def test_frames_of_a_group_see_each_other_and_nothing_leaks_over_its_right_edge():
    """Groups: 0 | 1 2 3 4 | 5 6 7 8. A frame is seen by its neighbours, across an edge by the later one only."""
    conv, x = GroupCausalConv3d(8, 8, group=4).double(), features(9)
    seen_by = {0: [0, 1], 1: [1, 2], 2: [1, 2, 3], 3: [2, 3, 4], 4: [3, 4, 5], 5: [5, 6], 8: [7, 8]}
    assert {t: changed_frames(conv, x, t) for t in seen_by} == seen_by


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("sizes", [[1, 4, 4, 4], [1, 8, 4], [1, 12], [5, 8], [13]])
def test_group_causal_convolution_streams(sizes, kernel):
    conv, x = GroupCausalConv3d(8, 6, (kernel, 3, 3), group=4).double(), features(13)
    torch.testing.assert_close(streamed(conv, x, sizes), conv(x), **EXACT)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks of two halves


def test_both_halves_of_a_convolution_see_all_channels():
    conv, x = KTCConv(8, 6).double(), features(5)
    keyframe, motion = conv(x).chunk(2, 1)
    frames = x.transpose(1, 2).flatten(0, 1)
    each = F.conv2d(frames, conv.keyframe.weight[:, :, 0], conv.keyframe.bias, padding=1)
    torch.testing.assert_close(keyframe.transpose(1, 2).flatten(0, 1), each, **EXACT)
    torch.testing.assert_close(motion, group_by_group(conv.motion, x), **EXACT)


def test_norm_divides_each_half_by_its_root_mean_square():
    norm, x = RMSNorm(8).double(), features(3) * torch.tensor([1.0] * 4 + [9.0] * 4).view(-1, 1, 1, 1)
    norm.weight.copy_(torch.rand(8))
    halves = [half / half.square().mean(1, keepdim=True).sqrt() for half in x.chunk(2, 1)]
    torch.testing.assert_close(norm(x), torch.cat(halves, 1) * norm.weight.view(-1, 1, 1, 1), **EXACT)
    whole = RMSNorm(8, halves=1).double()(x)
    torch.testing.assert_close(whole, x / x.square().mean(1, keepdim=True).sqrt(), **EXACT)
    assert changed_frames(norm, x, 1) == [1]


def test_down_selects_frames_in_the_2d_half_and_merges_them_in_the_3d_half():
    down, x = Down(8, 2).double(), features(5)
    small = down.space(x)
    assert small.shape == (2, 8, 5, 2, 3)
    keyframe, motion = down(x).chunk(2, 1)
    torch.testing.assert_close(keyframe, small[:, :4, [0, 1, 3]], **EXACT)
    torch.testing.assert_close(motion, small[:, 4:, [0, 2, 4]], **EXACT)  # as it starts
    down.merge.weight.normal_()
    first, second = down.merge.weight[..., 0, 0].unbind(2)
    sums = [torch.einsum("oc,bchw->bohw", first, small[:, 4:, t]) for t in (1, 3)]
    sums = [s + torch.einsum("oc,bchw->bohw", second, small[:, 4:, t]) for s, t in zip(sums, (2, 4), strict=True)]
    torch.testing.assert_close(down(x)[:, 4:, 1:], torch.stack(sums, 2), **EXACT)
    torch.testing.assert_close(down(x[:, :, :1]), down(x)[:, :, :1], **EXACT)
    assert Down(8, 1).double()(x).shape == (2, 8, 5, 2, 3)


def test_up_repeats_frames_in_the_2d_half_and_splits_channels_in_the_3d_half():
    up, x = Up(8, 2).double(), features(3)

    def rendered(frames: torch.Tensor) -> torch.Tensor:
        return up.space(frames.repeat_interleave(2, -1).repeat_interleave(2, -2))

    torch.testing.assert_close(up(x), rendered(x[:, :, [0, 1, 1, 2, 2]]), **EXACT)  # as it starts
    assert up(x).shape == (2, 4, 5, 8, 12)
    up.split.weight.normal_()
    even, odd = torch.einsum("oc,bcthw->bothw", up.split.weight[..., 0, 0, 0], x[:, 4:, 1:]).chunk(2, 1)
    motion = torch.stack([x[:, 4:, 0], even[:, :, 0], odd[:, :, 0], even[:, :, 1], odd[:, :, 1]], 2)
    keyframe = x[:, :4, [0, 1, 1, 2, 2]]
    torch.testing.assert_close(up(x), rendered(torch.cat([keyframe, motion], 1)), **EXACT)
    torch.testing.assert_close(up(x[:, :, :1]), up(x)[:, :, :1], **EXACT)
    assert Up(8, 1).double()(x).shape == (2, 4, 3, 8, 12)


def test_the_head_mixes_six_convolutions():
    head, x = PyramidHead(8, 4).double(), features(2)
    frames = x.transpose(1, 2).flatten(0, 1)
    parts = [F.conv2d(frames, head.branches[0].weight, head.branches[0].bias)]
    for branch, d in zip(head.branches[1:], (1, 3, 6, 9, 12), strict=True):
        parts.append(F.conv2d(frames, branch.weight, branch.bias, padding=d, dilation=d))
    halves = torch.cat([part[:, :2] for part in parts] + [part[:, 2:] for part in parts], 1)
    expected = F.conv2d(halves, head.mix.weight, head.mix.bias).unflatten(0, (2, 2)).transpose(1, 2)
    torch.testing.assert_close(head(x), expected, **EXACT)


# ---------------------------------------------------------------------------------------------------------------------
# What the frames and the latents are made of


@pytest.mark.parametrize(("half", "dark"), [("keyframe", [0, 1, 5]), ("motion", [2, 3, 4, 6, 7, 8])])
def test_each_frame_is_drawn_by_its_half(model, half, dark):
    """Without the weights of one half's last convolution, the frames that this half draws are black."""
    conv = getattr(model.decoder.conv_out, half)
    kept = [p.clone() for p in conv.parameters()]
    try:
        for p in conv.parameters():
            p.zero_()
        video = model.decode(torch.randn(1, 4, 3, 2, 1, dtype=torch.float64)).sample
    finally:
        for p, value in zip(conv.parameters(), kept, strict=True):
            p.copy_(value)
    assert [t for t in range(9) if video[:, :, t].abs().max() == 0] == dark


def test_selection_in_a_stream_goes_on_where_the_last_chunk_ended():
    drawn = torch.cat([torch.zeros(1, 3, 9, 1, 1), torch.ones(1, 3, 9, 1, 1)], 1)
    expected = [0, 0, 1, 1, 1, 0, 1, 1, 1]
    for sizes in ([9], [1, 8], [1, 4, 4], [5, 4]):
        assert streamed(select_frames, drawn, sizes)[0, 0, :, 0, 0].tolist() == expected


def test_moments_are_the_means_of_both_halves_and_then_their_logvars(model):
    h = model.quant_conv(model.encoder(clip(5)))  # of each half (mean, logvar), two channels each
    posterior = model.encode(clip(5)).latent_dist
    torch.testing.assert_close(posterior.mean, h[:, [0, 1, 4, 5]], **EXACT)
    torch.testing.assert_close(posterior.logvar, h[:, [2, 3, 6, 7]], **EXACT)


# ---------------------------------------------------------------------------------------------------------------------
# Causality and streams


@pytest.mark.parametrize("sizes", [[1, 4, 4, 4], [1, 8, 4], [1, 12], [5, 4, 4]])
def test_any_chunks_give_the_moments_and_the_frames_of_the_whole(model, sizes):
    x = clip(13)
    moments = model._moments(x)
    assert moments.shape == (1, 8, 4, 2, 1)
    torch.testing.assert_close(streamed(model._moments, x, sizes), moments, **EXACT)
    z, latents = moments[:, :4], [1 + (sizes[0] - 1) // 4, *(n // 4 for n in sizes[1:])]
    frames = model._frames(z)
    assert frames.shape == x.shape
    torch.testing.assert_close(streamed(model._frames, z, latents), frames, **EXACT)


def test_groups_shrink_and_grow_with_time(model):
    def groups(levels: nn.ModuleList) -> list[set[int]]:
        return [{m.group for m in level.modules() if isinstance(m, GroupCausalConv3d)} for level in levels]

    assert groups(model.encoder.levels) == [{4}, {4}, {2}, set()]
    assert groups(model.decoder.levels) == [set(), {2}, {4}, {4}]
    assert model.encoder.conv_in.motion.group == model.decoder.conv_out.motion.group == 4


def test_streams_of_the_contract_equal_whole_clips(model):
    x = clip(11)
    whole = model.encode(x).latent_dist.mean
    parts = torch.cat([part.mean for part in model.stream_encode(x.split(3, 2), chunk_frames=4)], 2)
    torch.testing.assert_close(parts, whole, **EXACT)
    frames = torch.cat(list(model.stream_decode(whole.split([1, 3], 2), num_frames=11)), 2)
    torch.testing.assert_close(frames, model.decode(whole, num_frames=11).sample, **EXACT)


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_a_prefix_is_encoded_and_decoded_as_in_the_whole(model, frames):
    x, latents = clip(13), 1 + (frames - 1) // 4
    z = model.encode(x).latent_dist.mean
    torch.testing.assert_close(model.encode(x[:, :, :frames]).latent_dist.mean, z[:, :, :latents], **EXACT)
    torch.testing.assert_close(model.decode(z[:, :, :latents]).sample, model.decode(z).sample[:, :, :frames], **EXACT)


def test_a_latent_sees_the_whole_of_its_group(model):
    """Frames 1 to 4 are latent 1: the last of them reaches it, and no latent before."""

    def encode(x: torch.Tensor) -> torch.Tensor:
        return model.encode(x).latent_dist.mean

    assert changed_frames(encode, clip(13), 0) == [0, 1, 2, 3]
    assert changed_frames(encode, clip(13), 4)[0] == changed_frames(encode, clip(13), 1)[0] == 1
    assert changed_frames(encode, clip(13), 5)[0] == 2


def test_images_are_first_frames(model):
    x = clip(5, batch=2)
    z = model.encode(x[:, :, 0]).latent_dist.mean
    assert z.shape == (2, 4, 2, 1)
    torch.testing.assert_close(z, model.encode(x).latent_dist.mean[:, :, 0], **EXACT)
    torch.testing.assert_close(model.decode(z).sample, model.decode(z.unsqueeze(2)).sample[:, :, 0], **EXACT)


def test_every_parameter_has_a_gradient_from_images_alone():
    """Which is what a phase of images needs when the gradients of several processes are averaged."""
    model = IVVAE(**TINY)
    with torch.enable_grad():
        model(clip(1).float())[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_recomputed_gradients_are_the_same():
    model, x = IVVAE(**TINY).double().train(), clip(5)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        with torch.enable_grad():
            model(x)[0].square().sum().backward()
        return [p.grad for p in model.parameters()]

    plain = gradients()
    model.enable_gradient_checkpointing()
    recomputed = gradients()
    assert model.last_layer.grad.abs().max() > 0
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
