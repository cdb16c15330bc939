"""The VAEs there are: `lvdm vae list` is a table of them, `lvdm vae info` takes one apart. Counted, nothing is run."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vae
from lvdm.cli import program
from lvdm.cost import parameters
from lvdm.errors import UserError
from lvdm.text import aligned
from sample.configs import DescribeVAE, ListVAEs
from vae.adapter import CLASSES
from vae.base import VideoVAE
from vae.spec import VAESpec

CLIP = (17, 256, 256)
"""Frames, height and width of the clip whose latents the table shows."""
MIB = 2**20 / 4
"""Numbers in fp32 that fill a MiB."""

# ---------------------------------------------------------------------------------------------------------------------
# All of them


def table() -> str:
    """The registered VAEs at full size, one a line, by name."""
    head = ("name", "parameters", "factors", "frames", "z", by(CLIP), "streams", "kind", "paper")
    rows = []
    for name in vae.names():
        with torch.device("meta"):
            model = vae.build(name)
        spec = model.spec
        latents, streams = by(spec.latent_shape(*CLIP)), "yes" if model.streams else "no"
        facts = (f"{parameters(model):,}", factors(spec), spec.frame_rule, str(spec.latent_channels), latents)
        rows.append((name, *facts, streams, kind(spec), vae.registry.entry(name).paper))
    return aligned([head, *rows], right={1, 4})


def factors(spec: VAESpec) -> str:
    """Compression of time, height and width: "4x8x8"."""
    return by((spec.time_factor, spec.space_factor, spec.space_factor))


def kind(spec: VAESpec) -> str:
    return "codes" if spec.discrete else "continuous"


# ---------------------------------------------------------------------------------------------------------------------
# One of them


def describe(config: DescribeVAE) -> str:
    """Facts, parameters and the stages of encode, decode and refine."""
    model = on_meta(config.model, config.model_args)
    model.spec.check_square(config.size, "size")
    return f"{facts(config.model, model)}\n\n{levels(model, config.frames, config.size)}"


def on_meta(name: str, options: dict[str, Any]) -> VideoVAE:
    """`made`, without its numbers."""
    with torch.device("meta"):
        return made(name, options).eval().to("meta")  # a few parameters are made on the CPU whatever the context


def made(name: str, options: dict[str, Any]) -> VideoVAE:
    """The model that `name` builds or, of a run, folder, file or hub id, loads; UserError for what it does not take."""
    if name in vae.TRAINED_BY or (name not in vae.names() and _is_a_place(name.rpartition(":")[2])):
        if options:
            raise UserError(f"model_args: {name} is trained and has its options; they go with a name in the registry")
        with torch.device("cpu"):
            return vae.load(name)
    try:
        return vae.build(name, **options)
    except TypeError as error:
        if "required" not in str(error):
            raise
        raise UserError(f"{name} has no size of its own, give model_args: {error}") from None


def _is_a_place(spec: str) -> bool:
    """Whether it is a path or a hub id, rather than the name of a model or of a class."""
    return "/" in spec or "." in spec or (spec not in ("", *CLASSES) and Path(spec).exists())


def facts(name: str, model: VideoVAE) -> str:
    """What `spec` says, and the parameters of each part."""
    spec = model.spec
    latents = [("latent mean", numbers(spec.latent_mean)), ("latent std", numbers(spec.latent_std))]
    if spec.discrete:
        latents = [("codebook", f"{len(model.codebook):,} codes")]
    how = "exactly" if model.streams else f"no: {spec.inexact or 'codes have no posterior to stream'}"
    rows = [
        (name, paper(model) or model.title),
        ("compression", f"{factors(spec)} (time x height x width)"),
        ("frames", spec.frame_rule),
        ("latents", f"{spec.latent_channels} channels, {kind(spec)}"),
        *latents,
        ("streams", how),
        ("refines", "2T - 1 frames" if spec.refines else "no"),
        ("parameters", f"{parameters(model):,}"),
        *((f"  {part}", f"{count:,}") for part, count in parts(model)),
    ]
    return aligned(rows)


def paper(model: VideoVAE) -> str:
    """Where a model comes from, by its class and, of diffusers' models, theirs; "" where the registry has neither."""
    for entry in map(vae.registry.entry, vae.names()):
        if entry.resolve() is type(model) and entry.defaults.get("kind") == model.options.get("kind"):
            return entry.paper
    return ""


def parts(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, int]]:
    """(name, parameters) of the encoder, the decoder and what else has some."""
    for name, parameter in module.named_parameters(recurse=False):
        yield prefix + name, parameter.numel()
    for name, child in module.named_children():
        if isinstance(child, ModelMixin):
            yield from parts(child, f"{prefix}{name}.")
        elif parameters(child):
            yield prefix + name, parameters(child)


# ---------------------------------------------------------------------------------------------------------------------
# Stage by stage


@dataclass
class Stage:
    """A module, or the blocks of a level, and what they did in one pass of one clip."""

    name: str
    blocks: list[nn.Module]
    flops: int = 0
    outputs: dict[nn.Module, list[tuple[int, ...]]] = field(default_factory=dict)
    """(C, T, H, W) of every call of a block."""

    @property
    def calls(self) -> list[tuple[int, ...]]:
        """What leaves the stage: the outputs of its last block."""
        return list(self.outputs.values())[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, T, H, W) of all calls together."""
        channels, _, height, width = self.calls[-1]
        return channels, sum(call[1] for call in self.calls), height, width


def measure(model: nn.Module, run: Callable[[], Any]) -> tuple[list[Stage], int]:
    """The stages that multiply and give frames, in the order in which `run` (on meta tensors) calls them; all FLOPs."""
    counter, ran, hooks = FlopCounterMode(display=False), {}, []

    def enter(stage: Stage) -> Callable:
        def before(block: nn.Module, args: Any) -> None:
            ran.setdefault(stage.name, stage)
            stage.flops -= counter.get_total_flops()

        return before

    def leave(stage: Stage) -> Callable:
        def after(block: nn.Module, args: Any, output: Any) -> None:
            stage.flops += counter.get_total_flops()
            tensor = output if isinstance(output, Tensor) else output[0]  # some also return their caches
            if tensor.ndim in (4, 5):  # frames as a batch, or a clip
                shape = tensor.movedim(0, 1).shape if tensor.ndim == 4 else tensor.shape[1:]
                stage.outputs.setdefault(block, []).append(tuple(shape))

        return after

    for name, blocks in stages(model):
        stage = Stage(name, blocks)
        for block in blocks:
            hooks += [block.register_forward_pre_hook(enter(stage)), block.register_forward_hook(leave(stage))]
    try:
        with torch.device("meta"), torch.no_grad(), counter:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return [stage for stage in ran.values() if stage.flops and stage.outputs], counter.get_total_flops()


def stages(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, list[nn.Module]]]:
    """(name, blocks) of what is inside a model and its encoders and decoders; a list of levels is a stage a level."""
    for name, child in module.named_children():
        path = prefix + name
        if isinstance(child, ModelMixin) or re.search("coder|refiner", name):
            yield from stages(child, f"{path}.")
        elif isinstance(child, nn.Sequential) or not _runs(child):
            for key, level in child.named_children():
                yield f"{path}.{key}", list(_blocks(level))
        else:
            yield path, [child]


def _runs(module: nn.Module) -> bool:
    """Whether it can be called; lists of modules cannot."""
    return type(module).forward is not nn.Module.forward


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    if _runs(module):
        yield module
    else:
        for child in module.children():
            yield from _blocks(child)


def levels(model: VideoVAE, frames: int, size: int) -> str:
    """The stages of each pass of a clip of `frames` frames of `size`x`size`, then the totals."""
    spec = model.spec
    latents = spec.latent_shape(frames, size, size)
    with torch.device("meta"):
        x, z = torch.empty(1, 3, frames, size, size), torch.empty(1, *latents)
    encode = model.codes if spec.discrete else model.encode
    runs = {f"encode {by((frames, size, size))}": lambda: encode(x)}
    runs[f"decode {by(latents)}"] = lambda: model._frames(z)  # `decode` looks at codes, which are not there
    if spec.refines:
        runs[f"refine {by(latents)}"] = lambda: model.refine(z)
    texts, totals, largest = [], [], (0, "")
    for name, run in runs.items():
        try:
            rows, total = measure(model, run)
        except Exception as error:  # a model of a library may look at numbers, and these have none
            texts.append(f"{name}: cannot be counted without running it ({' '.join(str(error).split())[:150]})")
            continue
        texts.append(aligned([(name, "C", "T", "H", "W", "parameters", "GFLOP", "MiB"), *map(_row, rows)], range(1, 8)))
        totals.append(f"{name.split()[0]} {total / 1e12:.4g} TFLOP")
        largest = max([largest, *((volume(call), stage.name) for stage in rows for call in stage.calls)])
    if totals:
        texts.append(f"{', '.join(totals)}; largest single output {largest[0] / MIB:,.1f} MiB ({largest[1]}), in fp32")
    return "\n\n".join(texts)


def _row(stage: Stage) -> tuple[str, ...]:
    size = sum(map(parameters, stage.blocks))
    counts = f"{size:,}", f"{stage.flops / 1e9:,.1f}", f"{volume(stage.shape) / MIB:,.1f}"
    return stage.name, *map(str, stage.shape), *counts


# ---------------------------------------------------------------------------------------------------------------------
# Text


def volume(shape: Iterable[int]) -> int:
    return torch.Size(shape).numel()


def by(shape: Iterable[int]) -> str:
    """ "17x256x256"."""
    return "x".join(map(str, shape))


def numbers(values: Sequence[float]) -> str:
    """One number where all channels have the same."""
    return " ".join(f"{value:.4g}" for value in (values[:1] if len(set(values)) == 1 else values))


# ---------------------------------------------------------------------------------------------------------------------
# The command


def print_table(config: ListVAEs) -> None:
    print(table())


def print_description(config: DescribeVAE) -> None:
    print(describe(config))


def list_main(argv: list[str] | None = None) -> int:
    """`lvdm vae list`."""
    return program(ListVAEs, argv, print_table)


def info_main(argv: list[str] | None = None) -> int:
    """`lvdm vae info`."""
    return program(DescribeVAE, argv, print_description)
