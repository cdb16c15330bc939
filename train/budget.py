"""What a step of VAE training will cost, for `--dry-run` and for the log, counted before anything is allocated."""

import copy

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from lvdm import cost
from lvdm.metrics.lpips import LPIPS
from train.configs import Kind, Rendering
from vae.base import VideoVAE
from vae.discriminators import PatchGAN


def step_costs(
    config: Rendering, model: VideoVAE, renderer: nn.Module, rate: int = 1
) -> dict[tuple[int, int], cost.StepCost]:
    """What it costs to render one clip of each (frames, size) and to learn from it; the encoder sees every `rate`-th
    frame of the clip."""
    twin, costs = _on_meta(renderer), {}
    for frames, size in {(kind.frames, kind.size) for _, kind in config.kinds()}:
        x = torch.empty(1, 3, frames, size, size, device="meta")
        noise = torch.empty(1, *model.spec.latent_shape((frames - 1) // rate + 1, size, size), device="meta")
        costs[frames, size] = cost.forward_cost(lambda x=x, noise=noise: twin(x, noise)[0], backward=True)
    return costs


def describe_phases(config: Rendering, name: str, model: VideoVAE, renderer: nn.Module, rate: int = 1) -> str:
    """A line for each kind of clip; `model` and `renderer` on the meta device."""
    if config.gradient_checkpointing:
        model.train().enable_gradient_checkpointing()
    held = cost.parameters(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    costs, lines, judges = step_costs(config, model, renderer, rate), [], Judges(config)
    for phase in config.phases:
        for kind in phase.kinds:
            what = f"{name}, {phase.batch} clips of {kind.frames}x{kind.size}x{kind.size}"
            of_clip, micro = costs[kind.frames, kind.size], phase.batch // config.accumulate
            flops, kept = of_clip.passes() * phase.batch, judges.peak_bytes(kind, micro, of_clip.activation_bytes)
            lines.append(cost.describe_step(what, trained, held, flops, kept, judges.state_bytes))
    return "\n".join(lines)


class Judges:
    """The memory of what a rendering is judged by: LPIPS and the adversary, those of them that the config asks for."""

    def __init__(self, config: Rendering):
        self.config, self.lpips, self.critic = config, None, None
        self.fake = FakeTensorMode()  # as meta, but LPIPS turns autocast off, which meta has not
        with self.fake:
            if config.lpips_weight:
                self.lpips = LPIPS("vgg", pretrained=False)
            if config.adversarial_weight:
                dims = {"3d": 3, "2d": 2}[config.discriminator]
                self.critic = PatchGAN(dims, config.discriminator_width, config.discriminator_norm)

    @property
    def state_bytes(self) -> int:
        """Weights in fp32; of the adversary also gradient and two Adam moments."""
        lpips, critic = (cost.parameters(module) if module else 0 for module in (self.lpips, self.critic))
        return 4 * lpips + 16 * critic

    def peak_bytes(self, kind: Kind, clips: int, rendering: int) -> int:
        """Bytes kept at a time for the backward pass of `clips` clips, of each of which the renderer keeps `rendering`:
        those of the renderer's step or, once they are gone, those of the adversary's, whichever are more."""
        frames = min(self.config.lpips_frames or kind.frames, kind.frames) * clips
        size, opposing, learning = (kind.size, kind.size), 0, 0
        with self.fake:
            if self.lpips:
                y = torch.empty(min(frames, self.config.lpips_chunk), 3, *size, requires_grad=True)
                opposing += cost.forward_cost(lambda: self.lpips(y, y.detach())).activation_bytes
            if self.critic:
                video = torch.empty(clips, 3, kind.frames, *size, requires_grad=True)
                self.critic.requires_grad_(False)
                opposing += cost.forward_cost(lambda: self.critic(video)).activation_bytes
                self.critic.requires_grad_(True)  # of the clips, and of their renderings
                learning = 2 * cost.forward_cost(lambda: self.critic(video.detach())).activation_bytes
        return max(rendering * clips + opposing, learning)


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy whose weights take no memory, with those of `module` untouched."""
    twins = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, twins | {id(buffer): buffer.to("meta") for buffer in module.buffers()})
