"""UniVAE: OD-VAE with multi-scale temporal downsampling, and a refinement decoder for twice the frame rate."""

from dataclasses import replace
from functools import partial

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from lvdm.errors import UserError, nearest
from vae.blocks import StreamState, begins
from vae.odvae import ODFamily, check_options
from vae.options import check_choices, positive
from vae.skeleton import Decoder
from vae.spec import VAESpec
from vae.streams import Run, Stage

FUSES = ("none", "conv1x1")
INJECTIONS = ("add", "gate", "replace", "blend", "none")
INITS = ("d1", "fresh")


class UniVAE(ODFamily):
    """E + D1 (UniVAE 3.1, 3.2) and, with `refine=True`, D2 (3.3). 4x8x8 compression, T = 4n + 1 frames.

    Args:
        z: latent channels.
        width: channels of level 0; level i has `width * mult[i]`.
        mult: channel multipliers of the four levels.
        blocks: residual blocks a level of the encoder; the decoders have one more.
        kernels: temporal kernels of the multi-scale downsampling, odd; (3,) is OD-VAE.
        fuse: "none", or "conv1x1" to mix the groups after it.
        norm: "frame" (causal, the default) or "clip" (statistics over time, as OD-VAE was published).
        upsample: "nearest" (causal, the default) or "trilinear" (looks one frame ahead, as OD-VAE was published).
        refine: whether to build D2.
        inject: how D1's features enter D2, see `Injection`; "add" is eq. 2, "none" the paper's UniVAE-V2.
        latent_mean, latent_std: a channel, measured on training data; None means 0 and 1.
    """

    @register_to_config
    def __init__(
        self,
        z: int = 4,
        width: int = 128,
        mult: tuple[int, ...] = (1, 2, 4, 4),
        blocks: int = 2,
        kernels: tuple[int, ...] = (3, 5, 7, 9),
        fuse: str = "none",
        norm: str = "frame",
        upsample: str = "nearest",
        refine: bool = False,
        inject: str = "add",
        latent_mean: tuple[float, ...] | None = None,
        latent_std: tuple[float, ...] | None = None,
    ):
        super().__init__()
        check_options(self.options)
        check_choices(self.options, {"fuse": FUSES, "inject": INJECTIONS})
        _check_kernels(kernels, width, mult)
        self._build(kernels=kernels, fuse=fuse)
        up = partial(self._up, last_time=4)
        self.refiner = Refiner(z, self._plan, up, inject) if refine else None

    @property
    def spec(self) -> VAESpec:
        return VAESpec(**self._facts(), refines=self.refiner is not None)

    def _refined(self, z: Tensor, state: StreamState | None = None) -> Tensor:
        return self.refiner(z, self.decoder.trunk(z, state), state)

    def _stages(self, work: str) -> list[Stage]:
        """To refine, D1 and D2 go side by side, on half of the channels each, up to the tap: nothing is done twice."""
        if work != "refine":
            return super()._stages(work)
        d1, d2 = self.decoder.stages(), self.refiner.stages()
        beside = [replace(d2[i], run=_side_by_side(d1[i].run, d2[i].run, shared=i == 0)) for i in range(4)]
        return [*beside, d2[4], replace(d2[5], run=self._tap, step=2), *d2[6:]]

    def _tap(self, h: Tensor, state: StreamState | None = None) -> Tensor:
        """D1 draws the frames of its own, every second one, and they enter D2."""
        first = 0 if begins(self, state) else 1
        d1, d2 = h.chunk(2, 1)
        features = self.decoder.ups[1].draw(d1[:, :, first::2], state)
        return self.refiner.injection(self.refiner.ups[1].draw(d2, state), features, state)

    def add_refiner(self, init: str, inject: str = "add") -> "UniVAE":
        """A new UniVAE with the same E and D1 and a D2: `init="d1"` copies D1's weights, "fresh" draws new ones."""
        if init not in INITS:
            raise UserError(f"init={init!r}: expected one of {', '.join(INITS)}{nearest(init, INITS)}")
        grown = type(self)(**{**self.options, "refine": True, "inject": inject})
        weights = self.state_dict()
        if init == "d1":
            weights |= {k.replace("decoder.", "refiner.", 1): v for k, v in weights.items() if k.startswith("decoder.")}
        missing, unexpected = grown.load_state_dict(weights, strict=False)
        assert not unexpected and all(key.startswith("refiner.") for key in missing)
        return grown


class Refiner(Decoder):
    """D2 (UniVAE 3.3): D1's topology, with time by 4 at the last temporal upsampling, guided there by D1's features."""

    def __init__(self, z: int, plan, up, inject: str):
        super().__init__(z, plan, up)
        self.injection = Injection(inject)

    def forward(self, z: Tensor, features: Tensor, state: StreamState | None = None) -> Tensor:
        """Latents and D1's features at the tap, N + 1 frames -> 2N + 1 frames."""
        return self.head(self.injection(self.trunk(z, state), features, state), state)


class Injection(nn.Module):
    """How D1's features of N + 1 frames enter D2's 2N + 1 at frames 0, 2, ..., 2N (UniVAE eq. 2).

    "add" is the paper's. "gate" scales them by a learned scalar that starts at 0. "replace" puts them in the place of
    D2's own. "blend" also adds to each frame between the mean of its two neighbours. "none" leaves D2 without guidance.
    """

    def __init__(self, mode: str):
        super().__init__()
        self.mode = mode
        self.gate = nn.Parameter(torch.zeros(1)) if mode == "gate" else None

    def forward(self, refined: Tensor, features: Tensor, state: StreamState | None = None) -> Tensor:
        if self.mode == "none":
            return refined
        begun = not begins(self, state)
        first = 1 if begun else 0  # in a later piece of a stream the even frames of the video are the odd ones
        out = refined.clone()
        if self.mode == "replace":
            out[:, :, first::2] = features
        else:
            out[:, :, first::2] += features if self.gate is None else self.gate * features
        if self.mode == "blend":
            known = torch.cat([state[self], features], 2) if begun else features
            out[:, :, 1 - first :: 2] += (known[:, :, 1:] + known[:, :, :-1]) / 2
            if state is not None:
                state[self] = features[:, :, -1:].clone()
        return out


def _side_by_side(d1: Run, d2: Run, shared: bool) -> Run:
    """Both on their halves of the channels, or on `shared` ones, as halves."""

    def run(h: Tensor, state: StreamState | None = None) -> Tensor:
        ours, theirs = (h, h) if shared else h.chunk(2, 1)
        return torch.cat([d1(ours, state), d2(theirs, state)], 1)

    return run


def _check_kernels(kernels: tuple[int, ...], width: int, mult: tuple[int, ...]) -> None:
    odd = isinstance(kernels, list | tuple) and all(positive(k) and k % 2 and k > 1 for k in kernels)
    if not odd or not kernels:
        raise UserError(f"kernels={kernels}: expected odd temporal kernels of at least 3, e.g. [3, 5, 7, 9]")
    if any(width * m % len(kernels) for m in mult[1:3]):
        raise UserError(f"width={width}: levels 1 and 2 must split into {len(kernels)} equal groups of channels")
