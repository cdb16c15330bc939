"""How fast a transformer trains and draws here (`lvdm bench dit`)."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import torch

import dit
from dit.conditioning import Condition
from dit.cost import sample_cost
from dit.sampling import draw
from lvdm import accelerator as accelerators
from lvdm import bench, cost
from lvdm.bench import DTYPES, Work
from lvdm.cli import program
from lvdm.diffusion import objective
from lvdm.ema import EMA
from lvdm.rng import generator
from lvdm.samplers import make_scheduler
from sample.bench.configs import BenchDiT

HEAD = ("work", "way")


def run(config: BenchDiT) -> None:
    """Prints and keeps a row a way of running; `times` is beside the eager step and the plain loop."""
    device = accelerators.device()
    ways = ["eager", "compiled"] if config.compile else ["eager"]
    models = {way: build(config, way, device) for way in ways}
    step, guided = "training step", f"{config.steps} guided steps"
    works: dict[tuple, Work] = {(bench.MATMUL, config.precision): bench.product(device, config.precision)}
    works |= {
        (step, way): replace(training_step(config, model, device), compiled=way == "compiled")
        for way, model in models.items()
    }
    works |= {
        (guided, f"{way}, one doubled batch"): replace(sampling(config, model, device), compiled=way == "compiled")
        for way, model in models.items()
    }
    works[guided, "plain loop, two batches"] = plain_loop(config, models["eager"], device)
    rows = bench.time_all(works, config.rounds, device)

    slow = {step: (step, "eager"), guided: (guided, "plain loop, two batches")}
    beside = {key: slow[key[0]] for key in rows if key[0] in slow and key != slow[key[0]]}
    shape = f"{config.channels}x{config.frames}x{config.size[0]}x{config.size[1]}"
    count = cost.parameters(models["eager"])
    notes = [f"{count:,} parameters, {config.batch} latents of {shape}, {config.precision}, {config.rounds} rounds"]
    bench.report(config, f"lvdm bench: {config.model}", device, HEAD, rows, beside, notes=notes)


def build(config: BenchDiT, way: str, device: torch.device) -> Any:
    """A class-conditional model whose prediction is not zero, as a fresh one's is."""
    torch.manual_seed(0)
    shape = {"in_channels": config.channels, "frames": config.frames, "size": tuple(config.size)}
    model = dit.build(config.model, **shape, condition="class", num_classes=101, **config.model_args)
    torch.nn.init.normal_(model.head.linear.weight, std=0.02)
    model.set_attention_backend(config.attention)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if way == "compiled":
        model.compile_repeated_blocks()
    return model.to(device)


def guided_flops(config: BenchDiT, model: Any) -> int:
    """Of a batch's sampling: every step sees each latent with its class and without."""
    return 2 * config.steps * config.batch * sample_cost(model).flops


def training_step(config: BenchDiT, model: Any, device: torch.device) -> Work:
    """What `lvdm train dit` does in a step, but for reading latents: loss, gradient, clipping, AdamW, average."""
    learnt, ema = objective("noise"), EMA(model, 0.9999)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    shape = (config.batch, config.channels, config.frames, *config.size)
    x0, noise = torch.randn(shape, device=device), torch.randn(shape, device=device)
    t = torch.randint(1000, (config.batch,), device=device)
    condition = Condition(torch.randint(101, (config.batch,), device=device))

    def step() -> None:
        model.train()
        noisy = learnt.add_noise(x0, t, noise)
        with torch.autocast(device.type, DTYPES[config.precision], enabled=config.precision != "fp32"):
            output = model(noisy, t, condition)
            loss = learnt.losses(output, x0, noisy, t, noise)["loss"].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    def held() -> Iterator[torch.Tensor]:
        return chain(model.parameters(), ema.shadow.values())

    return Work(step, sample_cost(model, backward=True).passes() * config.batch, held=held, turns=2)


def sampling(config: BenchDiT, model: Any, device: torch.device) -> Work:
    """What `lvdm sample` does for a batch of latents."""
    condition = Condition(torch.arange(config.batch))
    generators = [generator(0, "bench", i) for i in range(config.batch)]

    @torch.no_grad()
    def videos() -> None:
        model.eval()
        with torch.autocast(device.type, DTYPES[config.precision], enabled=config.precision != "fp32"):
            draw(model, condition, generators, make_scheduler("noise"), config.steps, guidance=7.0)

    return Work(videos, guided_flops(config, model), held=model.parameters)


def plain_loop(config: BenchDiT, model: Any, device: torch.device) -> Work:
    """What one would write first: the model with and without its class, one after the other, autocast in each call."""
    scheduler = make_scheduler("noise")
    labels = torch.arange(config.batch, device=device)
    shape = (config.batch, config.channels, config.frames, *config.size)

    def denoise(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, DTYPES[config.precision], enabled=config.precision != "fp32"):
            return model(x, t, Condition(labels)).float()

    @torch.no_grad()
    def videos() -> None:
        model.eval()
        scheduler.set_timesteps(config.steps)
        x = torch.randn(shape, device=device)
        for timestep in scheduler.timesteps:
            t = timestep.to(device).expand(config.batch)
            given, null = denoise(x, t, labels), denoise(x, t, torch.full_like(labels, -1))
            eps = null[:, : config.channels] + 7.0 * (given - null)[:, : config.channels]
            x = scheduler.step(torch.cat([eps, given[:, config.channels :]], 1), timestep, x).prev_sample

    return Work(videos, guided_flops(config, model), held=model.parameters)


def main(argv: list[str] | None = None) -> int:
    """`lvdm bench dit`."""
    return program(BenchDiT, argv, run)
