"""Which of some models is the better one by a metric, and how far two orders of them agree."""

from itertools import combinations

SPREAD = "SSIM, largest difference"
"""Between positions in a group."""


def order(metric: str, ours: dict[str, float], papers: dict[str, float | None]) -> str:
    """The models by one metric, best first; beside them those of the paper, where it has that metric of two or
    more, and how many pairs stand alike in both."""
    up = best_of([metric]).get(metric) == "max"
    said = f"{metric}, ours: {ranked(ours, up)}"
    known = {name: value for name, value in papers.items() if value is not None}
    if len(known) < 2:
        return f"{said}."
    pairs = list(combinations(known, 2))
    alike = sum((ours[a] - ours[b]) * (known[a] - known[b]) > 0 for a, b in pairs)
    return f"{said}; the paper's: {ranked(known, up)} ({alike} of {len(pairs)} pairs alike)."


def ranked(values: dict[str, float], up: bool) -> str:
    """Names, best first."""
    return ", then ".join(sorted(values, key=values.__getitem__, reverse=up))


def best_of(columns: list[str]) -> dict[str, str]:
    """Which end of each column is the good one, of those that have one."""
    ends = {}
    for name in columns:
        if not name.startswith(("parameters", "compression")):
            largest = name.startswith(("PSNR", "SSIM", "IS")) or "it/s" in name
            ends[name] = "max" if largest and name != SPREAD else "min"
    return ends
