"""Report pages: one HTML file that shows a run's videos, curves and tables, opened from disk without a network.

Everything is inside the file (videos and images as data URIs, charts as inline SVG), and its content security policy
forbids any request. Without scripts the page still reads and plays; the script adds synchronised players, sortable
tables and values under the pointer. Equal content gives equal bytes.

    page = Page("UniVAE, stage 2", "Refinement at twice the frame rate, trained for `1000` samples.")
    page.section("Reconstruction")
    page.players([Player("Input", Path("input.mp4")), Player("D2", Path("d2.mp4"), "25 fps from the same latents")])
    page.chart("Loss", {"train": [(0, 0.9), (8, 0.7)]}, "samples seen", "L1")
    page.table(["model", "PSNR"], [["D1", 31.2], ["D2", 30.4]], protocol="17 frames, 64x64", best={"PSNR": "max"})
    page.write(Path("report/index.html"))
"""

import base64
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Literal

import av
import numpy as np

from lvdm.errors import UserError
from lvdm.files import write_text
from lvdm.report_style import CONTROLS, SCRIPT, STYLE

Cell = str | int | float | None
Points = Sequence[tuple[float, float]]

# Chart geometry in SVG user units, and the units of long tick labels.
WIDTH, HEIGHT = 560, 290
LEFT, TOP, RIGHT, BOTTOM = 50, 28, 552, 250
UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; media-src data:; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<header>
<h1>{title}</h1>
{lead}{contents}</header>
{sections}</main>
<script>{script}</script>
</body>
</html>
"""


@dataclass(frozen=True)
class Player:
    """One video of a synchronised group: an mp4 file or its bytes, H.264 with yuv420p, which every browser plays."""

    title: str
    video: Path | bytes
    caption: str = ""


class Page:
    """A report, filled from top to bottom and then written once.

    All text is escaped. In prose (leads, notes, captions) an empty line starts a paragraph and `backticks` mark code.
    """

    def __init__(self, title: str, lead: str = ""):
        self.title = title
        self.lead = lead
        self._sections: list[tuple[str, list[str]]] = [("", [])]

    def _add(self, block: str) -> None:
        self._sections[-1][1].append(block)

    def section(self, title: str, text: str = "") -> None:
        """Starts a section; what is added next belongs to it."""
        self._sections.append((title, []))
        if text:
            self._add(_prose(text, "lead"))

    def note(self, text: str) -> None:
        """An honest warning, set apart: what was not measured, what a number does not mean."""
        self._add(f'<aside class="warning" role="note">{_prose(text)}</aside>')

    def facts(self, facts: Mapping[str, object]) -> None:
        """Short names with their values: machine, time, versions, seed."""
        rows = _lines(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts.items())
        self._add(f'<dl class="facts">\n{rows}\n</dl>')

    def players(self, players: Sequence[Player], note: str = "") -> None:
        """Videos side by side on one clock in seconds, whatever their frame rates; a shorter one holds its last frame.

        One button and one slider (a step = one frame of the fastest) drive the group; it loops while in view.
        Raises UserError for a video that is missing or that browsers do not play, ValueError for an empty group.
        """
        if not players:
            raise ValueError("a group of players needs at least one video")
        cells = [_player(player) for player in players]
        label = escape("Videos: " + ", ".join(player.title for player in players))
        self._add(
            f'<figure class="players" role="group" tabindex="0" aria-label="{label}">\n'
            f"{_grid(cells)}\n{CONTROLS}{_caption(note)}</figure>"
        )

    def images(self, images: Mapping[str, Path | bytes], note: str = "") -> None:
        """PNG files (paths or bytes) side by side, each under its caption. Raises UserError for any other format."""
        cells = [_image(caption, image) for caption, image in images.items()]
        self._add(f"<figure>\n{_grid(cells)}\n{_caption(note)}</figure>")

    def chart(
        self, title: str, series: Mapping[str, Points], x_label: str, y_label: str, log_y: bool = False, note: str = ""
    ) -> None:
        """Lines of (x, y) points, e.g. a loss over samples seen; neighbouring charts share a row.

        A value that is not finite (or, with `log_y`, not positive) leaves a gap and is counted in the legend. Lines
        of more than 60 points are drawn faint, with their centred moving average on top.
        """
        self._add(_chart(title, series, x_label, y_label, log_y, note))

    def table(
        self,
        header: Sequence[str],
        rows: Sequence[Sequence[Cell]],
        caption: str = "",
        protocol: str = "",
        note: str = "",
        best: Mapping[str, Literal["min", "max"]] | None = None,
    ) -> None:
        """A table that sorts by a click on its header; numbers are right-aligned, floats to four digits.

        `protocol` says how its numbers were measured, one protocol for all of them. `best` names the columns whose
        smallest or largest value is set in bold. None and NaN mean "not measured". A string such as "31.2 ± 0.4"
        counts as the number it starts with and is shown as it is.
        """
        self._add(_table(header, rows, caption, protocol, note, best or {}))

    def html(self) -> str:
        """The whole page as HTML5 text."""
        sections, links = [], []
        for number, (title, blocks) in enumerate(self._sections):
            body = _lines(blocks)
            if title:
                links.append(f'<li><a href="#section-{number}">{escape(title)}</a></li>')
                sections.append(f'<section id="section-{number}">\n<h2>{escape(title)}</h2>\n{body}\n</section>\n')
            elif blocks:
                sections.append(f"<section>\n{body}\n</section>\n")
        contents = f'<nav aria-label="Contents"><ul>\n{_lines(links)}\n</ul></nav>\n' if len(links) > 2 else ""
        return PAGE.format(
            title=escape(self.title),
            lead=f"{_prose(self.lead, 'lead')}\n" if self.lead else "",
            contents=contents,
            sections="".join(sections),
            style=STYLE,
            script=SCRIPT,
        )

    def write(self, path: Path) -> Path:
        """Writes the page to `path` at once (temporary name, then rename), makes its folder, and returns `path`."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, self.html())
        return path


# ---------------------------------------------------------------------------------------------------------------------
# Text and media


def _lines(items: Iterable[str]) -> str:
    return "\n".join(items)


def _prose(text: str, css: str = "") -> str:
    """Escaped paragraphs; `code` in backticks."""
    attribute = f' class="{css}"' if css else ""
    paragraphs = [p.strip() for p in text.split("\n\n") if p.strip()]
    return _lines(f"<p{attribute}>{_inline(p)}</p>" for p in paragraphs)


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _caption(note: str) -> str:
    return f"<figcaption>{_inline(note)}</figcaption>\n" if note else ""


def _grid(cells: list[str]) -> str:
    """Cells in rows of equal length, at most five a row."""
    columns = math.ceil(len(cells) / max(1, math.ceil(len(cells) / 5)))
    return f'<div class="grid" style="--columns: {columns}">\n{_lines(cells)}\n</div>'


def _data_uri(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def _read(what: str, source: Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return source
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise UserError(f"{what}: cannot read {source} ({error.strerror})") from None


def _player(player: Player) -> str:
    what = f"video {player.title!r}"
    data = _read(what, player.video)
    try:
        with av.open(io.BytesIO(data)) as container:
            stream = container.streams.video[0]
            codec, pixels = stream.codec_context.name, stream.codec_context.pix_fmt
            frames, fps = stream.frames, float(stream.average_rate or 0)
            width, height = stream.codec_context.width, stream.codec_context.height
    except (av.error.FFmpegError, IndexError):
        raise UserError(f"{what} is not a readable mp4 file; expected H.264, yuv420p") from None
    if codec != "h264" or pixels != "yuv420p" or not frames or not fps:
        raise UserError(f"{what} is {codec}, {pixels}; browsers need H.264, yuv420p, in mp4: encode it so")
    return (
        f'<div class="cell">\n<h3>{escape(player.title)}</h3>\n'
        f'<video src="{_data_uri("video/mp4", data)}" width="{width}" height="{height}" data-frames="{frames}" '
        f'data-fps="{fps:g}" aria-label="{escape(player.title)}" autoplay loop muted playsinline controls></video>\n'
        f'<p class="facts-line">{frames} frames · {fps:g} fps · {width}×{height}</p>\n'
        + (f"<p>{_inline(player.caption)}</p>\n" if player.caption else "")
        + "</div>"
    )


def _image(caption: str, image: Path | bytes) -> str:
    data = _read(f"image {caption!r}", image)
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise UserError(f"image {caption!r} is not a PNG file; save it as PNG")
    source = _data_uri("image/png", data)
    return f'<div class="cell">\n<img src="{source}" alt="{escape(caption)}">\n<p>{_inline(caption)}</p>\n</div>'


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def _number(cell: Cell) -> float | None:
    """The number a cell shows ("31.2 ± 0.4" shows 31.2), None when it shows none."""
    if isinstance(cell, int | float):
        return None if math.isnan(cell) else float(cell)
    match = re.fullmatch(r"([-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?)(?:\s*±.*|\s*%)?", cell or "")
    return float(match[1].replace(",", "")) if match else None


def _show(cell: Cell, largest: float) -> str:
    """A cell as text; a float has four digits of the column's `largest` number, so that the points stand in line."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return '<span title="not measured">–</span>'
    if isinstance(cell, float) and math.isfinite(cell):
        digits = 3 - math.floor(math.log10(largest)) if largest else 2
        return f"{cell:,.{max(digits, 0)}f}" if digits <= 6 else f"{cell:.3e}"
    return f"{cell:,}" if isinstance(cell, int) else escape(str(cell))


def _table(
    header: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    caption: str,
    protocol: str,
    note: str,
    best: Mapping[str, str],
) -> str:
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a table row has {len(row)} cells, its header {len(header)}: {row}")
    if unknown := set(best) - set(header):
        raise ValueError(f"best= names columns that the header lacks: {sorted(unknown)}")

    heads, body = [], [[] for _ in rows]
    for column, name in enumerate(header):
        cells = [row[column] for row in rows]
        numbers = [_number(cell) for cell in cells]
        known = [n for n in numbers if n is not None]
        is_text = not known or any(n is None and isinstance(c, str) for n, c in zip(numbers, cells, strict=True))
        largest = max((abs(n) for n in known if math.isfinite(n)), default=0.0)
        winner = {"min": min, "max": max}[best[name]](known) if name in best and known else None
        arrow = {"min": " ↓", "max": " ↑"}[best[name]] if name in best else ""
        heads.append(f'<th scope="col"{"" if is_text else " class=number"}>{escape(name)}{arrow}</th>')
        for line, cell, number in zip(body, cells, numbers, strict=True):
            shown = _show(cell, largest)
            if winner is not None and number == winner:
                shown = f"<strong>{shown}</strong>"
            value = "" if is_text or number is None else f' data-value="{number!r}"'
            line.append(f"<td{'' if is_text else ' class=number'}{value}>{shown}</td>")

    lines = _lines(f"<tr>{''.join(line)}</tr>" for line in body)
    title = f"<caption>{_inline(caption)}</caption>\n" if caption else ""
    below = f'<p class="protocol"><b>Protocol</b> {_inline(protocol)}</p>\n' if protocol else ""
    below += f"<p>{_inline(note)}</p>\n" if note else ""
    label = escape(caption or "Table")
    return (
        f'<figure class="table">\n<div class="scroll" tabindex="0" role="region" aria-label="{label}">\n'
        f"<table>\n{title}<thead>\n<tr>{''.join(heads)}</tr>\n</thead>\n<tbody>\n{lines}\n</tbody>\n</table>\n</div>\n"
        + (f"<figcaption>\n{below}</figcaption>\n" if below else "")
        + "</figure>"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Charts


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


def _chart(title: str, series: Mapping[str, Points], x_label: str, y_label: str, log_y: bool, note: str) -> str:
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
        f'<ul class="legend">\n{_lines(legend)}\n</ul>\n<div class="scroll">\n'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{spoken}" data-axes="{axes}">\n'
        f'{_lines(grid)}\n<path class="axis" d="M{LEFT} {BOTTOM}H{RIGHT}"/>\n{_lines(lines)}\n'
        f'<text x="4" y="12">{escape(y_label)}{" (log scale)" if log_y else ""}</text>\n'
        f'<text class="end" x="{RIGHT}" y="{HEIGHT - 4}">{escape(x_label)}</text>\n'
        f"</svg>\n</div>\n{_caption(note)}</figure>"
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
