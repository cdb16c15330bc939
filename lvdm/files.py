"""Files that are there whole or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lvdm.errors import UserError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the place of `path` at the end, or goes when that fails.

    Two processes may do so at once: the last one wins, and no reader sees half a file.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Removes what `replacing` left in `folder` where its process was killed; nobody may be writing there."""
    for part in folder.glob(".*.part*"):
        part.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes `data` as the whole of `path`."""
    with replacing(path) as part:
        part.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` in UTF-8 as the whole of `path`."""
    write_bytes(path, text.encode())


def require_space(folder: Path, size: int, what: str) -> None:
    """Raises UserError unless the disk of `folder` has `size` bytes left."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(f"{folder}: {gigabytes(size)} are needed {what}, only {gigabytes(free)} are free on that disk")


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
