"""What was generated on the latents of a table's models: distances with their floors, speed of training, samples."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lvdm.metrics.protocol import Protocol, require_same
from lvdm.report import Player
from lvdm.run import finished, read_log
from sample.measure.evaluate import Table as Measured
from sample.measure.evaluate import read_results
from sample.measure.figures import best_of
from sample.plan import Step
from sample.tables.blocks import Block, Chart, Clips, Grid
from sample.tables.configs import Reproduce
from sample.tables.ordering import order
from sample.tables.reproduce import Model, chains_of, models_of
from sample.tables.table import Table

SHOWN = 2
"""Samples of a page, each of all models."""


@dataclass
class Distance:
    """One number of a set of videos, against another."""

    dataset: str
    arm: str
    seed: int
    metric: str
    mean: float
    low: float | None
    high: float | None
    floor: float | None
    """The same of real videos against other real ones."""
    floor_count: int
    real: int
    fake: int
    paper: float | None
    title: str
    protocol: dict
    warning: str


def runs(config: Reproduce, table: Table) -> Iterator[tuple[Model, str, Step]]:
    """(model, dataset's title, step) of all chains."""
    for model in models_of(config, table):
        for name, step in chains_of(config, table, model):
            yield model, table.datasets[name].title, step


def distances(config: Reproduce, table: Table) -> Iterator[Distance]:
    """All that the chains measured."""
    for model, dataset, step in runs(config, table):
        if step.verb.startswith("evaluate"):
            for measured in read_results(Path(step.set["out"])):
                yield distance(model, dataset, measured)


def distance(model: Model, dataset: str, measured: Measured) -> Distance:
    """One table of `lvdm evaluate`, which has one number."""
    ((_, value, low, high, floor, floor_count, real, fake),) = measured.rows
    own = measured.protocol["preset"].startswith("rfvd")
    metric = f"r{measured.header[1]}" if own else measured.header[1]
    paper = model.arm.paper.get(f"{metric}, {dataset}")
    title = f"{dataset}: {measured.title}"
    return Distance(
        *(dataset, model.arm.name, model.seed, metric, value, low, high, floor, floor_count, real, fake),
        *(paper, title, measured.protocol, measured.note),
    )


def grids(table: Table, apart: list[Distance]) -> Iterator[Grid]:
    """A table a metric and dataset, of one protocol."""
    for title in dict.fromkeys(one.title for one in apart):
        rows = [one for one in apart if one.title == title]
        require_same(Protocol(**one.protocol) for one in rows)
        metric = rows[0].metric
        header = ["", metric, "95 % from", "to", "floor", "floor N", "N real", "N fake"]
        cells = [[named(o), o.mean, o.low, o.high, o.floor, o.floor_count, o.real, o.fake] for o in rows]
        first = [one for one in rows if one.seed == 0]
        ordered = order(metric, {one.arm: one.mean for one in first}, {one.arm: one.paper for one in first})
        note = f"Best first: {ordered} floor: real videos against other real ones. {rows[0].warning}".strip()
        described = Protocol(**rows[0].protocol).describe()
        yield Grid(title, header, cells, described, note, best_of([metric]))


def named(one: Distance) -> str:
    return f"{one.arm}, seed {one.seed}" if one.seed else one.arm


def trainings(config: Reproduce, table: Table) -> Iterator[Grid | Chart]:
    """How fast the transformers trained, in how much memory, and their losses."""
    cells, losses = [], {}
    for model, dataset, step in runs(config, table):
        if step.verb == "train dit":
            folder = Path(step.set["out"])
            log = [record for record in read_log(folder) if "samples_per_s" in record]
            last = log[-1] if log else {}
            name = f"{model.arm.name}, seed {model.seed}" if model.seed else model.arm.name
            done = finished(folder) or {}
            losses.setdefault(dataset, {})[name] = [(r["samples"], r["mse"]) for r in log if "mse" in r]
            cells.append([name, dataset, last.get("samples_per_s"), last.get("peak_gib"), done.get("seconds")])
    header = ["", "latents of", "samples/s", "peak GiB", "seconds"]
    note = "On stored latents: the VAE is no part of a step. Memory is measured on a GPU only."
    yield Grid("Training of the transformers", header, cells, note=note)
    for dataset, lines in losses.items():
        yield Chart(f"{dataset}: squared error of the noise", lines, "samples", "mse", log=True)


def generated(config: Reproduce, table: Table) -> Iterator[Block]:
    """The first samples of every model, by dataset; equal numbers begin with equal noise only where latents agree in
    shape."""
    folders: dict[str, dict[str, Path]] = {}
    for model, dataset, step in runs(config, table):
        if step.verb == "sample" and model.seed == 0:
            folders.setdefault(dataset, {})[model.arm.name] = Path(step.set["out"])
    for dataset, by_arm in folders.items():
        for number in range(SHOWN):
            paths = {name: folder / "d1" / f"{number:06d}.mp4" for name, folder in by_arm.items()}
            players = [Player(name, path) for name, path in paths.items() if path.is_file()]
            if players:
                yield Clips(f"{dataset}, sample {number}", players)
