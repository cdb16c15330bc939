"""Which of some models is the better one by a metric, and how far two orders of them agree."""

from collections.abc import Callable
from itertools import combinations

from sample.measure.figures import good_end


def order(
    metric: str, ours: dict[str, float], papers: dict[str, float | None], clear: Callable[[str, str], bool]
) -> str:
    """The models by one metric, best first; beside them those of the paper, where it has that metric of two or more.

    Of the pairs that are not level in the paper those count that are `clear` here: how many stand alike in both.
    """
    up = good_end(metric) == "max"
    said = f"{metric}, ours: {ranked(ours, up)}"
    known = {name: value for name, value in papers.items() if value is not None}
    if len(known) < 2:
        return f"{said}."
    apart = [(a, b) for a, b in combinations(known, 2) if known[a] != known[b]]
    sure = [(ours[a] - ours[b]) * (known[a] - known[b]) for a, b in apart if clear(a, b)]
    alike = f"of {len(apart)} pairs {len(sure) or 'none'} clear here"
    alike += f", {sum(pair > 0 for pair in sure)} of them as in the paper" if sure else ""
    return f"{said}; the paper's: {ranked(known, up)} ({alike})."


def ranked(values: dict[str, float], up: bool) -> str:
    """Names, best first, those that are level with = between."""
    places = sorted(set(values.values()), reverse=up)
    return ", then ".join(" = ".join(name for name, value in values.items() if value == place) for place in places)
