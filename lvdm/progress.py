"""Progress bars with the time left: one for what runs now and, within a plan, one for the whole.

Where the output is no terminal, a line every tenth of the way says the same.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_whole: "Whole | None" = None


class Bar:
    """A task of `total` units; `advance` moves it."""

    def __init__(self, name: str, total: int, done: int):
        self.name, self.total, self.done, self.note = name, max(total, 1), done, ""
        self.started, self.first = time.monotonic(), done
        self._display = _Terminal(name, self.total, done) if sys.stderr.isatty() else _Lines(self)

    def advance(self, units: int = 1, note: str = "") -> None:
        self.done, self.note = self.done + units, note
        if _whole:
            _whole.at(self.done / self.total)
        self._display.show(self.done, note)

    def left(self) -> float:
        """Seconds to go at the rate so far."""
        rate = (self.done - self.first) / max(time.monotonic() - self.started, 1e-9)
        return (self.total - self.done) / max(rate, 1e-9)


class Whole:
    """A plan: steps of known relative cost, and the share of the whole that is done."""

    def __init__(self, name: str, costs: list[float]):
        self.total, self.started = sum(costs), time.monotonic()
        self.before = self.skipped = 0.0  # cost of the steps that are over, and what of it was done by earlier runs
        self.cost = self.share = 0.0  # of the step that runs now, and the share of it that is done
        self._display = _Terminal(name, self.total, 0) if sys.stderr.isatty() else None

    @property
    def done(self) -> float:
        return self.before + self.cost * self.share

    def step_skipped(self, cost: float) -> None:
        self.before += cost
        self.skipped += cost
        self._show()

    @contextmanager
    def step(self, cost: float) -> Iterator[None]:
        self.cost, self.share = cost, 0.0
        yield
        self.before, self.cost = self.before + cost, 0.0
        self._show()

    def at(self, share: float) -> None:
        """A bar of the step that runs now has come to `share`; a later bar of the same step does not turn back."""
        self.share = max(self.share, min(share, 1.0))
        self._show()

    def line(self) -> str:
        """ "37% of the whole, 2:10 left", from the time that the steps so far took for their cost."""
        worked = self.done - self.skipped
        share = f"{self.done / max(self.total, 1e-9):.0%} of the whole"
        if worked <= 0:
            return share
        return f"{share}, {clock((self.total - self.done) * (time.monotonic() - self.started) / worked)} left"

    def close(self) -> None:
        if self._display:
            self._display.close()

    def _show(self) -> None:
        if self._display:
            self._display.show(self.done, "")


@contextmanager
def bar(name: str, total: int, done: int = 0, show: bool = True) -> Iterator[Bar]:
    """A bar for `total` units of which `done` are done already (a resumed run); `show` only on the main process."""
    if not show:
        yield _Silent()
        return
    task = Bar(name, total, done)
    try:
        yield task
    finally:
        task._display.close()


@contextmanager
def whole(name: str, costs: list[float]) -> Iterator[Whole]:
    """Bars opened within it also move the bar of the whole."""
    global _whole
    _whole = Whole(name, costs)
    try:
        yield _whole
    finally:
        _whole.close()
        _whole = None


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


class _Silent:
    def advance(self, units: int = 1, note: str = "") -> None:
        pass


class _Lines:
    """For logs: a line at each tenth."""

    def __init__(self, bar: Bar):
        self.bar, self.tenth = bar, int(10 * bar.done / bar.total)

    def show(self, done: float, note: str) -> None:
        tenth = int(10 * done / self.bar.total)
        if tenth > self.tenth:
            self.tenth = tenth
            overall = f" | {_whole.line()}" if _whole else ""
            line = f"{self.bar.name}: {10 * tenth}% {note}, {clock(self.bar.left())} left{overall}"
            print(" ".join(line.split()).replace("% ,", "%,"), file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


class _Terminal:
    """A live bar; all bars share one display."""

    _live = None
    _open = 0

    def __init__(self, name: str, total: float, done: float):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        cls = type(self)
        if cls._live is None:
            columns = (
                TextColumn("{task.description:<28}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=False),
                TextColumn("{task.fields[note]}"),
            )
            cls._live = Progress(*columns, console=Console(stderr=True), refresh_per_second=4, speed_estimate_period=60)
            cls._live.start()
        cls._open += 1
        self.task = cls._live.add_task(name, total=total, completed=done, note="")

    def show(self, done: float, note: str) -> None:
        self._live.update(self.task, completed=done, note=note)

    def close(self) -> None:
        cls = type(self)
        cls._open -= 1
        if cls._open == 0:
            cls._live.stop()
            cls._live = None
