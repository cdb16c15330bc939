"""What a training log says of the steps since its last record: means of the losses, and how fast it went."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Meter:
    """Means of named values since they were last read, over all processes; a checkpoint keeps what is not read yet."""

    def __init__(self, accelerator: Any):
        self.accelerator = accelerator
        self.sums: dict[str, list[float]] = {}  # name: [total, count]
        self._pending: dict[str, Tensor] = {}  # of this step and process, still on the device

    def add(self, name: str, values: Tensor, where: Tensor | None = None) -> None:
        """Takes `values` (any shape), or those `where` is true. All processes add the same names in the same order."""
        values = values.detach().double()
        chosen = torch.ones_like(values) if where is None else where.double()
        part = torch.stack([(values * chosen).sum(), chosen.sum()])
        self._pending[name] = self._pending[name] + part if name in self._pending else part

    def step(self) -> None:
        """Ends a step: shares out what was added in it."""
        if not self._pending:
            return
        names, parts = list(self._pending), torch.stack(list(self._pending.values()))
        for name, (total, count) in zip(names, self.accelerator.reduce(parts, "sum").tolist(), strict=True):
            before = self.sums.get(name, [0.0, 0.0])
            self.sums[name] = [before[0] + total, before[1] + count]
        self._pending = {}

    def read(self) -> dict[str, float]:
        """The means, and begins anew; a name without any value is left out."""
        means = {name: total / count for name, (total, count) in self.sums.items() if count}
        self.sums = {}
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums = state["sums"]


class Pace:
    """Speed since it was last read: samples a second of all processes, TFLOP/s and MFU of each, peak memory, and the
    share of the time that went into waiting for data."""

    def __init__(self, flops_per_sample: float, accelerator: Any):
        self.flops, self.device, self.processes = flops_per_sample, accelerator.device, accelerator.num_processes
        self.waited, self.started = 0.0, time.perf_counter()

    def wait(self, batches: Iterable[T]) -> Iterator[T]:
        """`batches`, the time until each is there counted as waiting."""
        batches = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - start
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens within it is no part of the pace."""
        start = time.perf_counter()
        yield
        self.started += time.perf_counter() - start

    def read(self, samples: int) -> dict[str, float]:
        """The figures of the `samples` that all processes have seen since the last time."""
        now = time.perf_counter()
        seconds = max(now - self.started, 1e-9)
        rate, waited = samples / seconds, self.waited / seconds
        self.started, self.waited = now, 0.0
        tflops = rate * self.flops / self.processes / 1e12
        figures = {"samples_per_s": rate, "tflops": tflops, "waiting": waited}
        if self.device.type == "cuda":
            figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            peak = peak_tflops(torch.cuda.get_device_name())
            figures |= {"mfu": tflops / peak} if peak else {}
        return {name: float(f"{value:.4g}") for name, value in figures.items()}


_PEAKS = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "V100": 125}


def peak_tflops(device: str) -> float | None:
    """Dense bf16 (fp16 of a V100) TFLOP/s that the maker states for a CUDA device of this name; None of an unknown."""
    return next((float(peak) for name, peak in _PEAKS.items() if name in device), None)
