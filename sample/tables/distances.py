"""What was generated on the latents of a table's models: distances with their floors, speed of training, samples."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import mean
from typing import Any

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
from sample.tables.reproduce import Model, chains_of, models_of, named, title_of
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
    """Of the interval; of IS a standard deviation below."""
    high: float | None
    floor: float | None
    """The same of real videos against other real ones; of IS that of the real clips."""
    real: int
    fake: int
    paper: float | None
    """Of the paper's own videos, and so None where others are in their place."""
    measured: Measured
    """The table of `lvdm evaluate` that it is of."""

    def line(self) -> dict[str, Any]:
        """For results.json."""
        of = self.measured
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "measured"}
        return own | {"title": of.title, "protocol": of.protocol, "warning": of.note}


def runs(config: Reproduce, table: Table) -> Iterator[tuple[Model, str, Step]]:
    """(model, dataset's title, step) of all chains."""
    for model in models_of(config, table):
        for name, step in chains_of(config, table, model):
            yield model, title_of(config, table, name), step


def distances(config: Reproduce, table: Table) -> Iterator[Distance]:
    """All that the chains measured."""
    for model, dataset, step in runs(config, table):
        if step.verb.startswith("evaluate"):
            for measured in read_results(Path(step.set["out"])):
                yield distance(model, dataset, measured)


def distance(model: Model, dataset: str, measured: Measured) -> Distance:
    """One table of `lvdm evaluate`, which has one number."""
    ((_, *cells),) = measured.rows
    own = measured.protocol["preset"].startswith("rfvd")
    metric = f"r{measured.header[1]}" if own else measured.header[1]
    paper = model.arm.told.get(f"{metric}, {dataset}")
    return Distance(dataset, model.arm.name, model.seed, metric, *cells[:4], *cells[-2:], paper, measured)


def grids(config: Reproduce, apart: list[Distance]) -> Iterator[Grid]:
    """A table a metric and dataset, of one protocol."""
    for dataset, title in dict.fromkeys((one.dataset, one.measured.title) for one in apart):
        rows = [one for one in apart if (one.dataset, one.measured.title) == (dataset, title)]
        protocols = [Protocol(**one.measured.protocol) for one in rows]
        require_same(protocols)
        metric, first = rows[0].metric, rows[0].measured
        cells = [[named(one.arm, one.seed), *one.measured.rows[0][1:]] for one in rows]
        known = [i for i, column in enumerate(zip(*cells, strict=True)) if any(cell is not None for cell in column)]
        header, *cells = ([line[i] for i in known] for line in (["", metric, *first.header[2:]], *cells))
        note = [f"Best first: {ordered(config, rows, protocols[0].features == 'pixels')}"]
        if "floor" in header:
            note.append("floor: real videos against other real ones.")
        best = {} if config.trial else best_of([metric])
        text = " ".join([*note, first.note]).strip()
        yield Grid(f"{dataset}: {title}", header, cells, protocols[0].describe(), text, best)


def ordered(config: Reproduce, rows: list[Distance], trial: bool) -> str:
    """The models by one metric, and the paper's order where this is no trial."""
    by_arm: dict[str, list[Distance]] = {}
    for one in rows:
        by_arm.setdefault(one.arm, []).append(one)
    ours = {arm: mean(one.mean for one in own) for arm, own in by_arm.items()}
    papers = {} if trial or config.trial else {arm: own[0].paper for arm, own in by_arm.items()}
    return order(rows[0].metric, ours, papers, lambda a, b: clear(by_arm[a], by_arm[b]))


def clear(a: list[Distance], b: list[Distance]) -> bool:
    """Whether the intervals of every seed of one model lie below those of every seed of the other, of at least two
    seeds. IS has no interval."""
    known = all(one.low is not None and one.metric != "IS" for one in (*a, *b))
    if not known or max(len(a), len(b)) < 2:
        return False
    return any(max(x.high for x in below) < min(y.low for y in above) for below, above in ((a, b), (b, a)))


def trainings(config: Reproduce, table: Table) -> Iterator[Grid | Chart]:
    """How fast the transformers trained, in how much memory, and their losses."""
    cells, losses = [], {}
    for model, dataset, step in runs(config, table):
        if step.verb == "train dit":
            folder = Path(step.set["out"])
            log = [record for record in read_log(folder) if "samples_per_s" in record]
            last = log[-1] if log else {}
            done = finished(folder) or {}
            losses.setdefault(dataset, {})[model.name] = [(r["samples"], r["mse"]) for r in log if "mse" in r]
            cells.append([model.name, dataset, last.get("samples_per_s"), last.get("peak_gib"), done.get("seconds")])
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
