"""How fast a VAE learns here, and in how much memory (`lvdm bench train-vae`): the steps of `lvdm train vae` itself."""

from collections.abc import Iterator
from functools import cache
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor

import vae
from lvdm import accelerator as accelerators
from lvdm import bench
from lvdm.bench import Row, Work
from lvdm.cli import program
from lvdm.ema import EMA
from lvdm.meter import Meter
from lvdm.rng import generator
from train.adversary import Adversary
from train.budget import step_costs
from train.configs import BenchTrainVAE, ClipPhase, TrainVAE
from train.loop import Descent, LossGuard, adam, set_rate
from train.vae import check_model, frame_terms, latent_terms, posterior_noise, total
from vae.losses import Rendered

HEAD = ("losses", "activations", "model")


def run(config: BenchTrainVAE) -> dict[tuple, Row]:
    """Prints and keeps a row a kind of losses, of activations kept or computed again, and a model; `times` is beside
    `config.model`."""
    device = accelerators.device()
    recipes = {losses: recipe(config, losses, device) for losses in config.losses}
    first = next(iter(recipes.values()))
    accelerator = accelerators.for_training(first)
    named = bench.named(config.model, config.model_args, config.against)
    learners = {name: Learner(first, accelerator, *model, config.compile) for name, model in named.items()}
    works: dict[tuple, Work] = {(bench.MATMUL, first.precision): bench.product(device, first.precision)}
    saving = {"kept": False, "recomputed": True} if config.checkpointing else {"kept": False}
    for losses, activations, name in product(recipes, saving, learners):
        works[losses, activations, name] = learners[name].work(recipes[losses], saving[activations])
    rows = bench.time_all(works, config.rounds, device)

    beside = {key: (*key[:2], config.model) for key in rows if len(key) == len(HEAD) and key[2] != config.model}
    kind = first.phases[0]
    shape = f"{kind.batch}x{kind.frames}x{kind.size}x{kind.size}"
    notes = [
        f"{shape}, {first.precision}, {config.rounds} rounds; FLOPs: of the model, without what is computed again",
        *([f"times: how many times as long as {config.model}"] if beside else []),
    ]
    bench.report(config, "lvdm bench: training step of a VAE", device, HEAD, rows, beside, notes=notes)
    return rows


def recipe(config: BenchTrainVAE, losses: str, device: torch.device) -> TrainVAE:
    """What `lvdm train vae` would be given: its own losses from the first step on, or L1 alone."""
    cuda = device.type == "cuda"
    frames, size = config.frames or (25 if cuda else 9), config.size or (256 if cuda else 64)
    phase = ClipPhase(samples=config.batch, batch=config.batch, lr=1e-5, frames=frames, size=size)
    precision = accelerators.native_precision(device) if config.precision == "auto" else config.precision
    alone = {"lpips_weight": 0.0, "adversarial_weight": 0.0, "kl_weight": 0.0} if losses == "l1" else {}
    return TrainVAE(phases=[phase], precision=precision, non_finite="skip", **alone)


class Learner:
    """A model with its optimizer and average, whose steps differ in their losses and in what they keep."""

    def __init__(self, config: TrainVAE, accelerator: Any, name: str, options: dict[str, Any], compile: bool):
        torch.manual_seed(0)
        self.accelerator, self.model = accelerator, vae.build(name, **options)
        check_model(config, self.model)
        kind = config.phases[0]
        self.flops = step_costs(config, self.model, self.model)[kind.frames, kind.size].passes() * kind.batch
        if compile:
            self.model.compile_repeated_blocks()
        self.compiled = compile
        self.ema = EMA(self.model.to(accelerator.device).train(), config.ema)
        self.renderer, self.optimizer = accelerator.prepare(self.model, adam(self.model.parameters(), config))
        set_rate(self.optimizer, kind.lr)

    def work(self, config: TrainVAE, recompute: bool) -> Work:
        """Forward and backward pass, optimizer, average and, where there is one, the adversary's step."""
        accelerator, kind = self.accelerator, config.phases[0]
        device, samples, names = accelerator.device, list(range(kind.batch)), ["a random clip"]
        clips = torch.rand(kind.batch, 3, kind.frames, kind.size, kind.size, generator=generator(0, "bench"))
        x = clips.mul(2).sub(1).to(device)
        latents = self.model.spec.latent_shape(kind.frames, kind.size, kind.size)
        noise = posterior_noise(0, samples, latents).to(device)
        judges = cache(lambda: self.judges(config))  # made in the first turn, so that their memory counts

        def step() -> None:
            terms, adversary, descent = judges()
            (self.model.enable_gradient_checkpointing if recompute else self.model.disable_gradient_checkpointing)()
            with accelerator.accumulate(self.renderer), accelerators.autocast(accelerator):
                rendered = Rendered(x, *self.renderer(x, noise), noise, samples, 0)
                descent.take(total(terms, adversary, rendered)["loss"], 0, names)
                if adversary:
                    adversary.learn(rendered)
            self.ema.update()
            if adversary:
                adversary.step(kind.lr, 0, names)

        return Work(step, self.flops, kind.batch * kind.frames, self.held, turns=2, compiled=self.compiled)

    def judges(self, config: TrainVAE) -> tuple[list[Any], Adversary | None, Descent]:
        """The terms of the loss, the adversary, and the one who steps."""
        accelerator = self.accelerator
        terms = [*frame_terms(config, accelerator), *latent_terms(config, self.model, accelerator.device)]
        guard = LossGuard(config, None, accelerator)  # which asks for a folder only when it stops a run
        adversary = None
        if config.adversarial_weight:
            adversary = Adversary(config, accelerator, self.model.last_layer, guard, Meter(accelerator))
        return terms, adversary, Descent(accelerator, self.renderer, self.optimizer, guard)

    def held(self) -> Iterator[Tensor]:
        """Weights, their average, and the moments of Adam once there are some."""
        moments = (value for state in self.optimizer.state.values() for value in state.values())
        return chain(self.model.parameters(), self.model.buffers(), self.ema.shadow.values(), moments)


def main(argv: list[str] | None = None) -> int:
    """`lvdm bench train-vae`."""
    return program(BenchTrainVAE, argv, run)
