"""How fast the models of a table are: untrained, in turn, in one run, for `lvdm reproduce`."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

import vae
from lvdm.accelerator import device
from lvdm.bench import Row, Work, machine, time_all
from lvdm.files import write_text
from lvdm.run import RunFolder
from sample.bench import dit as bench_dit
from sample.bench import vae as bench_vae
from sample.bench.configs import BenchDiT
from sample.tables.table import STEP


@dataclass
class Timing:
    """What is timed, and how."""

    operational: ClassVar[tuple[str, ...]] = ()

    out: str = ""
    """Folder for results.json."""
    models: dict[str, Any] = field(default_factory=dict)
    """By name in the table: `model` in the registry and its `model_args`."""
    works: list[str] = field(default_factory=list)
    """encode, decode, refine or reconstruct."""
    frames: int = 17
    """Of the clip."""
    size: list[int] = field(default_factory=lambda: [256, 256])
    """Its height and width."""
    rounds: int = 5
    """All are timed once a round, in turn."""
    precision: str = "bf16"
    """fp32, bf16 or fp16."""
    transformer: dict[str, Any] = field(default_factory=dict)
    """Keys of lvdm bench dit, for a training step of a transformer on such latents; empty times none."""


def run(config: Timing) -> None:
    """Writes `results.json` to `config.out`, once."""
    folder = RunFolder(config.out, config)
    if not folder.finished:
        rows = [{"model": model, "work": work, **asdict(row)} for (model, work), row in measure(config).items()]
        found = {"machine": machine(device()), "rows": rows}
        write_text(folder.path / "results.json", json.dumps(found, indent=2, allow_nan=False))
        folder.finish(rows=len(rows))


def read(folder: str | Path) -> tuple[dict[str, str], dict[tuple[str, str], Row]]:
    """The machine, and {(model, work): Row}, that `run` wrote."""
    stored = json.loads((Path(folder) / "results.json").read_text())
    return stored["machine"], {(row.pop("model"), row.pop("work")): Row(**row) for row in stored["rows"]}


def measure(config: Timing) -> dict[tuple[str, str], Row]:
    """Every work of every model, in turn; then the transformer's step."""
    models = {name: fresh(**options) for name, options in config.models.items()}
    shape = (1, config.frames, *config.size)
    found = bench_vae.measure(models, config.works, shape, config.rounds, config.precision)
    rows = {(model, work): row for model, by_work in found.items() for work, row in by_work.items()}
    if config.transformer:
        work = step(BenchDiT(**config.transformer, precision=config.precision))
        rows |= time_all({(config.transformer["model"], STEP): work}, config.rounds, device())
    return rows


def fresh(model: str, model_args: dict[str, Any]) -> Any:
    """An untrained model: weights change no speed."""
    torch.manual_seed(0)
    return vae.build(model, **model_args).to(device()).eval()


def step(config: BenchDiT) -> Work:
    """A training step of a transformer on latents that are there."""
    return bench_dit.training_step(config, bench_dit.build(config, "eager", device()), device())
