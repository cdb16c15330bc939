"""Stage 2: D2 learns to render twice the frames from D1's latents (UniVAE 3.3; `lvdm train refine`).

E and D1 are frozen. A clip has 2N + 1 = 8n + 1 frames; E sees the N + 1 even ones, D2 is compared with all.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

import vae
from lvdm import accelerator as accelerators
from lvdm.cli import program
from lvdm.errors import UserError
from lvdm.run import RunFolder
from train.budget import describe_phases
from train.configs import TrainRefine
from train.loop import load_weights
from train.vae import check_model, fit, frame_terms
from vae.base import VideoVAE


class Refinement(nn.Module):
    """Clip (B, 3, 2N+1, H, W) -> (D2's rendering of all frames, the frozen posterior's mean, logvar)."""

    def __init__(self, model: VideoVAE):
        super().__init__()
        self.model = model
        model.eval().requires_grad_(False)
        model.refiner.train().requires_grad_(True)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            posterior = self.model.encode(x[:, :, ::2]).latent_dist
            z = posterior.mean + posterior.std * noise.to(posterior.mean)
        return self.model.refine(z).sample, posterior.mean, posterior.logvar


def run(config: TrainRefine) -> Path:
    """Trains, resumes or finds finished the run at `config.out`; returns its export folder."""
    stage_1 = vae.load(config.vae)
    check_model(config, stage_1, rate=2)
    accelerator = accelerators.for_training(config)
    with accelerator.main_process_first():
        folder = RunFolder(config.out, config, accelerator.is_main_process)
    folder.bind(vae=stage_1.identity())  # a run that goes on must find the same frozen weights
    if not folder.finished:
        torch.manual_seed(config.seed)
        model = with_refiner(config, stage_1)
        terms = frame_terms(config, accelerator, config.middle_weight)
        fit(config, folder, accelerator, model, Refinement(model), model.refiner.conv_out.weight, terms, rate=2)
    accelerators.close(accelerator)
    return folder.path / "export"


def with_refiner(config: TrainRefine, model: VideoVAE) -> VideoVAE:
    """The model of stage 1 with a new D2 that starts as `config.init` says."""
    if not hasattr(model, "add_refiner"):
        raise UserError(f"vae={config.vae}: {model.title} cannot have a refinement decoder; give a UniVAE")
    if config.init in ("d1", "fresh"):
        return model.add_refiner(config.init, config.inject)
    start = vae.load(config.init)
    if not start.spec.refines:
        raise UserError(f"init={config.init}: has no refinement decoder to start from; use d1 or fresh")
    grown = model.add_refiner("fresh", config.inject)
    load_weights(grown.refiner, start.refiner.state_dict(), f"init={config.init}")
    return grown


def describe(config: TrainRefine) -> str:
    """Parameters, FLOPs and memory of a step of each phase, for `--dry-run`."""
    stage_1 = vae.load(config.vae)
    check_model(config, stage_1, rate=2)
    model = with_refiner(config, stage_1).to("meta")
    return describe_phases(config, "D2", model, Refinement(model), rate=2)


def main(argv: list[str] | None = None) -> int:
    """`lvdm train refine`."""
    return program(TrainRefine, argv, run, describe)


if __name__ == "__main__":
    accelerators.leave(main())
