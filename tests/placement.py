"""On a fake CUDA device no operator mixes devices: tensors that have a shape, a dtype and a place, and no numbers.

Forward passes alone: a torch without CUDA builds no graph of tensors that say they are there. test_placement.py runs
this file in a process of its own, for a Tensor that was patched never is again what it was.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode

import dit
import vae
from dit.conditioning import Condition
from dit.latte import Latte
from dit.sampling import draw
from lvdm import diffusion, samplers
from lvdm.ema import EMA
from lvdm.latents import LatentScale
from lvdm.metrics.flow import warping_error
from lvdm.metrics.frechet import FeatureStats, frechet_distance, frechet_of_rows
from lvdm.metrics.i3d import I3D
from lvdm.metrics.lpips import LPIPS
from lvdm.rng import generator
from sample.interpolate import interpolate
from sample.measure import scores
from sample.reconstruct import reconstruct
from train import validation
from train.vae import posterior_noise
from vae import losses, memory
from vae.alignment import Alignment, Identity
from vae.base import VideoVAE
from vae.discriminators import PatchGAN
from vae.losses import Rendered

CUDA, NUMBER = torch.device("cuda:0"), 333


# ---------------------------------------------------------------------------------------------------------------------
# The device


def part(x: Tensor, where) -> Tensor:
    """x[where]; tensors in it come behind whole dimensions, and may be on the CPU, as on a real device."""
    where = where if isinstance(where, tuple) else (where,)
    chosen = [i.to(x.device) if isinstance(i, Tensor) else None for i in where]
    whole = torch.empty_strided(x.shape, x.stride(), device="meta")
    view = whole[tuple(slice(None) if isinstance(i, Tensor) else i for i in where)]
    view = x.as_strided(view.shape, view.stride(), x.storage_offset() + view.storage_offset())
    return view if all(i is None for i in chosen) else torch.ops.aten.index(view, chosen)


def packed(x: Tensor, **layout) -> Tensor:
    layout = layout or {"memory_format": torch.contiguous_format}
    return x if x.is_contiguous(**layout) else torch.ops.aten.clone(x, **layout)


NUMBERS = {
    "item": lambda x: NUMBER,
    "tolist": lambda x: np.full(tuple(x.shape), NUMBER).tolist(),
    "__int__": lambda x: NUMBER,
    "__float__": lambda x: float(NUMBER),
    "__bool__": lambda x: True,
}
"""What a tensor answers that has no numbers, on the CPU also to `numpy`."""
ON_CPU = {"numpy": lambda x: np.full(tuple(x.shape), NUMBER)}
PLACED = {
    "__getitem__": part,
    "__setitem__": lambda x, where, value: torch.as_tensor(value).expand(part(x, where).shape),
    "copy_": lambda x, other: other.expand(x.shape),
    "contiguous": packed,
}
"""What a torch without CUDA cannot do with a tensor that says it is there."""


def of_fakes(name: str, fake: Callable, on: set[str]) -> Callable:
    """`fake` for fake tensors on these kinds of device, else the method of all tensors."""
    real = getattr(Tensor, name)

    def method(x: Tensor, *given, **keys):
        faked = isinstance(x, FakeTensor) and x.device.type in on
        return (fake if faked else real)(x, *given, **keys)

    return method


def together(convolution: Callable) -> Callable:
    """Of fakes it looks at the device of the first alone."""

    def checked(x: Tensor, weight: Tensor, *more, **keys) -> Tensor:
        if x.device != weight.device:
            raise RuntimeError(f"a convolution of two devices, {x.device} and {weight.device}")
        return convolution(x, weight, *more, **keys)

    return checked


def moved(self: nn.Module, *args, **kwargs) -> nn.Module:
    """`nn.Module.to`, whose parameters are new ones, and frozen: autocast would begin a graph of the others."""
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    for module in self.modules():
        for kept in (module._parameters, module._buffers):
            for name, t in kept.items():
                if t is not None:
                    cast = dtype if dtype and t.is_floating_point() else t.dtype
                    new = torch.empty_strided(t.shape, t.stride(), device=device or t.device, dtype=cast)
                    kept[name] = nn.Parameter(new, False) if isinstance(t, nn.Parameter) else new
    return self


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    monkeypatch.setenv("LVDM_FUSED", "0")
    monkeypatch.setattr(nn.Module, "to", moved)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(memory, "free_bytes", lambda _: 2**36)
    for fakes, on in ((NUMBERS, {"cpu", "cuda"}), (ON_CPU, {"cpu"}), (PLACED, {"cuda"})):
        for name, fake in fakes.items():
            monkeypatch.setattr(Tensor, name, of_fakes(name, fake, on))
    for name in ("conv1d", "conv2d", "conv3d", "conv_transpose3d"):
        monkeypatch.setattr(F, name, together(getattr(F, name)))
    with torch.no_grad(), FakeTensorMode():
        yield


def there(*tensors: Tensor) -> Tensor:
    assert {t.device for t in tensors} == {CUDA}
    return tensors[0]


def built(name: str, **options) -> VideoVAE:
    codes = {"codes": 2 * NUMBER} if name in ("tats", "vqgan") else {}
    return vae.build(name, **vae.registry.entry(name).tiny | codes | options).to(CUDA).eval()


def clip(count: int = 9, size: int = 32, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, count, size, size, device=CUDA)


def test_devices_that_are_mixed_are_found():
    x = clip()
    with pytest.raises(RuntimeError, match="device"):
        x + torch.rand(x.shape)
    with pytest.raises(RuntimeError, match="device"):
        built("univae").encode(torch.rand(1, 3, 9, 32, 32))
    with pytest.raises(RuntimeError, match="device"):
        F.conv2d(x[0], torch.rand(1, 3, 3, 3))
    assert part(x, (0, ..., slice(1, None, 2))).shape == (3, 9, 32, 16)
    assert there(x[:, :, torch.tensor([0, 4])]).shape == (2, 3, 2, 32, 32)
    with pytest.raises(RuntimeError):
        x.numpy()


# ---------------------------------------------------------------------------------------------------------------------
# VAEs


@pytest.mark.parametrize("name", vae.names())
def test_every_vae(name):
    model, x = built(name), clip()
    with torch.autocast("cuda", torch.bfloat16):
        there(model.reconstruct(x), model.reconstruct(x[:, :, 0]))
        if model.streams:
            latents = [posterior.mode() for posterior in model.stream_encode(x.split(4, 2))]
            there(*latents, *model.stream_decode(latents))


@pytest.mark.parametrize("inject", ["add", "gate", "replace", "blend", "none"])
def test_refinement_whole_and_as_a_stream(inject):
    model = built("univae", refine=True, inject=inject)
    z = there(model.encode(clip()).latent_dist.mode())
    there(model.refine(z).sample, *model.stream_decode(z.split(1, 2), refine=True))


def test_tiles_and_slices():
    model = built("sdvae")
    model.enable_tiling(model.least_tile, frames=5)
    model.enable_slicing()
    there(model.reconstruct(clip(9, model.least_tile + 16)))


def test_programs_that_start_on_the_cpu():
    model, video = built("univae", refine=True), torch.rand(1, 3, 9, 30, 34)
    for refine in (False, True):
        there(*(t for pair in reconstruct(model, video.split(4, 2), 9, refine) for t in pair))
    there(*interpolate(model, video.split(4, 2), 9, dtype=torch.bfloat16))


# ---------------------------------------------------------------------------------------------------------------------
# Losses, validation


@pytest.mark.parametrize("mapping", ["first", "slice", "average", "random"])
def test_the_terms_of_the_loss(mapping):
    model, x, samples = built("univae"), clip(), [0, 1]
    noise = posterior_noise(0, samples, model.spec.latent_shape(9, 32, 32)).to(CUDA)
    alignment = Alignment(built("sdvae"), model, mapping, 0)
    lpips, weights = LPIPS("vgg", pretrained=False).to(CUDA), torch.ones(9)
    with torch.autocast("cuda", torch.bfloat16):
        rendered = Rendered(x, *model(x, noise), noise, samples, 0)
        y = there(rendered.y, rendered.z)
        there(losses.l1(x, y, weights), losses.kl(rendered.mean, rendered.logvar))
        there(losses.perceptual(lpips, x, y, torch.tensor([1, 4]), weights, chunk=3))
        there(alignment.decoder(rendered), alignment.encoder(rendered))


def test_the_identity_of_images():
    model, x = built("osvae"), clip(1)
    noise = torch.zeros(2, *model.spec.latent_shape(1, 32, 32), device=CUDA)
    there(Identity(model)(Rendered(x, *model(x, noise), noise, [0, 1], 0)))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_the_critic(dims, norm):
    critic, x = PatchGAN(dims, 8, norm).to(CUDA), clip()
    with torch.autocast("cuda", torch.bfloat16):
        logits = there(critic(x))
        there(losses.hinge_generator(logits), losses.hinge_discriminator(logits, logits))


@pytest.mark.parametrize("view, refine", [(validation.single_rate, False), (validation.double_rate, True)])
def test_validation_gives_what_is_on_the_cpu(view, refine, monkeypatch):
    monkeypatch.setattr(validation.rife, "available", lambda: False)
    look = view(built("univae", refine=refine), clip(9, 64, batch=1), LPIPS("alex", pretrained=False).to(CUDA))
    assert look.panels.device == look.latent.device == torch.device("cpu")


def test_the_average_of_weights():
    model = built("univae", refine=True)
    model.encoder.requires_grad_(True)
    ema = EMA(model, 0.9)
    ema.update()
    there(*ema.shadow.values())
    ema.load_state_dict({key: v if isinstance(v, int) else torch.zeros(v.shape) for key, v in ema.state_dict().items()})
    with ema.applied():
        there(model.reconstruct(clip()))


# ---------------------------------------------------------------------------------------------------------------------
# The transformer


def latte(**options) -> Latte:
    tiny = {**dit.registry.entry("latte-s/2").tiny, "frames": 3, "size": (4, 4), "condition": "class", "num_classes": 2}
    return dit.build("latte-s/2", **tiny, label_dropout=0.1, **options).to(CUDA).eval()


@pytest.mark.parametrize("name, options", [("noise", {}), ("flow", {"objective": "flow", "learn_sigma": False})])
@pytest.mark.parametrize("images", [0, 2])
def test_the_loss_of_the_transformer(name, options, images):
    model, learnt = latte(**options), diffusion.objective(name)
    x0, noise = torch.randn(2, 2, 4, 3 + images, 4, 4, device=CUDA)
    t = torch.stack([learnt.timestep(generator(0, i)) for i in range(2)]).to(CUDA)
    labels = torch.zeros(2, 1 + images, dtype=torch.int64, device=CUDA)
    condition = Condition(labels[:, 0], labels[:, 1:] if images else None).drop(labels[:, 0] > 0, labels[:, 1:] > 0)
    with torch.autocast("cuda", torch.bfloat16):
        noisy = learnt.add_noise(x0, t, noise)
        there(*learnt.losses(model(noisy, t, condition), x0, noisy, t, noise).values())


@pytest.mark.parametrize("name, sampler", [(name, one) for name, known in samplers.SAMPLERS.items() for one in known])
def test_samplers_with_guidance(name, sampler, monkeypatch):
    scheduler = samplers.make_scheduler(name, sampler)
    monkeypatch.setattr(type(scheduler), "index_for_timestep", lambda *_: 0, raising=False)  # it compares numbers
    model = latte(**({"objective": "flow", "learn_sigma": False} if name == "flow" else {}))
    draws = [generator(0, i) for i in range(2)]
    there(draw(model, Condition.of_classes([0, 1], 2), draws, scheduler, 4, guidance=3.0))


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def test_metrics_of_frames_and_of_sets():
    x, y = clip(9, 64), clip(9, 64)
    there(*(metric(x, y) for _, metric in scores.METRICS.values()))
    for spatial in (False, True):
        there(LPIPS("alex", spatial=spatial, pretrained=False).to(CUDA).video(x, y))
    there(warping_error(x, y, lambda a, b: torch.zeros(len(a), 2, *a.shape[-2:], device=CUDA)))
    features = there(I3D().to(CUDA).eval()(torch.rand(2, 3, 9, 224, 224, device=CUDA)))
    stats = FeatureStats(400, CUDA)
    for rows in (features, features.cpu()):
        stats.update(rows)
    there(stats.mean, stats.cov())
    assert frechet_distance(stats, stats) == frechet_of_rows(features, features) == NUMBER


def test_latents_are_scaled_where_they_are():
    there(LatentScale([0.0] * 4, [1.0] * 4).denormalise(torch.rand(2, 4, 3, 4, 4, device=CUDA)))
