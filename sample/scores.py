"""The scores of every frame of every clip, kept one by one, and intervals of their means, for `lvdm reproduce`."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

import vae
from lvdm.accelerator import device
from lvdm.data.clips import ClipPolicy, Clips
from lvdm.data.index import open_index
from lvdm.files import write_text
from lvdm.latents import weights_hash
from lvdm.media import to_float
from lvdm.metrics.features import full_precision
from lvdm.metrics.frames import psnr, ssim
from lvdm.metrics.lpips import LPIPS
from lvdm.metrics.protocol import Protocol
from lvdm.progress import bar
from lvdm.rng import generator
from lvdm.run import RunFolder
from sample.evaluate import thumbnail
from vae.base import VideoVAE

REFERENCES = {"reconstruction": "upscaled 1/8 thumbnail", "refinement": "D1, linear blend between"}
DRAWS = 10_000
"""Of the bootstrap."""


@dataclass
class Measure:
    """What is measured of one trained VAE, and on which clips."""

    operational: ClassVar[tuple[str, ...]] = ("batch",)

    out: str = ""
    """Folder for results.json."""
    vae: str = ""
    """The trained VAE."""
    what: str = "reconstruction"
    """reconstruction: D1's frames. refinement: D2's, the encoder sees every second."""
    videos: str = ""
    """Folder of videos."""
    holdout: float = 0.0
    """Clips are from the last part of each shot; 0 takes all of it."""
    frames: list[int] = field(default_factory=lambda: [17])
    """Lengths; a shorter clip is the beginning of a longer one."""
    size: int = 128
    """Height and width."""
    per_video: int = 1
    """Clips a video, evenly spaced."""
    batch: int = 4
    """Clips at a time."""


@dataclass
class Scores:
    """Of one length: rendering -> metric -> a row of numbers a clip, one a frame (of flicker, one a pair of frames)."""

    protocol: dict[str, Any]
    sources: list[str]
    """The video of each clip."""
    values: dict[str, dict[str, list[list[float]]]]


def run(config: Measure) -> None:
    """Writes `results.json` to `config.out`, once."""
    model, clips = vae.load(config.vae).to(device()).eval(), clips_of(config)
    folder = RunFolder(config.out, config)
    folder.bind(vae=weights_hash(model.state_dict()), videos=clips.index.hash())
    if not folder.finished:
        scores = {frames: asdict(s) for frames, s in measure(config, model, clips).items()}
        write_text(folder.path / "results.json", json.dumps(scores))
        folder.finish(clips=len(clips.grid(config.per_video)))


def read(folder: str | Path) -> dict[int, Scores]:
    """The scores that `run` wrote, by length."""
    stored = json.loads((Path(folder) / "results.json").read_text())
    return {int(frames): Scores(**scores) for frames, scores in stored.items()}


def clips_of(config: Measure) -> Clips:
    """The clips to measure on, of the greatest length."""
    split = "val" if config.holdout else "all"
    policy = ClipPolicy(max(config.frames), 1, config.size, split=split, holdout=config.holdout)
    return Clips(open_index(config.videos, "none"), policy, seed=0).say_skipped()


@torch.no_grad()
def measure(config: Measure, model: VideoVAE, clips: Clips) -> dict[int, Scores]:
    """Every length of the same clips."""
    windows, lpips = clips.grid(config.per_video), LPIPS("alex").to(device())
    sources = [clips.rows[window.row_index].path for window in windows]
    found: dict[int, dict[str, list[dict[str, Tensor]]]] = {frames: {} for frames in config.frames}
    with bar("measure", len(windows) * len(config.frames)) as progress:
        for i in range(0, len(windows), config.batch):
            video = torch.stack([clips.read(window).video for window in windows[i : i + config.batch]])
            longest = to_float(video.to(device()))
            for frames in config.frames:
                x = longest[:, :, :frames]
                for name, y in renderings(model, x, config.what):
                    found[frames].setdefault(name, []).append(score(x, y, lpips))
                progress.advance(len(x))
    return {
        frames: Scores(
            protocol(config, clips, frames, len(windows), lpips).to_dict(),
            sources,
            {name: joined(parts) for name, parts in by_name.items()},
        )
        for frames, by_name in found.items()
    }


def joined(parts: list[dict[str, Tensor]]) -> dict[str, list[list[float]]]:
    """The scores of all batches in one."""
    return {metric: torch.cat([part[metric] for part in parts]).tolist() for metric in parts[0]}


def renderings(model: VideoVAE, x: Tensor, what: str) -> Iterator[tuple[str, Tensor]]:
    """("model", its frames) and (the reference's name, what can be had without what is measured), in [-1, 1]."""
    if what == "reconstruction":
        yield "model", model.reconstruct(x).clamp(-1, 1)
        yield REFERENCES[what], thumbnail(x)
        return
    z = model.encode(x[:, :, ::2]).latent_dist.mean
    yield "model", model.refine(z).sample.clamp(-1, 1)
    d1 = model.decode(z).sample.clamp(-1, 1)
    blend = torch.empty_like(x)
    blend[:, :, ::2], blend[:, :, 1::2] = d1, (d1[:, :, 1:] + d1[:, :, :-1]) / 2
    yield REFERENCES[what], blend


def score(x: Tensor, y: Tensor, lpips: LPIPS) -> dict[str, Tensor]:
    """Metrics of each frame, (B, T), and the flicker of each pair of neighbours, (B, T-1), on the CPU in fp64."""
    with full_precision(x.device):
        values = {"PSNR": psnr(x, y), "SSIM": ssim(x, y), "LPIPS": lpips.video(x, y), "flicker": flicker(x, y)}
    return {key: value.cpu().double() for key, value in values.items()}


def flicker(x: Tensor, y: Tensor) -> Tensor:
    """How much more or less y changes from frame to frame than x: the mean of |dy - dx| over C, H, W in levels of 255.

    (B, 3, T, H, W) twice, in [-1, 1], to (B, T-1); 0 for equal frames, and for errors that stand still.
    """
    return (y - x).double().diff(dim=2).abs().mean((1, 3, 4)) * 127.5


def protocol(config: Measure, clips: Clips, frames: int, count: int, lpips: LPIPS) -> Protocol:
    """How the numbers were made."""
    longest = f", the first of {max(config.frames)}" if frames < max(config.frames) else ""
    return Protocol(
        metric="PSNR, SSIM, LPIPS, flicker",
        features="lpips-alex",
        weights_sha256=lpips.weights_sha256,
        frames=frames,
        stride_real=1,
        stride_fake=1,
        resize=f"short side to {config.size}, centre crop, uint8",
        count_real=count,
        count_fake=count,
        split=f"{clips.index.root.name}, {clips.policy.split}",
        seed=0,
        estimator=f"mean over frames, then over clips{longest}; posterior mean; flicker in levels of 255",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Means and their intervals


def of_clips(scores: list[Scores], rendering: str, metric: str, part: slice = slice(None)) -> Tensor:
    """The mean over the frames in `part` of each clip, of the runs `scores`: (runs, clips) fp64."""
    runs = [torch.tensor(s.values[rendering][metric], dtype=torch.float64)[:, part].mean(1) for s in scores]
    return torch.stack(runs)


def interval(values: Tensor, sources: list[str]) -> tuple[float, float]:
    """The 95 % interval of the mean of `values` (clips,); the sources are the sample, their clips stay together.

    Percentile bootstrap (Efron 1979): as many sources are drawn with replacement as there are, 10,000 times.
    """
    names = sorted(set(sources))
    of = torch.tensor([names.index(source) for source in sources])
    sums = torch.zeros(len(names), dtype=torch.float64).index_add(0, of, values.double())
    counts = torch.bincount(of, minlength=len(names))
    drawn = torch.randint(len(names), (DRAWS, len(names)), generator=generator(0, "bootstrap"))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
