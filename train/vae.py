"""Stage 1: a video VAE learns to reconstruct clips (`lvdm train vae`, `accelerate launch -m train.vae`).

`fit` is the training loop of both stages: stage 2 (train/refine.py) renders with D2 instead of D1.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vae
from lvdm import accelerator as accelerators
from lvdm import cost
from lvdm.cli import program
from lvdm.ema import EMA
from lvdm.errors import UserError
from lvdm.media import to_float
from lvdm.metrics.lpips import LPIPS
from lvdm.progress import bar
from lvdm.rng import generator
from lvdm.run import RunFolder, Timer
from train.configs import TrainRefine, TrainVAE
from train.data import collate, index_of, phase_clips
from train.loop import LossGuard, adam, crossed, learning_rate, load_weights, micro_batches, phases_left, set_rate
from vae import losses
from vae.base import VideoVAE
from vae.discriminators import PatchGAN3D


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
        fit(config, folder, accelerator, model, model, model.last_layer, kl_weight=config.kl_weight)
    accelerators.close(accelerator)
    return folder.path / "export"


def fit(
    config: TrainVAE | TrainRefine,
    folder: RunFolder,
    accelerator: Any,
    model: VideoVAE,
    renderer: nn.Module,
    last_layer: Tensor,
    kl_weight: float = 0.0,
    rate: int = 1,
) -> None:
    """The training loop: `renderer(x, noise) -> (y, mean, logvar)` learns to render its clip, `model` is exported.

    `last_layer` is the weight of the layer that draws the frames, for the adaptive weight. The encoder sees every
    `rate`-th frame of the clip, which sets the shape of the posterior's noise.
    """
    device, threads = accelerator.device, accelerators.threads(config.threads, folder.records())

    # Data, adversary, optimizers
    with accelerator.main_process_first():  # which fills the cache of indexes and weights
        index = index_of(config)
        lpips = LPIPS("vgg").to(device) if config.lpips_weight else None
    folder.bind(videos=index.hash())
    clips = [phase_clips(config, index, phase, config.seed) for phase in config.phases]
    critic = PatchGAN3D(config.discriminator_width, config.discriminator_norm)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    optimizer = adam([p for p in renderer.parameters() if p.requires_grad], config)
    critic_optimizer = adam(critic.parameters(), config)
    renderer, critic, optimizer, critic_optimizer = accelerator.prepare(renderer, critic, optimizer, critic_optimizer)
    # After the model has moved to its device
    ema, timer, guard = EMA(model, config.ema), Timer(), LossGuard(config, folder, accelerator)
    accelerator.register_for_checkpointing(ema, timer, guard)

    # Resume
    seen = folder.resume(accelerator.load_state)
    folder.log(samples=seen, event="start", threads=threads, processes=accelerator.num_processes, device=str(device))
    accelerator.init_trackers("lvdm")

    with bar(config.title, config.total, seen, accelerator.is_main_process) as progress:
        for phase, data, start, end in phases_left(config.phases, clips, seen):
            batches = micro_batches(data.at, collate, start, end, phase.batch, config, accelerator)
            for seen in range(start, end, phase.batch):
                lr = learning_rate(config, phase, seen)
                set_rate(optimizer, lr)
                set_rate(critic_optimizer, config.discriminator_lr or lr)
                adversarial = config.adversarial_weight > 0 and seen >= config.adversarial_start
                sums: dict[str, float] = {}
                for _ in range(config.accumulate):
                    batch = next(batches)
                    x = to_float(batch.on(device))
                    elements = x[0, :, 0].numel()
                    shape = model.spec.latent_shape((x.shape[2] - 1) // rate + 1, *x.shape[3:])
                    noise = posterior_noise(config.seed, batch.samples, shape).to(device)

                    # The renderer; the adversary only judges
                    critic.requires_grad_(False)
                    with accelerator.accumulate(renderer, critic), accelerator.autocast():
                        y, mean, logvar = renderer(x, noise)
                        terms = {"l1": losses.l1(x, y)}
                        reconstruction = terms["l1"]
                        if lpips is not None and seen >= config.lpips_start:
                            shown = frames_shown(config.seed, seen, config.lpips_frames, x.shape[2])
                            terms["lpips"] = losses.perceptual(lpips, x, y, shown)
                            reconstruction = reconstruction + config.lpips_weight * terms["lpips"]
                        loss = reconstruction
                        if kl_weight:
                            terms["kl"] = losses.kl(mean, logvar)
                            loss = loss + kl_weight / elements * terms["kl"]
                        if adversarial:
                            terms["g"] = losses.hinge_generator(critic(y))
                            weight = losses.adaptive_weight(reconstruction, terms["g"], last_layer, elements)
                            terms["adaptive"] = weight * elements
                            loss = loss + config.adversarial_weight * weight * terms["g"]
                        terms["loss"] = loss
                        accepted = guard.accepts(loss, seen, batch.names)
                        if accepted:
                            accelerator.backward(loss)
                            if accelerator.sync_gradients and config.clip and seen >= config.clip_start:
                                accelerator.unscale_gradients(optimizer)  # and not those of the adversary
                                sums["grad"] = float(nn.utils.clip_grad_norm_(renderer.parameters(), config.clip))
                            optimizer.step()
                        optimizer.zero_grad()

                        # The adversary; the rendering gets no gradient
                        critic.requires_grad_(True)
                        if adversarial and accepted:
                            terms["d"] = losses.hinge_discriminator(critic(x), critic(y.detach()))
                            accelerator.backward(terms["d"])
                            critic_optimizer.step()
                        critic_optimizer.zero_grad()
                    for name, value in terms.items():
                        sums[name] = sums.get(name, 0.0) + float(value.detach()) / config.accumulate
                ema.update()

                seen += phase.batch
                sums = accelerators.mean_over_processes(accelerator, sums)
                if crossed(seen, phase.batch, config.log_every):
                    folder.log(samples=seen, lr=lr, seconds=round(timer.seconds(), 2), skipped=guard.skipped, **sums)
                    accelerator.log(sums, step=seen)
                progress.advance(phase.batch, f"l1 {sums['l1']:.3f}")
                if seen == config.total or crossed(seen, phase.batch, config.save_every):
                    folder.save(seen, accelerator.save_state, config.keep, accelerator.wait_for_everyone)

    # The averaged weights are what the run was for
    with ema.applied():
        folder.export(model)
    folder.finish(samples=config.total, seconds=round(timer.seconds(), 1), skipped=guard.skipped)


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
    """Refuses models that cannot be trained, and phases whose clips the model does not take as they are."""
    model.require_posterior(f"model={getattr(config, 'model', model.title)}")
    rule = replace(model.spec, time_factor=rate * model.spec.time_factor)
    for i, phase in enumerate(config.phases):
        if rule.first_frames == 1:  # the others pad in a way of their own, images included
            rule.check_frames(phase.frames, f"phases[{i}].frames")
        rule.check_square(phase.size, f"phases[{i}].size")


def posterior_noise(seed: int, samples: list[int], shape: tuple[int, ...]) -> Tensor:
    """The posterior's noise of each clip, a function of (seed, sample)."""
    return torch.stack([torch.randn(shape, generator=generator(seed, "posterior", sample)) for sample in samples])


def frames_shown(seed: int, seen: int, count: int, frames: int) -> Tensor | None:
    """Which frames LPIPS looks at in the step after `seen` samples; None is all."""
    if not 0 < count < frames:
        return None
    return torch.randperm(frames, generator=generator(seed, "lpips", seen))[:count].sort().values


def describe(config: TrainVAE) -> str:
    """Parameters, FLOPs and memory of a step of each phase, for `--dry-run`."""
    with torch.device("meta"):
        model = vae.build(config.model, **config.model_args)
    check_model(config, model)
    return describe_phases(config, config.model, model, model)


def describe_phases(config: TrainVAE | TrainRefine, name: str, model: VideoVAE, renderer: nn.Module, rate=1) -> str:
    """A line a phase; `model` and `renderer` on the meta device."""
    if config.gradient_checkpointing:
        model.train().enable_gradient_checkpointing()
    held = cost.parameters(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines = []
    for phase in config.phases:
        with torch.device("meta"):
            x = torch.empty(1, 3, phase.frames, phase.size, phase.size)
            noise = torch.empty(1, *model.spec.latent_shape((phase.frames - 1) // rate + 1, phase.size, phase.size))
        step = cost.forward_cost(lambda x=x, noise=noise: renderer(x, noise))
        what = f"{name}, {phase.batch} clips of {phase.frames}x{phase.size}x{phase.size}"
        lines.append(cost.describe_step(what, trained, held, phase.batch, step))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """`lvdm train vae`."""
    return program(TrainVAE, argv, run, describe)


if __name__ == "__main__":
    accelerators.leave(main())
