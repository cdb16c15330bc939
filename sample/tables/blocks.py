"""What pages of tables are made of, and the same blocks as HTML and as Markdown."""

from dataclasses import dataclass, field
from typing import Any

from lvdm.report import Page, Player


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


@dataclass
class Clips:
    """Videos side by side on one clock; Markdown leaves them out."""

    title: str
    players: list[Player]
    note: str = ""


Block = Text | Grid | Chart | Facts | Clips


def html(title: str, blocks: list[Block]) -> Page:
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
            case Clips():
                page.players(block.players, block.note, block.title)
    return page


def markdown(title: str, blocks: list[Block]) -> str:
    """The same without charts and videos."""
    lines = [f"# {title}"]
    for block in blocks:
        match block:
            case Text():
                lines += [f"## {block.title}"] * bool(block.title)
                lines += [f"> {p}" if block.warning else p for p in block.paragraphs]
            case Grid():
                cells = [[shown(cell) for cell in row] for row in block.rows]
                table = [block.header, ["---"] * len(block.header), *cells]
                lines += [f"**{block.caption}**", "\n".join(f"| {' | '.join(row)} |" for row in table)]
                lines += [f"Protocol: {block.protocol}"] * bool(block.protocol) + [block.note] * bool(block.note)
            case Facts():
                lines.append("\n".join(f"- {key}: {value}" for key, value in block.values.items()))
    return "\n\n".join(lines) + "\n"


def shown(cell: Any) -> str:
    """A cell of a Markdown table."""
    return "–" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)
