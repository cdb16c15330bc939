"""From a config to clips, and from clips to batches."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lvdm.data.clips import Clip, ClipPolicy, Clips, Cut
from lvdm.data.index import Index, open_index
from train.configs import Phase, Videos


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
    later = config.cut_on == "device"
    return Clips(index, policy, seed=seed, cache_gib=config.cache_gib, uncut=later).say_skipped()


def index_of(config: Videos) -> Index:
    """The index of the config's videos."""
    return open_index(config.videos, config.labels, config.subset)
