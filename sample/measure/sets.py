"""Sets of videos compared with each other, wherever they come from: files, datasets, latents, reconstructions."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import median_high
from typing import Any, TypeVar

import av
import torch
import torch.nn.functional as F
from torch import Tensor

from lvdm.accelerator import device, is_main
from lvdm.data import arrays
from lvdm.data.clips import Clips, Window, crop, resize
from lvdm.data.frames import is_pictures, pictures_of
from lvdm.data.index import IndexRow
from lvdm.errors import UserError
from lvdm.latents import LatentFile, weights_hash
from lvdm.media import to_float
from lvdm.metrics.content import contents_of
from sample.render import frames as rendered_frames
from vae.base import VideoVAE

T, U = TypeVar("T"), TypeVar("U")

MANY = 256
"""Files whose reading takes long enough for a bar."""
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
    its frames were taken, `paces` the frames a second that each clip plays at (None: nobody says), `note` what it is
    kept as where that moves its pixels, `libraries` the versions of what decodes its files.
    """

    name: str
    sources: list[str]
    frames: int
    size: int
    stride: int | None
    fps: float | None = None
    paces: list[float | None]
    note: str
    libraries: dict[str, str]

    @property
    def count(self) -> int:
        """Clips."""
        return len(self.sources)

    @property
    def rates(self) -> tuple[float, float] | None:
        """The slowest and fastest that clips play at; None where nobody says."""
        known = [pace for pace in self.paces if pace]
        return (min(known), max(known)) if known else None

    @property
    def usual_rate(self) -> float | None:
        """The median of what clips play at; None where nobody says."""
        known = [pace for pace in self.paces if pace]
        return median_high(known) if known else None

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
    """Windows of the videos of a dataset, cut to a square as `fit` says."""

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
        files = [root / row.path for row in used.values()]
        self.note, self.libraries = compression(files), decoders(files)
        holdout = policy.holdout if policy.split != "all" else 0.0
        self._chosen = {"subset": subset, "holdout": holdout, "per_video": per_video, "short": policy.short}

    @property
    def origin(self) -> dict[str, Any]:
        """The fields of a `Protocol` that say which clips of which dataset they are."""
        return {**self._chosen, "across_cuts": self.clips.policy.across_cuts, "dataset": digest(self)[:8]}

    def key(self, numbers: Sequence[int]) -> dict[str, Any]:
        policy, rows = self.clips.policy, self.clips.rows
        windows = [self.windows[number] for number in numbers]
        files = [self.clips.index.root / rows[window.row_index].path for window in windows]
        held = contents_of(files, show=len(files) > MANY and is_main())
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
        factor = model.spec.space_factor
        shapes = [(z.num_frames, *(z.size or (side * factor for side in z.latent.shape[-2:]))) for z in latents]
        _, height, width = shapes[0]
        if len(set(shapes)) > 1 or height != width:
            found = ", ".join(f"{t} frames of {w}x{h}" for t, h, w in sorted(set(shapes))[:3])
            raise UserError(f"samples: expected square videos of one size and length, got {found}")
        self.latents, self.sources, self.model, self.refine, self.stride = latents, sources, model, refine, stride
        there = 2 * latents[0].num_frames - 1 if refine else latents[0].num_frames
        self.frames, self.size = frames or -(-there // stride), height
        require_length(sources[0], there, self.frames, stride)
        self.paces = [z.fps * (2 if refine else 1) / stride for z in latents]
        self.note, self.libraries = "latents (rendered, not quantised)", {}
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
            require_finite(video, [self.sources[number] for number in group])
            yield video.float().clamp(-1, 1)


class Reconstructed(VideoSet):
    """Clips that went through a VAE and back: posterior mean (or codes), D1."""

    def __init__(self, of: VideoSet, model: VideoVAE):
        model.spec.check_square(of.size, "size")
        self.of, self.model, self.name, self.sources = of, model, f"{model.title}, D1", of.sources
        self.frames, self.size, self.stride, self.fps = of.frames, of.size, of.stride, of.fps
        self.paces, self.note, self.libraries = of.paces, "", of.libraries
        self._vae = model.identity()

    def key(self, numbers: Sequence[int]) -> dict[str, Any]:
        return {"reconstructed": self.of.key(numbers), "vae": self._vae}

    @torch.no_grad()
    def grouped(self, groups: Sequence[Sequence[int]], workers: int) -> Iterator[Tensor]:
        for group, x in zip(groups, self.of.grouped(groups, workers), strict=True):
            video = self.model.reconstruct(x)
            require_finite(video, [self.sources[number] for number in group])
            yield video.float().clamp(-1, 1)


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
    one = {file.suffix.lower(): file for file in map(first_of, files)}
    kinds = {suffix[1:]: codec_of(file) for suffix, file in sorted(one.items())}
    return ", ".join(f"{suffix} ({codec})" for suffix, codec in kinds.items() if codec not in LOSSLESS)


def first_of(file: Path) -> Path:
    """Of a folder its first picture, else the file itself."""
    return Path(pictures_of(file)[0]) if file.is_dir() else file


def decoders(files: Sequence[Path]) -> dict[str, str]:
    """The versions of what decodes these files: their pixels may be others with another one."""
    coded = [file for file in files if not arrays.is_array(file)]
    names = {name for file in coded for name in (("pillow",) if is_pictures(file) else ("av", "decord"))}
    return {name: version(name) for name in sorted(names)}


def codec_of(file: Path) -> str:
    """Name of the codec of a video, of pictures and arrays their suffix."""
    if is_pictures(file) or arrays.is_array(file):
        return file.suffix[1:].lower()
    with av.open(str(file.resolve())) as container:
        return container.streams.video[0].codec_context.name


def rate_of(root: Path, row: IndexRow) -> float | None:
    """The frames a second of a video; None where nobody says (pictures, arrays without a .json)."""
    path = root / row.path
    if is_pictures(path):
        return None
    return arrays.rate_of(path) if arrays.is_array(path) else row.fps


def require_finite(video: Tensor, sources: Sequence[str]) -> None:
    """Refuses what a VAE made of clips (B, 3, T, H, W), of `sources`, where it is not finite."""
    odd = (~video.isfinite()).any(dim=4).any(dim=3).any(dim=1).nonzero()
    if len(odd):
        clip, frame = odd[0].tolist()
        raise UserError(f"{sources[clip]}: the VAE makes NaN or infinity of its clip, in frame {frame}")


def require_length(source: str, there: int, frames: int, stride: int) -> None:
    """Refuses a sample that is shorter than what is compared, and a stride that leaves one frame of it."""
    if stride > 1 and frames == 1:
        raise UserError(f"stride_fake={stride}: of the {there} frames of {source} one is left; take a smaller one")
    if there < (frames - 1) * stride + 1:
        at = f" at stride_fake={stride}" if stride > 1 else ""
        raise UserError(f"samples: {source} has {there} frames, the protocol takes {frames}{at}; set frames")


def digest(videos: VideoSet) -> str:
    """Hex digest of all that the pixels of a set depend on, the content of its files among it."""
    return hashlib.sha256(json.dumps(videos.key(range(videos.count))).encode()).hexdigest()[:16]
