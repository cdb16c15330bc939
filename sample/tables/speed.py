"""The page of a table of speeds (`lvdm reproduce`): seconds of all models, and ratios beside the paper's."""

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from lvdm import bench
from lvdm.bench import Row
from sample.measure.figures import commit
from sample.tables.blocks import Block, Facts, Grid, Text
from sample.tables.comparison import models, papers, save, warning
from sample.tables.configs import Reproduce
from sample.tables.ordering import order
from sample.tables.table import FIGURES, STEP, Table
from sample.tables.timing import Timing, read


@dataclass
class Figure:
    """A number that the paper has, too."""

    arm: str
    metric: str
    mean: float
    """The median of the rounds."""
    low: float
    """The smallest."""
    high: float
    times: float | None
    """How many times the first model's, where that could be timed."""
    paper: float | None
    paper_times: float | None

    def apart(self, other: "Figure") -> bool:
        """Whether all rounds of one took longer than all of the other."""
        return self.low > other.high or self.high < other.low


def write(config: Reproduce, table: Table, timed: Timing) -> Path:
    """index.html, results.md, results.json and results.csv in the table's folder; returns the first."""
    machine, rows = read(timed.out)
    found = list(figures(table, rows))
    facts = {
        **machine,
        "version": f"lvdm ({commit()})",
        "command": f"lvdm reproduce {config.table} scale={config.scale} out={config.out}",
    }
    costs = [{"arm": model, "metric": f"{work} (s)", **asdict(row)} for (model, work), row in rows.items()]
    blocks = list(content(config, table, timed, rows, found, facts))
    return save(config, table, blocks, facts, [asdict(one) for one in found], costs)


def figures(table: Table, rows: dict[tuple[str, str], Row]) -> Iterator[Figure]:
    """What the paper has and could be timed, metric by metric."""
    first = next(iter(table.arms.values()))
    for metric in first.paper:
        name, _, unit = metric.partition(" (")
        timed = {arm: rounds(rows, arm, FIGURES[name]) for arm in table.arms}
        values = {arm: [1 / s for s in times] if unit == "it/s)" else times for arm, times in timed.items() if times}
        for arm, own in values.items():
            theirs, median = table.arms[arm].told.get(metric), statistics.median(own)
            times = median / statistics.median(values[first.name]) if first.name in values else None
            paper_times = None if theirs is None else theirs / first.told[metric]
            yield Figure(arm, metric, median, min(own), max(own), times, theirs, paper_times)


def rounds(rows: dict[tuple[str, str], Row], arm: str, parts: tuple[str, ...]) -> list[float]:
    """Seconds of each round of those works together; a step is the same for all models. None where one failed."""
    steps = [row for (_, work), row in rows.items() if work == STEP]
    found = [steps[0] if part == STEP and steps else rows.get((arm, part), Row([])) for part in parts]
    return [sum(times) for times in zip(*(row.seconds for row in found), strict=False)]


def content(
    config: Reproduce,
    table: Table,
    timed: Timing,
    rows: dict[tuple[str, str], Row],
    found: list[Figure],
    facts: dict[str, object],
) -> Iterator[Block]:
    """The page from top to bottom."""
    shape = "x".join(map(str, (timed.frames, *timed.size)))
    yield warning(config, table)
    yield Text(
        "Ours",
        ["Untrained models, which are as fast as trained ones. They took turns in one run; a step was timed after."],
    )
    protocol = (
        f"clips of {shape}, one at a time, {timed.precision}, median of {timed.rounds} rounds, eager; {facts['device']}"
    )
    names = list(dict.fromkeys(one.metric for one in found))
    for metric in names:
        own = {one.arm: one for one in found if one.metric == metric}
        cells = [[o.arm, o.mean, o.low, o.high, o.times, o.paper_times] for o in own.values()]
        header = ["", metric, "from", "to", "times the first", "the paper's times"]
        theirs = {} if config.trial else {arm: one.paper for arm, one in own.items()}
        means = {arm: one.mean for arm, one in own.items()}
        ordered = order(metric, means, theirs, lambda a, b, own=own: own[a].apart(own[b]))
        note = f"Best first: {ordered} clear: every round of one took longer than all of the other."
        yield Grid(metric, header, cells, protocol, note)
    header, lines = bench.table(("model", "work"), rows)
    yield Grid("All that was timed", header, lines, protocol)
    yield from papers(table)
    yield from models(table)
    yield Text(
        "What these runs do not show", ["The paper's seconds: another device. Compare ratios.", *table.shows_not]
    )
    yield Text("How it was made")
    yield Facts(facts)
