"""From a config to clips, and from clips to batches."""

from bisect import bisect
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from lvdm.data.clips import Clip, ClipPolicy, Clips, Cut, Memory
from lvdm.data.index import Index, open_index
from lvdm.errors import UserError
from lvdm.rng import generator
from train.configs import ClipPhase, Kind, Rendering, Videos


@dataclass
class Batch:
    """Clips of a micro-batch: their sample numbers, where they come from, their frames, cut or still to be cut."""

    samples: list[int]
    names: list[str]
    videos: list[Tensor]
    cuts: list[Cut | None]

    def on(self, device: torch.device) -> Tensor:
        """The clips, uint8 (B, 3, T, H, W), on `device`, where they are cut if they are not yet."""
        moved = (video.to(device, non_blocking=True) for video in self.videos)
        return torch.stack([cut.of(video) if cut else video for video, cut in zip(moved, self.cuts, strict=True)])

    def pin_memory(self) -> "Batch":
        return Batch(self.samples, self.names, [video.pin_memory() for video in self.videos], self.cuts)


def collate(items: list[tuple[int, Clip]]) -> Batch:
    """Stacks (sample number, clip) pairs."""
    samples, clips = zip(*items, strict=True)
    names = [f"{clip.source}@{clip.start}" for clip in clips]
    return Batch(list(samples), names, [clip.video for clip in clips], [clip.cut for clip in clips])


@dataclass(frozen=True)
class Mixture:
    """The clips of one phase. An optimizer step, counted from the phase's first sample `start`, shows one kind; each of
    its clips has one of the kind's strides, and comes from the list of videos long enough for it.

    Kinds are drawn by their shares, strides evenly, as functions of (seed, first sample of the step) and (seed,
    sample): processes, micro-batches and restarts change nothing. In a phase of one kind and one stride every video is
    shown once an epoch. A mixture shows a list of n videos to a part of the samples only: in each n samples, counted
    from the first, a video then comes at most once, and over many as often as any other of its list; but unlike in an
    epoch, some do not come.
    """

    phase: ClipPhase
    start: int
    seed: int
    clips: list[list[Clips]]  # of each kind, of each of its strides

    def number(self, sample: int) -> int:
        """Which of `phase.kinds` the step of a sample shows."""
        first = sample - (sample - self.start) % self.phase.batch
        return drawn([kind.share for kind in self.phase.kinds], self.seed, "kind", first)

    def at(self, sample: int) -> Clip:
        """The clip of a sample (its number since the start of training)."""
        strides = self.clips[self.number(sample)]
        return strides[drawn([1.0] * len(strides), self.seed, "stride", sample)].at(sample)


def drawn(weights: list[float], seed: int, *keys: str | int) -> int:
    """A number below len(weights), drawn in proportion to them as a function of (seed, keys)."""
    if len(weights) == 1:
        return 0
    *bounds, total = accumulate(weights)
    return bisect(bounds, total * torch.rand((), generator=generator(seed, *keys), dtype=torch.float64).item())


def curriculum(config: Rendering, indexes: dict[str, Index]) -> list[Mixture]:
    """The training clips of each phase; decoded videos are kept once for all kinds and strides of a size.

    `indexes` are those of `indexes_of(config)`. Raises UserError where a kind is longer than every shot, or has fewer
    clips than a batch.
    """
    memory, later = Memory(config.cache_gib), config.cut_on == "device"

    @cache  # of the same kind in several phases, too
    def clips(source: str, policy: ClipPolicy) -> Clips:
        return Clips(indexes[source], policy, config.seed, memory, uncut=later).say_skipped()

    def of_kind(kind: Kind) -> list[Clips]:
        source = source_of(config, kind)
        return [clips(source, policy) for policy in policies(config, kind, source)]

    starts = accumulate((phase.samples for phase in config.phases), initial=0)
    mixtures = [
        Mixture(phase, start, config.seed, [of_kind(kind) for kind in phase.kinds])
        for phase, start in zip(config.phases, starts, strict=False)
    ]
    for i, mixture in enumerate(mixtures):
        for kind, strides in zip(mixture.phase.kinds, mixture.clips, strict=True):
            check_batch(f"phases[{i}].batch", mixture.phase.batch, kind, strides)
    return mixtures


def check_batch(key: str, batch: int, kind: Kind, strides: list[Clips]) -> None:
    """Refuses a batch of more clips than there are, wherever in a video they may begin, at all strides of a kind."""
    if batch <= sum(map(len, strides)):  # one a video is enough
        return
    places = sum(len(part) for clips in strides for row in clips.rows for part in clips.policy.starts(row))
    if batch > places:
        raise UserError(
            f"{key}={batch}: {strides[0].index.root} has {places} clips of {kind.frames} frames to train on;"
            f" a batch of at most {places}, fewer frames, or more videos"
        )


def source_of(config: Rendering, kind: Kind) -> str:
    """Where clips of a kind come from: "images" for single frames if the config names any, else "videos"."""
    return "images" if config.images and kind.frames == 1 else "videos"


def policies(config: Rendering, kind: Kind, source: str) -> list[ClipPolicy]:
    """How clips of a kind are cut out of a source, a stride; images have neither strides nor a rate nor a last part."""
    image = source == "images"
    return [
        ClipPolicy(
            frames=kind.frames,
            stride=stride,
            size=kind.size,
            crop=config.crop,
            flip=config.flip,
            split="train",
            holdout=0.0 if image else config.holdout,
            fps=0.0 if image else kind.fps,
            short=config.short,
            across_cuts=config.across_cuts,
        )
        for stride in ([1] if image else kind.strides or [kind.stride])
    ]


def indexes_of(config: Rendering) -> dict[str, Index]:
    """The index of each source: "videos", and "images" if the config names any. Raises UserError for unused images."""
    if not config.images:
        return {"videos": index_of(config)}
    if not any(kind.frames == 1 for _, kind in config.kinds()):
        raise UserError(f"images={config.images}: no phase shows clips of one frame: frames=1, or leave images out")
    return {"videos": index_of(config), "images": open_index(config.images, "none")}


def index_of(config: Videos) -> Index:
    """The index of the config's videos."""
    return open_index(config.videos, config.labels, config.subset)
