"""Which of some models is the better one by a metric, and how far two orders of them agree."""

from itertools import combinations

from sample.measure.figures import good_end


def order(metric: str, ours: dict[str, float], papers: dict[str, float | None]) -> str:
    """The models by one metric, best first; beside them those of the paper, where it has that metric of two or
    more, and how many pairs stand alike in both, of those that are not level in one."""
    up = good_end(metric) == "max"
    said = f"{metric}, ours: {ranked(ours, up)}"
    known = {name: value for name, value in papers.items() if value is not None}
    if len(known) < 2:
        return f"{said}."
    pairs = [(ours[a] - ours[b]) * (known[a] - known[b]) for a, b in combinations(known, 2)]
    apart = [pair for pair in pairs if pair]
    alike = sum(pair > 0 for pair in apart)
    return f"{said}; the paper's: {ranked(known, up)} ({alike} of {len(apart)} pairs alike)."


def ranked(values: dict[str, float], up: bool) -> str:
    """Names, best first, those that are level with = between."""
    places = sorted(set(values.values()), reverse=up)
    return ", then ".join(" = ".join(name for name, value in values.items() if value == place) for place in places)
