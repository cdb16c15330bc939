"""Numbers as pages and terminals show them: with their intervals, their good ends and the versions that made them."""

import math
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch

import lvdm

ENOUGH_VIDEOS = 6
"""Of fewer, all have one sign by chance more often than one time in twenty: 2 / 2^5."""
SPREAD = "SSIM, largest difference"
"""Between positions in a group."""


def around(mean: float, low: float | None, high: float | None) -> str:
    """A number with half of its interval, where it has one: "24.53 ± 0.61"."""
    digits = 2 if abs(mean) >= 1 else 4
    return f"{mean:.{digits}f}" + ("" if low is None else f" ± {(high - low) / 2:.{digits}f}")


def between(mean: float, low: float | None, high: float | None) -> str:
    """A difference with its interval, where it has one: "+0.117 [+0.037, +0.198]"."""
    return f"{mean:+.3g}" + ("" if low is None else f" [{low:+.3g}, {high:+.3g}]")


def finite(value: float) -> float | None:
    """JSON has no nan."""
    return value if math.isfinite(value) else None


def good_end(metric: str) -> Literal["min", "max"] | None:
    """Which end of a metric is the good one, None where it has none; `metric` may have its unit or frames behind it."""
    if metric.startswith(("parameters", "compression")):
        return None
    largest = metric.removeprefix("pooled ").startswith(("PSNR", "SSIM", "IS", "IP")) or "it/s" in metric
    return "max" if largest and metric != SPREAD else "min"


def best_of(columns: Iterable[str]) -> dict[str, Literal["min", "max"]]:
    """The good end of each column that has one."""
    return {name: end for name in columns if (end := good_end(name))}


def versions() -> str:
    """What made the numbers."""
    return f"lvdm {lvdm.__version__} ({commit()}), torch {torch.__version__}"


def commit() -> str:
    """The commit of this checkout, with + where files differ from it."""
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return "no git"
    return f"commit {done.stdout.strip()}" if done.returncode == 0 else "no checkout"
