"""How long a generated video takes here, from noise to frames (`lvdm bench sample`): transformer, then D1 and D2."""

from dataclasses import replace

import torch

from lvdm import accelerator as accelerators
from lvdm import bench
from lvdm.bench import DTYPES, Row, Work
from lvdm.cli import program
from lvdm.rng import generator
from sample.bench import dit as bench_dit
from sample.bench import vae as bench_vae
from sample.bench.configs import BenchDiT, BenchSample
from sample.render import frames, require_refiner
from vae.base import VideoVAE

HEAD = ("work", "model")


def run(config: BenchSample) -> dict[tuple, Row]:
    """Prints and keeps what each part costs for a batch of videos, and how many a minute they make together."""
    device = accelerators.device()
    if config.precision == "auto":
        config.precision = accelerators.native_precision(device)
    refines = {"refine": True} if config.vae == "univae" and config.refine else {}
    model = bench_vae.opened(config.vae, refines | config.vae_args).to(device)
    require_refiner(model, config.refine, config.vae)
    drawn = latents_of(config, model)
    transformer = bench_dit.build(drawn, "compiled" if config.compile else "eager", device)

    works: dict[tuple, Work] = {(bench.MATMUL, config.precision): bench.product(device, config.precision)}
    works["sampling", config.model] = replace(bench_dit.sampling(drawn, transformer, device), compiled=config.compile)
    works["D1", config.vae] = rendering(config, model, refine=False)
    if config.refine:
        works["D2", config.vae] = rendering(config, model, refine=True)
    rows = bench.time_all(works, config.rounds, device)

    parts = {key: row.median for key, row in rows.items() if key[0] != bench.MATMUL}
    shape = f"{config.batch}x{config.frames}x{config.size}x{config.size}"
    notes = [f"{shape}, {config.steps} steps, {config.precision}, {config.rounds} rounds"]
    if None not in parts.values():
        whole = sum(parts.values())
        notes.append(f"{60 * config.batch / whole:.4g} videos a minute, without writing them")
        notes += [f"{name}: {100 * seconds / whole:.1f} % of the time" for (name, _), seconds in parts.items()]
    bench.report(config, f"lvdm bench: {config.model} and {config.vae}", device, HEAD, rows, notes=notes)
    return rows


def latents_of(config: BenchSample, model: VideoVAE) -> BenchDiT:
    """What the transformer has to draw; a UserError for a clip that the VAE does not take."""
    model.require_posterior(f"vae={config.vae}")
    model.spec.check_frames(config.frames, "frames")
    model.spec.check_square(config.size, "size")
    z, t, *size = model.spec.latent_shape(config.frames, config.size, config.size)
    same = {key: getattr(config, key) for key in ("model", "model_args", "batch", "precision", "attention", "steps")}
    return BenchDiT(**same, channels=z, frames=t, size=size)


def rendering(config: BenchSample, model: VideoVAE, refine: bool) -> Work:
    """What `lvdm sample` does with the latents of a batch, video by video, up to the files."""
    height = width = config.size
    latents = torch.randn(
        config.batch, *model.spec.latent_shape(config.frames, height, width), generator=generator(0, "bench")
    ).to(model.device)

    def videos() -> None:
        with torch.autocast(model.device.type, DTYPES[config.precision], enabled=config.precision != "fp32"):
            for latent in latents:
                bench_vae.drain(frames(model, latent[None], config.frames, refine))

    rendered = 2 * config.frames - 1 if refine else config.frames
    clip = (config.batch, 3, config.frames, height, width)
    flops = bench_vae.flops(bench_vae.on_meta(model), "refine" if refine else "decode", clip)
    return Work(videos, flops, config.batch * rendered, lambda: bench_vae.tensors(model))


def main(argv: list[str] | None = None) -> int:
    """`lvdm bench sample`."""
    return program(BenchSample, argv, run)
