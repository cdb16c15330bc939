"""What every registered VAE keeps: lengths, images, posteriors, files, precision, gradients, tiles, streams."""

import pytest
import torch

import vae
from lvdm.data.reader import read_frames
from lvdm.errors import UserError
from lvdm.media import to_float
from lvdm.rng import generator
from vae.tiling import starts

NAMES = vae.names()
SPECS = {name: vae.build(name, **vae.registry.entry(name).tiny).spec for name in NAMES}
CONTINUOUS = [name for name in NAMES if not SPECS[name].discrete]
DISCRETE = [name for name in NAMES if SPECS[name].discrete]
EXACT = [name for name in CONTINUOUS if SPECS[name].exact_streaming]
INEXACT = [name for name in CONTINUOUS if not SPECS[name].exact_streaming]
BF16 = 0.1
"""Largest relative distance (RMS) of a bf16 reconstruction from that in fp32, at random weights and tiny width."""
SEAM = {0.25: 4.0, 0.5: 2.0}
"""Overlap of tiles -> how much larger than in the whole frame the step across a seam may be, at random weights."""


@pytest.fixture
def tiny():
    """`tiny(name, dtype)`: the model at the size of a test, the same at each call."""

    def build(name: str, dtype: torch.dtype = torch.float32):
        torch.manual_seed(0)
        model = vae.build(name, **vae.registry.entry(name).tiny).to(dtype).eval()
        model.reach = 0  # tiles of any size: how few see enough is a test of its own
        return model

    return build


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def clip(name: str, frames: int, batch: int = 1, dtype: torch.dtype = torch.float32, size=None) -> torch.Tensor:
    f = SPECS[name].space_factor
    height, width = size or (3 * f, 2 * f)
    x = torch.rand(batch, 3, frames, height, width, generator=generator(0, "clip", frames), dtype=torch.float64)
    return (2 * x - 1).to(dtype)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


@pytest.mark.parametrize("name", NAMES)
def test_any_length_of_any_size_comes_back(name, tiny):
    model = tiny(name)
    for frames in (1, 6, 9):
        x = clip(name, frames, batch=2)
        y = model.reconstruct(x)
        assert y.shape == x.shape and y.dtype == x.dtype and torch.isfinite(y).all(), frames
    image = clip(name, 1, batch=2)[:, :, 0]
    assert model.reconstruct(image).shape == image.shape


@pytest.mark.parametrize("name", CONTINUOUS)
def test_latents_have_the_shape_of_the_spec(name, tiny):
    model, spec = tiny(name), SPECS[name]
    for frames in (1, 6, spec.frames(3)):
        x = clip(name, frames, batch=2)
        z = model.encode(x).latent_dist.mode()
        assert z.shape == (2, *spec.latent_shape(frames, *x.shape[-2:]))
        assert model.decode(z).sample.shape[2] == spec.frames(z.shape[2]) == spec.valid_frames(frames)
        assert model.decode(z, num_frames=frames).sample.shape == x.shape
    assert model.encode(clip(name, 1)[:, :, 0]).latent_dist.mean.ndim == 4
    assert len(spec.latent_mean) == len(spec.latent_std) == spec.latent_channels


@pytest.mark.parametrize("name", DISCRETE)
def test_codes_have_the_shape_of_the_spec(name, tiny):
    model, spec = tiny(name), SPECS[name]
    x = clip(name, 6, batch=2)
    codes = model.codes(x)
    assert codes.shape == (2, *spec.latent_shape(6, *x.shape[-2:])[1:]) and codes.dtype == torch.int64
    assert torch.equal(model.decode(codes, num_frames=6).sample, model.reconstruct(x))
    with pytest.raises(UserError, match=r"discrete.*reconstruct"):
        model.encode(x)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_and_lengths_off_the_rule_are_named(name, tiny):
    model, spec = tiny(name), SPECS[name]
    read = model.codes if spec.discrete else model.encode
    with pytest.raises(UserError, match=f"divisible by {spec.space_factor}"):
        read(clip(name, 1, size=(spec.space_factor + 1, spec.space_factor)))
    if spec.time_factor > 1:
        with pytest.raises(UserError, match="6 frames: expected"):
            read(clip(name, 6), pad=False)
    frames = spec.frames(2)
    read(clip(name, frames), pad=False)


# ---------------------------------------------------------------------------------------------------------------------
# The posterior and the latents


@pytest.mark.parametrize("name", CONTINUOUS)
def test_the_posterior_samples_from_its_mean_and_variance(name, tiny):
    posterior = tiny(name).encode(clip(name, SPECS[name].frames(2), batch=2)).latent_dist
    assert torch.equal(posterior.mode(), posterior.mean)
    draws = [posterior.sample(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(draws[0], posterior.mean + (posterior.logvar / 2).exp() * noise)
    normal = torch.distributions.Normal(posterior.mean.double(), posterior.std.double())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(posterior.kl().double(), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_clip_gives_the_same_bytes_and_neighbours_do_not_matter(name, tiny):
    model, x = tiny(name, torch.float64), clip(name, 5, batch=2, dtype=torch.float64)
    y = model.reconstruct(x)
    assert torch.equal(y, model.reconstruct(x))
    torch.testing.assert_close(model.reconstruct(x[1:]), y[1:], rtol=0, atol=1e-9)
    model.enable_slicing()
    torch.testing.assert_close(model.reconstruct(x), y, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_forward_is_encode_draw_decode(name, tiny):
    model, x = tiny(name), clip(name, 5)
    y, mean, logvar = model(x)
    assert torch.equal(y, model.reconstruct(x)) and mean.shape == logvar.shape
    noise = torch.ones_like(mean)
    drawn = model.decode(mean + (logvar / 2).exp() * noise, num_frames=5).sample
    torch.testing.assert_close(model(x, noise)[0], drawn, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Files, precision, gradients


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_comes_back_the_same(name, tiny, tmp_path):
    model, x = tiny(name), clip(name, 5)
    model.save_pretrained(tmp_path)
    loaded = vae.load(str(tmp_path))
    assert type(loaded) is type(model) and loaded.options == model.options and not loaded.training
    assert torch.equal(loaded.reconstruct(x), model.reconstruct(x))
    assert loaded.spec == model.spec and loaded.latent_sha256() == model.latent_sha256()
    assert not list(tmp_path.glob("*.bin")) and list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("name", CONTINUOUS)
def test_bf16_stays_near_fp32(name, tiny):
    model, x = tiny(name), clip(name, 5)
    z = model.encode(x).latent_dist.mean
    y = model.decode(z, num_frames=5).sample
    half = tiny(name, torch.bfloat16)
    z_half = half.encode(x.bfloat16()).latent_dist.mean
    assert z_half.dtype == torch.bfloat16 and relative(z_half, z) < BF16
    assert relative(half.decode(z.bfloat16(), num_frames=5).sample, y) < BF16
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(model.decode(z, num_frames=5).sample, y) < BF16


@pytest.mark.parametrize("name", DISCRETE)
def test_codes_decode_in_bf16_near_fp32(name, tiny):
    """(From the same codes: near ties between two codes may fall either way.)"""
    model, x = tiny(name), clip(name, 8)
    codes = model.codes(x)
    half = tiny(name, torch.bfloat16)
    assert relative(half.decode(codes).sample, model.decode(codes).sample) < BF16
    assert half.codes(x.bfloat16()).shape == codes.shape


@pytest.mark.parametrize("name", CONTINUOUS)
def test_checkpointing_changes_no_gradient(name, tiny):
    x = clip(name, 5, dtype=torch.float64)
    gradients = []
    for checkpointing in (False, True):
        model = tiny(name, torch.float64).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        with torch.enable_grad():
            y, mean, logvar = model(x)
            (y.square().mean() + mean.square().mean() + logvar.square().mean()).backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 10
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, rtol=0, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_the_last_layer_draws_the_frames(name, tiny):
    """Scaling it and its bias scales the frames, up to a bias elsewhere: it is a weight of the model, and the last."""
    model, z = tiny(name, torch.float64), None
    weight = model.last_layer
    owner = next(key for key, p in model.named_parameters() if p is weight)
    z = model.encode(clip(name, 5, dtype=torch.float64)).latent_dist.mean
    before = model.decode(z).sample
    weight.mul_(2)
    after = model.decode(z).sample
    weight.mul_(-0.5)
    minus = model.decode(z).sample
    assert (after - before).abs().max() > 1e-6, owner
    torch.testing.assert_close(2 * (after - before), before - minus, rtol=0, atol=1e-9)  # linear in it


# ---------------------------------------------------------------------------------------------------------------------
# Tiles and streams


@pytest.mark.parametrize("name", NAMES)
def test_one_tile_that_covers_all_changes_nothing(name, tiny):
    model, x = tiny(name, torch.float64), clip(name, 5, dtype=torch.float64)
    y = model.reconstruct(x)
    model.enable_tiling(size=8 * SPECS[name].space_factor, frames=33)
    assert torch.equal(model.reconstruct(x), y)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_tiles_and_runs_have_the_shapes_of_the_whole(name, tiny):
    model, spec = tiny(name), SPECS[name]
    f = spec.space_factor
    x = clip(name, 14, size=(5 * f, 4 * f))
    whole = model.encode(x).latent_dist.mean
    model.enable_tiling(size=3 * f, overlap=0.34, frames=9)
    z = model.encode(x).latent_dist.mean
    assert z.shape == whole.shape and not torch.equal(z, whole)
    y = model.decode(z, num_frames=14).sample
    assert y.shape == x.shape and torch.isfinite(y).all()
    model.disable_tiling()
    assert torch.equal(model.encode(x).latent_dist.mean, whole)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_tiles_are_blended_linearly(name, tiny):
    """Against two tiles decoded alone, 3 latents wide, which share one: there one falls to 0, the other rises to 1."""
    model, f = tiny(name), SPECS[name].space_factor
    z = torch.randn(1, SPECS[name].latent_channels, 2, 2, 5, generator=generator(0, "tiles"))
    left, right = (model.decode(part).sample for part in (z[..., :3], z[..., 2:]))
    rise = (torch.arange(f) + 0.5) / f
    shared = left[..., 2 * f :] * (1 - rise) + right[..., :f] * rise
    expected = torch.cat([left[..., : 2 * f], shared, right[..., f:]], -1)
    model.enable_tiling(size=3 * f, overlap=0.34, frames=0)
    torch.testing.assert_close(model.decode(z).sample, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_seams_are_small_on_a_real_frame(name, tiny, real_data):
    """The step from a pixel to the next where tiles begin and end, against the step there without tiles."""
    picture = torch.as_tensor(read_frames(sorted((real_data / "val").glob("*.mp4"))[0], [0])[0])
    x = to_float(picture.permute(2, 0, 1)[None, :, None, :160, :160])
    model = tiny(name)
    z = model.encode(x).latent_dist.mean
    whole = model.decode(z, num_frames=1).sample
    for overlap, bound in SEAM.items():
        model.enable_tiling(size=96, overlap=overlap, frames=0)
        y, begins = model.decode(z, num_frames=1).sample, starts(20, 12, overlap)
        seams = [8 * edge - 1 for edge in {*begins[1:], *(begin + 12 for begin in begins[:-1])}]
        seen, there = ((v[..., 1:] - v[..., :-1]).abs()[..., seams].mean() for v in (y, whole))
        assert 0.1 * there < seen < bound * there, overlap


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("plan", [[1, 4, 4, 4], [1, 8, 4], [1, 12], [13], [5, 3, 5]])
def test_any_plan_of_chunks_is_the_whole_clip(name, plan, tiny):
    model, x = tiny(name, torch.float64), clip(name, 13, dtype=torch.float64)
    whole = model.encode(x).latent_dist
    parts = list(model.stream_encode(x.split(plan, 2), chunk_frames=4))
    torch.testing.assert_close(torch.cat([part.mean for part in parts], 2), whole.mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.cat([part.logvar for part in parts], 2), whole.logvar, rtol=0, atol=1e-9)
    y = model.decode(whole.mean).sample
    for most in (1, 12):
        frames = torch.cat(list(model.stream_decode(whole.mean.split(1, 2), chunk_frames=most)), 2)
        torch.testing.assert_close(frames, y, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", EXACT)
def test_any_prefix_is_that_of_the_whole_clip(name, tiny):
    model, x = tiny(name, torch.float64), clip(name, 13, dtype=torch.float64)
    z = model.encode(x).latent_dist.mean
    y = model.decode(z).sample
    for frames in (1, 5, 9):
        short = model.encode(x[:, :, :frames]).latent_dist.mean
        torch.testing.assert_close(short, z[:, :, : short.shape[2]], rtol=0, atol=1e-9)
        again = model.decode(short).sample
        torch.testing.assert_close(again, y[:, :, : again.shape[2]], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", EXACT)
def test_an_image_is_the_first_frame_of_a_video(name, tiny):
    model, x = tiny(name, torch.float64), clip(name, 9, dtype=torch.float64)
    z, image = model.encode(x).latent_dist.mean, model.encode(x[:, :, 0]).latent_dist.mean
    torch.testing.assert_close(image, z[:, :, 0], rtol=0, atol=1e-9)
    torch.testing.assert_close(model.decode(image).sample, model.decode(z).sample[:, :, 0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", INEXACT)
def test_the_others_say_why_they_do_not_stream(name, tiny):
    model = tiny(name)
    assert len(SPECS[name].inexact) > 10
    for stream, x in ((model.stream_encode, clip(name, 5)), (model.stream_decode, torch.zeros(1, 1, 1, 1, 1))):
        with pytest.raises(UserError, match="does not stream exactly") as error:
            stream([x])
        assert SPECS[name].inexact in str(error.value)


@pytest.mark.parametrize("name", INEXACT)
def test_and_they_are_right(name, tiny):
    """Some prefix of the clip, or of its latents, gives other numbers than the whole."""
    model, x = tiny(name, torch.float64), clip(name, 13, dtype=torch.float64)
    z = model.encode(x).latent_dist.mean
    short = model.encode(x[:, :, :5]).latent_dist.mean
    y, again = model.decode(z).sample, model.decode(z[:, :, :2]).sample
    moved = (short - z[:, :, : short.shape[2]]).abs().max(), (again - y[:, :, : again.shape[2]]).abs().max()
    assert max(moved) > 1e-6


def test_the_names_of_the_papers_are_there():
    expected = "univae odvae ospvae cvvae ivvae osvae sdvae svdvae vqgan tats cogvideox"
    assert set(NAMES) == set(expected.split())
    assert set(DISCRETE) == {"vqgan", "tats"}
    assert set(EXACT) >= {"univae", "ivvae", "sdvae"}
