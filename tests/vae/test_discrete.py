"""VQGAN and TATS: clips become codes, codes become clips, and what needs a posterior is refused."""

import pytest
import torch
import torch.nn.functional as F

import vae.discrete
from lvdm.errors import UserError
from vae.discrete import best_codes, nearest_codes
from vae.tats import TATS, SameConv3d, SameConvTranspose3d
from vae.vqgan import FRAMES, VQGAN

TINY = {"z": 8, "width": 8, "blocks": 1, "codes": 64}
BOTH = pytest.mark.parametrize("cls", [VQGAN, TATS])


def tiny(cls, **options):
    torch.manual_seed(0)
    model = cls(**TINY, **options).double().eval()
    if cls is TATS:  # a codebook that its features are spread over: those of some clip
        with torch.no_grad():
            model.codebook.copy_(model._moments(clip(1, 3, 16, 32, 32).flip(2)).movedim(1, -1).flatten(0, -2))
    return model


def clip(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(*shape, dtype=torch.float64, generator=generator) * 2 - 1


def parameters(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def test_parameters_of_vqgan():
    with torch.device("meta"):
        model = VQGAN()
    convs = parameters(model.quant_conv, model.decoder.post_quant_conv)
    assert parameters(model.encoder) == 26_345_728
    assert parameters(model.decoder, model.quant_conv) - convs == 38_316_163
    assert (convs, model.codebook.numel(), parameters(model.projection)) == (131_584, 2_097_152, 2_105_344)
    assert parameters(model) == 68_995_971


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_parameters_of_tats(norm):
    with torch.device("meta"):
        model = TATS(norm=norm)
    convs = parameters(model.encoder.quant_conv, model.decoder.post_quant_conv)
    assert (parameters(model), convs) == (23_652_227, 131_584)
    assert model.codebook.shape == (16384, 256)
    assert "codebook" in dict(model.named_buffers())


@BOTH
@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 4, 5, 16, 17])
def test_codes_of_every_length_and_back(cls, frames):
    model, x = tiny(cls), clip(2, 3, frames, 16, 24)
    codes = model.codes(x)
    latents = frames if cls is VQGAN else -(-frames // 4)
    assert codes.dtype == torch.int64 and codes.shape == (2, latents, 2, 3) == (
        2,
        *model.spec.latent_shape(frames, 16, 24)[1:],
    )
    assert model.spec.discrete
    assert torch.equal(model.reconstruct(x), model.decode(codes, num_frames=frames).sample)
    assert model.reconstruct(x).shape == x.shape
    assert model.decode(codes, return_dict=False)[0].shape[2] == model.spec.frames(latents)


@BOTH
@torch.no_grad()
def test_images_are_clips_of_one_frame(cls):
    model, x = tiny(cls), clip(2, 3, 16, 16)
    codes = model.codes(x)
    assert codes.shape == (2, 2, 2)
    assert torch.equal(codes, model.codes(x.unsqueeze(2)).squeeze(1))
    torch.testing.assert_close(model.decode(codes).sample, model.reconstruct(x.unsqueeze(2)).squeeze(2))
    assert model.reconstruct(x).shape == x.shape


@BOTH
@torch.no_grad()
def test_what_is_decoded_is_the_codebook_at_the_codes(cls):
    model = tiny(cls)
    codes = torch.randint(0, 64, (1, 2, 2, 2))
    embedded = torch.stack([model.codebook[code] for code in codes.flatten()]).view(1, 2, 2, 2, 8).movedim(-1, 1)
    assert torch.equal(model.decode(codes).sample, model._frames(embedded))
    assert torch.equal(model.decode(codes.int()).sample, model.decode(codes).sample)


@torch.no_grad()
def test_vqgan_takes_the_best_logit_of_each_frame_alone():
    model, x = tiny(VQGAN), clip(1, 3, FRAMES + 3, 16, 16)
    logits = model.projection(model.quant_conv(model.encoder(x)))
    codes = model.codes(x)
    assert torch.equal(codes, logits.argmax(1))
    assert len(codes.unique()) > 1
    assert torch.equal(codes[:, 5], model.codes(x[:, :, 5]))
    torch.testing.assert_close(model.decode(codes).sample[:, :, 9], model.decode(codes[:, 9]).sample, rtol=0, atol=1e-9)


@torch.no_grad()
def test_nearest_codes_are_those_of_the_distances(monkeypatch):
    h, codebook = torch.randn(2, 8, 3, 4, 5, dtype=torch.float64), torch.randn(64, 8, dtype=torch.float64)
    distances = (h.movedim(1, -1).unsqueeze(-2) - codebook).square().sum(-1)
    expected = distances.argmin(-1)
    assert torch.equal(nearest_codes(h, codebook), expected)
    monkeypatch.setattr(vae.discrete, "TOKENS", 7)  # chunks change nothing
    assert torch.equal(nearest_codes(h, codebook), expected)
    assert torch.equal(nearest_codes(codebook.T[None, :, :, None, None], codebook).flatten(), torch.arange(64))
    scores = torch.einsum("bcthw,nc->bnthw", h, codebook) + codebook[:, :1].reshape(1, -1, 1, 1, 1)
    assert torch.equal(best_codes(h, codebook, codebook[:, 0]), scores.argmax(1))


@torch.no_grad()
@pytest.mark.parametrize("stride", [(2, 2, 2), (1, 2, 2)])
def test_convolutions_of_tats_repeat_the_border(stride):
    x = clip(1, 2, 4, 6, 8)
    shape = tuple(n // s for n, s in zip(x.shape[2:], stride, strict=True))
    down = SameConv3d(2, 3, (4, 4, 4), stride).double()
    y = down(x)
    assert y.shape == (1, 3, *shape)
    for at in [(0, 0, 0), (1, 2, 3), tuple(n - 1 for n in shape)]:  # each output by hand, indices clamped to the clip
        taps = [
            (torch.arange(4) + i * s - (4 - s + 1) // 2).clamp(0, n - 1)
            for i, s, n in zip(at, stride, x.shape[2:], strict=True)
        ]
        window = x[0][:, taps[0]][:, :, taps[1]][:, :, :, taps[2]]
        expected = (down.weight * window).sum((1, 2, 3, 4)) + down.bias
        torch.testing.assert_close(y[0, :, at[0], at[1], at[2]], expected)
    up = SameConvTranspose3d(3, 2, (4, 4, 4), stride).double()
    assert up(y).shape == (1, 2, *x.shape[2:])


@torch.no_grad()
def test_a_transposed_convolution_of_tats_by_hand():
    """In one dimension, kernel 4, stride 2: a border value on each side, then the middle 2n of what is scattered."""
    up = SameConvTranspose3d(1, 1, (4, 4, 4), (2, 2, 2)).double()
    up.weight.zero_()
    up.bias.zero_()
    kernel = torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float64)
    up.weight[0, 0, :, 1:3, 1:3] = kernel[:, None, None]  # each place in space is hit once by these two taps
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).view(1, 1, 3, 1, 1)
    scattered = torch.zeros(12, dtype=torch.float64)
    for i, value in enumerate([1, 1, 2, 3, 3]):
        scattered[2 * i : 2 * i + 4] += value * kernel
    assert torch.equal(up(x)[0, 0, :, 0, 0], scattered[3:9])


@torch.no_grad()
def test_tats_looks_both_ways_and_works_on_half_the_range():
    model, x = tiny(TATS), clip(1, 3, 16, 16, 16)
    changed = x.clone()
    changed[:, :, 8:] = 0
    features = model._moments(x)
    assert len(model.codes(x).unique()) > 1
    assert not torch.allclose(features[:, :, 1], model._moments(changed)[:, :, 1])
    assert torch.equal(features, model.encoder(x / 2))
    z = torch.randn_like(features)
    assert torch.equal(model._frames(z), 2 * model.decoder(z))
    assert "look ahead" in model.spec.inexact and "norms" not in model.spec.inexact
    assert "norms" in tiny(TATS, norm="group").spec.inexact


@BOTH
@torch.no_grad()
def test_slices_and_tiles(cls):
    model, x = tiny(cls), clip(2, 3, 8, 32, 48)
    codes, video = model.codes(x), model.reconstruct(x)
    model.enable_slicing()
    assert torch.equal(model.codes(x), codes)
    torch.testing.assert_close(model.reconstruct(x), video, rtol=0, atol=1e-9)
    model.reach = 0
    model.enable_tiling(size=16, overlap=0.5, frames=5)
    assert model.codes(x).shape == codes.shape and model.reconstruct(x).shape == video.shape
    model.enable_tiling(size=0, frames=5)
    if cls is VQGAN:
        assert torch.equal(model.codes(x), codes)
    else:  # runs of 4 frames, each a clip of its own
        assert torch.equal(model.codes(x), torch.cat([model.codes(part) for part in x.split(4, 2)], 1))


@BOTH
@torch.no_grad()
def test_saved_and_loaded_with_its_codebook(cls, tmp_path):
    model, x = tiny(cls).float(), clip(1, 3, 4, 16, 16).float()
    model.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.codebook, model.codebook)
    assert torch.equal(loaded.codes(x), model.codes(x)) and torch.equal(loaded.reconstruct(x), model.reconstruct(x))
    assert loaded.latent_sha256() == model.latent_sha256()


@BOTH
@torch.no_grad()
def test_half_precision(cls):
    model, x = tiny(cls).bfloat16(), clip(1, 3, 4, 16, 16).bfloat16()
    assert model.reconstruct(x).dtype == torch.bfloat16


@BOTH
def test_what_needs_a_posterior_is_refused(cls):
    model, x = tiny(cls), clip(1, 3, 4, 16, 16)
    for call in (model.encode, model, lambda x: model.stream_encode([x]), lambda x: model.stream_decode([x])):
        with pytest.raises(UserError, match=rf"{cls.__name__} is discrete.*for reconstruction only.*codes\(\)"):
            call(x)
    with pytest.raises(UserError, match="has no refinement decoder"):
        model.refine(model.codes(x))


@BOTH
def test_codes_that_are_none_are_user_errors(cls):
    model = tiny(cls)
    with pytest.raises(UserError, match=r"takes integer codes .*, not float32 \(1, 8, 1, 2, 2\)"):
        model.decode(torch.zeros(1, 8, 1, 2, 2))
    with pytest.raises(UserError, match=r"takes integer codes .*, not bool"):
        model.decode(torch.zeros(1, 2, 2, dtype=torch.bool))
    with pytest.raises(UserError, match=r"codes from 0 to 64, expected 0 to 63"):
        model.decode(torch.tensor([[[0, 64]]]))
    with pytest.raises(UserError, match=r"codes from -1 to 3"):
        model.decode(torch.tensor([[[-1, 3]]]))


def test_bad_clips_and_options_are_user_errors():
    with pytest.raises(UserError, match="15x16"):
        tiny(VQGAN).codes(clip(1, 3, 1, 15, 16))
    with pytest.raises(UserError, match=r"5 frames: expected 4n, e.g. 4 or 8"):
        tiny(TATS).codes(clip(1, 3, 5, 16, 16), pad=False)
    with pytest.raises(UserError, match=r"norm='bath'.*did you mean 'batch'"):
        TATS(norm="bath")
    with pytest.raises(UserError, match="codes=0"):
        VQGAN(codes=0)


@torch.no_grad()
def test_a_short_clip_of_tats_repeats_its_last_frame():
    model, x = tiny(TATS), clip(1, 3, 5, 16, 16)
    padded = F.pad(x, (0, 0, 0, 0, 0, 3), mode="replicate")
    assert torch.equal(model.codes(x), model.codes(padded))
