"""Sets of videos compared with each other, wherever they come from: files, datasets, latents, reconstructions."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
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
from lvdm.data.index import IndexRow
from lvdm.errors import UserError
from lvdm.latents import LatentFile, weights_hash
from lvdm.media import to_float
from lvdm.metrics.cache import load_features, save_features
from lvdm.metrics.content import contents_of
from lvdm.metrics.features import FeatureExtractor
from lvdm.metrics.protocol import SMALL_BATCH, Preset, Protocol
from lvdm.metrics.sets import (
    FeatureSet,
    Floor,
    Metric,
    batchwise_frechet,
    floor,
    frechet,
    inception_score,
    interval,
    kernel_distance,
)
from lvdm.progress import Bar, bar
from sample.measure.configs import OWN_FEATURES
from sample.render import frames as rendered_frames
from vae.base import VideoVAE

T, U = TypeVar("T"), TypeVar("U")

SPLITS = 10
"""Of an inception score."""
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
    its frames were taken, `paces` the frames a second that each clip plays at (None: nobody says), `note` what is to be
    said of their pixels.
    """

    name: str
    sources: list[str]
    frames: int
    size: int
    stride: int | None
    fps: float | None = None
    paces: list[float | None]
    note: str

    @property
    def count(self) -> int:
        """Clips."""
        return len(self.sources)

    @property
    def rates(self) -> tuple[float, float] | None:
        """The slowest and fastest that clips play at; None where nobody says."""
        known = [pace for pace in self.paces if pace]
        return (min(known), max(known)) if known else None

    @abstractmethod
    def key(self, numbers: Sequence[int]) -> dict[str, Any]:
        """All that the pixels of these clips depend on, as JSON: files, frames, cut, weights."""

    @abstractmethod
    def grouped(self, groups: Sequence[Sequence[int]], workers: int) -> Iterator[Tensor]:
        """The clips of each group at a time, (B, 3, frames, size, size) in [-1, 1] on the device, read ahead."""

    def batches(self, numbers: Sequence[int], batch: int, workers: int) -> Iterator[Tensor]:
        """These clips, `batch` at a time, as `grouped` gives them."""
        return self.grouped(list(batched(numbers, batch)), workers)


class Files(VideoSet):
    """Windows of the videos of a dataset, cut to a square as `fit` says.

    `origin` are the fields of a `Protocol` that say which clips of which dataset they are.
    """

    def __init__(
        self,
        clips: Clips,
        windows: Sequence[Window],
        fit: str = "crop",
        rate: float | None = None,
        name: str = "",
        subset: str = "",
        per_video: int | None = None,
    ):
        """`rate` is what the videos play at, where somebody knows that better than their files; `subset` and
        `per_video` are those keys of the config that chose the videos and windows."""
        self.clips, self.windows, self.fit = clips, list(windows), fit
        policy, root = clips.policy, clips.index.root
        used = {window.row_index: clips.rows[window.row_index] for window in self.windows}
        self.name = name or f"{root.name}, {policy.split}"
        self.sources = [used[window.row_index].path for window in windows]
        self.frames, self.size = policy.frames, policy.size
        self.stride, self.fps = (None, policy.fps) if policy.fps else (policy.stride, None)
        stated = {i: rate or rate_of(root, row) for i, row in used.items()}
        paces = {i: known and known / policy.stride_of(used[i]) for i, known in stated.items()}
        self.paces = [paces[window.row_index] for window in windows]
        self.note = compression([root / row.path for row in used.values()])
        holdout = policy.holdout if policy.split != "all" else 0.0
        chosen = {"subset": subset, "holdout": holdout, "per_video": per_video, "short": policy.short}
        self.origin = {**chosen, "dataset": clips.index.hash()[:8]}

    def key(self, numbers: Sequence[int]) -> dict[str, Any]:
        policy, rows = self.clips.policy, self.clips.rows
        windows = [self.windows[number] for number in numbers]
        files = [self.clips.index.root / rows[window.row_index].path for window in windows]
        held = contents_of(files, show=len(files) > 4 * PART and is_main())
        clips = [
            [rows[window.row_index].path, held[file], policy.places(rows[window.row_index], window.start)]
            for window, file in zip(windows, files, strict=True)
        ]
        return {"clips": clips, "size": self.size, "fit": self.fit}

    def grouped(self, groups: Sequence[Sequence[int]], workers: int) -> Iterator[Tensor]:
        numbers = (number for group in groups for number in group)
        clips = ahead(lambda number: self.read(self.windows[number]), numbers, workers)
        for group in groups:
            yield to_float(torch.stack(list(islice(clips, len(group)))).to(device()))

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
        self.paces, self.note = [rate] * len(sources), ""
        self.name = "generated, D2 (twice the rate)" if refine else "generated, D1"
        self._vae = model.identity()

    def key(self, numbers: Sequence[int]) -> dict[str, Any]:
        latents = [[weights_hash({"": self.latents[n].latent}), self.latents[n].num_frames] for n in numbers]
        cut = {"size": self.size, "frames": self.frames, "stride": self.stride}
        return {"latents": latents, "vae": self._vae, "refine": self.refine, **cut}

    @torch.no_grad()
    def grouped(self, groups: Sequence[Sequence[int]], workers: int) -> Iterator[Tensor]:
        for group in groups:
            part = [self.latents[number] for number in group]
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
        self.paces, self.note = of.paces, ""
        self._vae = model.identity()

    def key(self, numbers: Sequence[int]) -> dict[str, Any]:
        return {"reconstructed": self.of.key(numbers), "vae": self._vae}

    @torch.no_grad()
    def grouped(self, groups: Sequence[Sequence[int]], workers: int) -> Iterator[Tensor]:
        for x in self.of.grouped(groups, workers):
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
    """Refuses a sample that is shorter than what is compared, and a stride that leaves one frame of it."""
    if stride > 1 and frames == 1:
        raise UserError(f"stride_fake={stride}: of the {there} frames of {source} one is left; take a smaller one")
    if there < (frames - 1) * stride + 1:
        at = f" at stride_fake={stride}" if stride > 1 else ""
        raise UserError(f"samples: {source} has {there} frames, the protocol takes {frames}{at}; set frames")


# ---------------------------------------------------------------------------------------------------------------------
# Features and numbers


def world_size() -> int:
    """Processes of this launch."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def share(items: Sequence[T]) -> Sequence[T]:
    """The items that are this process's."""
    world = world_size()
    return items[torch.distributed.get_rank() :: world] if world > 1 else items


def spread(items: Sequence[T], work: Callable[[T], U]) -> list[U]:
    """`work` of every item in order, shared out to the processes of a launch; each gets all results."""
    world, done = world_size(), [work(item) for item in share(items)]
    if world == 1:
        return done
    parts: list = [None] * world
    torch.distributed.all_gather_object(parts, done)
    return [parts[i % world][i // world] for i in range(len(items))]


def digest(videos: VideoSet) -> str:
    """Hex digest of all that the pixels of a set depend on, the content of its files among it."""
    return hashlib.sha256(json.dumps(videos.key(range(videos.count))).encode()).hexdigest()[:16]


def features_of(videos: VideoSet, network: FeatureExtractor, batch: int, workers: int, progress: Bar) -> FeatureSet:
    """The features of all clips, from the cache where it has them. UserError for clips too short for the network."""
    if videos.frames < network.min_frames:
        raise UserError(f"frames={videos.frames}: {network.name} needs at least {network.min_frames}")
    made = {"network": network.name, "weights": network.weights_sha256, "resize": network.resize}
    parts = [range(videos.count)[i : i + PART] for i in range(0, videos.count, PART)]
    keys = {part: {**made, "videos": videos.key(part)} for part in share(parts)}
    known = {part: load_features(key) for part, key in keys.items()}
    missing = [part for part, features in known.items() if features is None]
    fresh = extract(videos, missing, network, batch, workers, progress) if missing else iter(())

    def work(part: range) -> FeatureSet:
        if known[part] is None:
            save_features(keys[part], features := next(fresh))
            return features
        progress.advance(len(part))
        return known[part]

    return FeatureSet.join(spread(parts, work))


def extract(
    videos: VideoSet, parts: Sequence[range], network: FeatureExtractor, batch: int, workers: int, progress: Bar
) -> Iterator[FeatureSet]:
    """The features of the clips of each part in turn; reading runs on from one to the next."""
    groups = {part: list(batched(part, batch)) for part in parts}
    clips = videos.grouped([group for part in parts for group in groups[part]], workers)
    for part in parts:
        rows = []
        for group in groups[part]:
            x = next(clips)
            odd = (~x.isfinite()).flatten(1).any(1).nonzero()
            if len(odd):
                raise UserError(f"{videos.sources[group[int(odd[0])]]}: its frames hold NaN or infinity")
            rows.append(network(x).float().cpu())
            progress.advance(len(group))
        rows = torch.cat(rows)
        numbers = torch.arange(len(part)).repeat_interleave(len(rows) // len(part))
        yield FeatureSet(rows, numbers, [videos.sources[number] for number in part])


@dataclass(frozen=True)
class Row:
    """A number with its 95 % interval (nan where there are too few videos), its floor, and how it was made.

    Of IS the interval is one standard deviation over splits to both sides, and the floor the score of the real clips.
    """

    metric: str
    value: float
    low: float
    high: float
    floor: Floor | None
    protocol: Protocol
    warning: str


@dataclass(frozen=True)
class Report:
    """What is known of a set of videos."""

    rows: list[Row]


METRICS = {"fvd": "FVD", "kvd": "KVD", "is": "IS", "fid": "FID"}


INCEPTION = "inception score, mean over 10 splits after a shuffle by seed 42"
JACKKNIFE = 48
"""How often a distance is taken for its value, interval and floor, at most."""


def measure(
    real: VideoSet,
    fake: VideoSet,
    preset: Preset,
    metrics: Sequence[str],
    network: Callable[[str], FeatureExtractor],
    batch: int = 4,
    workers: int = 2,
    seed: int = 0,
    beyond: VideoSet | None = None,
    floor: bool = True,
) -> Report:
    """The metrics (fvd, kvd, is, fid) of two sets under a preset; `network` makes a feature extractor of its name.

    `beyond` are more real clips, for the `floor`, which reconstructions have none of. UserError for what `require`
    refuses. Features come from the cache where it has them; under a launcher every process takes a share of the clips,
    and all return the same.
    """
    require(real, fake, preset, metrics, network)
    sides, rows = [real, fake, *([beyond] if beyond else [])], []
    names = features_for(metrics, preset)
    with bar("features", len({*names.values()}) * sum(side.count for side in sides), show=is_main()) as progress:
        found = {
            name: [features_of(side, network(name), batch, workers, progress) for side in sides]
            for name in dict.fromkeys(names.values())
        }
    for metric, name in names.items():
        of_real, of_fake, *more = found[name]
        protocol = protocol_of(metric, real, fake, preset, network(name), seed)
        if metric == "is":
            number = inception(of_real, of_fake)
        else:
            reals = FeatureSet.join([of_real, *more]) if floor and preset.against == "reals" else None
            number = distance(metric, of_real, of_fake, preset, reals)
        rows.append(Row(metric, *number, protocol, protocol.warning() or ""))
    return Report(rows)


def features_for(metrics: Sequence[str], preset: Preset) -> dict[str, str]:
    """The features that each metric is of."""
    return {metric: OWN_FEATURES.get(metric, preset.features) for metric in metrics}


def require(
    real: VideoSet,
    fake: VideoSet,
    preset: Preset,
    metrics: Sequence[str],
    network: Callable[[str], FeatureExtractor],
) -> None:
    """Refuses, before any clip is read, sets that are too small for a metric, and clips too short for its features."""
    there = f"{real.count} real and {fake.count} samples"
    least = min(real.count, fake.count)
    if least < 2:
        raise UserError(f"a set metric needs at least 2 videos a side, got {there}")
    if least < preset.batch and {"fvd", "fid"} & {*metrics}:
        raise UserError(f"{SMALL_BATCH}: batches of {preset.batch} clips, and there are {there}")
    if least < SPLITS and "is" in metrics:
        raise UserError(f"metrics=is: {SPLITS} splits need as many videos a side, got {there}")
    for name in features_for(metrics, preset).values():
        if real.frames < network(name).min_frames:
            raise UserError(f"frames={real.frames}: {name} needs at least {network(name).min_frames}")


def is_main() -> bool:
    """Whether this process speaks for all of a launch."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def estimator(metric: str, preset: Preset) -> tuple[Callable[[FeatureSet, FeatureSet], float], str]:
    """FVD, KVD or FID as the preset has it, and in words."""
    if metric == "kvd":
        return kernel_distance, "kernel distance, ((x.y) / d + 1)^3, unbiased, fp64"
    if preset.batch:
        words = f"Fréchet, mean over batches of {preset.batch} clips (biased), fp64"
        return partial(batchwise_frechet, batch=preset.batch), words
    return partial(frechet, covariance=preset.covariance), "Fréchet, fp64"


def distance(
    metric: str, real: FeatureSet, fake: FeatureSet, preset: Preset, reals: FeatureSet | None
) -> tuple[float, float, float, Floor | None]:
    """FVD, KVD or FID: value, interval and, where there are `reals`, the floor among them."""
    of, _ = estimator(metric, preset)
    many = len(real.features) + len(fake.features) > 1000  # each distance may take seconds
    with bar(f"interval of {METRICS[metric]}", JACKKNIFE, show=many and is_main()) as progress:

        def counted(a: FeatureSet, b: FeatureSet) -> float:
            progress.advance()
            return of(a, b)

        bounds = bounds_of(metric, counted, real, fake, preset)
        return counted(real, fake), *bounds, reals and floor(counted, reals, fake.count)


def bounds_of(metric: str, of: Metric, real: FeatureSet, fake: FeatureSet, preset: Preset) -> tuple[float, float]:
    """The 95 % interval of a distance; no Fréchet distance is below 0."""
    low, high = interval(of, real, fake, paired=preset.against == "originals")
    return low if metric == "kvd" else max(low, 0.0), high


def inception(real: FeatureSet, fake: FeatureSet) -> tuple[float, float, float, Floor]:
    """IS: the mean over splits, one standard deviation around it, and as floor that of the real clips."""
    mean, std = inception_score(fake.features, SPLITS)
    of_real, real_std = inception_score(real.features, SPLITS)
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
        **getattr(real, "origin", {}),
    )
