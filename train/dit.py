"""A diffusion transformer learns the latents of a store (`lvdm train dit`, `accelerate launch -m train.dit`)."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dit
from dit.conditioning import Condition
from dit.cost import sample_cost
from lvdm import accelerator as accelerators
from lvdm import cost, trackers
from lvdm.cli import program
from lvdm.diffusion import objective
from lvdm.ema import EMA
from lvdm.errors import UserError
from lvdm.latents import LatentSpace, LatentStore, Record, sample_posterior
from lvdm.meter import Meter, Pace
from lvdm.progress import bar
from lvdm.rng import generator, item_at
from lvdm.run import RunFolder, Timer
from train.configs import TrainDiT
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
from train.preview import Preview


def run(config: TrainDiT) -> Path:
    """Trains, resumes or finds finished the run at `config.out`; returns its export folder."""
    accelerator = accelerators.for_training(config)
    with accelerator.main_process_first():
        folder = RunFolder(config.out, config, accelerator.is_main_process)
    if folder.finished:
        accelerators.close(accelerator)
        return folder.path / "export"
    device, threads = accelerator.device, accelerators.threads(config.threads, folder.records())

    # Data, model, optimizer
    draws, learnt = Draws(config), objective(config.objective)
    folder.bind(**draws.hashes())
    torch.manual_seed(config.seed)
    model = build_model(config, draws).to(device)
    preview = Preview(config, model, draws.space) if config.preview_every and accelerator.is_main_process else None
    # Before a bf16 engine rounds the weights
    ema, timer, guard = EMA(model, config.ema), Timer(), LossGuard(config, folder, accelerator)
    meter, flops = Meter(accelerator), sample_cost(model, config.images_per_video, backward=True).passes()
    denoiser, optimizer = accelerator.prepare(model, adam(model.parameters(), config))
    descent = Descent(accelerator, denoiser, optimizer, guard)
    accelerator.register_for_checkpointing(ema, timer, guard, meter)

    # Resume
    accelerators.check_engine(accelerator, folder.records(), folder.latest())
    seen = folder.resume(accelerator.load_state)
    start_of = {"threads": threads, "processes": accelerator.num_processes, "engine": accelerators.engine(accelerator)}
    folder.log(samples=seen, event="start", device=str(device), **start_of)
    trackers.start(accelerator, folder.path, config)

    denoiser.train()
    pace = Pace(flops, accelerator)
    with bar("DiT", config.total, seen, accelerator.is_main_process) as progress:
        logged, note = seen, ""
        for phase, _, start, end in phases_left(config.phases, config.phases, seen):
            batches = pace.wait(micro_batches(draws, collate, start, end, phase.batch, config, accelerator))
            for seen in range(start, end, phase.batch):
                lr = learning_rate(config, phase, seen)
                set_rate(optimizer, lr)
                clip = config.clip if config.clip and seen >= config.clip_start else math.inf
                for _ in range(config.accumulate):
                    batch = next(batches).to(device)
                    with accelerator.accumulate(denoiser):  # which casts by itself, as it was prepared
                        noisy = learnt.add_noise(batch.latent, batch.timestep, batch.noise)
                        output = denoiser(noisy, batch.timestep, batch.condition(model.label_embed is not None))
                        terms = learnt.losses(output, batch.latent, noisy, batch.timestep, batch.noise)
                        accepted, norm = descent.take(terms["loss"].mean(), seen, batch.names, clip)
                        if accepted:
                            measure(meter, terms, batch.timestep)
                        if norm is not None:
                            meter.add("grad", torch.tensor(norm, device=device))
                ema.update()

                seen += phase.batch
                meter.step()
                if crossed(seen, phase.batch, config.log_every):
                    means = meter.read()
                    speed, logged = pace.read(seen - logged), seen
                    state = {"lr": lr, "seconds": round(timer.seconds(), 2), "skipped": guard.skipped}
                    folder.log(samples=seen, **state, **means, **speed)
                    accelerator.log({**means, **speed, "lr": lr}, step=seen)
                    note = f"mse {means['mse']:.3f}" if "mse" in means else ""
                progress.advance(phase.batch, note)
                if preview and crossed(seen, phase.batch, config.preview_every):
                    with pace.paused(), ema.applied(), accelerators.autocast(accelerator):
                        preview.show(folder.path / "previews", seen, accelerator.trackers)
                if seen == config.total or crossed(seen, phase.batch, config.save_every):
                    folder.save(seen, accelerator.save_state, config.keep, accelerator.wait_for_everyone)

    # The averaged weights are what the run was for
    with ema.applied():
        folder.export(model)
    folder.finish(samples=config.total, seconds=round(timer.seconds(), 1), skipped=guard.skipped)
    accelerators.close(accelerator)
    return folder.path / "export"


def measure(meter: Meter, terms: dict[str, Tensor], timestep: Tensor) -> None:
    """Adds the loss and its parts to the log, and the error by quarter of the timesteps: mse_q1 is the cleanest."""
    for name, values in terms.items():
        meter.add(name, values)
    for quarter in range(4):
        meter.add(f"mse_q{quarter + 1}", terms["mse"], where=(timestep * 4 // 1000).long() == quarter)


# ----------------------------------------------------------------------------------------------------------------------
# Draws


@dataclass
class Batch:
    """Normalised latents of a micro-batch (B, C, t + I, h, w), I images behind the t frames of each video, with all
    that is drawn for them."""

    names: list[str]
    latent: Tensor
    noise: Tensor
    timestep: Tensor
    label: Tensor
    dropped: Tensor
    image_label: Tensor
    image_dropped: Tensor

    def to(self, device: torch.device) -> "Batch":
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return Batch(self.names, **moved)

    def pin_memory(self) -> "Batch":
        pinned = {k: v.pin_memory() for k, v in vars(self).items() if isinstance(v, Tensor)}
        return Batch(self.names, **pinned)

    def condition(self, conditional: bool) -> Condition:
        """The classes of videos and images, some of them dropped, or none."""
        if not conditional:
            return Condition()
        images = self.image_label if self.image_label.shape[1] else None
        return Condition(self.label, images).drop(self.dropped, self.image_dropped)


class Draws:
    """Everything that training sample i needs, as a function of (seed, i)."""

    def __init__(self, config: TrainDiT):
        self.seed, self.label_dropout = config.seed, config.label_dropout
        self.timestep = objective(config.objective).timestep
        self.store, self.images = open_stores(config)
        self.space = LatentSpace.of(self.store)
        self.images_per_video = config.images_per_video

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(C, t + I, h, w) of a sample."""
        c, t, h, w = self.store.manifest.shape
        return c, t + self.images_per_video, h, w

    def hashes(self) -> dict[str, str]:
        """What a run is bound to."""
        images = {"images": self.images.manifest.hash()} if self.images else {}
        return {"latents": self.store.manifest.hash(), **images}

    def __call__(self, sample: int) -> dict[str, Any]:
        g = generator(self.seed, "dit", sample)
        record = self.store[item_at(self.seed, sample, len(self.store))]
        latent, noise = self._latent(record, g)
        timestep, dropped = self.timestep(g), torch.rand((), generator=g) < self.label_dropout
        first = sample * self.images_per_video
        images = [self._image(number) for number in range(first, first + self.images_per_video)]
        return {
            "name": f"{self.store.manifest.sources[record['source']]}@{record['start']}",
            "latent": torch.cat([latent, *(image["latent"] for image in images)], dim=1),
            "noise": torch.cat([noise, *(image["noise"] for image in images)], dim=1),
            "timestep": timestep,
            "label": torch.tensor(record["label"]),
            "dropped": dropped,
            "image_label": torch.tensor([image["label"] for image in images], dtype=torch.int64),
            "image_dropped": torch.tensor([image["dropped"] for image in images], dtype=torch.bool),
        }

    def _image(self, number: int) -> dict[str, Any]:
        """The image `number`, counted since the start of training."""
        g = generator(self.seed, "dit image", number)
        record = self.images[item_at(self.seed, number, len(self.images))]
        latent, noise = self._latent(record, g)
        dropped = torch.rand((), generator=g) < self.label_dropout
        return {"latent": latent, "noise": noise, "label": record["label"], "dropped": dropped}

    def _latent(self, record: Record, g: torch.Generator) -> tuple[Tensor, Tensor]:
        latent = self.store.scale.normalise(sample_posterior(record["mean"], record["logvar"], g))
        return latent, torch.randn(latent.shape, generator=g)


def collate(items: list[tuple[int, dict[str, Any]]]) -> Batch:
    """Stacks (sample number, draws) pairs."""
    draws = [draw for _, draw in items]
    stacked = {key: torch.stack([draw[key] for draw in draws]) for key in draws[0] if key != "name"}
    return Batch([draw["name"] for draw in draws], **stacked)


def open_stores(config: TrainDiT) -> tuple[LatentStore, LatentStore | None]:
    """The videos' store and, if asked for, the images', which must be of the same VAE, size and classes."""
    if config.images_per_video and not config.images:
        raise UserError(
            f"images_per_video={config.images_per_video}: expected images=STORE beside it, a store of single frames"
            " (lvdm train latents frames=1)"
        )
    if config.images and not config.images_per_video:
        raise UserError(f"images={config.images}: expected images_per_video beside it, e.g. images_per_video=8")
    store = LatentStore(config.latents)
    if not config.images:
        return store, None
    images, m = LatentStore(config.images), store.manifest
    images.require(vae_sha256=m.vae_sha256, size=m.size, shape=[m.shape[0], 1, *m.shape[2:]])
    if config.condition != "none" and m.classes:
        images.require(classes=m.classes)
    return store, images


# ----------------------------------------------------------------------------------------------------------------------
# Model


def build_model(config: TrainDiT, draws: Draws) -> Any:
    """The transformer that fits the store: fresh, or with the weights of `config.init`."""
    model = fresh_model(config, draws)
    if config.init:
        start = dit.load(config.init)
        shape = [start.config.in_channels, start.config.frames, *start.config.size]
        there = draws.store.manifest.shape
        if shape != there:
            raise UserError(f"init={config.init}: made for latents of {shape}, those of {config.latents} are {there}")
        load_weights(model, start.state_dict(), f"init={config.init}")
    return model


def fresh_model(config: TrainDiT, draws: Draws) -> Any:
    """The transformer that fits the store, with new weights."""
    channels, frames, *size = draws.store.manifest.shape
    classes = draws.space.classes
    conditional = bool(classes) if config.condition == "auto" else config.condition == "class"
    if conditional and not classes:
        raise UserError(f"condition=class: the store {config.latents} has no classes; make it with labels=folder")
    fits = {
        "in_channels": channels,
        "frames": frames,
        "size": tuple(size),
        "condition": "class" if conditional else "none",
        "num_classes": len(classes) if conditional else 0,
        "label_dropout": config.label_dropout,
        "objective": config.objective,
        "latents": asdict(draws.space),
        **({"learn_sigma": False} if config.objective == "flow" else {}),
    }
    for key in fits.keys() & config.model_args.keys():
        raise UserError(f"model_args.{key}: is not to be set, it follows from the latent store and the other keys")
    model = dit.build(config.model, **fits, **config.model_args)
    model.set_attention_backend(config.attention)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if config.compile:
        model.compile_repeated_blocks()
    return model


def describe(config: TrainDiT) -> str:
    """Parameters, FLOPs and memory of a step of each phase, for `--dry-run`."""
    draws = Draws(config)
    with torch.device("meta"):
        model = fresh_model(config, draws)
    count, lines = cost.parameters(model), []
    step = sample_cost(model, config.images_per_video, backward=True, checkpointing=config.gradient_checkpointing)
    for phase in config.phases:
        name = f"{config.model}, {phase.batch} latents of {draws.shape}"
        flops, kept = step.passes() * phase.batch, step.activation_bytes * phase.batch // config.accumulate
        lines.append(cost.describe_step(name, count, count, flops, kept))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """`lvdm train dit`."""
    return program(TrainDiT, argv, run, describe)


if __name__ == "__main__":
    accelerators.leave(main())
