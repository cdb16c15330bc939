"""From a config to clips, and from clips to batches."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lvdm.data.clips import Clip, ClipPolicy, Clips
from lvdm.data.index import Index, open_index
from train.configs import Phase, Videos


@dataclass
class Batch:
    """Clips of a micro-batch: their sample numbers, where they come from, and uint8 frames (B, 3, T, H, W)."""

    samples: list[int]
    names: list[str]
    video: Tensor

    def pin_memory(self) -> "Batch":
        return Batch(self.samples, self.names, self.video.pin_memory())


def collate(items: list[tuple[int, Clip]]) -> Batch:
    """Stacks (sample number, clip) pairs."""
    samples, clips = zip(*items, strict=True)
    names = [f"{clip.source}@{clip.start}" for clip in clips]
    return Batch(list(samples), names, torch.stack([clip.video for clip in clips]))


def phase_clips(config: Videos, index: Index, phase: Phase, seed: int) -> Clips:
    """The training clips of one phase."""
    policy = ClipPolicy(
        frames=phase.frames,
        stride=phase.stride,
        size=phase.size,
        crop=config.crop,
        flip=config.flip,
        split="train",
        holdout=config.holdout,
        fps=phase.fps,
        short=config.short,
        across_cuts=config.across_cuts,
    )
    return Clips(index, policy, seed=seed, cache_gib=config.cache_gib).say_skipped()


def index_of(config: Videos) -> Index:
    """The index of the config's videos."""
    return open_index(config.videos, config.labels, config.subset)
