"""Sets of videos compared with each other, wherever they come from: files, datasets, latents, reconstructions."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import av
import torch
import torch.nn.functional as F
from torch import Tensor

from lvdm.accelerator import device
from lvdm.data import arrays
from lvdm.data.clips import Clips, Window, crop, resize
from lvdm.data.frames import is_pictures
from lvdm.data.index import IndexRow, stamp_of
from lvdm.errors import UserError
from lvdm.latents import LatentFile, weights_hash
from lvdm.media import to_float
from lvdm.metrics.cache import cached_features
from lvdm.metrics.features import FeatureExtractor
from lvdm.metrics.protocol import Preset, Protocol
from lvdm.metrics.sets import (
    FeatureSet,
    Floor,
    batchwise_frechet,
    floor,
    frechet,
    inception_score,
    interval,
    kernel_distance,
)
from lvdm.progress import Bar, bar
from sample.render import frames as rendered_frames
from vae.base import VideoVAE

T, U = TypeVar("T"), TypeVar("U")

PART = 64
"""Clips whose features are one file of the cache: what a killed run loses at most, a process takes at a time."""
LOSSLESS = ("bmp", "ffv1", "ffvhuff", "huffyuv", "npy", "png", "ppm", "rawvideo", "tif", "tiff", "utvideo")
FIT = {
    "crop": "short side to {0}, centre crop, uint8",
    "crop_first": "centre square, then to {0}, uint8",
    "whole": "whole frame to {0}x{0}, aspect not kept, uint8",
}
"""How frames come to their size, in words; the keys are those of `resize`."""


class VideoSet(ABC):
    """Clips of one length and size: one side of a comparison.

    `name` is for people, `sources` the video of each clip, `frames` and `size` what a clip is, `stride` and `fps` how
    its frames were taken, `rates` the slowest and fastest that clips play at (None: nobody says), `note` what is to be
    said of their pixels.
    """

    name: str
    sources: list[str]
    frames: int
    size: int
    stride: int | None
    fps: float | None = None
    rates: tuple[float, float] | None
    note: str

    @property
    def count(self) -> int:
        """Clips."""
        return len(self.sources)

    @abstractmethod
    def key(self, numbers: Sequence[int]) -> dict[str, Any]:
        """All that the pixels of these clips depend on, as JSON: files, frames, cut, weights."""

    @abstractmethod
    def batches(self, numbers: Sequence[int], batch: int, workers: int) -> Iterator[Tensor]:
        """These clips, `batch` at a time: (B, 3, frames, size, size) in [-1, 1] on the device."""


class Files(VideoSet):
    """Windows of the videos of a dataset, cut to a square as `fit` says."""

    def __init__(
        self,
        clips: Clips,
        windows: Sequence[Window],
        fit: str = "crop",
        rate: float | None = None,
        name: str = "",
    ):
        """`rate` is what the videos play at, where somebody knows that better than their files."""
        self.clips, self.windows, self.fit = clips, list(windows), fit
        policy, used = clips.policy, sorted({window.row_index for window in windows})
        rows = [clips.rows[i] for i in used]
        self.name = name or f"{clips.index.root.name}, {policy.split}"
        self.sources = [clips.rows[window.row_index].path for window in windows]
        self.frames, self.size = policy.frames, policy.size
        self.stride, self.fps = (None, policy.fps) if policy.fps else (policy.stride, None)
        stated = [rate or rate_of(clips.index.root, row) for row in rows]
        rates = [known / policy.stride_of(row) for known, row in zip(stated, rows, strict=True) if known]
        self.rates = (min(rates), max(rates)) if rates else None
        self.note = compression([clips.index.root / row.path for row in rows])
        self._stamps = {i: stamp_of(clips.index.root / clips.rows[i].path) for i in used}

    def key(self, numbers: Sequence[int]) -> dict[str, Any]:
        windows = [self.windows[number] for number in numbers]
        clips = [
            [self.clips.rows[row].path, self._stamps[row], self.clips.policy.places(self.clips.rows[row], start)]
            for row, start, _ in windows
        ]
        return {"clips": clips, "size": self.size, "fit": self.fit}

    def batches(self, numbers: Sequence[int], batch: int, workers: int) -> Iterator[Tensor]:
        clips = ahead(lambda number: self.read(self.windows[number]), numbers, workers)
        for part in batched(clips, batch):
            yield to_float(torch.stack(part).to(device()))

    def read(self, window: Window) -> Tensor:
        """The clip as uint8 (3, frames, size, size)."""
        if self.fit == "crop":
            return self.clips.read(window).video
        frames = self.clips.read(window).video  # uncut: (T, H, W, 3)
        if self.fit == "crop_first":
            square = crop(frames.permute(0, 3, 1, 2), min(frames.shape[1:3])).permute(0, 2, 3, 1)
            return resize(square, self.size).transpose(0, 1).contiguous()
        pictures = frames.permute(0, 3, 1, 2)
        return F.interpolate(pictures, (self.size, self.size), mode="bilinear", antialias=True).transpose(0, 1)


class Rendered(VideoSet):
    """Latents as a VAE renders them: by D1, or with `refine` by D2 at twice the rate; every `stride`-th frame."""

    def __init__(
        self,
        latents: Sequence[LatentFile],
        sources: list[str],
        model: VideoVAE,
        refine: bool,
        stride: int = 1,
        frames: int | None = None,
    ):
        shapes = {(tuple(z.latent.shape), tuple(z.size or ()), z.num_frames, z.fps) for z in latents}
        height, width = (side * model.spec.space_factor for side in latents[0].latent.shape[-2:])
        height, width = latents[0].size or (height, width)
        if len(shapes) > 1 or height != width:
            raise UserError(f"samples: expected square videos of one size, length and rate, got {sorted(shapes)}")
        self.latents, self.sources, self.model, self.refine, self.stride = latents, sources, model, refine, stride
        there = 2 * latents[0].num_frames - 1 if refine else latents[0].num_frames
        self.frames, self.size = frames or -(-there // stride), height
        require_length(sources[0], there, self.frames, stride)
        rate = latents[0].fps * (2 if refine else 1) / stride
        self.rates, self.note = (rate, rate), ""
        self.name = "generated, D2 (twice the rate)" if refine else "generated, D1"
        self._vae = weights_hash(model.state_dict())

    def key(self, numbers: Sequence[int]) -> dict[str, Any]:
        latents = [[weights_hash({"": self.latents[n].latent}), self.latents[n].num_frames] for n in numbers]
        cut = {"size": self.size, "frames": self.frames, "stride": self.stride}
        return {"latents": latents, "vae": self._vae, "refine": self.refine, **cut}

    @torch.no_grad()
    def batches(self, numbers: Sequence[int], batch: int, workers: int) -> Iterator[Tensor]:
        for part in batched((self.latents[number] for number in numbers), batch):
            latent = torch.stack([z.latent for z in part])
            video = torch.cat(list(rendered_frames(self.model, latent, part[0].num_frames, self.refine)), 2)
            video = video[:, :, :: self.stride, : self.size, : self.size][:, :, : self.frames]
            yield video.float().clamp(-1, 1)


class Reconstructed(VideoSet):
    """Clips that went through a VAE and back: posterior mean (or codes), D1."""

    def __init__(self, of: VideoSet, model: VideoVAE):
        model.spec.check_square(of.size, "size")
        self.of, self.model, self.name, self.sources = of, model, f"{model.title}, D1", of.sources
        self.frames, self.size, self.stride, self.fps = of.frames, of.size, of.stride, of.fps
        self.rates, self.note = of.rates, ""
        self._vae = weights_hash(model.state_dict())

    def key(self, numbers: Sequence[int]) -> dict[str, Any]:
        return {"reconstructed": self.of.key(numbers), "vae": self._vae}

    @torch.no_grad()
    def batches(self, numbers: Sequence[int], batch: int, workers: int) -> Iterator[Tensor]:
        for x in self.of.batches(numbers, batch, workers):
            yield self.model.reconstruct(x).float().clamp(-1, 1)


def ahead(read: Callable[[T], U], items: Iterable[T], workers: int) -> Iterator[U]:
    """`read` of each item in turn, by `workers` threads that are at most twice as many items ahead; 0 reads here."""
    if not workers:
        yield from map(read, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append(pool.submit(read, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter."""
    part: list[T] = []
    for item in items:
        part.append(item)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


def compression(files: Sequence[Path]) -> str:
    """What the files are kept as where that loses something, of one file a suffix: "mp4 (h264)"; else ""."""
    one = {(next(iter(sorted(file.iterdir())), file) if file.is_dir() else file).suffix.lower(): file for file in files}
    kinds = {suffix[1:]: codec_of(file) for suffix, file in sorted(one.items())}
    return ", ".join(f"{suffix} ({codec})" for suffix, codec in kinds.items() if codec not in LOSSLESS)


def codec_of(file: Path) -> str:
    """Name of the codec of a video, of pictures and arrays their suffix."""
    if is_pictures(file) or arrays.is_array(file):
        path = next(iter(sorted(file.iterdir()))) if file.is_dir() else file
        return path.suffix[1:].lower()
    with av.open(str(file.resolve())) as container:
        return container.streams.video[0].codec_context.name


def rate_of(root: Path, row: IndexRow) -> float | None:
    """The frames a second of a video; None where nobody says (pictures, arrays without a .json)."""
    path = root / row.path
    if is_pictures(path):
        return None
    return arrays.rate_of(path) if arrays.is_array(path) else row.fps


def require_length(source: str, there: int, frames: int, stride: int) -> None:
    """Refuses a sample that is shorter than what is compared."""
    if there < (frames - 1) * stride + 1:
        at = f" at stride_fake={stride}" if stride > 1 else ""
        raise UserError(f"samples: {source} has {there} frames, the protocol takes {frames}{at}; set frames")


# ---------------------------------------------------------------------------------------------------------------------
# Features and numbers


def spread(items: Sequence[T], work: Callable[[T], U]) -> list[U]:
    """`work` of every item in order, shared out to the processes of a launch; each gets all results."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [work(item) for item in items]
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    parts: list = [None] * world
    torch.distributed.all_gather_object(parts, [work(item) for item in items[rank::world]])
    return [parts[i % world][i // world] for i in range(len(items))]


def features_of(videos: VideoSet, network: FeatureExtractor, batch: int, workers: int, progress: Bar) -> FeatureSet:
    """The features of all clips, from the cache where it has them. UserError for clips too short for the network."""
    if videos.frames < network.min_frames:
        raise UserError(f"frames={videos.frames}: {network.name} needs at least {network.min_frames}")

    def part(numbers: Sequence[int]) -> FeatureSet:
        made = {"network": network.name, "weights": network.weights_sha256, "resize": network.resize}
        found = cached_features(
            {**made, "videos": videos.key(numbers)}, lambda: extract(videos, numbers, network, batch, workers)
        )
        progress.advance(len(numbers))
        return found

    numbers = range(videos.count)
    return FeatureSet.join(spread([numbers[i : i + PART] for i in range(0, len(numbers), PART)], part))


def extract(
    videos: VideoSet, numbers: Sequence[int], network: FeatureExtractor, batch: int, workers: int
) -> FeatureSet:
    """The features of these clips."""
    rows = []
    for i, x in enumerate(videos.batches(numbers, batch, workers)):
        odd = (~x.isfinite()).flatten(1).any(1).nonzero()
        if len(odd):
            raise UserError(f"{videos.sources[numbers[i * batch + int(odd[0])]]}: its frames hold NaN or infinity")
        rows.append(network(x).float().cpu())
    rows = torch.cat(rows)
    clips = torch.arange(len(numbers)).repeat_interleave(len(rows) // len(numbers))
    return FeatureSet(rows, clips, [videos.sources[number] for number in numbers])


@dataclass(frozen=True)
class Row:
    """A number with its 95 % interval (nan where there are too few videos), its floor, and how it was made."""

    metric: str
    value: float
    low: float
    high: float
    floor: Floor
    protocol: Protocol
    warning: str


@dataclass(frozen=True)
class Report:
    """What is known of a set of videos."""

    rows: list[Row]


METRICS = {"fvd": "FVD", "kvd": "KVD", "is": "IS", "fid": "FID"}
OWN_FEATURES = {"is": "c3d", "fid": "inception"}
"""Metrics that are of other features than the protocol's."""


INCEPTION = (
    "inception score, 10 splits after a shuffle by seed 42; interval: one standard deviation, floor: of real clips"
)


def measure(
    real: VideoSet,
    fake: VideoSet,
    preset: Preset,
    metrics: Sequence[str],
    network: Callable[[str], FeatureExtractor],
    batch: int = 4,
    workers: int = 2,
    seed: int = 0,
) -> Report:
    """The metrics (fvd, kvd, is, fid) of two sets under a preset; `network` makes a feature extractor of its name.

    UserError for fewer than 2 clips a side. Features come from the cache where it has them; under a launcher every
    process takes a share of the clips, and all return the same.
    """
    if min(real.count, fake.count) < 2:
        raise UserError(f"a set metric needs at least 2 videos a side, got {real.count} real and {fake.count} samples")
    wanted = {metric: OWN_FEATURES.get(metric, preset.features) for metric in metrics}
    names = list(dict.fromkeys(wanted.values()))
    networks, pairs = {name: network(name) for name in names}, {}
    with bar("features", len(names) * (real.count + fake.count), show=is_main()) as progress:
        for name in names:
            pairs[name] = [features_of(side, networks[name], batch, workers, progress) for side in (real, fake)]
    rows = []
    for metric, name in wanted.items():
        number = inception if metric == "is" else distance
        protocol = protocol_of(metric, real, fake, preset, networks[name], seed)
        rows.append(Row(metric, *number(metric, *pairs[name], preset), protocol, protocol.warning() or ""))
    return Report(rows)


def is_main() -> bool:
    """Whether this process speaks for all of a launch."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def estimator(metric: str, preset: Preset) -> tuple[Callable[[FeatureSet, FeatureSet], float], str]:
    """FVD, KVD or FID as the preset has it, and in words."""
    if metric == "kvd":
        return kernel_distance, "kernel distance, ((x.y) / d + 1)^3, unbiased, fp64"
    if preset.batch:
        words = f"Fréchet, mean over batches of {preset.batch} clips (biased), covariance 1/(N-1), fp64"
        return partial(batchwise_frechet, batch=preset.batch), words
    return partial(frechet, covariance=preset.covariance), "Fréchet, fp64"


def distance(metric: str, real: FeatureSet, fake: FeatureSet, preset: Preset) -> tuple[float, float, float, Floor]:
    """FVD, KVD or FID: value, interval and floor."""
    of, _ = estimator(metric, preset)
    return of(real, fake), *interval(of, real, fake), floor(of, real, fake.count)


def inception(metric: str, real: FeatureSet, fake: FeatureSet, preset: Preset) -> tuple[float, float, float, Floor]:
    """IS: the mean over splits, one standard deviation around it, and as floor that of the real clips."""
    mean, std = inception_score(fake.features)
    of_real, real_std = inception_score(real.features)
    return mean, mean - std, mean + std, Floor(of_real, of_real - real_std, of_real + real_std, real.count)


def protocol_of(
    metric: str, real: VideoSet, fake: VideoSet, preset: Preset, network: FeatureExtractor, seed: int
) -> Protocol:
    """How a number was made."""
    lossy = [f"{side} clips kept as {videos.note}" for side, videos in (("real", real), ("fake", fake)) if videos.note]
    fit = FIT[getattr(real, "fit", "crop")].format(real.size)
    return Protocol(
        metric=METRICS[metric],
        features=network.name,
        weights_sha256=network.weights_sha256,
        frames=real.frames,
        stride_real=real.stride,
        stride_fake=None if real.fps else fake.stride,
        resize=f"{fit} (real); {network.resize}",
        count_real=real.count,
        count_fake=fake.count,
        split=real.name,
        seed=seed,
        estimator=INCEPTION if metric == "is" else estimator(metric, preset)[1],
        fps=real.fps,
        preset=preset.name,
        draw=preset.draw,
        covariance=preset.covariance if metric in ("fvd", "fid") else "",
        inputs=", ".join(lossy),
    )
