"""The instruments of `lvdm bench`: works that take turns in one run, what they cost, and its table, JSON and page.

A large matrix product takes its turn with them: its rate is what the device could do at that time.
"""

import ctypes
import gc
import json
import multiprocessing
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from torch import Tensor

from lvdm.config import to_dict
from lvdm.errors import UserError
from lvdm.files import write_text
from lvdm.progress import bar
from lvdm.report import Page, Points
from lvdm.text import aligned

K = TypeVar("K", bound=Hashable)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MATMUL = "matrix product"


@dataclass(frozen=True)
class Work:
    """Something to time."""

    run: Callable[[], Any]
    """One turn of it; may return before the device is done."""
    flops: float | None = None
    """Floating-point operations a turn; None where they cannot be counted."""
    frames: int = 0
    """Frames a turn, of all clips."""
    held: Callable[[], Iterable[Tensor]] = tuple
    """What it holds before its first turn, a part of its peak: weights."""
    turns: int = 1
    """After how many it holds all that it ever will."""
    compiled: bool = False
    """Whether torch.compile is at work, whose processes and threads a child would wait for: no peak on a CPU."""


@dataclass(frozen=True)
class Row:
    """What one work cost."""

    seconds: list[float]
    """Of every round."""
    flops: float | None = None
    """Floating-point operations a turn."""
    peak_gib: float | None = None
    """The most memory at a time: of what it holds, and of all a turn allocates. Its input, and what the other works of
    the run hold, are no part of it. None where the system does not tell."""
    frames: int = 0
    """Frames a turn, of all clips."""
    error: str = ""
    """Why it was not timed."""

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def tflops(self) -> float | None:
        """TFLOP/s at the median."""
        return self.flops / self.median / 1e12 if self.flops and self.seconds else None

    @property
    def rate(self) -> float | None:
        """Frames a second at the median."""
        return self.frames / self.median if self.frames and self.seconds else None


# ---------------------------------------------------------------------------------------------------------------------
# Time


def alternate(runs: Mapping[K, Callable[[], Any]], rounds: int) -> dict[K, list[float]]:
    """Seconds of every run in every round; all runs once a round, in turn, so that a busy machine meets all alike."""
    seconds: dict[K, list[float]] = {name: [] for name in runs}
    with bar("bench", rounds * len(runs)) as progress:
        for _ in range(rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
                progress.advance(note=_title(name))
    return seconds


def ratio(seconds: Mapping[K, Sequence[float]], slow: K, fast: K) -> float:
    """The median over the rounds of how much longer `slow` takes."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


def time_all(works: Mapping[K, Work], rounds: int, device: torch.device) -> dict[K, Row]:
    """Peak memory of every work, then its seconds in `rounds` rounds; the first turn of each is not counted.

    A work that memory is too small for has a row that says so, and the others go on: on a CPU its first turns are
    those of a child process, which the system may kill in the place of this one.
    """
    cuda = device.type == "cuda"
    first = _first_on_cuda if cuda else _first_on_cpu
    peaks: dict[K, float | None] = {}
    errors: dict[K, str] = {}
    with bar("memory", len(works)) as progress:
        for name, work in works.items():
            with _noted(errors, name):
                peaks[name] = first(work)
            if cuda:
                torch.cuda.empty_cache()
            progress.advance(note=_title(name))

    def turn(name: K) -> None:
        with _noted(errors, name):
            if name not in errors:
                works[name].run()
            if cuda:
                torch.cuda.synchronize()

    seconds = alternate({name: partial(turn, name) for name in peaks}, rounds)
    return {
        name: Row(
            [] if name in errors else seconds[name], work.flops, peaks.get(name), work.frames, errors.get(name, "")
        )
        for name, work in works.items()
    }


@contextmanager
def _noted(errors: dict[K, str], name: K) -> Iterator[None]:
    """In the place of an error for want of memory, a word on it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        errors[name] = "out of memory"


def product(device: torch.device, precision: str) -> Work:
    """A product of two large square matrices: as fast as the device gets."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=DTYPES[precision]) for _ in range(2))
    return Work(lambda: a @ b, 2.0 * n**3, held=lambda: (a, b))


def named(model: str, model_args: dict[str, Any], against: Sequence[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """(name, options) of a model and of those `against` it: "odvae", "odvae:variant=1:width=32", "diffusers:VQModel".

    Raises UserError where two have the same name, which would be one row.
    """
    found = {model: (model, model_args)}
    for text in against:
        if text in found:
            raise UserError(
                f"against={text}: already a model of this run; tell them apart by options, {text}:KEY=VALUE"
            )
        parts = text.split(":")
        options = (part.partition("=") for part in parts if "=" in part)
        name = ":".join(part for part in parts if "=" not in part)
        found[text] = name, {key: yaml.safe_load(value) for key, _, value in options}
    return found


def _title(name: Hashable) -> str:
    return " ".join(map(str, name)) if isinstance(name, tuple) else str(name)


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def _first_on_cuda(work: Work) -> float:
    """GiB at the peak of its first turns."""
    gc.collect()
    held, before = size_of(work.held()), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(work.turns):
        work.run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before + held) / 2**30


def _first_on_cpu(work: Work) -> float | None:
    """The same, measured in a child process; then a turn in this one, to warm it up."""
    peak = _peak_of_child(work) if sys.platform == "linux" and not work.compiled else None
    work.run()
    return peak


def _peak_of_child(work: Work) -> float | None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free here would be taken there unseen
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_in_child, args=(work, there))
    child.start()
    there.close()
    try:
        said = here.recv()
    except EOFError:
        said = MemoryError("killed by the system")
    child.join()
    if isinstance(said, MemoryError):
        raise said
    return said


def _in_child(work: Work, answer: Connection) -> None:
    """Sends GiB at the peak of the first turns, a MemoryError, or None for what the parent will see for itself."""
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what a tensor frees is gone, what it takes is new
    try:
        held, before = size_of(work.held()), _memory("RssAnon")
        for _ in range(work.turns):
            work.run()
        peak = _memory("VmHWM") - _memory("RssFile") - _memory("RssShmem")  # the code of libraries is not of the work
        answer.send((peak - before + held) / 2**30)
    except Exception as error:
        answer.send(MemoryError(str(error)) if _out_of_memory(error) else None)


def _memory(kind: str) -> int:
    """Bytes of this process, of a kind in /proc/self/status; VmHWM is the most there was since it began."""
    found = re.search(rf"{kind}:\s*(\d+) kB", _read("/proc/self/status"))
    if not found:
        raise OSError(f"no {kind} in /proc/self/status")  # an old kernel, or what stands in for one
    return 1024 * int(found[1])


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind tensors, shared ones counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


# ---------------------------------------------------------------------------------------------------------------------
# What is said of it


def machine(device: torch.device) -> dict[str, str]:
    """What was measured on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        found = re.search(r"model name\s*: (.*)", _read("/proc/cpuinfo"))
        name = f"{found[1] if found else platform.machine()}, {torch.get_num_threads()} threads"
    versions = {"Python": platform.python_version(), "torch": torch.__version__}
    if device.type == "cuda":
        versions |= {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}
    return {"device": name, **versions}


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).is_file() else ""


Cells = list[str | int | float | None]


def table(
    head: Sequence[str], rows: Mapping[tuple, Row], beside: Mapping[tuple, tuple] | None = None
) -> tuple[list[str], list[Cells]]:
    """Header and rows: a key's parts under `head`, then what its work cost; and how many times as long it takes as the
    row that `beside` names for it. The share is that of the rate of the product in the same run."""
    best = next((row.tflops for key, row in rows.items() if key[0] == MATMUL), None)
    columns = ["seconds", "from", "to", "frames/s", "TFLOP/s", "share", "peak GiB", *(["times"] if beside else [])]
    lines = []
    for key, row in rows.items():
        share = row.tflops / best if best and row.tflops else None
        spread = (min(row.seconds), max(row.seconds)) if row.seconds else (None, None)
        cells: Cells = [row.error or row.median, *spread, row.rate, row.tflops, share, row.peak_gib]
        if beside:
            other = rows.get(beside.get(key, key))
            both = other is not None and key in beside and row.seconds and other.seconds
            cells.append(ratio({0: row.seconds, 1: other.seconds}, 0, 1) if both else None)
        lines.append([*key, *[""] * (len(head) - len(key)), *cells])
    return [*head, *columns], lines


def text(header: Sequence[str], lines: Sequence[Cells], head: int) -> str:
    """The same for a terminal; the first `head` columns are names."""
    cells = [[_short(cell) for cell in line] for line in lines]
    return aligned([header, *cells], right=range(head, len(header)))


def _short(cell: str | int | float | None) -> str:
    return "-" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def report(
    config: Any,
    title: str,
    device: torch.device,
    head: Sequence[str],
    rows: Mapping[tuple, Row],
    beside: Mapping[tuple, tuple] | None = None,
    charts: Mapping[str, Mapping[str, Points]] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Prints the table; where `config.out` names a JSON file, writes it, and the page beside it, with `charts`: their
    titles, which end in the unit, and lines over frames."""
    facts = machine(device)
    header, lines = table(head, rows, beside)
    print(f"{title}\n{', '.join(f'{key} {value}' for key, value in facts.items())}")
    print(text(header, lines, len(head)))
    for note in notes:
        print(note)
    if not config.out:
        return
    kept = [dict(zip(head, key, strict=False)) | asdict(row) for key, row in rows.items()]
    keep(config.out, {"config": to_dict(config), "machine": facts, "notes": list(notes), "rows": kept})
    page = Page(title, "All works of a table took turns in one run. `share` is that of a large matrix product in it.")
    page.facts(facts)
    for name, lines_over_frames in (charts or {}).items():
        page.chart(name, lines_over_frames, "frames", name.rpartition(", ")[2])
    page.table(header, lines, note=" ".join(notes))
    print(f"to look at: {page.write(Path(config.out).with_suffix('.html'))}")


def keep(out: str, measured: Any) -> None:
    """Writes all that was measured as JSON, where a file is named."""
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps(measured, indent=2) + "\n")
