"""How fast a transformer trains and draws here (`lvdm bench dit`): every way of running it in turn, in one run."""

import json
import statistics
from collections.abc import Callable
from typing import Any

import torch

import dit
from dit.conditioning import Condition
from dit.sampling import draw
from lvdm import accelerator as accelerators
from lvdm import cost
from lvdm.cli import program
from lvdm.config import to_dict
from lvdm.diffusion import objective
from lvdm.ema import EMA
from lvdm.files import write_text
from lvdm.meter import peak_tflops
from lvdm.rng import generator
from lvdm.samplers import make_scheduler
from sample.bench import alternate, ratio
from sample.configs import BenchDiT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def run(config: BenchDiT) -> None:
    """Prints a row a way of running: seconds, TFLOP/s, share of the device's peak, peak memory; and their ratios."""
    device = accelerators.device()
    ways = ["eager", "compiled"] if config.compile else ["eager"]
    models = {way: build(config, way, device) for way in ways}
    flops = forward_flops(config)
    shape = f"{config.channels}x{config.frames}x{config.size[0]}x{config.size[1]}"
    count = cost.parameters(models["eager"])
    print(f"{config.model}, {count:,} parameters, {config.batch} latents of {shape}, {config.precision}, {device}")

    results = {}
    steps = {way: training_step(config, model, device) for way, model in models.items()}
    results["training step"] = measure(config, steps, 3 * flops * config.batch, device)
    videos = {f"{way}, one doubled batch": sampling(config, model, device) for way, model in models.items()}
    videos["plain loop, two batches"] = plain_loop(config, models["eager"], device)
    passes = 2 * config.steps * config.batch
    results[f"{config.steps} guided steps of sampling"] = measure(config, videos, flops * passes, device)
    for title, rows in results.items():
        show(title, rows, device)
    if config.out:
        write_text(config.out, json.dumps({"config": to_dict(config), "rows": results}, indent=2) + "\n")


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
        model.compile_repeated_blocks(fullgraph=True)
    return model.to(device)


def forward_flops(config: BenchDiT) -> int:
    """Of one sample."""
    with torch.device("meta"):
        model = build(config, "eager", torch.device("meta"))
        x, label = torch.empty(1, config.channels, config.frames, *config.size), torch.zeros(1, dtype=torch.int64)
        return cost.forward_cost(lambda: model(x, torch.zeros(1), Condition(label))).flops


def training_step(config: BenchDiT, model: Any, device: torch.device) -> Callable[[], Any]:
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

    return step


def sampling(config: BenchDiT, model: Any, device: torch.device) -> Callable[[], Any]:
    """What `lvdm sample` does for a batch of latents."""
    condition = Condition(torch.arange(config.batch))
    generators = [generator(0, "bench", i) for i in range(config.batch)]

    @torch.no_grad()
    def videos() -> None:
        model.eval()
        with torch.autocast(device.type, DTYPES[config.precision], enabled=config.precision != "fp32"):
            draw(model, condition, generators, make_scheduler("noise"), config.steps, guidance=7.0)

    return videos


def plain_loop(config: BenchDiT, model: Any, device: torch.device) -> Callable[[], Any]:
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

    return videos


def measure(config: BenchDiT, ways: dict[str, Callable[[], Any]], flops: float, device: torch.device) -> dict[str, Any]:
    """Seconds of all rounds, and memory, of each way; the first call of each (compilation, start) is not counted."""
    peaks = {}
    for name, way in ways.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        way()
        peaks[name] = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    seconds = alternate({name: synchronised(way, device) for name, way in ways.items()}, config.rounds)
    return {name: {"seconds": times, "flops": flops, "peak_gib": peaks[name]} for name, times in seconds.items()}


def synchronised(way: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """`way`, until the device has done it."""

    def timed() -> None:
        way()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return timed


def show(title: str, rows: dict[str, Any], device: torch.device) -> None:
    """The table of one kind of work."""
    print(title)
    peak = peak_tflops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    last = list(rows)[-1]
    for name, row in rows.items():
        median = statistics.median(row["seconds"])
        spread = f"({min(row['seconds']):.4g} to {max(row['seconds']):.4g})"
        rate = row["flops"] / median / 1e12
        share = f"  {rate / peak:.0%} of the peak" if peak else ""
        memory = f"  {row['peak_gib']:.1f} GiB" if row["peak_gib"] else ""
        times = ratio({key: value["seconds"] for key, value in rows.items()}, last, name)
        print(f"  {name:<26} {median:9.4g} s {spread:<20} {rate:9.4g} TFLOP/s{share}{memory}  {times:.2f}x {last}")


def main(argv: list[str] | None = None) -> int:
    """`lvdm bench dit`."""
    return program(BenchDiT, argv, run)
