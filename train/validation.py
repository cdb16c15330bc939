"""What a VAE's averaged weights are worth while it trains: frame metrics and pictures of clips that it never sees."""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from lvdm import rife
from lvdm.data.clips import Clip, ClipPolicy, Clips
from lvdm.data.index import Index, open_index
from lvdm.errors import UserError
from lvdm.files import write_text
from lvdm.media import contact_sheet, to_float, to_uint8, write_mp4
from lvdm.metrics.features import full_precision
from lvdm.metrics.frames import psnr, ssim
from lvdm.metrics.lpips import LPIPS
from lvdm.metrics.protocol import Protocol
from lvdm.run import RunFolder
from lvdm.trackers import log_media
from train.configs import ClipShape, TrainRefine, TrainVAE
from train.loop import crossed
from vae.base import VideoVAE

METRICS = ("psnr", "ssim", "lpips")
SHOWN = 8
"""Clips in the pictures."""


class Validation:
    """Measures `model` every `config.validate_every` samples and at the end, always on the same clips.

    `rate` 2 is stage 2, of which frames that the encoder saw (even) and those between them (middle) count apart, too,
    beside a linear blend of D1's frames and, where it is installed, RIFE. Made on all processes, under
    `accelerator.main_process_first()`; only the main one measures. Training does not notice: random state and modes of
    the modules stay as they are.

    Raises UserError where no video is long enough, and for clips too small for LPIPS.
    """

    def __init__(
        self,
        config: TrainVAE | TrainRefine,
        index: Index,
        model: VideoVAE,
        rate: int,
        folder: RunFolder,
        accelerator: Any,
    ):
        self.config, self.model, self.rate, self.folder, self.accelerator = config, model, rate, folder, accelerator
        self.clips = fixed_clips(config, index)
        with torch.random.fork_rng([]):  # a network is drawn before its weights come
            self.lpips = LPIPS("alex").to(accelerator.device)

    def due(self, seen: int, batch: int) -> bool:
        """Whether to validate after the step of `batch` samples that led to `seen`."""
        return seen == self.config.total or crossed(seen, batch, self.config.validate_every)

    def run(self, samples: int) -> dict[str, Any] | None:
        """Measures and shows the model as it is; what `RunFolder.save` is to know if it is the best so far, else None.

        All processes call it, with the averaged weights applied, and get the same.
        """
        best = self._record(samples) if self.accelerator.is_main_process else None
        return broadcast_object_list([best])[0]

    def _record(self, samples: int) -> dict[str, Any] | None:
        """Into validation/, the log and the trackers; into export-best/ where it is the best."""
        looks = self.look()
        means = means_of(looks)
        self._write(samples, looks, means)
        values = {f"val_{name}": value for name, value in means.items()}
        self.folder.log(samples=samples, event="validation", **values)
        self.accelerator.log(values, step=samples)
        best = {"metric": self.config.best, "value": means[self.config.best], "clips": content_hash(self.clips)}
        if not is_better(best, self.folder.best()):
            return None
        self.folder.export(self.model, "export-best")  # before the checkpoint, from which a killed run goes on
        return best

    def look(self) -> list["Look"]:
        """Scores and pictures of each clip, by the weights that the model has now."""
        device, view = self.accelerator.device, single_rate if self.rate == 1 else double_rate
        with unnoticed(self.model, device):
            return [view(self.model, to_float(clip.video[None].to(device)), self.lpips) for clip in self.clips]

    def _write(self, samples: int, looks: list["Look"], means: dict[str, float]) -> None:
        folder = self.folder.path / "validation"
        folder.mkdir(exist_ok=True)
        path = folder / f"{samples:09d}.mp4"
        video = torch.cat([look.panels for look in looks[:SHOWN]], dim=1)
        write_mp4(path, video, self.clips[0].fps)
        latents = latent_picture([look.latent for look in looks[:SHOWN]])
        contact_sheet([latents[None]], path.with_name(f"{path.stem}-latents.png"))
        clips = [
            {"source": clip.source, "start": clip.start, **look.scores}
            for clip, look in zip(self.clips, looks, strict=True)
        ]
        values = {"samples": samples, "protocol": self._protocol().to_dict(), "mean": means, "clips": clips}
        write_text(path.with_suffix(".json"), json.dumps(values, indent=2))
        still = video[len(video) // 2 - (self.rate - 1)]  # in stage 2 a middle frame
        pictures = {"validation": still, "latents": latents}
        log_media(self.accelerator.trackers, samples, pictures, {"validation_video": path})

    def _protocol(self) -> Protocol:
        """How the numbers were made."""
        shape = clip_shape(self.config)
        stride = None if shape.fps else stride_of(shape)
        return Protocol(
            metric="PSNR, SSIM, LPIPS",
            features="lpips-alex",
            weights_sha256=self.lpips.weights_sha256,
            frames=shape.frames,
            stride_real=stride,
            stride_fake=stride,
            resize=f"short side to {shape.size}, centre crop, uint8",
            count_real=len(self.clips),
            count_fake=len(self.clips),
            split=self.config.validate_videos or f"{self.config.videos}, val",
            seed=0,
            estimator="mean of per-frame values, then over clips; averaged weights",
            fps=shape.fps or None,
        )


class Look(NamedTuple):
    """One clip: its scores by metric and part of the frames ("psnr", "psnr_even"); uint8 (T, H, n W, 3), the original
    and n - 1 renderings side by side; its latent (z, t, h, w)."""

    scores: dict[str, float]
    panels: Tensor
    latent: Tensor


# ---------------------------------------------------------------------------------------------------------------------
# Clips


def clip_shape(config: TrainVAE | TrainRefine) -> ClipShape:
    """What every validation of a run looks at, whichever phase it is in, so that its numbers compare: the longest kind
    of the last phase."""
    return max(config.phases[-1].kinds, key=lambda kind: (kind.frames, kind.size))


def stride_of(shape: ClipShape) -> int:
    return min(shape.strides or [shape.stride])


def fixed_clips(config: TrainVAE | TrainRefine, index: Index) -> list[Clip]:
    """`config.validate_clips` clips, or as many as there are, evenly spaced over the videos and in each."""
    shape = clip_shape(config)
    if shape.size < 32:
        raise UserError(f"validate_every: the last phase has size={shape.size}, and LPIPS (Alex) needs at least 32")
    policy = ClipPolicy(
        frames=shape.frames,
        stride=stride_of(shape),
        size=shape.size,
        split="all" if config.validate_videos else "val",
        holdout=0.0 if config.validate_videos else config.holdout,
        fps=shape.fps,
        short=config.short,
        across_cuts=config.across_cuts,
    )
    try:
        index = open_index(config.validate_videos, "none") if config.validate_videos else index
        clips = Clips(index, policy, seed=0, cache_gib=0)
    except UserError as error:
        if config.validate_videos:
            raise UserError(f"validate_videos: {error}") from None
        raise UserError(f"validate_every: {error}, a larger holdout, or validate_videos=FOLDER") from None
    windows = clips.grid(-(-config.validate_clips // len(clips)))
    count = min(config.validate_clips, len(windows))
    return [clips.read(windows[i * len(windows) // count]) for i in range(count)]


def content_hash(clips: list[Clip]) -> str:
    """Of every pixel: numbers of other clips do not compare."""
    return hashlib.sha256(b"".join(clip.video.numpy().tobytes() for clip in clips)).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Renderings


@contextmanager
def unnoticed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients within; afterwards each module's mode and the random state are what they were.

    In stage 2 the modes of the modules differ.
    """
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def single_rate(model: VideoVAE, x: Tensor, lpips: LPIPS) -> Look:
    """Stage 1: a clip (1, 3, T, H, W) in [-1, 1] beside D1's frames of its posterior's mode."""
    latent = model.encode(x).latent_dist.mode()
    y = shown(model.decode(latent, num_frames=x.shape[2]).sample)
    return Look(scores({"": metrics(x, y, lpips)}), panels(x, y), latent[0].float().cpu())


def double_rate(model: VideoVAE, x: Tensor, lpips: LPIPS) -> Look:
    """Stage 2: a clip (1, 3, 2N+1, H, W) beside D1's frames with blends between them and beside D2's, both from the
    latents of its even frames."""
    latent = model.encode(x[:, :, ::2]).latent_dist.mode()
    d1 = shown(model.decode(latent, num_frames=x.shape[2] // 2 + 1).sample)
    d2 = shown(model.refine(latent, num_frames=x.shape[2]).sample)
    blend = (d1[:, :, 1:] + d1[:, :, :-1]) / 2
    blended = torch.empty_like(d2)
    blended[:, :, ::2], blended[:, :, 1::2] = d1, blend
    values = metrics(x, d2, lpips)
    parts = {"": values, "_even": values[:, ::2], "_middle": values[:, 1::2]}
    parts["_blend"] = metrics(x[:, :, 1::2], blend, lpips)
    if rife.available():
        with full_precision(x.device):
            between = rife.middle_frames(d1)
        parts["_rife"] = metrics(x[:, :, 1::2], between, lpips)
    return Look(scores(parts), panels(x, blended, d2), latent[0].float().cpu())


def shown(video: Tensor) -> Tensor:
    """As it is looked at: fp32, clamped to [-1, 1]."""
    return video.float().clamp(-1, 1)


def metrics(x: Tensor, y: Tensor, lpips: LPIPS) -> Tensor:
    """PSNR, SSIM and LPIPS of each frame of two clips (1, 3, T, H, W): (3, T) fp64."""
    with full_precision(x.device):
        return torch.cat([metric(x, y).cpu().double() for metric in (psnr, ssim, lpips.video)])


def scores(parts: dict[str, Tensor]) -> dict[str, float]:
    """The mean over the frames of each part, by metric and name of the part."""
    return {
        f"{metric}{part}": mean
        for part, values in parts.items()
        for metric, mean in zip(METRICS, values.mean(1).tolist(), strict=True)
    }


def means_of(looks: list[Look]) -> dict[str, float]:
    """Each score averaged over the clips."""
    return {name: sum(look.scores[name] for look in looks) / len(looks) for name in looks[0].scores}


def is_better(new: dict[str, Any], old: dict[str, Any] | None) -> bool:
    """Whether a metric has improved; what was measured by another metric or on other clips does not count."""
    if old is None or any(new[key] != old[key] for key in ("metric", "clips")):
        return math.isfinite(new["value"])
    return new["value"] < old["value"] if new["metric"] == "lpips" else new["value"] > old["value"]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def panels(*videos: Tensor) -> Tensor:
    """Clips (1, 3, T, H, W) side by side: uint8 (T, H, n W, 3)."""
    return to_uint8(torch.cat(videos, dim=4))[0].permute(1, 2, 3, 0).cpu()


def latent_picture(latents: list[Tensor]) -> Tensor:
    """Each channel of some latents (z, t, h, w) in grey, as IV-VAE's figure 10: uint8 (z h, n t w, 3).

    A row a channel, from its least value (black) to its greatest (white); in it all frames of all clips.
    """
    rows = torch.cat(latents, dim=1).movedim(1, 2).flatten(2)  # (z, h, n t w)
    low, high = rows.amin((1, 2), keepdim=True), rows.amax((1, 2), keepdim=True)
    grey = (rows - low) / (high - low).clamp(min=1e-12)
    return to_uint8(grey * 2 - 1).flatten(0, 1)[..., None].expand(-1, -1, 3).contiguous()
