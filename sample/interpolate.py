"""A video at twice its frame rate (`lvdm interpolate`), as a stream: E sees every frame, D2 draws those between."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import vae
from lvdm import rife
from lvdm.accelerator import device, native_precision
from lvdm.cli import program
from lvdm.data.reader import probe
from lvdm.data.stream import read_pieces
from lvdm.errors import UserError
from lvdm.media import to_uint8, write_mp4
from lvdm.metrics.lpips import LPIPS
from lvdm.progress import bar
from sample.configs import Interpolate
from sample.measure.scores import score
from sample.reconstruct import output, reconstruct
from vae.base import VideoVAE

T = TypeVar("T")

METRICS = {"PSNR": "{:.2f} dB", "SSIM": "{:.4f}", "LPIPS": "(alex) {:.4f}"}


def run(config: Interpolate) -> Path:
    """Writes the video at twice its frame rate and, beside it, the comparison that was asked for."""
    source = Source.of(config)
    config = replace(config, out=config.out or f"{Path(config.video).stem}-2x.mp4")
    path = output(config)
    beside = output(replace(config, out=str(path.with_name(f"{path.stem}-compare.mp4")))) if config.compare else None
    model = vae.load(config.vae).to(device())
    if not model.spec.refines:
        raise UserError(f"vae={config.vae} has no refinement decoder to draw frames: train one (lvdm train refine)")
    model.enable_tiling(config.tile, frames=config.tile_frames)
    if note := model.approximation(source.count):
        print(note)

    judge = Judge(source) if config.every_second else None
    pieces = interpolate(
        model, source.pieces(), source.count, config.keep_originals, config.tile_frames, precision(config, model.device)
    )
    frames = judge.watch("D2", singly(pieces)) if judge else singly(pieces)
    write_mp4(path, map(picture, counted("interpolate", source.rendered, frames)), source.fps)
    print(f"{path}: {source.rendered} frames at {source.fps:g} fps")
    if beside:
        columns = compared(path, source, judge)
        pictures = (side_by_side(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True))
        write_mp4(beside, counted("compare", source.rendered, pictures), source.fps)
        print(f"{beside}: {' | '.join(columns)}" + ("" if rife.available() else f" ({rife.MISSING})"))
    if judge:
        print(f"the {source.count - 1} frames between, against those that were dropped:\n{judge.table()}")
    return path


@dataclass(frozen=True)
class Source:
    """What the encoder sees of a video: `count` frames, every `stride`-th; `fps` is twice their rate."""

    video: str
    short_side: int
    stride: int
    count: int
    fps: float

    @classmethod
    def of(cls, config: Interpolate) -> "Source":
        """Of a video with frames to draw between, else a UserError."""
        if not Path(config.video).is_file():
            raise UserError(f"video={config.video}: no such file")
        info, stride = probe(config.video), 2 if config.every_second else 1
        frames = min(info.frames, config.max_frames or info.frames)
        count = (frames - 1) // stride + 1
        if count < 2:
            raise UserError(f"video={config.video}: expected a video of at least {stride + 1} frames, found {frames}")
        if info.vfr:
            print(f"{config.video}: the time between its frames varies; in the result it will not")
        return cls(config.video, config.short_side, stride, count, 2 * info.fps / stride)

    @property
    def rendered(self) -> int:
        return 2 * self.count - 1

    def pieces(self) -> Iterator[Tensor]:
        """(1, 3, t, H, W) in [-1, 1]."""
        return read_pieces(self.video, self.stride * (self.count - 1) + 1, self.short_side, self.stride)

    def whole(self) -> Iterator[Tensor]:
        """Where `stride` is 2: (1, 3, 1, H, W) of all frames, those dropped between the others."""
        return read_pieces(self.video, self.rendered, self.short_side, length=1)


# ---------------------------------------------------------------------------------------------------------------------
# Frames between


def interpolate(
    model: VideoVAE,
    video: Iterable[Tensor],
    count: int,
    keep_originals: bool = True,
    tile_frames: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Tensor]:
    """The 2 * count - 1 frames, in pieces (1, 3, t, H, W) in [-1, 1], of a video of `count` frames that comes in such.

    D2's at the odd places and, without `keep_originals`, at all. Any size and length; longer videos of models that do
    not stream go as `reconstruct` has it. Convolutions are in `dtype`.
    """
    position, pairs = 0, reconstruct(model, doubled(video, mean), 2 * count - 1, True, tile_frames)
    for x, y in each_in(lambda: torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32), pairs):
        y = y.float()
        if keep_originals:
            y[:, :, position % 2 :: 2] = x[:, :, position % 2 :: 2]
        position += y.shape[2]
        yield y


def each_in(context: Callable[[], AbstractContextManager], items: Iterable[T]) -> Iterator[T]:
    """`items`, each made within a `context()` that its user is not in."""
    items, end = iter(items), object()
    while True:
        with context():
            item = next(items, end)
        if item is end:
            return
        yield item


def precision(config: Interpolate, device: torch.device) -> torch.dtype:
    """Of the convolutions: what was asked for, or the fastest that the device computes in itself."""
    name = native_precision(device) if config.precision == "auto" else config.precision
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def doubled(video: Iterable[Tensor], between: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """A video that comes in pieces (B, 3, t, H, W), and between its frames what `between` makes of them.

    `between` takes n + 1 >= 2 successive frames and gives n.
    """
    last = None
    for piece in video:
        known = piece if last is None else torch.cat([last, piece], 2)
        frames = known.repeat_interleave(2, 2)[:, :, :-1]
        if known.shape[2] > 1:
            frames[:, :, 1::2] = between(known)
        yield frames if last is None else frames[:, :, 1:]
        last = piece[:, :, -1:]


def mean(video: Tensor) -> Tensor:
    """The linear blend of neighbours: (B, C, n + 1, H, W) to (B, C, n, H, W)."""
    return (video[:, :, :-1] + video[:, :, 1:]) / 2


def flow(video: Tensor) -> Tensor:
    """`mean` by RIFE."""
    return rife.middle_frames(video.to(device())).to(video)


# ---------------------------------------------------------------------------------------------------------------------
# Comparison


class Judge:
    """Scores of frames between, in streams of single frames, against those that were dropped."""

    def __init__(self, source: Source):
        self.source, self.lpips = source, LPIPS("alex").to(device())
        self.scores: dict[str, list[dict[str, Tensor]]] = {}

    def watch(self, name: str, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """`frames` as they come; the scores of every second one are kept under `name`."""
        self.scores[name] = []
        for i, (y, x) in enumerate(zip(frames, self.source.whole(), strict=True)):
            if i % 2:
                self.scores[name].append(score(x.to(device()), y.to(device()), self.lpips))
            yield y

    def table(self) -> str:
        """A line a stream: the means over its frames."""
        lines = []
        for name, scores in self.scores.items():
            means = {key: torch.cat([s[key] for s in scores], 1).mean().item() for key in METRICS}
            lines.append(f"  {name:<12}  {', '.join(f'{k} {METRICS[k].format(v)}' for k, v in means.items())}")
        return "\n".join(lines)


def compared(path: Path, source: Source, judge: Judge | None) -> dict[str, Iterator[Tensor]]:
    """The frames of every column, one by one; D2's are those written to `path`, which were judged before that."""
    peers = {"linear blend": singly(doubled(source.pieces(), mean))}
    if rife.available():
        peers["RIFE"] = singly(doubled(source.pieces(), flow))
    if judge:
        peers = {name: judge.watch(name, frames) for name, frames in peers.items()}
    ours = read_pieces(path, source.rendered, length=1)
    columns = {"linear blend": peers.pop("linear blend"), "D2": ours, **peers}
    return {"dropped": source.whole(), **columns} if judge else columns


def side_by_side(frames: Mapping[str, Tensor]) -> np.ndarray:
    """Frames (1, 3, 1, H, W) beside each other, each below its name: uint8 (H + head, columns * W, 3)."""
    pictures = {name: picture(frame) for name, frame in frames.items()}
    height, width = np.min([shown.shape[:2] for shown in pictures.values()], 0)  # an mp4 pads odd sizes
    head = max(16, height // 16)
    sheet = Image.new("RGB", (width * len(pictures), height + head), "white")
    for i, (name, shown) in enumerate(pictures.items()):
        draw = ImageDraw.Draw(sheet)
        draw.text((i * width + 4, 1), name, fill="black", font=ImageFont.load_default(0.7 * head))
        sheet.paste(Image.fromarray(shown[:height, :width]), (i * width, head))
    return np.asarray(sheet)


def singly(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """Pieces (B, C, t, H, W) frame by frame."""
    for piece in pieces:
        yield from piece.split(1, 2)


def picture(frame: Tensor) -> np.ndarray:
    """(1, 3, 1, H, W) in [-1, 1] to uint8 (H, W, 3)."""
    return to_uint8(frame[0, :, 0]).permute(1, 2, 0).cpu().numpy()


def counted(name: str, total: int, items: Iterable) -> Iterator:
    """The items, with a bar."""
    with bar(name, total) as progress:
        for item in items:
            yield item
            progress.advance()


def main(argv: list[str] | None = None) -> int:
    """`lvdm interpolate`."""
    return program(Interpolate, argv, run)


if __name__ == "__main__":
    sys.exit(main())
