"""The numbers of a table of models (`lvdm reproduce`): means, intervals, and which differences are clear."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lvdm.metrics.protocol import Protocol, require_same
from sample.measure.figures import ENOUGH_VIDEOS, SPREAD
from sample.measure.scores import Scores, ends, of_clips, resampled
from sample.tables.table import Arm, Table


@dataclass(frozen=True)
class Column:
    """What is shown of a metric."""

    metric: str
    frames: tuple[slice, ...] = (slice(None),)
    """Those it is the mean of; of several parts of a clip, the largest of their means less the smallest."""
    paper: str = ""
    """What the paper calls it."""


POSITIONS = tuple(slice(i, None, 4) for i in (1, 2, 3, 4))
"""Frames by their place in the group that a latent holds, after the first frame of the clip."""
MIDDLE, EVEN, FIRST = (slice(1, None, 2),), (slice(None, None, 2),), (slice(1),)
FRAMES = {
    "PSNR (dB)": Column("PSNR", paper="PSNR"),
    "SSIM": Column("SSIM", paper="SSIM"),
    "LPIPS": Column("LPIPS", paper="LPIPS"),
    "LPIPS (spatial)": Column("LPIPS (spatial)", paper="LPIPS"),
    "flicker": Column("flicker"),
    "PSNR, first frame": Column("PSNR", FIRST),
}
COLUMNS = {
    "reconstruction": FRAMES,
    "generation": FRAMES,
    "positions": {
        "PSNR (dB)": Column("PSNR", paper="PSNR"),
        **{f"SSIM, position {i}": Column("SSIM", (p,), f"SSIM, position {i}") for i, p in enumerate(POSITIONS, 1)},
        SPREAD: Column("SSIM", POSITIONS, SPREAD),
    },
    "refinement": {
        "PSNR, middle frames (dB)": Column("PSNR", MIDDLE, "PSNR"),
        "SSIM, middle": Column("SSIM", MIDDLE, "SSIM"),
        "LPIPS, middle": Column("LPIPS", MIDDLE, "LPIPS"),
        "flicker": Column("flicker"),
        "PSNR, even frames": Column("PSNR", EVEN),
    },
}
"""What is shown of each kind of measurement, where it was measured."""


@dataclass
class Row:
    """One number of one model: its mean over clips and seeds, and its difference from the first model's."""

    frames: int
    arm: str
    metric: str
    mean: float
    low: float | None
    """Of the interval, which one video alone has not."""
    high: float | None
    difference: float
    difference_low: float | None
    difference_high: float | None
    paper: float | None
    paper_difference: float | None
    seeds: list[float]
    """The number of each seed."""
    seed_differences: list[float]
    videos: int
    """How many were measured on."""
    clear: list[str]
    """The models that it differs from clearly (see `Number.clear`)."""


@dataclass
class Number:
    """A number of one model, or the difference of two, on the same clips."""

    seeds: Tensor
    """Of each seed, (seeds,) fp64."""
    drawn: Tensor
    """The mean over seeds in each draw of the bootstrap over videos, the same draws for all models."""
    videos: int

    def __sub__(self, other: "Number") -> "Number":
        return Number(self.seeds - other.seeds, self.drawn - other.drawn, self.videos)

    @property
    def around(self) -> tuple[float, float | None, float | None]:
        """The mean over seeds and its 95 % interval, which one video alone has not."""
        return self.seeds.mean().item(), *(ends(self.drawn) if self.videos > 1 else (None, None))

    @property
    def clear(self) -> bool:
        """Whether the interval of a difference leaves out 0 and every seed's has its sign, of enough videos and seeds
        to say so."""
        if self.videos < ENOUGH_VIDEOS or len(self.seeds) < 2:
            return False
        _, low, high = self.around
        return (low > 0 and bool((self.seeds > 0).all())) or (high < 0 and bool((self.seeds < 0).all()))


def number(runs: list[Scores], column: Column, rendering: str = "model") -> Number:
    """A column of one model, of its `runs`, one a seed."""
    parts = torch.stack([of_clips(runs, rendering, column.metric, part) for part in column.frames])

    def of(means: Tensor) -> Tensor:
        return means[0] if len(means) == 1 else means.amax(0) - means.amin(0)

    sources = runs[0].sources
    return Number(of(parts.mean(-1)), of(resampled(parts, sources)).mean(0), len(set(sources)))


def rows_of(table: Table, scores: dict[str, list[dict[int, Scores]]]) -> list[Row]:
    """Every number of every arm at every length; scores of other protocols or clips are a UserError."""
    rows, first = [], next(iter(scores))
    for frames in scores[first][0]:
        runs = {name: [run[frames] for run in own] for name, own in scores.items()}
        require_same(Protocol(**s.protocol) for own in runs.values() for s in own)
        for metric, column in columns_of(table, runs[first][0]).items():
            numbers = {name: number(own, column) for name, own in runs.items()}
            rows += [row(frames, table.arms[first], table.arms[name], metric, column, numbers) for name in numbers]
    return rows


def row(frames: int, first: Arm, arm: Arm, metric: str, column: Column, numbers: dict[str, Number]) -> Row:
    """The number of an arm beside those of all."""
    own = numbers[arm.name]
    change, theirs, base = own - numbers[first.name], arm.told.get(column.paper), first.told.get(column.paper)
    return Row(
        *(frames, arm.name, metric, *own.around, *change.around, theirs),
        None if theirs is None or base is None else round(theirs - base, 6),
        own.seeds.tolist(),
        change.seeds.tolist(),
        own.videos,
        [name for name, other in numbers.items() if name != arm.name and (own - other).clear],
    )


def columns_of(table: Table, measured: Scores) -> dict[str, Column]:
    """The columns of a table whose metric was measured."""
    return {name: column for name, column in COLUMNS[table.what].items() if column.metric in measured.values["model"]}
