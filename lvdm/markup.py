"""Text as HTML, escaped: what pages and charts are put together with."""

import re
from collections.abc import Iterable
from html import escape


def stacked(items: Iterable[str]) -> str:
    """One a line."""
    return "\n".join(items)


def prose(text: str, css: str = "") -> str:
    """Escaped paragraphs, parted by empty lines; `code` in backticks."""
    attribute = f' class="{css}"' if css else ""
    paragraphs = [p.strip() for p in text.split("\n\n") if p.strip()]
    return stacked(f"<p{attribute}>{inline(p)}</p>" for p in paragraphs)


def inline(text: str) -> str:
    """Escaped text; `code` in backticks."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def figcaption(note: str) -> str:
    """What stands under a figure, or nothing."""
    return f"<figcaption>{inline(note)}</figcaption>\n" if note else ""
