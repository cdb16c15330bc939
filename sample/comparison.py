"""The page of a table of models (`lvdm reproduce`): our numbers beside the paper's, as HTML, Markdown, JSON and CSV."""

import csv
import io
import json
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lvdm
from lvdm.data.index import open_index
from lvdm.files import write_text
from lvdm.metrics.protocol import Protocol, require_same
from lvdm.report import Page
from lvdm.run import read_log
from sample.configs import Reproduce
from sample.plan import Plan
from sample.reproduce import Model, Table
from sample.scores import REFERENCES, Measure, Scores, interval, of_clips, read

ALL, MIDDLE, EVEN, FIRST = slice(None), slice(1, None, 2), slice(None, None, 2), slice(1)
COLUMNS = {
    "reconstruction": {
        "PSNR (dB)": ("PSNR", ALL),
        "SSIM": ("SSIM", ALL),
        "LPIPS": ("LPIPS", ALL),
        "flicker": ("flicker", ALL),
        "PSNR, first frame": ("PSNR", FIRST),
    },
    "refinement": {
        "PSNR, middle frames (dB)": ("PSNR", MIDDLE),
        "SSIM, middle": ("SSIM", MIDDLE),
        "LPIPS, middle": ("LPIPS", MIDDLE),
        "flicker": ("flicker", ALL),
        "PSNR, even frames": ("PSNR", EVEN),
    },
}
"""What is shown of each kind of measurement: a metric and the frames it is taken over."""
ENOUGH_VIDEOS = 6
"""Of fewer, all have one sign by chance more often than one time in twenty: 2 / 2^5."""
NOT_SHOWN = (
    "The paper's absolute values: other videos, other sizes, other numbers of samples. Compare differences and orders, "
    "never values of one table with those of the other.",
    "The order of long trainings: one of short trainings may turn round.",
    "The spread among trainings: the intervals are of the measured videos, for these very trainings.",
)


@dataclass
class Row:
    """One number of one model: its mean over clips and seeds, and its difference from the first model's."""

    frames: int
    arm: str
    metric: str
    mean: float
    low: float
    high: float
    difference: float
    difference_low: float
    difference_high: float
    paper: float | None
    paper_difference: float | None
    seeds: list[float]
    """The mean of each seed."""
    seed_differences: list[float]
    videos: int
    """How many were measured on."""

    @property
    def clear(self) -> bool:
        """Whether the interval of the difference leaves out 0 and the difference of every seed has its sign, of enough
        videos and seeds to say so."""
        sign = (self.difference_low > 0) - (self.difference_high < 0)
        enough = self.videos >= ENOUGH_VIDEOS and len(self.seeds) > 1
        return enough and sign != 0 and all(sign * difference > 0 for difference in self.seed_differences)


@dataclass
class Text:
    """A section's beginning, or with `warning` a note of its own."""

    title: str
    paragraphs: list[str] = field(default_factory=list)
    warning: bool = False


@dataclass
class Grid:
    """A table."""

    caption: str
    header: list[str]
    rows: list[list[Any]]
    protocol: str = ""
    note: str = ""
    best: dict[str, str] = field(default_factory=dict)


@dataclass
class Chart:
    """Lines; Markdown leaves them out."""

    title: str
    series: dict[str, list[tuple[float, float]]]
    x: str
    y: str
    log: bool = False


@dataclass
class Facts:
    """Names and values."""

    values: dict[str, object]


def write(config: Reproduce, table: Table, plan: Plan, measured: list[tuple[Model, Measure]]) -> Path:
    """index.html, results.md, results.json and results.csv in the table's folder; returns the first."""
    scores: dict[str, list[dict[int, Scores]]] = {}
    for model, measure in measured:
        scores.setdefault(model.arm.name, []).append(read(measure.out))
    found = rows_of(table, scores)
    facts = facts_of(config, plan, measured)
    blocks = list(content(config, table, plan, measured, scores, found, facts))
    out = Path(config.out)
    results = {"table": table.title, "scale": config.scale, "facts": facts, "results": [asdict(row) for row in found]}
    write_text(out / "results.json", json.dumps(results, indent=2))
    write_text(out / "results.csv", csv_of(found))
    write_text(out / "results.md", markdown(table.title, blocks))
    return html(table.title, blocks).write(out / "index.html")


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def rows_of(table: Table, scores: dict[str, list[dict[int, Scores]]]) -> list[Row]:
    """Every number of every arm at every length; scores of other protocols or clips are a UserError."""
    rows, first = [], table.arms[0]
    for frames in scores[first.name][0]:
        by_arm = {arm.name: [run[frames] for run in scores[arm.name]] for arm in table.arms}
        require_same(Protocol(**s.protocol) for runs in by_arm.values() for s in runs)
        sources = by_arm[first.name][0].sources
        for column, (metric, part) in COLUMNS[table.what].items():
            base = of_clips(by_arm[first.name], "model", metric, part)
            for arm in table.arms:
                values = of_clips(by_arm[arm.name], "model", metric, part)
                change = values - base
                theirs, first_theirs = (a.paper.get(metric) if part in (ALL, MIDDLE) else None for a in (arm, first))
                known = theirs is not None and first_theirs is not None
                rows.append(
                    Row(
                        frames,
                        arm.name,
                        column,
                        *(values.mean().item(), *interval(values.mean(0), sources)),
                        *(change.mean().item(), *interval(change.mean(0), sources)),
                        theirs,
                        round(theirs - first_theirs, 6) if known else None,
                        values.mean(1).tolist(),
                        change.mean(1).tolist(),
                        len(set(sources)),
                    )
                )
    return rows


def around(mean: float, low: float, high: float) -> str:
    """A number with half of its interval: "24.53 ± 0.61"."""
    digits = 2 if abs(mean) >= 1 else 4
    return f"{mean:.{digits}f} ± {(high - low) / 2:.{digits}f}"


def between(mean: float, low: float, high: float) -> str:
    """A difference with its interval: "+0.117 [+0.037, +0.198]"."""
    return f"{mean:+.3g} [{low:+.3g}, {high:+.3g}]"


def by_frame(runs: list[Scores], metric: str) -> list[tuple[float, float]]:
    """(frame, mean over clips and seeds) of a metric."""
    means: Tensor = torch.stack([torch.tensor(s.values["model"][metric], dtype=torch.float64).mean(0) for s in runs])
    return list(enumerate(means.mean(0).tolist()))


# ---------------------------------------------------------------------------------------------------------------------
# Content


def content(
    config: Reproduce,
    table: Table,
    plan: Plan,
    measured: list[tuple[Model, Measure]],
    scores: dict[str, list[dict[int, Scores]]],
    rows: list[Row],
    facts: dict[str, object],
) -> Iterator[Text | Grid | Chart | Facts]:
    """The page from top to bottom."""
    scale = table.scales[config.scale]
    lengths, names = list(dict.fromkeys(row.frames for row in rows)), [arm.name for arm in table.arms]
    kinds = {"tiny": "A trial of the machinery.", "small": "Short trainings.", "paper": "The paper's settings."}
    yield Text("", [f"{kinds[config.scale]} Scale {config.scale}: {scale.note}"], warning=True)
    yield Text("Ours", ["± is half of the 95 % interval over videos (bootstrap). The first model is the base."])
    for frames in lengths:
        yield ours(table, [row for row in rows if row.frames == frames], scores[names[0]][0][frames])
    for frames in lengths:
        yield differences(table, [row for row in rows if row.frames == frames])
    longest = lengths[-1]
    yield Text("By frame", ["Means over clips and seeds: where in a clip a model is good."])
    for metric in ("PSNR", "flicker"):
        lines = {name: by_frame([run[longest] for run in scores[name]], metric) for name in names}
        unit = "dB" if metric == "PSNR" else "levels of 255"
        yield Chart(f"{metric} by frame, {longest} frames", lines, "frame", unit)
    metrics = list(dict.fromkeys(metric for arm in table.arms for metric in arm.paper))
    yield Text("The paper", [table.says] if metrics else [table.says, table.protocol])
    if metrics:
        cells = [[arm.name, *(arm.paper.get(metric) for metric in metrics)] for arm in table.arms]
        yield Grid("The paper's numbers", ["", *metrics], cells, table.protocol, best=best_of(metrics))
    yield Text("What these runs do not show", [*NOT_SHOWN, *table.shows_not])
    yield Text("Training", [f"Seed {measured[0][0].seed}; every model saw equally many samples in equal batches."])
    for key, label in (("l1", "L1"), ("lpips", "LPIPS (VGG)")):
        logs = {m.arm.name: read_log(Path(measure.vae)) for m, measure in measured if m.seed == measured[0][0].seed}
        lines = {n: [(r["samples"], r[key]) for r in log if isinstance(r.get(key), float)] for n, log in logs.items()}
        yield Chart(label, lines, "samples", label, log=True)
    yield Text("How it was made")
    yield Facts(facts)
    times = plan.seconds()
    done = [[step.name, times.get(step.name), step.command()] for step in plan.steps]
    yield Grid("Commands", ["step", "seconds", "command"], done)


def ours(table: Table, rows: list[Row], reference: Scores) -> Grid:
    """The numbers at one length, each with its interval; below them what needs no training, or less of it."""
    columns, name = COLUMNS[table.what], REFERENCES[table.what]
    cells = []
    for arm in table.arms:
        cells.append([arm.name, *(around(r.mean, r.low, r.high) for r in rows if r.arm == arm.name)])
    floor = [of_clips([reference], name, metric, part)[0] for metric, part in columns.values()]
    cells.append([name, *(around(v.mean().item(), *interval(v, reference.sources)) for v in floor)])
    seeds = len(rows[0].seeds)
    note = ""
    if seeds > 1:
        first = next(iter(columns))
        single = [f"{r.arm}: {', '.join(f'{s:.4g}' for s in r.seeds)}" for r in rows if r.metric == first]
        note = f"Means of {seeds} seeds. {first} of each seed: {'; '.join(single)}."
    described = Protocol(**reference.protocol).describe()
    return Grid(f"Ours, {rows[0].frames} frames", ["", *columns], cells, described, note, best_of(list(columns)))


def differences(table: Table, rows: list[Row]) -> Grid:
    """Our differences from the first model beside the paper's, and which of ours are clear."""
    header, cells = ["", "clear"], [[arm.name] for arm in table.arms[1:]]
    for line in cells:
        line.append(", ".join(r.metric for r in rows if r.arm == line[0] and r.clear) or "nothing")
    for metric in COLUMNS[table.what]:
        mine = {row.arm: row for row in rows if row.metric == metric}
        with_paper = any(row.paper_difference is not None for row in mine.values())
        header += [metric, f"{metric}, paper"] if with_paper else [metric]
        for line in cells:
            row = mine[line[0]]
            line.append(between(row.difference, row.difference_low, row.difference_high))
            if with_paper:
                line.append(None if row.paper_difference is None else f"{row.paper_difference:+.4g}")
    orders = [order(metric, [row for row in rows if row.metric == metric]) for metric in COLUMNS[table.what]]
    note = (
        f"In brackets the 95 % interval over {rows[0].videos} videos. clear: it leaves out 0 and all seeds agree, of at"
        f" least {ENOUGH_VIDEOS} videos and 2 seeds. Best first: {' '.join(orders)}"
    )
    return Grid(f"Differences from {table.arms[0].name}, {rows[0].frames} frames", header, cells, note=note)


def order(metric: str, rows: list[Row]) -> str:
    """The models by one metric, ours and, where it has that metric, the paper's, best first."""
    up = best_of([metric])[metric] == "max"
    said = f"{metric}, ours: {', then '.join(r.arm for r in sorted(rows, key=lambda r: r.mean, reverse=up))}"
    if any(row.paper is None for row in rows):
        return f"{said}."
    return f"{said}; the paper's: {', then '.join(r.arm for r in sorted(rows, key=lambda r: r.paper, reverse=up))}."


def best_of(columns: list[str]) -> dict[str, str]:
    """Which end of each column is the good one."""
    return {name: "max" if name.startswith(("PSNR", "SSIM")) else "min" for name in columns}


def facts_of(config: Reproduce, plan: Plan, measured: list[tuple[Model, Measure]]) -> dict[str, object]:
    """Machine, versions, data and times."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    seeds = len({model.seed for model, _ in measured})
    given = "".join(f" {key}={value}" for key in ("videos", "val") if (value := getattr(config, key)))
    trained, held = open_index(config.videos, "none"), f"the last {measured[0][1].holdout:.0%} of each shot"
    if config.val:
        index = open_index(config.val, "none")
        held = f"{len(index.ok)} videos in {index.root.name} ({index.hash()[:8]})"
    return {
        "device": f"{device} ({platform.processor() or platform.machine()})",
        "versions": f"lvdm {lvdm.__version__} ({commit()}), torch {torch.__version__}",
        "trained on": f"{len(trained.ok)} videos in {trained.root.name} ({trained.hash()[:8]})",
        "measured on": held,
        "seeds": seeds,
        "time of the trainings": f"{sum(plan.seconds().values()):.0f} s",
        "command": f"lvdm reproduce {config.table}{given} scale={config.scale} seeds={seeds} out={config.out}",
    }


def commit() -> str:
    """The commit of this checkout, with + where files differ from it."""
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return "no git"
    return f"commit {done.stdout.strip()}" if done.returncode == 0 else "no checkout"


# ---------------------------------------------------------------------------------------------------------------------
# Formats


def html(title: str, blocks: list[Text | Grid | Chart | Facts]) -> Page:
    page = Page(title)
    for block in blocks:
        match block:
            case Text(warning=True):
                page.note("\n\n".join(block.paragraphs))
            case Text():
                page.section(block.title, "\n\n".join(block.paragraphs))
            case Grid():
                page.table(block.header, block.rows, block.caption, block.protocol, block.note, block.best)
            case Chart():
                page.chart(block.title, block.series, block.x, block.y, block.log)
            case Facts():
                page.facts(block.values)
    return page


def markdown(title: str, blocks: list[Text | Grid | Chart | Facts]) -> str:
    """The same without charts."""
    lines = [f"# {title}"]
    for block in blocks:
        match block:
            case Text():
                lines += [f"## {block.title}"] * bool(block.title)
                lines += [f"> {p}" if block.warning else p for p in block.paragraphs]
            case Grid():
                cells = [["–" if cell is None else str(cell) for cell in row] for row in block.rows]
                table = [block.header, ["---"] * len(block.header), *cells]
                lines += [f"**{block.caption}**", "\n".join(f"| {' | '.join(row)} |" for row in table)]
                lines += [f"Protocol: {block.protocol}"] * bool(block.protocol) + [block.note] * bool(block.note)
            case Facts():
                lines.append("\n".join(f"- {key}: {value}" for key, value in block.values.items()))
    return "\n\n".join(lines) + "\n"


def csv_of(rows: list[Row]) -> str:
    """A line a number; seeds separated by blanks."""
    text = io.StringIO()
    lines = [
        {key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in asdict(row).items()}
        for row in rows
    ]
    writer = csv.DictWriter(text, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
