"""Looking at a dataset before anything is trained on it: what is there, what is broken, what it looks like."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from lvdm.cli import program
from lvdm.data.clips import resize
from lvdm.data.configs import CheckVideos, IndexVideos, PreviewVideos
from lvdm.data.datasets import open_dataset
from lvdm.data.index import Index, IndexRow, files_of, open_index, survey
from lvdm.data.reader import read_frames
from lvdm.errors import Unsound, UserError
from lvdm.media import contact_sheet
from lvdm.progress import bar

RED = torch.tensor([255, 0, 0], dtype=torch.uint8)

# ---------------------------------------------------------------------------------------------------------------------
# What is there


def index(config: IndexVideos) -> None:
    """Brings the index up to date and prints what is in it."""
    found = open_index(
        config.videos, config.labels, config.subset, config.cache or None, again=config.again, workers=config.workers
    )
    print(summary(found))
    if config.out:
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        found.save(config.out)
        print(f"written to {config.out}")


def summary(index: Index) -> str:
    """One fact a line: how much there is and of what kind, how much of it is broken and why."""
    ok = index.ok
    rates = Counter("varies" if row.vfr else f"{row.fps:.4g}" for row in ok)
    facts = {
        "videos": f"{len(ok):,}",
        "hours": f"{sum(row.length / row.fps for row in ok if row.fps) / 3600:,.2f}",
        "frames": f"{sum(row.length for row in ok):,}",
        "shots": f"{sum(len(row.shots()) for row in ok):,}",
        "sizes": counted(f"{row.width}x{row.height}" for row in ok),
        "fps": counted(rates.elements()),
        "classes": f"{len(index.classes):,} (labels={index.labels})",
        "broken": _why(index.broken),
        "damaged": _why(index.damaged),
        "hash": index.hash(),
    }
    return "\n".join(f"{name:<8} {fact}" for name, fact in facts.items())


def counted(values: Iterable[str], most: int = 5) -> str:
    """ "320x240 (13), 640x480 (2)": the most frequent values."""
    counts = Counter(values)
    texts = [f"{value} ({count:,})" for value, count in counts.most_common(most)]
    return ", ".join(texts + [f"{len(counts) - most:,} others"] * (len(counts) > most))


def _why(rows: list[IndexRow]) -> str:
    """How many rows, and the last part of their reasons, which says what the decoder met."""
    return f"{len(rows):,}" + (f": {counted(row.reason.rpartition(': ')[2] for row in rows)}" if rows else "")


# ---------------------------------------------------------------------------------------------------------------------
# What is broken


def check(config: CheckVideos) -> None:
    """Prints a line for each file that is broken or damaged, by path; raises `Unsound` when there is one."""
    dataset = open_dataset(config.videos, config.labels, config.subset)
    files, frames, bad = files_of(dataset), 0, []
    with bar(f"check {dataset.root.name}", len(files)) as progress:
        for row in survey(dataset.root, files, config.workers, full=True):
            frames += row.frames
            if row.reason:
                bad.append(row)
            progress.advance(note=f"{len(bad)} bad" if bad else "")
    for row in sorted(bad, key=lambda row: row.path):
        print(f"{row.path}: {row.reason}")
    broken = sum(row.state == "broken" for row in bad)
    print(f"{len(files):,} files, {frames:,} frames decoded: {broken} broken, {len(bad) - broken} damaged")
    if bad:
        raise Unsound(f"{len(bad)} of {len(files):,} files are not sound")


# ---------------------------------------------------------------------------------------------------------------------
# What it looks like


def preview(config: PreviewVideos) -> None:
    """Writes the contact sheet."""
    found = open_index(config.videos, config.labels, config.subset)
    rows = found.ok
    if config.per_class:
        first = {row.label: row for row in reversed(rows)}
        rows = [first[name] for name in found.classes if name in first]
        if not rows:
            raise UserError(f"per_class=true: the videos of {found.root} have no classes (labels={found.labels})")
    rows = rows[: config.count]
    strips = [strip(found.root, row, config.columns, config.size) for row in rows]
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(strips, config.out, config.columns, [caption(row) for row in rows])
    print(f"{len(rows)} of {len(found.ok)} videos in {config.out}")


def strip(root: Path, row: IndexRow, columns: int, size: int) -> torch.Tensor:
    """At most `columns` frames from the first to the last, uint8 (T, h, w, 3) of shorter side `size`; those before
    which a new shot has begun have a red bar at the left."""
    picks = torch.linspace(row.start, row.start + row.length - 1, min(columns, row.length)).round().long().tolist()
    pictures = resize(read_frames(root / row.path, picks, row.whole), size).permute(0, 2, 3, 1).contiguous()
    for before, pick, picture in zip(picks, picks[1:], pictures[1:], strict=False):
        if any(before < cut <= pick for cut in row.cuts):
            picture[:, : max(2, size // 24)] = RED
    return pictures


def caption(row: IndexRow) -> str:
    """The class, path, length and size of a video."""
    parts = [row.label, row.path, f"{row.length:,} frames", f"{row.width}x{row.height}"]
    parts += [f"{row.length / row.fps:.1f} s", f"{row.fps:.4g} fps"] if row.fps else []
    parts += [f"{len(row.shots())} shots"] if len(row.shots()) > 1 else []
    return ", ".join(part for part in parts if part)


# ---------------------------------------------------------------------------------------------------------------------
# The commands


def index_main(argv: list[str] | None = None) -> int:
    """`lvdm data index`."""
    return program(IndexVideos, argv, index)


def check_main(argv: list[str] | None = None) -> int:
    """`lvdm data check`."""
    return program(CheckVideos, argv, check)


def preview_main(argv: list[str] | None = None) -> int:
    """`lvdm data preview`."""
    return program(PreviewVideos, argv, preview)
