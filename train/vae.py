"""Stage 1: a video VAE learns to reconstruct clips (`lvdm train vae`, `accelerate launch -m train.vae`).

`fit` is the training loop of both stages: stage 2 (train/refine.py) renders with D2 instead of D1.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vae
from lvdm import accelerator as accelerators
from lvdm import trackers
from lvdm.cli import program
from lvdm.ema import EMA
from lvdm.errors import UserError
from lvdm.media import to_float
from lvdm.meter import Meter, Pace
from lvdm.metrics.lpips import LPIPS
from lvdm.progress import bar
from lvdm.rng import generator
from lvdm.run import RunFolder, Timer
from train.adversary import Adversary
from train.budget import describe_phases, step_costs
from train.configs import ClipPhase, Rendering, TrainRefine, TrainVAE
from train.data import collate, curriculum, indexes_of
from train.loop import (
    Descent,
    LossGuard,
    adam,
    crossed,
    learning_rate,
    load_weights,
    micro_batches,
    phases_left,
    set_rate,
)
from train.validation import Validation
from vae import losses
from vae.alignment import Alignment, Identity
from vae.base import VideoVAE
from vae.losses import Rendered, Term


def run(config: TrainVAE) -> Path:
    """Trains, resumes or finds finished the run at `config.out`; returns its export folder."""
    with torch.device("meta"):
        check_model(config, vae.build(config.model, **config.model_args))
    accelerator = accelerators.for_training(config)
    with accelerator.main_process_first():
        folder = RunFolder(config.out, config, accelerator.is_main_process)
    if not folder.finished:
        torch.manual_seed(config.seed)
        model = build_model(config)
        terms = [*frame_terms(config, accelerator), *latent_terms(config, model, accelerator.device)]
        fit(config, folder, accelerator, model, model, model.last_layer, terms)
    accelerators.close(accelerator)
    return folder.path / "export"


def fit(
    config: TrainVAE | TrainRefine,
    folder: RunFolder,
    accelerator: Any,
    model: VideoVAE,
    renderer: nn.Module,
    last_layer: Tensor,
    terms: Sequence[Term],
    rate: int = 1,
) -> None:
    """The training loop: `renderer(x, noise) -> (y, mean, logvar)` learns to render its clip, `model` is exported.

    `terms` make its loss, with an adversary, for which `last_layer` is the weight of the layer that draws the frames.
    The encoder sees every `rate`-th frame of the clip, which sets the shape of the posterior's noise.
    """
    device, threads = accelerator.device, accelerators.threads(config.threads, folder.records())

    # Data, networks, optimizers
    with accelerator.main_process_first():  # which fills the cache of indexes
        indexes = indexes_of(config)
    folder.bind(**{source: index.hash() for source, index in indexes.items()})
    clips = curriculum(config, indexes)
    costs = step_costs(config, model, renderer, rate)  # without what checkpointing computes again
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if config.compile:
        model.compile_repeated_blocks()
    # Before a bf16 engine rounds the weights
    ema, timer, guard = EMA(model.to(device), config.ema), Timer(), LossGuard(config, folder, accelerator)
    meter = Meter(accelerator)
    validation = None
    if config.validate_every:
        with accelerator.main_process_first():  # likewise
            validation = Validation(config, indexes["videos"], model, rate, folder, accelerator)
    adversary = Adversary(config, accelerator, last_layer, guard, meter) if config.adversarial_weight else None
    optimizer = adam([p for p in renderer.parameters() if p.requires_grad], config)
    renderer, optimizer = accelerator.prepare(renderer, optimizer)
    render, descent = accelerators.callable_of(accelerator, renderer), Descent(accelerator, renderer, optimizer, guard)
    accelerator.register_for_checkpointing(ema, timer, guard, meter, *([adversary] if adversary else []))

    # Resume
    accelerators.check_engine(accelerator, folder.records(), folder.latest())
    seen = folder.resume(accelerator.load_state)
    start_of = {"threads": threads, "processes": accelerator.num_processes, "engine": accelerators.engine(accelerator)}
    folder.log(samples=seen, event="start", device=str(device), **start_of)
    trackers.start(accelerator, folder.path, config)

    pace = Pace(0.0, accelerator)
    with bar(config.title, config.total, seen, accelerator.is_main_process) as progress:
        logged, note, work = seen, "", 0.0
        for phase, data, start, end in phases_left(config.phases, clips, seen):
            batches = pace.wait(micro_batches(data.at, collate, start, end, phase.batch, config, accelerator))
            for seen in range(start, end, phase.batch):
                lr = learning_rate(config, phase, seen)
                set_rate(optimizer, lr)
                clip = config.clip if config.clip and seen >= config.clip_start else math.inf
                renders, opposes = turns(config, phase, seen)
                for _ in range(config.accumulate):
                    batch = next(batches)
                    x = to_float(batch.on(device))
                    shape = model.spec.latent_shape((x.shape[2] - 1) // rate + 1, *x.shape[3:])
                    noise = posterior_noise(config.seed, batch.samples, shape).to(device)
                    with accelerator.accumulate(renderer), accelerators.autocast(accelerator):
                        with torch.set_grad_enabled(renders):
                            rendered = Rendered(x, *render(x, noise), noise, batch.samples, seen)
                        accepted = True
                        if renders:
                            values = total(terms, adversary, rendered)
                            accepted, norm = descent.take(values["loss"], seen, batch.names, clip)
                            measure(meter, values if accepted else {}, norm)
                        if opposes and accepted:
                            adversary.learn(rendered)
                    work += costs[tuple(x.shape[2:4])].passes(renders) * phase.batch / config.accumulate
                if renders:
                    ema.update()
                if opposes:
                    lr_d = learning_rate(config, phase, seen, config.discriminator_lr or None)
                    adversary.step(lr_d, seen, batch.names)

                seen += phase.batch
                meter.step()
                if crossed(seen, phase.batch, config.log_every):
                    pace.flops = work / (seen - logged)
                    means, speed = meter.read(), pace.read(seen - logged)
                    state = {"lr": lr, "seconds": round(timer.seconds(), 2), "skipped": guard.skipped}
                    folder.log(samples=seen, **state, **means, **speed)
                    accelerator.log({**means, **speed, "lr": lr}, step=seen)
                    logged, work = seen, 0.0
                    note = f"l1 {means['l1']:.3f}" if "l1" in means else note
                progress.advance(phase.batch, note)
                best = None
                if validation and validation.due(seen, phase.batch):
                    with pace.paused(), ema.applied(), accelerators.autocast(accelerator):
                        best = validation.run(seen)
                if best or seen == config.total or crossed(seen, phase.batch, config.save_every):
                    folder.save(seen, accelerator.save_state, config.keep, accelerator.wait_for_everyone, best)

    # The averaged weights are what the run was for
    with ema.applied():
        folder.export(model)
    folder.finish(samples=config.total, seconds=round(timer.seconds(), 1), skipped=guard.skipped)


def turns(config: Rendering, phase: ClipPhase, seen: int) -> tuple[bool, bool]:
    """Whether the renderer, and whether the adversary, moves in the step after `seen` samples."""
    joined = config.adversarial_weight > 0 and seen >= config.adversarial_start
    if not joined or config.update == "joint":
        return True, joined
    odd = seen // phase.batch % 2 == 1
    return not odd, odd


def measure(meter: Meter, values: dict[str, Tensor], norm: float | None) -> None:
    """Adds the terms of a micro-batch to the log and, where a step was taken, the norm of its gradient."""
    for name, value in values.items():
        meter.add(name, value)
    if norm is not None:
        meter.add("grad", torch.tensor(norm, device=meter.accelerator.device))


# ----------------------------------------------------------------------------------------------------------------------
# Losses


def total(terms: Sequence[Term], adversary: Adversary | None, rendered: Rendered) -> dict[str, Tensor]:
    """Every term by its name, as it is, and their weighted sum, the "loss"."""
    values, reconstruction, loss = losses.evaluate(terms, rendered)
    if adversary and adversary.joined(rendered.seen):
        opposition, judged = adversary.oppose(rendered, reconstruction)
        values, loss = values | judged, loss + opposition
    return {**values, "loss": loss}


def frame_terms(config: Rendering, accelerator: Any, middle_weight: float = 1.0) -> list[Term]:
    """What compares frames: L1 and LPIPS; `middle_weight` is that of frames 1, 3, 5, ... against 1 of the others."""

    def l1(rendered: Rendered) -> Tensor:
        x, y = rendered.x, rendered.y
        return losses.l1(x, y) if middle_weight == 1 else losses.l1(x, y, weights(x.shape[2]))

    def perceptual(rendered: Rendered) -> Tensor:
        x, y = rendered.x, rendered.y
        shown = frames_shown(config.seed, rendered.seen, config.lpips_frames, x.shape[2])
        middle = None if middle_weight == 1 else weights(x.shape[2])
        return losses.perceptual(lpips, x, y, shown, middle, config.lpips_chunk)

    def weights(frames: int) -> Tensor:
        return torch.where(torch.arange(frames) % 2 == 1, middle_weight, 1.0)

    terms = [Term("l1", 1.0, l1, reconstructs=True)]
    if config.lpips_weight:
        with accelerator.main_process_first():  # which fills the cache of weights
            lpips = LPIPS("vgg").to(accelerator.device)
        terms.append(Term("lpips", config.lpips_weight, perceptual, config.lpips_start, reconstructs=True))
    return terms


def latent_terms(config: TrainVAE, model: VideoVAE, device: torch.device) -> list[Term]:
    """What holds the latents: the KL, those of a frozen image VAE, those of the image VAE inside."""
    terms = []
    if config.kl_weight:
        terms.append(Term("kl", config.kl_weight, lambda r: losses.kl(r.mean, r.logvar), summed=True))
    if config.align_vae:
        image = vae.load(config.align_vae).to(device)
        alignment = Alignment(image, model, config.align_mapping, config.seed, f"align_vae={config.align_vae}")
        sides = {"decoder": alignment.decoder, "encoder": alignment.encoder}
        chosen = [side for side in sides if config.align in (side, "both")]
        terms += [Term(f"align_{side}", config.align_weight, sides[side]) for side in chosen]
    if config.identity_weight:
        of_images = Identity(model)
        terms.append(Term("identity", config.identity_weight, of_images, applies=lambda r: r.x.shape[2] == 1))
    return terms


# ----------------------------------------------------------------------------------------------------------------------
# Draws


def posterior_noise(seed: int, samples: list[int], shape: tuple[int, ...]) -> Tensor:
    """The posterior's noise of each clip, a function of (seed, sample)."""
    return torch.stack([torch.randn(shape, generator=generator(seed, "posterior", sample)) for sample in samples])


def frames_shown(seed: int, seen: int, count: int, frames: int) -> Tensor | None:
    """Which frames LPIPS looks at in the step after `seen` samples; None is all."""
    if not 0 < count < frames:
        return None
    return torch.randperm(frames, generator=generator(seed, "lpips", seen))[:count].sort().values


# ----------------------------------------------------------------------------------------------------------------------
# Model


def build_model(config: TrainVAE) -> VideoVAE:
    """The model to train: fresh, or with the weights of `config.init`, which must be of the same architecture."""
    model = vae.build(config.model, **config.model_args)
    if config.init:
        start = vae.load(config.init)
        if type(start) is not type(model):
            raise UserError(f"init={config.init}: holds {start.title}, and model={config.model} is {model.title}")
        weights = {k: v for k, v in start.state_dict().items() if not k.startswith("refiner.")}
        load_weights(model, weights, f"init={config.init}")
    return model


def check_model(config: TrainVAE | TrainRefine, model: VideoVAE, rate: int = 1) -> None:
    """Refuses models that cannot be trained, and clips that the model does not take as they are."""
    model.require_posterior(f"model={getattr(config, 'model', model.title)}")
    rule = replace(model.spec, time_factor=rate * model.spec.time_factor)
    for key, kind in config.kinds():
        if rule.first_frames == 1:  # the others pad in a way of their own, images included
            rule.check_frames(kind.frames, f"{key}.frames")
        rule.check_square(kind.size, f"{key}.size")


def describe(config: TrainVAE) -> str:
    """Parameters, FLOPs and memory of a step of each phase, for `--dry-run`."""
    with torch.device("meta"):
        model = vae.build(config.model, **config.model_args)
    check_model(config, model)
    return describe_phases(config, config.model, model, model)


def main(argv: list[str] | None = None) -> int:
    """`lvdm train vae`."""
    return program(TrainVAE, argv, run, describe)


if __name__ == "__main__":
    accelerators.leave(main())
