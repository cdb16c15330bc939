"""The engine of frame metrics: scores of every frame of every clip, kept one by one, and intervals of their means."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import vae
from lvdm.accelerator import device, is_main, share, spread
from lvdm.data.clips import ClipPolicy, Clips
from lvdm.data.index import open_index
from lvdm.files import write_text
from lvdm.metrics.features import full_precision
from lvdm.metrics.flow import WarpingError
from lvdm.metrics.frames import flicker, pooled_psnr, preserved, psnr, ssim
from lvdm.metrics.lpips import LPIPS
from lvdm.metrics.protocol import Protocol
from lvdm.progress import bar
from lvdm.rng import generator
from lvdm.run import RunFolder
from sample.measure.sets import Files, digest, require_finite
from vae.base import VideoVAE

REFERENCES = {"reconstruction": "upscaled 1/8 thumbnail", "refinement": "D1, linear blend between"}
DRAWS = 10_000
"""Of the bootstrap."""
METRICS: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "psnr": ("PSNR", psnr),
    "pooled_psnr": ("pooled PSNR", pooled_psnr),
    "ssim": ("SSIM", ssim),
    "flicker": ("flicker", flicker),
    "ip": ("IP", preserved),
}
"""Metrics that are closed forms: what they are called, and what they are."""
NETS = {
    "lpips": ("LPIPS", "alex", False),
    "lpips-vgg": ("LPIPS (VGG)", "vgg", False),
    "lpips-spatial": ("LPIPS (spatial)", "alex", True),
}
"""Metrics that are LPIPS: what they are called, which net, and whether spatial."""
WARPING = "warping error"
BY_PAIR, BY_CLIP = ("flicker", WARPING), ("pooled PSNR", "IP")
"""What is of a pair of frames, and of a clip as a whole, not of a frame. Of IP a clip has the two sums whose totals are
divided."""
DEFAULT = ("psnr", "ssim", "lpips", "flicker")


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
    stride: int = 1
    """Every how many frames of a video one is taken."""
    per_video: int = 1
    """Clips a video, evenly spaced."""
    batch: int = 4
    """Clips at a time."""
    metrics: list[str] = field(default_factory=lambda: list(DEFAULT))
    """Of psnr, pooled_psnr, ssim, lpips, lpips-vgg, lpips-spatial, flicker, ip."""
    tile_frames: int = 0
    """Frames at a time, runs sharing one frame where the model does not stream exactly; 0 takes whole clips."""


@dataclass
class Scores:
    """Of one length: rendering -> metric -> a row of numbers a clip, one a frame (of flicker and warping error, one a
    pair of frames; of pooled PSNR one, of IP the two sums of `preserved`)."""

    protocol: dict[str, Any]
    sources: list[str]
    """The video of each clip."""
    values: dict[str, dict[str, list[list[float]]]]


def run(config: Measure) -> None:
    """Writes `results.json` to `config.out`, once."""
    model, clips = load(config), clips_of(config)
    videos = Files(clips, clips.grid(config.per_video), per_video=config.per_video)
    folder = RunFolder(config.out, config, is_main())
    folder.bind(vae=model.identity(), videos=digest(videos))
    if not folder.finished:
        found = measure(model, videos, config.frames, config.what, config.metrics, config.batch)
        scores = {frames: asdict(s) for frames, s in found.items()}
        if is_main():
            write_text(folder.path / "results.json", json.dumps(scores, allow_nan=False))
        folder.finish(clips=videos.count)


def load(config: Measure) -> VideoVAE:
    """The model, on the device, as the config has it."""
    model = vae.load(config.vae).to(device()).eval()
    if config.tile_frames:
        model.enable_tiling(0, frames=config.tile_frames)
    return model


def read(folder: str | Path) -> dict[int, Scores]:
    """The scores that `run` wrote, by length."""
    stored = json.loads((Path(folder) / "results.json").read_text())
    return {int(frames): Scores(**scores) for frames, scores in stored.items()}


def clips_of(config: Measure) -> Clips:
    """The clips to measure on, of the greatest length."""
    split = "val" if config.holdout else "all"
    policy = ClipPolicy(max(config.frames), config.stride, config.size, split=split, holdout=config.holdout)
    return Clips(open_index(config.videos, "none"), policy, seed=0).say_skipped()


@torch.no_grad()
def measure(
    model: VideoVAE,
    videos: Files,
    lengths: Sequence[int],
    what: str = "reconstruction",
    metrics: Sequence[str] = DEFAULT,
    batch: int = 4,
    workers: int = 2,
    raft: str = "",
) -> dict[int, Scores]:
    """The scores of every length, of the beginnings of the same clips. Processes of a launch share the clips out.

    `raft` is the file of the warping error's weights. UserError, with the clip and frame, for what is not finite.
    """
    nets = networks_of(metrics, raft)
    groups = [range(videos.count)[i : i + batch] for i in range(0, videos.count, batch)]
    clips = videos.grouped(share(groups), workers)
    with bar("measure", videos.count * len(lengths), show=is_main()) as progress:

        def work(numbers: Sequence[int]) -> dict[int, dict[str, dict[str, Tensor]]]:
            longest, found = next(clips), {}
            for frames in lengths:
                x, found[frames] = longest[:, :, :frames], {}
                for name, y in renderings(model, x, what):
                    require_finite(y, [videos.sources[number] for number in numbers])
                    found[frames][name] = score(x, y.clamp(-1, 1), *nets, metrics=metrics)
                progress.advance(len(x))
            return found

        parts = spread(groups, work)
    return {
        frames: Scores(
            protocol(videos, frames, max(lengths), metrics, nets).to_dict(),
            videos.sources,
            {name: joined([part[frames][name] for part in parts]) for name in parts[0][frames]},
        )
        for frames in lengths
    }


def joined(parts: list[dict[str, Tensor]]) -> dict[str, list[list[float]]]:
    """The scores of all batches in one."""
    return {metric: torch.cat([part[metric] for part in parts]).tolist() for metric in parts[0]}


def renderings(model: VideoVAE, x: Tensor, what: str) -> Iterator[tuple[str, Tensor]]:
    """("model", its frames as they come) and (the reference's name, what can be had without what is measured)."""
    if what == "reconstruction":
        yield "model", model.reconstruct(x)
        yield REFERENCES[what], thumbnail(x)
        return
    z = model.encode(x[:, :, ::2]).latent_dist.mean
    yield "model", model.refine(z).sample
    d1 = model.decode(z).sample.clamp(-1, 1)
    blend = torch.empty_like(x)
    blend[:, :, ::2], blend[:, :, 1::2] = d1, (d1[:, :, 1:] + d1[:, :, :-1]) / 2
    yield REFERENCES[what], blend


def thumbnail(x: Tensor) -> Tensor:
    """Each frame shrunk to an eighth (antialiased) and enlarged again, bilinearly: what any f8 VAE must beat."""
    images = x.transpose(1, 2).flatten(0, 1)
    h, w = images.shape[-2:]
    small = F.interpolate(images, (h // 8, w // 8), mode="bilinear", antialias=True)
    large = F.interpolate(small, (h, w), mode="bilinear", align_corners=False)
    return large.unflatten(0, (len(x), -1)).transpose(1, 2)


def networks_of(metrics: Sequence[str], raft: str = "") -> list[LPIPS | WarpingError]:
    """The networks of those metrics that are one."""
    nets = [LPIPS(net, spatial=spatial).to(device()) for key, (_, net, spatial) in NETS.items() if key in metrics]
    return [*nets, WarpingError(raft, device())] if "warping" in metrics else nets


def score(x: Tensor, y: Tensor, *nets: LPIPS | WarpingError, metrics: Sequence[str] = DEFAULT) -> dict[str, Tensor]:
    """Metrics of each frame, (B, T), of each pair of neighbours, (B, T-1), and of a whole clip, (B, 1) or its two sums,
    by name, on the CPU in fp64; `nets` are those of `networks_of`."""
    labels = {(net, spatial): label for label, net, spatial in NETS.values()}
    with full_precision(x.device):
        values = {METRICS[name][0]: METRICS[name][1](x, y) for name in metrics if name in METRICS}
        for net in nets:
            label = labels[net.net, net.spatial] if isinstance(net, LPIPS) else WARPING
            values[label] = net.video(x, y)
    return {key: value.cpu().double().reshape(len(x), -1) for key, value in values.items()}


def label_of(metric: str) -> str:
    """What a metric is called."""
    return WARPING if metric == "warping" else (METRICS.get(metric) or NETS[metric])[0]


def named(metrics: Sequence[str]) -> str:
    """What they are called in a protocol."""
    units = {"flicker": " (levels of 255)"}
    return ", ".join(label_of(metric) + units.get(metric, "") for metric in metrics)


def estimator(metrics: Sequence[str], which: str = "") -> str:
    """From the values of frames to a number, in words; `which` says of which frames."""
    labels = [label_of(metric) for metric in metrics]
    means = [f"mean over frames{which}, then over clips"] if {*labels} - {*BY_CLIP} else []
    means += [f"pooled PSNR of a clip{which} at once, then mean over clips"] if "pooled PSNR" in labels else []
    means += [f"IP of the sums{which} of all clips"] if "IP" in labels else []
    means += ["PSNR capped at 100 dB"] if any("PSNR" in label for label in labels) else []
    return "; ".join([*means, "posterior mean"])


def protocol(videos: Files, frames: int, longest: int, metrics: Sequence[str], nets: Sequence[LPIPS]) -> Protocol:
    """How the numbers were made."""
    return Protocol(
        metric=named(metrics),
        features="+".join(net.name for net in nets) or None,
        weights_sha256="+".join(net.weights_sha256 for net in nets) or None,
        frames=frames,
        stride_real=videos.stride,
        stride_fake=videos.stride,
        resize=f"short side to {videos.size}, centre crop, uint8",
        count_real=videos.count,
        count_fake=videos.count,
        split=videos.name,
        seed=0,
        estimator=estimator(metrics, f", the first of {longest}" if frames < longest else ""),
        fps=videos.fps,
        inputs=f"clips kept as {videos.note}" if videos.note else "",
        **videos.origin,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Means and their intervals


def of_clips(scores: list[Scores], rendering: str, metric: str, part: slice = slice(None)) -> Tensor:
    """The mean over the frames in `part` of each clip, of the runs `scores`: (runs, clips) fp64. Of IP what each clip
    preserves of the mean original, so that here, too, the mean is the metric."""
    runs = torch.stack([torch.tensor(s.values[rendering][metric], dtype=torch.float64) for s in scores])
    return runs[..., 0] / runs[..., 1].mean(1, keepdim=True) if metric == "IP" else runs[:, :, part].mean(2)


def weights_of(scores: Scores, metric: str) -> Tensor | None:
    """What each clip weighs in the divisor of a metric, 1 on average; None where all weigh the same."""
    if metric != "IP":
        return None
    whole = torch.tensor(scores.values["model"][metric], dtype=torch.float64)[:, 1]
    return whole / whole.mean()


def interval(
    values: Tensor, sources: list[str], weights: Tensor | None = None
) -> tuple[float, float] | tuple[None, None]:
    """The 95 % interval of the mean of `values` (clips,), see `resampled`; None of fewer than 2 sources."""
    return ends(resampled(values, sources, weights)) if len(set(sources)) > 1 else (None, None)


def resampled(values: Tensor, sources: list[str], weights: Tensor | None = None) -> Tensor:
    """Means of `values` (..., clips) over draws of the sources, whose clips stay together: (..., 10,000) fp64.

    The bootstrap of Efron (1979): as many sources are drawn with replacement as there are; the draws of equal sources
    are the same whatever the values. With `weights` (clips,) the sum of a draw is divided by that of its weights.
    """
    names = {name: i for i, name in enumerate(sorted(set(sources)))}
    of = torch.tensor([names[source] for source in sources])
    drawn = torch.randint(len(names), (DRAWS, len(names)), generator=generator(0, "bootstrap"))
    times = torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape).double())
    sums = torch.zeros(*values.shape[:-1], len(names), dtype=torch.float64).index_add(-1, of, values.double())
    weights = torch.ones(len(of)) if weights is None else weights
    return sums @ times.T / (times @ torch.bincount(of, weights.double()))


def ends(drawn: Tensor) -> tuple[float, float]:
    """The 95 % percentile interval of the draws (10,000,) of a bootstrap."""
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
