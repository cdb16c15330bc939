"""What files hold, as hashes: each is read once a process, for as long as nobody touches it."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from lvdm.progress import bar

THREADS = 8


def content_of(path: Path) -> str:
    """Hex sha256 of a file; of a folder, of the names and hashes of its files in order, those of sub-folders left out.

    OSError where there is nothing to read.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
        return hashlib.sha256("".join(f"{file.name}\0{content_of(file)}\n" for file in files).encode()).hexdigest()
    path = path.resolve()
    found = os.stat(path)
    return _read(str(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def contents_of(paths: Iterable[Path], show: bool = False) -> dict[Path, str]:
    """`content_of` every path, by several threads."""
    paths = list(dict.fromkeys(paths))
    with bar("reading files", len(paths), show=show) as progress, ThreadPoolExecutor(THREADS) as pool:
        found = {}
        for path, content in zip(paths, pool.map(content_of, paths), strict=True):
            found[path] = content
            progress.advance()
    return found


@cache
def _read(path: str, *stamp: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
