"""OD-VAE: its four variants, UniVAE with one temporal kernel, IV-VAE's convolution, the attention of old weights."""

import pytest
import torch

import vae
from lvdm.errors import UserError

TINY = {"width": 8, "blocks": 1}


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("variant", "encoder", "total"),
    [
        (1, 99_714_696, 244_505_319),
        (2, 68_454_024, 171_072_231),
        (3, 94_399_368, 228_868_071),
        (4, 94_399_368, 239_189_991),
    ],
)
def test_parameters_of_the_variants(variant, encoder, total):
    with torch.device("meta"):
        model = vae.build("odvae", variant=variant)
    assert (count(model.encoder), count(model)) == (encoder, total)


def test_the_published_network_is_variant_4():
    assert vae.build("odvae", **TINY).options.variant == 4


@torch.no_grad()
def test_it_is_univae_with_one_kernel_and_the_published_switches():
    odvae = vae.build("odvae", **TINY).eval()
    univae = vae.build("univae", kernels=(3,), norm="clip", upsample="trilinear", **TINY).eval()
    univae.load_state_dict(odvae.state_dict())
    x = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    assert torch.equal(odvae(x)[0], univae(x)[0])
    assert not odvae.spec.exact_streaming


def test_its_config_holds_its_own_keys_alone():
    model = vae.build("odvae", **TINY)
    keys = ("z", "width", "mult", "blocks", "variant", "norm", "upsample", "conv", "attn_reshape")
    assert set(model.options) == {*keys, "latent_mean", "latent_std"}
    assert model.spec.latent_std == (1 / 0.18215,) * 4


@torch.no_grad()
def test_norms_of_2d_blocks_see_one_frame_as_published():
    """The official 2D blocks run frame by frame, so only blocks in three dimensions pool over time."""
    encoder = vae.build("odvae", **TINY).double().eval().encoder
    x = torch.rand(1, 8, 3, 8, 8, dtype=torch.float64)
    changed = x.clone()
    changed[:, :, 2] += torch.rand_like(x[:, :, 2])
    for level, reaches in ((0, False), (2, True)):
        block = encoder.levels[level][0]
        a, b = (block(v.repeat(1, block.norm1.num_channels // 8, 1, 1, 1)) for v in (x, changed))
        assert ((a - b)[:, :, 0].abs().max() > 1e-6) == reaches


@torch.no_grad()
def test_the_causal_switches_make_it_stream():
    model = vae.build("odvae", norm="frame", upsample="nearest", **TINY).double().eval()
    assert model.spec.exact_streaming
    x = torch.rand(1, 3, 10, 8, 16, dtype=torch.float64) * 2 - 1
    parts = torch.cat([part.mean for part in model.stream_encode(x.split(3, 2), chunk_frames=4)], 2)
    torch.testing.assert_close(parts, model.encode(x).latent_dist.mean, rtol=0, atol=1e-9)


@torch.no_grad()
def test_group_causal_convolutions_in_its_place_stream_too():
    torch.manual_seed(0)
    model = vae.build("odvae", conv="group", norm="frame", upsample="nearest", **TINY).double().eval()
    x = torch.rand(1, 3, 13, 16, 8, dtype=torch.float64) * 2 - 1
    whole = model.encode(x).latent_dist.mean
    parts = torch.cat([part.mean for part in model.stream_encode(x.split(5, 2), chunk_frames=4)], 2)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-9)
    frames = torch.cat(list(model.stream_decode(whole.split(1, 2), chunk_frames=1)), 2)
    torch.testing.assert_close(frames, model.decode(whole).sample, rtol=0, atol=1e-9)
    changed = x.clone()
    changed[:, :, 8] += 0.5  # the last frame of group 2 is seen by the first one of it, and not by the group before
    moved = (model.encode(changed).latent_dist.mean - whole).abs().amax((0, 1, 3, 4))
    assert moved[:2].max() < 1e-12 and moved[2] > 1e-6


@torch.no_grad()
def test_the_attention_of_old_weights_differs_in_videos_only():
    torch.manual_seed(0)
    fixed = vae.build("odvae", **TINY).eval()
    legacy = vae.build("odvae", attn_reshape="legacy", **TINY).eval()
    legacy.load_state_dict(fixed.state_dict())
    x = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    torch.testing.assert_close(fixed.reconstruct(x[:, :, 0]), legacy.reconstruct(x[:, :, 0]))
    causal = vae.build("odvae", attn_reshape="legacy", norm="frame", upsample="nearest", **TINY)
    assert not causal.spec.exact_streaming and "mixes frames" in causal.spec.inexact
    assert (fixed.reconstruct(x) - legacy.reconstruct(x)).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": 5}, "variant=5: expected one of 1, 2, 3, 4"),
        ({"conv": "grouped"}, "conv='grouped'.*did you mean 'group'"),
        ({"mult": (1, 2, 4)}, "mult=.*expected 4 whole multipliers"),
        ({"latent_std": (1.0, 1.0, 1.0)}, "latent_std=.*expected 4 numbers, one a channel"),
        ({"latent_std": (1.0, 0.0, 1.0, 1.0)}, "latent_std=.*above 0"),
        ({"attn_reshape": "old"}, "attn_reshape='old'.*frame, legacy"),
    ],
)
def test_options_out_of_range_are_user_errors(options, message):
    with pytest.raises(UserError, match=message):
        vae.build("odvae", **{**TINY, **options}).spec  # noqa: B018


def test_it_does_not_refine():
    model = vae.build("odvae", **TINY)
    assert not model.spec.refines
    with pytest.raises(UserError, match="ODVAE has no refinement decoder"):
        model.refine(torch.zeros(1, 4, 2, 1, 1))
