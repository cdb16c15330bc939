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
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal

import av

from lvdm.charts import Dot, Points, line_chart, scatter_chart
from lvdm.errors import UserError
from lvdm.files import write_text
from lvdm.markup import figcaption, inline, prose, stacked
from lvdm.report_style import CONTROLS, SCRIPT, STYLE


@dataclass(frozen=True)
class Link:
    """A cell of a table that leads to a group of players on the same page, by its anchor."""

    text: str
    anchor: str


Cell = str | int | float | Link | None

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
            self._add(prose(text, "lead"))

    def note(self, text: str) -> None:
        """An honest warning, set apart: what was not measured, what a number does not mean."""
        self._add(f'<aside class="warning" role="note">{prose(text)}</aside>')

    def facts(self, facts: Mapping[str, object]) -> None:
        """Short names with their values: machine, time, versions, seed."""
        rows = stacked(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts.items())
        self._add(f'<dl class="facts">\n{rows}\n</dl>')

    def players(self, players: Sequence[Player], note: str = "", title: str = "", anchor: str = "") -> None:
        """Videos side by side on one clock in seconds, whatever their frame rates; a shorter one holds its last frame.

        One button and one slider (a step = one frame of the fastest) drive the group; it loops while in view. Links
        and dots lead to its `anchor`, a word that no other group of the page has.
        Raises UserError for a video that is missing or that browsers do not play, ValueError for an empty group.
        """
        if not players:
            raise ValueError("a group of players needs at least one video")
        cells = [_player(player) for player in players]
        label = escape(f"{title or 'Videos'}: " + ", ".join(player.title for player in players))
        place = f' id="{escape(anchor)}"' if anchor else ""
        head = f"<h3>{escape(title)}</h3>\n" if title else ""
        self._add(
            f'<figure class="players"{place} role="group" tabindex="0" aria-label="{label}">\n'
            f"{head}{_grid(cells)}\n{CONTROLS}{figcaption(note)}</figure>"
        )

    def images(self, images: Mapping[str, Path | bytes], note: str = "") -> None:
        """PNG files (paths or bytes) side by side, each under its caption. Raises UserError for any other format."""
        cells = [_image(caption, image) for caption, image in images.items()]
        self._add(f"<figure>\n{_grid(cells)}\n{figcaption(note)}</figure>")

    def chart(
        self, title: str, series: Mapping[str, Points], x_label: str, y_label: str, log_y: bool = False, note: str = ""
    ) -> None:
        """Lines of (x, y) points, e.g. a loss over samples seen; neighbouring charts share a row.

        A value that is not finite (or, with `log_y`, not positive) leaves a gap and is counted in the legend. Lines
        of more than 60 points are drawn faint, with their centred moving average on top.
        """
        self._add(line_chart(title, series, x_label, y_label, log_y, note))

    def scatter(
        self,
        title: str,
        views: Mapping[str, Mapping[str, Sequence[Dot]]],
        x_label: str,
        y_label: str,
        note: str = "",
    ) -> None:
        """Dots on two axes of one scale: what one model has of each clip, across, and what others have, upwards.

        `views` are metric -> model -> dots, all of the same models; the reader chooses the metric. A dot with a value
        that is not finite is left out. A click on a dot leads to its anchor (see `players`).
        """
        self._add(scatter_chart(title, views, x_label, y_label, note))

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
        or "+0.3 [0.1, 0.5]" counts as the number it starts with and is shown as it is.
        """
        self._add(_table(header, rows, caption, protocol, note, best or {}))

    def html(self) -> str:
        """The whole page as HTML5 text."""
        sections, links = [], []
        for number, (title, blocks) in enumerate(self._sections):
            body = stacked(blocks)
            if title:
                links.append(f'<li><a href="#section-{number}">{escape(title)}</a></li>')
                sections.append(f'<section id="section-{number}">\n<h2>{escape(title)}</h2>\n{body}\n</section>\n')
            elif blocks:
                sections.append(f"<section>\n{body}\n</section>\n")
        contents = f'<nav aria-label="Contents"><ul>\n{stacked(links)}\n</ul></nav>\n' if len(links) > 2 else ""
        return PAGE.format(
            title=escape(self.title),
            lead=f"{prose(self.lead, 'lead')}\n" if self.lead else "",
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
# Media


def _grid(cells: list[str]) -> str:
    """Cells in rows of equal length, at most five a row."""
    columns = math.ceil(len(cells) / max(1, math.ceil(len(cells) / 5)))
    return f'<div class="grid" style="--columns: {columns}">\n{stacked(cells)}\n</div>'


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
        + (f"<p>{inline(player.caption)}</p>\n" if player.caption else "")
        + "</div>"
    )


def _image(caption: str, image: Path | bytes) -> str:
    data = _read(f"image {caption!r}", image)
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise UserError(f"image {caption!r} is not a PNG file; save it as PNG")
    source = _data_uri("image/png", data)
    return f'<div class="cell">\n<img src="{source}" alt="{escape(caption)}">\n<p>{inline(caption)}</p>\n</div>'


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def _number(cell: Cell) -> float | None:
    """The number a cell shows ("31.2 ± 0.4" and "31.2 [30.8, 31.6]" show 31.2), None when it shows none."""
    if isinstance(cell, int | float):
        return None if math.isnan(cell) else float(cell)
    if isinstance(cell, Link):
        return None
    match = re.fullmatch(r"([-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?)(?:\s*±.*|\s*\[.*\]|\s*%)?", cell or "")
    return float(match[1].replace(",", "")) if match else None


def _show(cell: Cell, largest: float) -> str:
    """A cell as text; a float has four digits of the column's `largest` number, so that the points stand in line."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return '<span title="not measured">–</span>'
    if isinstance(cell, Link):
        return f'<a href="#{escape(cell.anchor)}">{escape(cell.text)}</a>'
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
        is_text = not known or any(n is None and isinstance(c, str | Link) for n, c in zip(numbers, cells, strict=True))
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

    lines = stacked(f"<tr>{''.join(line)}</tr>" for line in body)
    title = f"<caption>{inline(caption)}</caption>\n" if caption else ""
    below = f'<p class="protocol"><b>Protocol</b> {inline(protocol)}</p>\n' if protocol else ""
    below += f"<p>{inline(note)}</p>\n" if note else ""
    label = escape(caption or "Table")
    return (
        f'<figure class="table">\n<div class="scroll" tabindex="0" role="region" aria-label="{label}">\n'
        f"<table>\n{title}<thead>\n<tr>{''.join(heads)}</tr>\n</thead>\n<tbody>\n{lines}\n</tbody>\n</table>\n</div>\n"
        + (f"<figcaption>\n{below}</figcaption>\n" if below else "")
        + "</figure>"
    )
