"""The command `lvdm`: a table of verbs, each of which imports its program only when it runs."""

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lvdm import config as configs
from lvdm.errors import Unsound, UserError, nearest


@dataclass(frozen=True)
class Verb:
    """A sub-command: where its `main(argv)` and its config dataclass live, and what it does in one line."""

    program: str
    """A module, or "module:function" where the function is not called `main`."""
    config: str
    summary: str


VERBS = {
    "demo": Verb("sample.demo", "sample.configs:Demo", "the whole job at a small size, on real clips, with a report"),
    "vae list": Verb("sample.zoo:list_main", "sample.configs:ListVAEs", "the video and image VAEs there are"),
    "vae info": Verb("sample.zoo:info_main", "sample.configs:DescribeVAE", "one VAE, stage by stage: shapes, FLOPs"),
    "vae card": Verb(
        "sample.measure.card", "sample.measure.configs:Card", "one VAE on a page: quality, latents, speed"
    ),
    "vae init": Verb("train.init", "train.configs:InitVAE", "a video VAE from the weights of an image VAE"),
    "data index": Verb("lvdm.data.look:index_main", "lvdm.data.configs:IndexVideos", "look at every video once"),
    "data check": Verb("lvdm.data.look:check_main", "lvdm.data.configs:CheckVideos", "decode all, name what is broken"),
    "data preview": Verb("lvdm.data.look:preview_main", "lvdm.data.configs:PreviewVideos", "a dataset in one picture"),
    "data ucf101": Verb("lvdm.data.programs:ucf101_main", "lvdm.data.programs:UCF101", "UCF101: fetch, check, index"),
    "data sky": Verb("lvdm.data.programs:sky_main", "lvdm.data.programs:Sky", "SkyTimelapse: fetch, check, index"),
    "train vae": Verb("train.vae", "train.configs:TrainVAE", "VAE stage 1: encoder and decoder reconstruct"),
    "train refine": Verb("train.refine", "train.configs:TrainRefine", "VAE stage 2: D2 renders twice the frame rate"),
    "train latents": Verb("train.latents", "train.configs:Latents", "encode a folder of videos to a latent store"),
    "latents stats": Verb("sample.latents:stats_main", "sample.configs:StoreStats", "what a latent store holds"),
    "latents verify": Verb("sample.latents:verify_main", "sample.configs:VerifyStore", "a latent store, byte by byte"),
    "latents show": Verb("sample.latents:show_main", "sample.configs:ShowItem", "one item of a latent store, decoded"),
    "train dit": Verb("train.dit", "train.configs:TrainDiT", "the diffusion transformer, on a latent store"),
    "sample": Verb("sample.generate", "sample.configs:Generate", "draw new videos from a trained DiT"),
    "export": Verb("sample.export", "sample.configs:Export", "DiT, VAE and scheduler as one pipeline folder"),
    "render": Verb("sample.render", "sample.configs:Render", "latent files to mp4, by D1 or at double rate by D2"),
    "reconstruct": Verb("sample.reconstruct", "sample.configs:Reconstruct", "a video through a VAE, side by side"),
    "interpolate": Verb("sample.interpolate", "sample.configs:Interpolate", "a video at twice its frame rate, by D2"),
    "bench vae": Verb("sample.bench.vae", "sample.bench.configs:BenchVAE", "VAEs: time and memory against length"),
    "bench refine": Verb(
        "sample.bench.vae:refine_main", "sample.bench.configs:BenchRefine", "D2 beside D1: time, memory"
    ),
    "bench train-vae": Verb("train.bench", "train.configs:BenchTrainVAE", "a VAE's training step: time and memory"),
    "bench data": Verb("sample.bench.data:data_main", "sample.bench.configs:BenchData", "how fast clips are read here"),
    "bench dit": Verb("sample.bench.dit", "sample.bench.configs:BenchDiT", "a transformer: training step, sampling"),
    "bench sample": Verb("sample.bench.sampling", "sample.bench.configs:BenchSample", "videos a minute, end to end"),
    "bench index": Verb("sample.bench.data:index_main", "sample.bench.configs:BenchIndex", "an index beside probing"),
    "bench latents": Verb(
        "sample.bench.data:latents_main", "sample.bench.configs:BenchLatents", "do latents come in time"
    ),
    "evaluate reconstruction": Verb(
        "sample.measure.evaluate:reconstruction_main",
        "sample.measure.configs:EvaluateReconstruction",
        "a VAE's frames, rFVD",
    ),
    "evaluate refinement": Verb(
        "sample.measure.evaluate:refinement_main",
        "sample.measure.configs:EvaluateRefinement",
        "D2's frames, seen and unseen",
    ),
    "evaluate generation": Verb(
        "sample.measure.evaluate:generation_main",
        "sample.measure.configs:EvaluateGeneration",
        "FVD, KVD, IS and FID",
    ),
    "fvd doctor": Verb("sample.measure.doctor", "sample.measure.configs:Doctor", "what moves your FVD, and how far"),
    "compare": Verb("sample.measure.compare", "sample.measure.configs:Compare", "VAEs or generators, side by side"),
    "reproduce": Verb("sample.tables.reproduce", "sample.tables.configs:Reproduce", "a table of a paper once more"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs `lvdm VERB ...` and returns its exit code: 0, or 2 for what the user can put right."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin slow a shared CPU tenfold; before torch
    try:
        return _dispatch(sys.argv[1:] if argv is None else argv)
    except BrokenPipeError:  # lvdm ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] in ("-V", "--version"):
        print(importlib.import_module("lvdm").__version__)
        return 0
    try:
        name, rest = _verb(argv)
    except UserError as error:
        return _complain(error)
    verb = VERBS[name]
    if "-h" in rest or "--help" in rest:
        print(configs.usage(_resolve(verb.config), f"lvdm {name}"))
        return 0
    return _resolve(verb.program)(rest)


def program(
    config: type,
    argv: list[str] | None,
    run: Callable[[Any], Any],
    describe: Callable[[Any], str] | None = None,
    plan: Callable[[Any], str] | None = None,
) -> int:
    """The body of every program's `main(argv)`: parse, `--help`, `--dry-run`, run. A UserError is one line and 2, what
    a check found wrong is 1.

    `describe(config)` gives what `--dry-run` prints below the resolved config, `plan(config)` what `--plan` prints.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        parsed, flags = configs.parse(config, argv)
        if flags.help:
            names = {verb.config.partition(":")[2]: f"lvdm {name}" for name, verb in VERBS.items()}
            print(configs.usage(config, names.get(config.__name__, config.__name__)))
        elif flags.plan:
            if plan is None:
                raise UserError("--plan: this command runs one program, not a plan; try --dry-run")
            print(plan(parsed))
        elif flags.dry_run:
            print(configs.to_yaml(parsed) + (describe(parsed) if describe else ""))
        else:
            run(parsed)
        return 0
    except UserError as error:
        return _complain(error)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which this module does not import
            raise
        return _complain(UserError(_out_of_memory(parsed, error)))
    except Unsound as found:
        print(found, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


def overview() -> str:
    """What `lvdm --help` prints."""
    width = max(map(len, VERBS))
    lines = [
        "usage: lvdm VERB [positionals] [--config FILE] [key=value ...] [--dry-run]",
        "",
        "Latent video diffusion, end to end: train a video VAE, encode, train a transformer, sample, render, evaluate.",
        "",
        *(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items()),
        "",
        "lvdm VERB --help explains every key. --config takes a path or a shipped recipe, e.g. vae/univae.yaml.",
    ]
    return "\n".join(lines)


def _verb(argv: list[str]) -> tuple[str, list[str]]:
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in VERBS:
            return name, argv[words:]
    groups = [name for name in VERBS if name.startswith(f"{argv[0]} ")]
    if groups:
        raise UserError(f"lvdm {argv[0]}: expected one of {', '.join(name.split()[1] for name in groups)} after it")
    first = dict.fromkeys(name.split()[0] for name in VERBS)
    raise UserError(f"unknown verb {argv[0]!r}{nearest(argv[0], first)}; known: {', '.join(VERBS)}")


def pipeline() -> Any:
    """The class that `from lvdm import LVDMPipeline` gives."""
    return _resolve("sample.pipeline:LVDMPipeline")


def _resolve(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name or "main")


LESS_MEMORY = {
    "accumulate": "a larger accumulate (the same step in more parts)",
    "gradient_checkpointing": "gradient_checkpointing=true",
    "lpips_chunk": "a smaller lpips_chunk",
    "phases": "a smaller batch, frames or size in phases",
    "batch": "a smaller batch",
    "tile": "tile=256",
    "tile_frames": "a smaller tile_frames",
}
"""What a key of a program can do where the GPU's memory is too small."""


def _out_of_memory(config: Any, error: RuntimeError) -> str:
    """What ran out, and which keys of this program help."""
    helps = [help for key, help in LESS_MEMORY.items() if hasattr(config, key)]
    tried = ". ".join(str(error).split(". ")[:2])
    return f"{tried}; what takes less: {', '.join(helps)}" if helps else tried


def _complain(error: UserError) -> int:
    text = str(error)
    if "Original Traceback" in text:  # a DataLoader's process sends its whole traceback; the last line is the message
        text = text.strip().splitlines()[-1].partition(": ")[2]
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return 2
