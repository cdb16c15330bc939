"""How fast VAEs encode, decode and refine here, and in how much memory (`lvdm bench vae`, `lvdm bench refine`).

Whole clips and streams, ours and any other model, take turns in one run.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lvdm import accelerator as accelerators
from lvdm import bench, cost
from lvdm.bench import Row, Work
from lvdm.cli import program
from lvdm.errors import UserError, nearest
from lvdm.rng import generator
from sample.bench.configs import BenchModel, BenchRefine, BenchVAE
from sample.zoo import made
from vae.base import VideoVAE

WORKS = ("encode", "decode", "refine", "reconstruct")
HEAD = ("work", "way", "T", "model")
COMPILED = ", compiled"
"""Behind the name of a model whose blocks are."""
PIECE = 8
"""Frames, or latents, that a stream is given at a time."""


class Case(NamedTuple):
    """One row of the table."""

    work: str
    way: str
    """whole or stream."""
    frames: int
    """Of the clip; `refine` renders 2T - 1."""
    model: str


def measure(
    models: Mapping[str, VideoVAE],
    works: Sequence[str],
    shape: tuple[int, int, int, int],
    rounds: int = 3,
    precision: str = "fp32",
    stream: bool = False,
) -> dict[str, dict[str, Row]]:
    """{model: {work: Row}}: what `works` (of `WORKS`) of clips of `shape` (B, T, H, W) cost, all models in turn.

    Models stay as they are, on the device of the first; of those of another precision copies are measured. `stream`
    takes clips piece by piece. UserError for a work or a size that a model does not take.
    """
    device = next(iter(models.values())).device
    placed = {name: place(model, device, precision) for name, model in models.items()}
    batch, frames, *size = shape
    rows = bench.time_all(
        cases(placed, works, ["stream" if stream else "whole"], [frames], batch, size), rounds, device
    )
    return {name: {case.work: row for case, row in rows.items() if case.model == name} for name in models}


# ---------------------------------------------------------------------------------------------------------------------
# Works


def cases(
    models: Mapping[str, VideoVAE],
    works: Sequence[str],
    ways: Sequence[str],
    lengths: Sequence[int],
    batch: int,
    size: Sequence[int],
) -> dict[Case, Work]:
    """Every work on clips (batch, 3, T, *size) of every length; a UserError where a model does not do it."""
    twins = {name: on_meta(model) for name, model in models.items()}
    found = {}
    for case in map(Case._make, product(works, ways, lengths, models)):
        model, shape = models[case.model], (batch, 3, case.frames, *size)
        require(case, model, size)
        found[case] = Work(
            torch.no_grad()(partial(TURNS[case.way, case.work], model, inputs(case, model, shape), case.frames)),
            flops(twins[case.model], case.work, shape),
            batch * (2 * case.frames - 1 if case.work == "refine" else case.frames),
            partial(tensors, model),
            compiled=case.model.endswith(COMPILED),
        )
    return found


def require(case: Case, model: VideoVAE, size: Sequence[int]) -> None:
    """Refuses what the model does not do."""
    if case.work not in WORKS:
        raise UserError(f"works={case.work}: expected some of {', '.join(WORKS)}{nearest(case.work, WORKS)}")
    if case.work == "refine" and not model.spec.refines:
        raise UserError(
            f"{case.model}: has no refinement decoder to time: take univae with model_args.refine=true, or one after"
            " stage 2 (lvdm train refine)"
        )
    if case.way == "stream" and not model.streams:
        raise UserError(f"{case.model}: does not stream ({model.spec.inexact or 'codes have no posterior'})")
    model.spec.check_size(*size)


def inputs(case: Case, model: VideoVAE, shape: tuple[int, ...]) -> Tensor:
    """What the work is given: a clip in [-1, 1], latents or codes; of a stream a piece, which it is given repeatedly,
    so that the input takes no memory that grows."""
    batch, _, frames, *size = shape
    at_a_time = PIECE if case.way == "stream" else frames
    draws = generator(0, "bench")
    clip = torch.rand(batch, 3, at_a_time, *size, generator=draws).mul(2).sub(1).to(model.device, model.dtype)
    if case.work in ("encode", "reconstruct"):
        return clip
    if model.spec.discrete:
        with torch.no_grad():
            return model.codes(clip)
    z, t, *small = model.spec.latent_shape(frames, *size)
    at_a_time = PIECE if case.way == "stream" else t
    return torch.randn(batch, z, at_a_time, *small, generator=draws).to(model.device, model.dtype)


def pieces(piece: Tensor, count: int) -> Iterator[Tensor]:
    """`count` frames or latents, the same piece again and again."""
    for start in range(0, count, piece.shape[2]):
        yield piece[:, :, : count - start]


def posterior(model: VideoVAE, x: Tensor, frames: int) -> Any:
    return model.codes(x) if model.spec.discrete else model.encode(x)


def decoded(model: VideoVAE, z: Tensor, frames: int) -> Tensor:
    return model.decode(z, num_frames=frames).sample


def refined(model: VideoVAE, z: Tensor, frames: int) -> Tensor:
    return model.refine(z, num_frames=2 * frames - 1).sample


def reconstructed(model: VideoVAE, x: Tensor, frames: int) -> Tensor:
    return model.reconstruct(x)


def streamed_posteriors(model: VideoVAE, piece: Tensor, frames: int) -> None:
    drain(model.stream_encode(pieces(piece, frames)))


def streamed_frames(model: VideoVAE, piece: Tensor, frames: int, refine: bool = False) -> None:
    latents = pieces(piece, model.spec.latent_frames(frames))
    drain(model.stream_decode(latents, refine=refine, num_frames=2 * frames - 1 if refine else frames))


def streamed_reconstruction(model: VideoVAE, piece: Tensor, frames: int) -> None:
    latents = (part.mode() for part in model.stream_encode(pieces(piece, frames)))
    drain(model.stream_decode(latents, num_frames=frames))


def drain(stream: Iterable[Any]) -> None:
    """Takes all and keeps none."""
    for _ in stream:
        pass


TURNS: dict[tuple[str, str], Callable[[VideoVAE, Tensor, int], Any]] = {
    ("whole", "encode"): posterior,
    ("whole", "decode"): decoded,
    ("whole", "refine"): refined,
    ("whole", "reconstruct"): reconstructed,
    ("stream", "encode"): streamed_posteriors,
    ("stream", "decode"): streamed_frames,
    ("stream", "refine"): partial(streamed_frames, refine=True),
    ("stream", "reconstruct"): streamed_reconstruction,
}


# ---------------------------------------------------------------------------------------------------------------------
# Models


def opened(name: str, options: dict[str, Any]) -> VideoVAE:
    """The model, with weights that are the same in every run."""
    torch.manual_seed(0)
    return made(name, options).eval()


def place(model: VideoVAE, device: torch.device, precision: str) -> VideoVAE:
    """The model there in this precision: itself where it is so already, else a copy."""
    dtype = bench.DTYPES[precision]
    return model if (model.device, model.dtype) == (device, dtype) else copy.deepcopy(model).to(device, dtype)


def on_meta(model: VideoVAE) -> VideoVAE:
    """The same architecture without its numbers, to count with."""
    with torch.device("meta"):
        return type(model)(**model.options).eval().to("meta")


def flops(twin: VideoVAE, work: str, shape: tuple[int, ...]) -> float | None:
    """Of the whole clip at once, on the meta device; None for a model that looks at numbers, and these have none."""
    batch, channels, frames, *size = shape
    with torch.device("meta"):
        x = torch.empty(batch, channels, twin.spec.valid_frames(frames), *size)
        z = torch.empty(batch, *twin.spec.latent_shape(frames, *size))
    parts = {
        "encode": lambda: twin.codes(x) if twin.spec.discrete else twin._moments(x),
        "decode": lambda: twin._frames(z),  # `decode` looks at codes, which are not there
        "refine": lambda: twin._refined(z),
    }
    try:
        wanted = ("encode", "decode") if work == "reconstruct" else (work,)
        return float(sum(cost.forward_cost(torch.no_grad()(parts[part])).flops for part in wanted))
    except Exception:  # of a library
        return None


def tensors(model: VideoVAE) -> Iterator[Tensor]:
    return chain(model.parameters(), model.buffers())


# ---------------------------------------------------------------------------------------------------------------------
# The commands


def run(config: BenchVAE) -> dict[tuple, Row]:
    """Prints and keeps a row a work, way, length and model; `times` is beside `config.model`."""
    device = accelerators.device()
    named = bench.named(config.model, config.model_args, config.against)
    models = {name: opened(*model) for name, model in named.items()}
    rows, notes = timed(config, models, config.works, device)
    beside = {case: case._replace(model=config.model) for case in rows if len(case) == 4 and case.model != config.model}
    notes += [f"times: how many times as long as {config.model}"] if beside else []
    title = f"{config.model} beside {', '.join(config.against)}" if config.against else config.model
    report(config, title, rows, beside, notes, device)
    return rows


def run_refine(config: BenchRefine) -> dict[tuple, Row]:
    """Prints and keeps the same of D1 and D2; `times` is D2 beside D1, and the notes are for a rendered frame."""
    device = accelerators.device()
    refines = {"refine": True} if config.model == "univae" else {}
    models = {config.model: opened(config.model, refines | config.model_args)}
    rows, notes = timed(config, models, ["decode", "refine"], device)
    beside = {case: case._replace(work="decode") for case in rows if case[0] == "refine"}
    notes.append("times: how many times as long as decode")
    for d2, d1 in beside.items():
        if rows[d1].seconds and rows[d2].seconds:
            shorter = rows[d1].frames / rows[d2].frames
            times = shorter * bench.ratio({case: rows[case].seconds for case in (d1, d2)}, d2, d1)
            counted = shorter * rows[d2].flops / rows[d1].flops
            notes.append(f"a frame of D2, {d2.way}, T={d2.frames}: {times:.2f} times one of D1 (FLOPs: {counted:.2f})")
    report(config, f"{config.model}: D2 beside D1", rows, beside, notes, device)
    return rows


def timed(
    config: BenchModel, models: dict[str, VideoVAE], works: Sequence[str], device: torch.device
) -> tuple[dict[tuple, Row], list[str]]:
    """All rows, the matrix product's first, and what there is to say of them."""
    lengths, size = clip_of(config, device)
    first = next(iter(models.values()))
    for frames in lengths:
        first.spec.check_frames(frames, "frames")
    for model in models.values():
        model.spec.check_square(size, "size")
    precision = accelerators.native_precision(device) if config.precision == "auto" else config.precision
    placed = {name: place(model, device, precision) for name, model in models.items()}
    del models
    if config.compile:
        placed |= {name + COMPILED: compiled(model) for name, model in placed.items()}
    streaming = {name: model for name, model in placed.items() if model.streams}
    groups = [(placed, "whole"), (streaming, "stream")]
    todo: dict[tuple, Work] = {(bench.MATMUL, precision): bench.product(device, precision)}
    for group, way in groups:
        if way in config.ways:
            todo |= cases(group, works, [way], lengths, config.batch, (size, size))
    notes = [f"{config.batch}xTx{size}x{size}, {precision}, {config.rounds} rounds"]
    if "stream" in config.ways:
        notes += [f"{name} does not stream" for name in placed.keys() - streaming.keys()]
    return bench.time_all(todo, config.rounds, device), notes


def clip_of(config: BenchModel, device: torch.device) -> tuple[list[int], int]:
    """Lengths, and height and width, that the config gives or leaves to the device."""
    cuda = device.type == "cuda"
    return config.frames or ([17, 33, 65] if cuda else [9, 17, 33]), config.size or (256 if cuda else 64)


def compiled(model: VideoVAE) -> VideoVAE:
    """A copy whose residual blocks are compiled."""
    twin = copy.deepcopy(model)
    twin.compile_repeated_blocks()
    return twin


def report(
    config: BenchModel,
    title: str,
    rows: dict[tuple, Row],
    beside: dict[tuple, tuple],
    notes: list[str],
    device: torch.device,
) -> None:
    """The table, JSON, and a page with time and memory over the number of frames."""
    charts: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for case, row in rows.items():
        for unit, value in (("seconds", row.median), ("GiB", row.peak_gib)):
            if len(case) == len(HEAD) and value is not None:
                lines = charts.setdefault(f"{case[0]}, {unit}", {})
                lines.setdefault(f"{case[3]}, {case[1]}", []).append((case[2], value))
    bench.report(config, f"lvdm bench: {title}", device, HEAD, rows, beside, charts, notes)


def main(argv: list[str] | None = None) -> int:
    """`lvdm bench vae`."""
    return program(BenchVAE, argv, run)


def refine_main(argv: list[str] | None = None) -> int:
    """`lvdm bench refine`."""
    return program(BenchRefine, argv, run_refine)
