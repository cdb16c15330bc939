"""The page of a table of models (`lvdm reproduce`): our numbers beside the paper's, as HTML, Markdown, JSON and CSV."""

import csv
import io
import json
import platform
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

import vae
from lvdm import config as configs
from lvdm.cost import parameters
from lvdm.data.index import open_index
from lvdm.files import write_text
from lvdm.metrics.protocol import Protocol
from lvdm.run import read_log
from sample.measure.figures import ENOUGH_VIDEOS, around, best_of, between, versions
from sample.measure.scores import REFERENCES, Measure, Scores, read
from sample.plan import Plan
from sample.tables.blocks import Block, Chart, Facts, Grid, Text, html, markdown
from sample.tables.configs import Reproduce
from sample.tables.distances import Distance, distances, generated, grids, trainings
from sample.tables.ordering import order
from sample.tables.reproduce import Model, left_out
from sample.tables.rows import Row, columns_of, number, rows_of
from sample.tables.showing import side_by_side
from sample.tables.table import Table
from sample.zoo import factors
from train.configs import TrainVAE

TAKEN = {
    "positions": ["SSIM by position: mean over the groups of 4 frames after the first frame, then over clips"],
    "refinement": ["the encoder saw every second frame, the even ones; middle: the others"],
}
"""How the columns are taken out of a clip, besides what the protocol of its scores says."""
NOT_SHOWN = (
    "The paper's absolute values: other videos, other sizes, other numbers of samples. Compare differences and orders, "
    "never values of one table with those of the other.",
    "The order of long trainings: one of short trainings may turn round.",
    "The spread among trainings: the intervals are of the measured videos, for these very trainings.",
)


def write(config: Reproduce, table: Table, plan: Plan, measured: list[tuple[Model, Measure]]) -> Path:
    """index.html, results.md, results.json and results.csv in the table's folder; returns the first."""
    scores: dict[str, list[dict[int, Scores]]] = {}
    for model, measure in measured:
        scores.setdefault(model.arm.name, []).append(read(measure.out))
    found, apart = rows_of(table, scores), list(distances(config, table))
    facts = facts_of(config, plan, measured)
    blocks = list(content(config, table, plan, measured, scores, found, apart, facts))
    return save(config, table, blocks, facts, [asdict(row) for row in found], [one.line() for one in apart])


def save(
    config: Reproduce, table: Table, blocks: list[Block], facts: dict[str, object], *numbers: list[dict[str, object]]
) -> Path:
    """The page in its four formats; `numbers` are dictionaries of one kind each."""
    out, lines = Path(config.out), [line for kind in numbers for line in kind]
    results = {"table": table.title, "scale": config.scale, "facts": facts, "results": lines}
    write_text(out / "results.json", json.dumps(results, indent=2, allow_nan=False))
    write_text(out / "results.csv", csv_of(lines))
    write_text(out / "results.md", markdown(table.title, blocks))
    return html(table.title, blocks).write(out / "index.html")


# ---------------------------------------------------------------------------------------------------------------------
# Content


def content(
    config: Reproduce,
    table: Table,
    plan: Plan,
    measured: list[tuple[Model, Measure]],
    scores: dict[str, list[dict[int, Scores]]],
    rows: list[Row],
    apart: list[Distance],
    facts: dict[str, object],
) -> Iterator[Block]:
    """The page from top to bottom."""
    lengths, names = list(dict.fromkeys(row.frames for row in rows)), list(scores)
    yield warning(config, table)
    yield Text("Ours", ["± is half of the 95 % interval over videos (bootstrap). The first model is the base."])
    for frames in lengths:
        yield ours(config, table, [row for row in rows if row.frames == frames], scores[names[0]][0][frames])
    if len(names) > 1:
        for frames in lengths:
            yield differences(config, [row for row in rows if row.frames == frames])
    if apart:
        yield Text("Generated", ["Samples of a transformer trained on each model's latents, against real videos."])
        yield from grids(config, apart)
        yield from trainings(config, table)
    yield from clips(config, table, measured)
    yield from curves(scores, lengths[-1])
    yield from papers(table)
    yield from models(table)
    yield not_shown(config, table)
    yield from learning(measured)
    yield Text("How it was made")
    yield Facts(facts)
    times = plan.seconds()
    yield Grid(
        "Commands",
        ["step", "seconds", "command"],
        [[step.name, times.get(step.name), step.command()] for step in plan.steps],
    )


def warning(config: Reproduce, table: Table) -> Text:
    """What kind of table it is."""
    kinds = {
        "tiny": "These numbers mean nothing: this is a trial of the machinery.",
        "small": "Short trainings.",
        "paper": "The paper's settings.",
    }
    return Text("", [f"{kinds[config.scale]} Scale {config.scale}: {table.scales[config.scale].note}"], warning=True)


def clips(config: Reproduce, table: Table, measured: list[tuple[Model, Measure]]) -> Iterator[Block]:
    """Videos to look at: reconstructions, and what was generated."""
    yield Text(
        "Side by side", ["In index.html: the same clips through every model of the first seed; one slider moves all."]
    )
    yield from side_by_side(config.out, measured)
    yield from generated(config, table)


def curves(scores: dict[str, list[dict[int, Scores]]], frames: int) -> Iterator[Block]:
    """Metrics over a clip."""
    yield Text("By frame", ["Means over clips and seeds: where in a clip a model is good."])
    for metric in ("PSNR", "flicker"):
        lines = {name: by_frame([run[frames] for run in runs], metric) for name, runs in scores.items()}
        unit = "dB" if metric == "PSNR" else "levels of 255"
        yield Chart(f"{metric} by frame, {frames} frames", lines, "frame", unit)


def by_frame(runs: list[Scores], metric: str) -> list[tuple[float, float]]:
    """(frame, mean over clips and seeds) of a metric."""
    means: Tensor = torch.stack([torch.tensor(s.values["model"][metric], dtype=torch.float64).mean(0) for s in runs])
    return list(enumerate(means.mean(0).tolist()))


def papers(table: Table) -> Iterator[Block]:
    """What the paper says, in words and numbers."""
    metrics = list(dict.fromkeys(metric for arm in table.arms.values() for metric in arm.paper))
    yield Text("The paper", [table.says] if metrics else [table.says, table.protocol])
    if metrics:
        cells = [[name, *map(arm.paper.get, metrics)] for name, arm in table.arms.items()]
        yield Grid("The paper's numbers", ["", *metrics], cells, table.protocol, best=best_of(metrics))


def models(table: Table) -> Iterator[Grid]:
    """The models at full size, whatever the scale: counted, without weights."""
    cells = []
    for name, arm in table.arms.items():
        keys = {key: value for key, value in arm.set.items() if key.startswith("model")}
        if table.verb == "train vae" and (arm.config or "model" in keys):
            recipe = configs.load(TrainVAE, arm.config or None, keys)
            with torch.device("meta"):
                model = vae.build(recipe.model, **recipe.model_args)
            spec = model.spec
            compression = spec.time_factor * spec.space_factor**2
            cells.append([name, recipe.model, parameters(model), factors(spec), compression, spec.latent_channels])
    header = ["", "name here", "parameters", "time x height x width", "compression", "channels"]
    if cells:
        yield Grid("The models at full size, counted here", header, cells)


def not_shown(config: Reproduce, table: Table) -> Text:
    """What the runs do not show, arms that are not there among it."""
    absent = [f"{name}, left out; {how}." for name, how in left_out(config, table).items()]
    return Text("What these runs do not show", [*NOT_SHOWN, *table.shows_not, *absent])


def learning(measured: list[tuple[Model, Measure]]) -> Iterator[Block]:
    """The curves of the trainings."""
    trained = [model for model, _ in measured if model.trained and model.seed == 0]
    if not trained:
        return
    yield Text("Training", ["Seed 0; every model trained here saw equally many samples in equal batches."])
    for key, label in (("l1", "L1"), ("lpips", "LPIPS (VGG)")):
        logs = {model.arm.name: read_log(Path(model.vae)) for model in trained}
        lines = {n: [(r["samples"], r[key]) for r in log if isinstance(r.get(key), float)] for n, log in logs.items()}
        yield Chart(label, lines, "samples", label, log=True)


def ours(config: Reproduce, table: Table, rows: list[Row], reference: Scores) -> Grid:
    """The numbers at one length, each with its interval; below them what needs no training, or less of it."""
    name = REFERENCES["refinement" if table.what == "refinement" else "reconstruction"]
    columns = columns_of(table, reference)
    header, cells = ["", *columns], []
    for arm in dict.fromkeys(row.arm for row in rows):
        cells.append([arm, *(around(r.mean, r.low, r.high) for r in rows if r.arm == arm)])
    cells.append([name, *(around(*number([reference], column, name).around) for column in columns.values())])
    note = ""
    if max(len(row.seeds) for row in rows) > 1:
        first = next(iter(columns))
        single = [f"{r.arm}: {', '.join(f'{s:.4g}' for s in r.seeds)}" for r in rows if r.metric == first]
        note = f"Means of seeds. {first} of each: {'; '.join(single)}."
    protocol = Protocol(**reference.protocol)
    protocol = replace(protocol, estimator="; ".join([protocol.estimator, *TAKEN.get(table.what, [])]))
    best = {} if config.trial else best_of(columns)
    return Grid(f"Ours, {rows[0].frames} frames", header, cells, protocol.describe(), note, best)


def differences(config: Reproduce, rows: list[Row]) -> Grid:
    """Our differences from the first model beside the paper's, and which of ours are clear."""
    first, *others = dict.fromkeys(row.arm for row in rows)
    header, cells = ["", "clear"], [[name] for name in others]
    for line in cells:
        line.append(", ".join(r.metric for r in rows if r.arm == line[0] and first in r.clear) or "nothing")
    metrics = list(dict.fromkeys(row.metric for row in rows))
    for metric in metrics:
        mine = {row.arm: row for row in rows if row.metric == metric}
        with_paper = any(row.paper_difference is not None for row in mine.values())
        header += [metric, f"{metric}, paper"] if with_paper else [metric]
        for line in cells:
            row = mine[line[0]]
            line.append(between(row.difference, row.difference_low, row.difference_high))
            if with_paper:
                line.append(None if row.paper_difference is None else f"{row.paper_difference:+.4g}")
    orders = []
    for metric in metrics:
        mine = {row.arm: row for row in rows if row.metric == metric}
        theirs = {} if config.trial else {name: row.paper for name, row in mine.items()}
        means = {name: row.mean for name, row in mine.items()}
        orders.append(order(metric, means, theirs, lambda a, b, mine=mine: b in mine[a].clear))
    note = (
        f"In brackets the 95 % interval over {rows[0].videos} videos. clear: it leaves out 0 and all seeds agree, of at"
        f" least {ENOUGH_VIDEOS} videos and 2 seeds. Best first: {' '.join(orders)}"
    )
    return Grid(f"Differences from {first}, {rows[0].frames} frames", header, cells, note=note)


def facts_of(config: Reproduce, plan: Plan, measured: list[tuple[Model, Measure]]) -> dict[str, object]:
    """Machine, versions, data and times."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    seeds = len({model.seed for model, _ in measured})
    given = "".join(f" {key}={value}" for key in ("videos", "val", "c3d") if (value := getattr(config, key)))
    for key in ("sets", "given"):
        given += "".join(f" {key}.{name}={value}" for name, value in getattr(config, key).items())
    trained, held = open_index(config.videos, "none"), f"the last {measured[0][1].holdout:.0%} of each shot"
    if config.val:
        index = open_index(config.val, "none")
        held = f"{len(index.ok)} videos in {index.root.name} ({index.hash()[:8]})"
    return {
        "device": f"{device} ({platform.processor() or platform.machine()})",
        "versions": versions(),
        "trained on": f"{len(trained.ok)} videos in {trained.root.name} ({trained.hash()[:8]})",
        "measured on": held,
        "seeds": seeds,
        "time of the steps": f"{sum(plan.seconds().values()):.0f} s",
        "command": f"lvdm reproduce {config.table}{given} scale={config.scale} seeds={seeds} out={config.out}",
    }


def csv_of(lines: list[dict[str, object]]) -> str:
    """A line a number; lists separated by semicolons, what a kind of number has not left empty."""
    text = io.StringIO()
    columns = list(dict.fromkeys(key for line in lines for key in line))
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({k: "; ".join(map(str, v)) if isinstance(v, list) else v for k, v in line.items()})
    return text.getvalue()
