"""OS-VAE: two VAEs, zeros in front of the 2D latents, and the last frames of what is decoded."""

import pytest
import torch
import torch.nn.functional as F

from lvdm.errors import UserError
from vae.osvae import OSVAE, TemporalDecoder, TemporalEncoder, TimeUpsample, ZeroCausalConv3d

TINY = {"width": 8, "blocks": 1, "filters": 8, "temporal_blocks": 1}


def tiny(**options):
    torch.manual_seed(0)
    return OSVAE(**TINY, **options).double().eval()


def clip(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(*shape, dtype=torch.float64, generator=generator) * 2 - 1


def moments(model, x):
    return model.encode(x).latent_dist.parameters


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_parameters_of_the_published_network():
    with torch.device("meta"):
        model = OSVAE()
    assert parameters(model.spatial) == 83_653_863
    assert parameters(model.encoder) + parameters(model.decoder) == 309_687_144
    assert parameters(model) == 393_341_007
    assert [name for name, p in model.encoder.levels.named_parameters() if "conv" in name and "bias" in name] == []


def test_spec_has_the_published_statistics():
    spec = tiny().spec
    assert (spec.frame_rule, spec.time_factor, spec.space_factor, spec.first_frames) == ("4n", 4, 8, 4)
    assert spec.latent_mean == (-0.10, 0.34, 0.27, 0.98) and spec.latent_std == (3.85, 2.32, 2.33, 3.06)
    assert tiny(latent_mean=(1, 1, 1, 1)).spec.latent_mean == (1, 1, 1, 1)
    assert tiny(z=2).spec.latent_std == (1.0, 1.0)


@torch.no_grad()
@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (4, 1), (5, 2), (16, 4), (17, 5)])
def test_every_length_gives_its_latents_and_comes_back(frames, latents):
    model, x = tiny(), clip(2, 3, frames, 16, 24)
    z = model.encode(x).latent_dist.mode()
    assert z.shape == (2, 4, latents, 2, 3) == (2, *model.spec.latent_shape(frames, 16, 24))
    whole = model.decode(z).sample
    assert whole.shape[2] == 4 * latents
    assert torch.equal(model.decode(z, num_frames=frames).sample, whole[:, :, 4 * latents - frames :])
    assert model.reconstruct(x).shape == x.shape
    if frames % 4:
        with pytest.raises(UserError, match=f"{frames} frames: expected 4n"):
            model.encode(x, pad=False)


@torch.no_grad()
def test_zeros_are_in_front_of_the_latents_of_the_2d_vae():
    """17 frames by hand: 2D latents x 0.18215, three zeros before them, the temporal encoder."""
    model, x = tiny(), clip(2, 3, 17, 16, 16)
    latents = torch.stack([model.spatial.encode(frame).latent_dist.mean for frame in x.unbind(2)], 2) * 0.18215
    padded = torch.cat([torch.zeros(2, 4, 3, 2, 2, dtype=x.dtype), latents], 2)
    close(moments(model, x), model.encoder(padded))
    black = torch.cat([torch.zeros(2, 3, 3, 16, 16, dtype=x.dtype), x], 2)
    assert not torch.allclose(moments(model, x), moments(model, black))  # zero frames are no zero latents


@torch.no_grad()
def test_frames_are_the_2d_decoding_of_what_the_temporal_decoder_gives():
    model, z = tiny(), clip(2, 4, 2, 2, 2)
    latents = model.decoder(z) / 0.18215
    frames = torch.stack([model.spatial.decode(frame).sample for frame in latents.unbind(2)], 2)
    close(model.decode(z).sample, frames)


@torch.no_grad()
def test_images_are_clips_of_one_frame_after_three_zeros():
    model, x = tiny(), clip(2, 3, 16, 16)
    z = model.encode(x).latent_dist.mode()
    assert z.shape == (2, 4, 2, 2)
    close(z, model.encode(x.unsqueeze(2)).latent_dist.mode().squeeze(2))
    close(model.decode(z).sample, model.decode(z.unsqueeze(2)).sample[:, :, -1])
    assert model.reconstruct(x).shape == x.shape


@torch.no_grad()
def test_temporal_convolutions_are_causal_with_zeros():
    x = clip(1, 2, 8, 3, 3)
    for stride in (1, 2):
        conv = ZeroCausalConv3d(2, 2, (3, 3, 3), (stride, 1, 1)).double()
        expected = F.conv3d(F.pad(x, (1, 1, 1, 1, 3 - stride, 0)), conv.weight, conv.bias, (stride, 1, 1))
        assert torch.equal(conv(x), expected) and conv(x).shape[2] == 8 // stride
        later = x.clone()
        later[:, :, 4:] = 0
        assert torch.equal(conv(later)[:, :, : 4 // stride], conv(x)[:, :, : 4 // stride])


@torch.no_grad()
def test_time_grows_from_neighbouring_channels():
    up = TimeUpsample(2).double()
    x = clip(1, 2, 3, 2, 2)
    y, pairs = up(x), up.conv(x)
    for channel in range(2):
        for frame in range(3):
            for half in range(2):
                assert torch.equal(y[:, channel, 2 * frame + half], pairs[:, 2 * channel + half, frame])


@torch.no_grad()
def test_time_changes_at_the_published_levels():
    encoder, decoder = TemporalEncoder(4, 8, 1), TemporalDecoder(4, 8, 1)
    lengths = []
    for level in (*encoder.levels, *decoder.levels):
        level[0].register_forward_hook(lambda module, args, h: lengths.append((h.shape[1], h.shape[2])))
    decoder(encoder(torch.zeros(1, 4, 8, 1, 1))[:, :4])
    assert lengths == [(8, 8), (16, 8), (16, 4), (32, 2), (32, 2), (16, 4), (16, 8), (8, 8)]


@torch.no_grad()
def test_tiles_in_time_are_clips_of_their_own_the_first_one_padded():
    model, x = tiny(), clip(1, 3, 17, 16, 16)
    model.enable_tiling(size=0, frames=9)
    tiles = moments(model, x)
    reconstruction = model.reconstruct(x)
    model.disable_tiling()
    parts = [moments(model, part) for part in x.split([5, 8, 4], 2)]
    assert [part.shape[2] for part in parts] == [2, 2, 1]
    close(tiles, torch.cat(parts, 2))
    z = [part[:, :4] for part in parts]
    close(reconstruction, torch.cat([model.decode(part).sample for part in z], 2)[:, :, 3:])


@torch.no_grad()
def test_tiles_in_space_and_slices():
    model, x = tiny(), clip(2, 3, 5, 32, 48)
    whole = model.reconstruct(x)
    model.enable_slicing()
    close(model.reconstruct(x), whole)
    model.reach = 0
    model.enable_tiling(size=16, overlap=0.5, frames=0)
    assert model.reconstruct(x).shape == x.shape


def test_streams_are_refused_because_of_the_padding():
    model = tiny()
    model.enable_tiling(size=0)
    with pytest.raises(UserError, match=r"stream_encode: .*OSVAE.*it pads clips in front"):
        next(model.stream_encode([clip(1, 3, 8, 16, 16)]))
    with pytest.raises(UserError, match=r"stream_decode: .*OSVAE.*it pads clips in front"):
        next(model.stream_decode([clip(1, 4, 2, 2, 2)]))


def test_it_trains_with_and_without_checkpointing():
    model, x = tiny().train(), clip(1, 3, 5, 16, 16)
    noise = clip(1, 4, 2, 2, 2)

    def gradients():
        model.zero_grad()
        video, mean, logvar = model(x, noise)
        assert video.shape == x.shape and mean.shape == logvar.shape == noise.shape
        ((video - x).abs().mean() + 1e-6 * logvar.sum()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    without = {name for name, _ in model.named_parameters()} - set(plain)
    assert without == set()
    model.enable_gradient_checkpointing()
    assert model.encoder.gradient_checkpointing and model.spatial.decoder.gradient_checkpointing
    again = gradients()
    assert all(torch.allclose(plain[name], again[name]) for name in plain)
    assert model.last_layer is model.spatial.decoder.conv_out.weight


@torch.no_grad()
def test_saved_and_loaded(tmp_path):
    model, x = tiny().float(), clip(1, 3, 5, 16, 16).float()
    model.save_pretrained(tmp_path)
    loaded = OSVAE.from_pretrained(tmp_path).eval()
    assert loaded.latent_sha256() == model.latent_sha256()
    assert torch.equal(loaded.reconstruct(x), model.reconstruct(x))


def test_options_out_of_range_are_user_errors():
    with pytest.raises(UserError, match="filters=0"):
        OSVAE(filters=0)
