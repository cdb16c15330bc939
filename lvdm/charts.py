"""Charts of report pages: inline SVG, lines over x and scatters of one model against others."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape

import numpy as np

from lvdm.markup import figcaption, stacked

Points = Sequence[tuple[float, float]]

# Geometry in SVG user units, of scatters as wide as high, and the units of long tick labels.
WIDTH, HEIGHT = 560, 290
LEFT, TOP, RIGHT, BOTTOM = 50, 28, 552, 250
SQUARE_HEIGHT, SQUARE_BOTTOM = 570, 530
UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class _Axis:
    """Maps values from `low` to `high`, on a linear or a log10 scale, to SVG units from `start` to `end`."""

    low: float
    high: float
    log: bool
    start: int
    end: int

    @classmethod
    def holding(cls, values: np.ndarray, start: int, end: int, log: bool = False, pad: float = 0.0) -> "_Axis":
        """The axis that just holds `values`, widened by the part `pad` at both ends; never of no length."""
        low, high = (values.min(), values.max()) if len(values) else (0.1, 1.0)
        low, high = (math.log10(low), math.log10(high)) if log else (float(low), float(high))
        if high - low <= 1e-9 * max(abs(low), abs(high)):
            low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
        low, high = low - pad * (high - low), high + pad * (high - low)
        return cls(10**low, 10**high, log, start, end) if log else cls(low, high, log, start, end)

    def place(self, values: np.ndarray | float) -> np.ndarray:
        low, high, values = (np.log10(v) if self.log else np.asarray(v) for v in (self.low, self.high, values))
        return self.start + (values - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """(place, label) of a few round values: powers of ten on a log scale (with their 2 and 5), else even steps."""
        values = []
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            factors = (1, 2, 5) if len(decades) <= 4 else (1,)
            steps = decades[:: max(1, len(decades) // 6)]
            values = [m * 10.0**e for e in steps for m in factors if self.low <= m * 10.0**e <= self.high]
        if len(values) < 3:
            step = 10 ** math.floor(math.log10((self.high - self.low) / 6))
            step = next(step * m for m in (1, 2, 5, 10) if (self.high - self.low) / (step * m) <= 6)
            values = [n * step for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        largest = max(map(abs, values))
        size, letter = next((pair for pair in UNITS if largest >= max(pair[0], 1e4) and not self.log), (1, ""))
        return [(float(self.place(v)), f"{v / size:.6g}{letter if v else ''}") for v in values]


@dataclass(frozen=True)
class Dot:
    """One thing measured by two models: `name` shows under the pointer, a click leads to `anchor` on the page."""

    x: float
    y: float
    name: str
    anchor: str = ""


def line_chart(title: str, series: Mapping[str, Points], x_label: str, y_label: str, log_y: bool, note: str) -> str:
    """See `Page.chart`."""
    curves = {name: _points(points, log_y) for name, points in series.items()}
    drawn = np.concatenate([xy[shown] for xy, shown in curves.values()] or [np.zeros((0, 2))])
    x_axis = _Axis.holding(drawn[:, 0], LEFT, RIGHT)
    y_axis = _Axis.holding(drawn[:, 1], BOTTOM, TOP, log_y, pad=0.05)

    lines, legend, windows = [], [], set()
    for index, (name, (xy, shown)) in enumerate(curves.items()):
        x, y = x_axis.place(xy[:, 0]), np.full(len(xy), np.nan)
        y[shown] = y_axis.place(xy[shown, 1])
        colour, window = f"c{index % 8}", _window(len(xy))
        if window > 1:
            windows.add(window)
            lines.append(f'<path class="{colour} raw" d="{_path(x, y)}"/>')
            y = _moving_average(y, window)
        lines.append(f'<path class="{colour} line" d="{_path(x, y)}"/>')
        legend.append(_legend(colour, name, xy, shown, log_y))
    if windows:
        widths = " or ".join(str(w) for w in sorted(windows))
        note = f"{note} Faint: every value. Bold: centred moving average over {widths} values.".strip()

    grid = [f'<text class="mid" x="{at:.1f}" y="{BOTTOM + 17}">{label}</text>' for at, label in x_axis.ticks()]
    for at, label in y_axis.ticks():
        grid.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{RIGHT}"/>')
        grid.append(f'<text class="end" x="{LEFT - 8}" y="{at + 4:.1f}">{label}</text>')
    axes = escape(json.dumps({"x": asdict(x_axis), "y": asdict(y_axis)}))
    spoken = escape(f"Line chart of {title}: {', '.join(series)}, over {x_label}; the legend has the last values")
    return (
        f'<figure class="chart">\n<h3>{escape(title)} <small class="at">last values</small></h3>\n'
        f'<ul class="legend">\n{stacked(legend)}\n</ul>\n<div class="scroll">\n'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{spoken}" data-axes="{axes}">\n'
        f'{stacked(grid)}\n<path class="axis" d="M{LEFT} {BOTTOM}H{RIGHT}"/>\n{stacked(lines)}\n'
        f'<text x="4" y="12">{escape(y_label)}{" (log scale)" if log_y else ""}</text>\n'
        f'<text class="end" x="{RIGHT}" y="{HEIGHT - 4}">{escape(x_label)}</text>\n'
        f"</svg>\n</div>\n{figcaption(note)}</figure>"
    )


def _points(points: Points, log_y: bool) -> tuple[np.ndarray, np.ndarray]:
    """The points as (N, 2), ordered by x, and which of the N can be drawn."""
    xy = np.asarray(points, np.float64).reshape(-1, 2)
    xy = xy[np.argsort(xy[:, 0], kind="stable")]
    return xy, np.isfinite(xy).all(axis=1) & ((xy[:, 1] > 0) | (not log_y))


def _legend(colour: str, name: str, xy: np.ndarray, shown: np.ndarray, log_y: bool) -> str:
    last = f"{xy[shown][-1, 1]:.4g}" if shown.any() else "nothing to draw"
    kind = "finite and positive" if log_y else "finite"
    gaps = "" if shown.all() else f" <small>({int((~shown).sum())} of {len(xy)} not {kind})</small>"
    return f'<li class="{colour}"><i></i>{escape(name)}{gaps} <span class="value">{last}</span></li>'


def _window(count: int) -> int:
    """How many values the bold line averages: none up to 60, then an odd number near 2 %."""
    return 2 * (count // 100) + 3 if count > 60 else 1


def _moving_average(y: np.ndarray, window: int) -> np.ndarray:
    """The mean of the finite values in an odd `window` centred on each value; NaN where `y` is NaN."""
    known = np.isfinite(y)
    total = np.convolve(np.where(known, y, 0.0), np.ones(window), "same")
    count = np.convolve(known.astype(float), np.ones(window), "same")
    return np.where(known, total / np.maximum(count, 1.0), np.nan)


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """SVG path data through the points, broken at NaN; of a long line, the lowest and highest point of a column."""
    pieces = []
    for run in np.split(np.arange(len(x)), np.flatnonzero(~np.isfinite(y))):
        run = run[np.isfinite(y[run])]
        if len(run) == 0:
            continue
        if len(x) > 2 * (RIGHT - LEFT):
            columns = np.split(run, np.flatnonzero(np.diff(np.floor(x[run]))) + 1)
            run = np.concatenate([np.unique([c[y[c].argmin()], c[y[c].argmax()]]) for c in columns])
        pieces.append("M" + "L".join(f"{x[i]:.2f} {y[i]:.2f}" for i in run))
        if len(run) == 1:  # a line of one point would not show: draw a dot
            pieces.append("m-1 0a1 1 0 1 0 2 0a1 1 0 1 0 -2 0")
    return "".join(pieces)


# ---------------------------------------------------------------------------------------------------------------------
# Scatters


def scatter_chart(
    title: str, views: Mapping[str, Mapping[str, Sequence[Dot]]], x_label: str, y_label: str, note: str
) -> str:
    """See `Page.scatter`."""
    names = list(next(iter(views.values())))
    legend = [f'<li class="c{(i + 1) % 8}"><i></i>{escape(name)}</li>' for i, name in enumerate(names)]
    shown = stacked(_view(name, series, x_label, y_label) for name, series in views.items())
    return (
        f'<figure class="chart scatter">\n<h3>{escape(title)} <small class="at"></small></h3>\n'
        f'<ul class="legend">\n{stacked(legend)}\n</ul>\n{shown}\n{figcaption(note)}</figure>'
    )


def _view(name: str, series: Mapping[str, Sequence[Dot]], x_label: str, y_label: str) -> str:
    """One metric: dots on two axes of one scale, and the diagonal on which both models are equal."""
    dots = [(i, dot) for i, of in enumerate(series.values()) for dot in of if math.isfinite(dot.x + dot.y)]
    values = np.array([[dot.x, dot.y] for _, dot in dots]).reshape(-1)
    x_axis = _Axis.holding(values, LEFT, RIGHT, pad=0.05)
    y_axis = _Axis.holding(values, SQUARE_BOTTOM, TOP, pad=0.05)
    grid = [f'<path class="equal" d="M{LEFT} {SQUARE_BOTTOM}L{RIGHT} {TOP}"/>']
    for (x, label), (y, _) in zip(x_axis.ticks(), y_axis.ticks(), strict=True):
        grid.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}M{x:.1f} {SQUARE_BOTTOM}V{TOP}"/>')
        grid.append(f'<text class="end" x="{LEFT - 8}" y="{y + 4:.1f}">{label}</text>')
        grid.append(f'<text class="mid" x="{x:.1f}" y="{SQUARE_BOTTOM + 17}">{label}</text>')
    marks = [_mark(dot, f"c{(i + 1) % 8}", x_axis.place(dot.x), y_axis.place(dot.y)) for i, dot in dots]
    spoken = escape(f"{name} of {len(marks)} clips, {x_label} across, {y_label} upwards")
    return (
        f'<div class="view" data-name="{escape(name)}">\n<h4>{escape(name)}</h4>\n<div class="scroll">\n'
        f'<svg viewBox="0 0 {WIDTH} {SQUARE_HEIGHT}" role="group" aria-label="{spoken}">\n{stacked(grid)}\n'
        f'<path class="axis" d="M{LEFT} {TOP}V{SQUARE_BOTTOM}H{RIGHT}"/>\n{stacked(marks)}\n'
        f'<text x="4" y="12">{escape(name)}, {escape(y_label)}</text>\n'
        f'<text class="end" x="{RIGHT}" y="{SQUARE_HEIGHT - 4}">{escape(name)}, {escape(x_label)}</text>\n'
        "</svg>\n</div>\n</div>"
    )


def _mark(dot: Dot, colour: str, x: float, y: float) -> str:
    spoken = escape(f"{dot.name}: {dot.x:.4g} across, {dot.y:.4g} upwards")
    circle = f'<circle class="{colour}" cx="{x:.2f}" cy="{y:.2f}" r="5"><title>{spoken}</title></circle>'
    return f'<a href="#{escape(dot.anchor)}" aria-label="{spoken}">{circle}</a>' if dot.anchor else circle
