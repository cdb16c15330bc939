"""What the training loops share: batches as a function of samples seen, learning rates, the guard of the
loss, and the steps of a network."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lvdm import accelerator as accelerators
from lvdm.errors import UserError
from lvdm.run import RunFolder
from train.configs import Phase, Training

STALLED = 600
"""Seconds without a batch after which a run stops."""


class BySample(Dataset):
    """`get(sample_index)` as a dataset: the item is a function of the sample's number since the start of training."""

    def __init__(self, get: Callable[[int], Any]):
        self.get = get

    def __getitem__(self, sample: int) -> Any:
        return sample, self.get(sample)


def micro_batches(
    get: Callable[[int], Any], collate: Callable, start: int, stop: int, batch: int, config: Training, accelerator: Any
) -> Iterator[Any]:
    """This process's share of samples start..stop-1, `config.accumulate` micro-batches a step of `batch` samples.

    Which process shows a sample changes with their number; which step it belongs to does not.
    """
    micro, rank, world = batch // config.accumulate, accelerator.process_index, accelerator.num_processes
    share = micro // world
    order = [range(first + rank * share, first + (rank + 1) * share) for first in range(start, stop, micro)]
    loader = DataLoader(
        BySample(get),
        batch_sampler=order,
        collate_fn=collate,
        num_workers=config.workers,
        pin_memory=accelerator.device.type == "cuda",
        prefetch_factor=4 if config.workers else None,
        timeout=STALLED if config.workers else 0,
    )
    return _watched(iter(loader))


def _watched(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches; a UserError where a process that reads them died or stalls."""
    try:
        yield from batches
    except RuntimeError as error:
        if not str(error).startswith("DataLoader"):
            raise
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"{first} Perhaps memory ran out (workers, cache_gib) or a disk is away; the same command goes on from the"
            " last checkpoint"
        ) from None


def phases_left(phases: Sequence[Phase], data: Sequence[Any], seen: int) -> Iterator[tuple[Phase, Any, int, int]]:
    """(phase, its data, first sample still to see, end) of each phase that is not over after `seen` samples."""
    start = 0
    for phase, source in zip(phases, data, strict=True):
        end = start + phase.samples
        if seen < end:
            yield phase, source, max(seen, start), end
        start = end


def crossed(seen: int, batch: int, every: int) -> bool:
    """Whether the step of `batch` samples that led to `seen` reached or passed a multiple of `every` samples."""
    return seen // every > (seen - batch) // every


def learning_rate(config: Training, phase: Phase, seen: int, peak: float | None = None) -> float:
    """The rate of the step after `seen` samples: `peak`, or else the phase's, risen linearly over the first `warmup`
    samples of the training and, with schedule=cosine, fallen to `final_lr` over all the others."""
    peak = phase.lr if peak is None else peak
    if seen < config.warmup:
        return peak * min(1.0, (seen + phase.batch) / config.warmup)
    if config.schedule == "constant":
        return peak
    done = (seen - config.warmup) / (config.total - config.warmup)
    return config.final_lr + (peak - config.final_lr) * (1 + math.cos(math.pi * done)) / 2


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def adam(parameters: Any, config: Training) -> torch.optim.AdamW:
    """Adam with decoupled weight decay, in one fused kernel. The rate is set each step."""
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(parameters, lr=0.0, betas=betas, weight_decay=config.weight_decay, fused=True)


def load_weights(module: nn.Module, weights: dict[str, Tensor], name: str) -> None:
    """Loads weights of the same architecture; others are a UserError that begins with `name`."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: weights of another architecture than the one asked for: {first}") from None


class LossGuard:
    """Stops at a loss or gradient that is not finite, naming what led to it, or skips and counts it, as configured."""

    most_in_a_row = 20
    most_scalings = 100  # with fp16, gradients in a row: far more halvings of the scale than any training needs

    def __init__(self, config: Training, folder: RunFolder, accelerator: Any):
        self.config, self.folder, self.accelerator = config, folder, accelerator
        self.skipped = 0
        self.in_a_row: dict[str, int] = {}

    def accepts(self, loss: Tensor, seen: int, names: list[str]) -> bool:
        """Whether to step on `loss`; all processes answer alike."""
        finite = self.accelerator.gather(loss.detach().isfinite().reshape(1)).all()
        return self._judge("loss", bool(finite), self.most_skipped, seen, names)

    def accepts_gradient(self, norm: float, seen: int, names: list[str], of: str = "gradient") -> bool:
        """Whether to take the step whose gradient, called `of`, has this norm, the same on all processes.

        With fp16 a gradient that is not finite belongs to finding the loss scale, unless that goes on and on.
        """
        most = self.most_scalings if self.config.precision == "fp16" else self.most_skipped
        return self._judge(of, math.isfinite(norm), most, seen, names)

    @property
    def most_skipped(self) -> int:
        return self.most_in_a_row if self.config.non_finite == "skip" else 1

    def _judge(self, kind: str, good: bool, most: int, seen: int, names: list[str]) -> bool:
        if good:
            self.in_a_row[kind] = 0
            return True
        self.skipped, self.in_a_row[kind] = self.skipped + 1, self.in_a_row.get(kind, 0) + 1
        if self.in_a_row[kind] >= most:
            last = self.folder.latest()
            good_one = f"the last good checkpoint is at {last} samples" if last else "no checkpoint was written yet"
            raise UserError(
                f"the {kind} is not finite at sample {seen} (clips: {', '.join(names)}); {good_one}."
                " Lower the learning rate, set clip=1 or precision=fp32, or non_finite=skip"
            )
        return False

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


class Descent:
    """The steps of one network: a micro-batch whose loss is not finite is left out, the others of its step still count.

    `model` and `optimizer` as the accelerator prepared them.
    """

    def __init__(self, accelerator: Any, model: Any, optimizer: Any, guard: LossGuard):
        self.accelerator, self.model, self.optimizer, self.guard = accelerator, model, optimizer, guard
        self.some = False  # whether a micro-batch of this step counts

    def take(self, loss: Tensor, seen: int, names: list[str], clip: float = math.inf) -> tuple[bool, float | None]:
        """Whether the micro-batch counts; with the last one of a step, the norm of the gradient, if it was finite.

        Call it within `accelerator.accumulate`; `clip` is the norm to which the gradient is clipped.
        """
        accepted, last = self.guard.accepts(loss, seen, names), self.accelerator.sync_gradients
        self.some |= accepted
        norm = None
        if accepted or (self.some and last):
            if not accepted:
                loss = sum(p.sum() for p in self.model.parameters() if p.requires_grad) * 0.0
            norm = accelerators.descend(self.accelerator, self.model, self.optimizer, loss, clip)
        self.some &= not last
        good = norm is not None and self.guard.accepts_gradient(norm, seen, names)
        return accepted, norm if good else None
