"""A diffusion transformer learns the latents of a store (`lvdm train dit`, `accelerate launch -m train.dit`)."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dit
from dit.conditioning import Condition
from lvdm import accelerator as accelerators
from lvdm import cost
from lvdm.cli import program
from lvdm.diffusion import GaussianDiffusion
from lvdm.ema import EMA
from lvdm.errors import UserError
from lvdm.latents import LatentSpace, LatentStore, Manifest, sample_posterior
from lvdm.progress import bar
from lvdm.rng import generator, item_at
from lvdm.run import RunFolder, Timer
from train.configs import TrainDiT
from train.loop import LossGuard, adam, crossed, learning_rate, load_weights, micro_batches, phases_left, set_rate

TIMESTEPS = 1000


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
    draws = Draws(config, LatentStore(config.latents))
    folder.bind(latents=draws.store.manifest.hash())
    diffusion = GaussianDiffusion(TIMESTEPS)
    torch.manual_seed(config.seed)
    model = build_model(config, draws.store)
    optimizer = adam(model.parameters(), config)
    denoiser, optimizer = accelerator.prepare(model, optimizer)
    # After the model has moved to its device
    ema, timer, guard = EMA(model, config.ema), Timer(), LossGuard(config, folder, accelerator)
    accelerator.register_for_checkpointing(ema, timer, guard)

    # Resume
    seen = folder.resume(accelerator.load_state)
    folder.log(samples=seen, event="start", threads=threads, processes=accelerator.num_processes, device=str(device))
    accelerator.init_trackers("lvdm")

    denoiser.train()
    with bar("DiT", config.total, seen, accelerator.is_main_process) as progress:
        for phase, _, start, end in phases_left(config.phases, config.phases, seen):
            batches = micro_batches(draws, collate, start, end, phase.batch, config, accelerator)
            for seen in range(start, end, phase.batch):
                lr = learning_rate(config, phase, seen)
                set_rate(optimizer, lr)
                sums: dict[str, float] = {}
                for _ in range(config.accumulate):
                    batch = next(batches).to(device)
                    with accelerator.accumulate(denoiser), accelerator.autocast():
                        condition = Condition(batch.label if model.label_embed is not None else None)
                        noisy = diffusion.add_noise(batch.latent, batch.timestep, batch.noise)
                        output = denoiser(noisy, batch.timestep, condition.drop(batch.dropped))
                        terms = diffusion.losses(output, batch.latent, noisy, batch.timestep, batch.noise)
                        terms = {name: value.mean() for name, value in terms.items()}
                        if guard.accepts(terms["loss"], seen, batch.names):
                            accelerator.backward(terms["loss"])
                            if accelerator.sync_gradients and config.clip and seen >= config.clip_start:
                                norm = accelerator.clip_grad_norm_(denoiser.parameters(), config.clip)
                                sums["grad"] = float(norm)
                            optimizer.step()
                        optimizer.zero_grad()
                    for name, value in terms.items():
                        sums[name] = sums.get(name, 0.0) + float(value.detach()) / config.accumulate
                ema.update()

                seen += phase.batch
                sums = accelerators.mean_over_processes(accelerator, sums)
                if crossed(seen, phase.batch, config.log_every):
                    folder.log(samples=seen, lr=lr, seconds=round(timer.seconds(), 2), skipped=guard.skipped, **sums)
                    accelerator.log(sums, step=seen)
                progress.advance(phase.batch, f"mse {sums['mse']:.3f}")
                if seen == config.total or crossed(seen, phase.batch, config.save_every):
                    folder.save(seen, accelerator.save_state, config.keep, accelerator.wait_for_everyone)

    # The averaged weights are what the run was for
    with ema.applied():
        folder.export(model)
    folder.finish(samples=config.total, seconds=round(timer.seconds(), 1), skipped=guard.skipped)
    accelerators.close(accelerator)
    return folder.path / "export"


@dataclass
class Batch:
    """Latents of a micro-batch (B, C, t, h, w), normalised, with all that is drawn for them."""

    names: list[str]
    latent: Tensor
    noise: Tensor
    timestep: Tensor
    label: Tensor
    dropped: Tensor

    def to(self, device: torch.device) -> "Batch":
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return Batch(self.names, **moved)

    def pin_memory(self) -> "Batch":
        pinned = {k: v.pin_memory() for k, v in vars(self).items() if isinstance(v, Tensor)}
        return Batch(self.names, **pinned)


class Draws:
    """Everything that training sample i needs, as a function of (seed, i)."""

    def __init__(self, config: TrainDiT, store: LatentStore):
        self.seed, self.label_dropout, self.store = config.seed, config.label_dropout, store

    def __call__(self, sample: int) -> dict[str, Any]:
        item = item_at(self.seed, sample, len(self.store))
        record = self.store[item]
        g = generator(self.seed, "dit", sample)
        latent = self.store.scale.normalise(sample_posterior(record["mean"], record["logvar"], g))
        return {
            "name": f"{self.store.manifest.sources[record['source']]}@{record['start']}",
            "latent": latent,
            "noise": torch.randn(latent.shape, generator=g),
            "timestep": torch.randint(TIMESTEPS, (), generator=g),
            "label": torch.tensor(record["label"]),
            "dropped": torch.rand((), generator=g) < self.label_dropout,
        }


def collate(items: list[tuple[int, dict[str, Any]]]) -> Batch:
    """Stacks (sample number, draws) pairs."""
    draws = [draw for _, draw in items]
    keys = ("latent", "noise", "timestep", "label", "dropped")
    return Batch([d["name"] for d in draws], **{k: torch.stack([d[k] for d in draws]) for k in keys})


def build_model(config: TrainDiT, store: LatentStore) -> Any:
    """The transformer that fits the store: fresh, or with the weights of `config.init`."""
    model = fresh_model(config, store.manifest, LatentSpace.of(store))
    if config.init:
        start = dit.load(config.init)
        shape = [start.config.in_channels, start.config.frames, *start.config.size]
        if shape != store.manifest.shape:
            raise UserError(
                f"init={config.init}: made for latents of {shape}, those of {config.latents} are {store.manifest.shape}"
            )
        load_weights(model, start.state_dict(), f"init={config.init}")
    return model


def fresh_model(config: TrainDiT, manifest: Manifest, latents: LatentSpace) -> Any:
    """The transformer that fits a store, with new weights."""
    channels, frames, *size = manifest.shape
    conditional = bool(manifest.classes) if config.condition == "auto" else config.condition == "class"
    if conditional and not manifest.classes:
        raise UserError(f"condition=class: the store {config.latents} has no classes; make it with labels=folder")
    fits = {
        "in_channels": channels,
        "frames": frames,
        "size": tuple(size),
        "condition": "class" if conditional else "none",
        "num_classes": len(manifest.classes) if conditional else 0,
        "label_dropout": config.label_dropout,
        "latents": asdict(latents),
    }
    for key in fits.keys() & config.model_args.keys():
        raise UserError(f"model_args.{key}: is not to be set, it follows from the latent store and the other keys")
    model = dit.build(config.model, **fits, **config.model_args)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def describe(config: TrainDiT) -> str:
    """Parameters, FLOPs and memory of a step of each phase, for `--dry-run`."""
    store = LatentStore(config.latents)
    latents, lines = LatentSpace.of(store), []
    with torch.device("meta"):
        model = fresh_model(config, store.manifest, latents)
        latent = torch.empty(1, *store.manifest.shape)
        label = torch.zeros(1, dtype=torch.int64) if model.label_embed is not None else None
        step = cost.forward_cost(lambda: model(latent, torch.zeros(1), Condition(label)))
    count = cost.parameters(model)
    for phase in config.phases:
        name = f"{config.model}, {phase.batch} latents of {tuple(latent.shape[1:])}"
        lines.append(cost.describe_step(name, count, count, phase.batch, step))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """`lvdm train dit`."""
    return program(TrainDiT, argv, run, describe)


if __name__ == "__main__":
    sys.exit(main())
