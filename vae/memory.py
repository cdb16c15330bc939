"""How much memory a stream or a whole clip needs, and how many frames at a time fit into what is free."""

import copy
import ctypes
import json
import sys
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lvdm.errors import UserError
from vae.streams import Stream

if TYPE_CHECKING:
    from vae.base import VideoVAE

PIXELS = 2**19
"""Pixels of the largest picture that a piece has by default: 8 frames of 256x256, and one of more than 512x512."""
MOST, SMALL = 16, 2**16
"""Frames that a piece has at most, by default; pixels of a clip or piece that is run without asking for its memory."""
SHARE, OTHER_SHARE = {"cuda": 0.8, "cpu": 0.4}, 0.5
"""Of the free memory, what tensors may take: convolutions borrow some, on a CPU copies of their input and output."""
TILES = (512, 256)
"""Those that are tried to find one that fits; each takes a second or two to count."""
REMEMBERED = 64
"""Counts that are kept, those that were asked for last."""


def chunk_frames(model: "VideoVAE", work: str, x: Tensor) -> int:
    """Frames of the video for a stream to take at a time, for "encode" of a video like `x` (B, 3, t, H, W), or for
    "decode" or "refine" of latents: as many as pay, and fit into free memory.

    Raises a UserError where a single one does not fit, with what it needs and what would fit.
    """
    chunk = default_chunk(model, work, x)
    if chunk * _pixels(model, work, x) <= SMALL:
        return chunk
    room = _room(x.device)
    while (needed := stream_bytes(model, work, x, chunk)) > room:
        if chunk == 1:
            raise UserError(_too_large(model, work, x, needed, room))
        chunk //= 2
    return chunk


def default_chunk(model: "VideoVAE", work: str, x: Tensor) -> int:
    """Frames at a time where memory is no question."""
    chunk, pixels = MOST, _pixels(model, work, x)
    while chunk > 1 and chunk * pixels > PIXELS:
        chunk //= 2
    return chunk


def fits(model: "VideoVAE", work: str, x: Tensor) -> bool:
    """Whether free memory holds a whole clip `x` while it is encoded, or latents while they are decoded or refined."""
    frames = x.shape[2] if work == "encode" else model.spec.frames(x.shape[2])
    if x.is_meta or frames * _pixels(model, work, x) <= SMALL:  # what is on meta takes none, and may be being counted
        return True
    return whole_bytes(model, work, x) <= _room(x.device)


def stream_bytes(model: "VideoVAE", work: str, x: Tensor, chunk: int) -> int:
    """Bytes that tensors take at the peak of a stream of a video, or latents, of the size of `x`, weights not counted.
    What kernels borrow within themselves is not seen; all counts in the dtype of the model, too much under autocast.
    Of tiles one is counted, and for each of the others what its stream keeps between pieces."""
    f = model.spec.time_factor
    piece = max(f, chunk)
    steady = 1 + 2 * (piece if work == "encode" else piece // f)  # two pieces after the first frame

    def run(twin: "VideoVAE", like: Tensor) -> Stream:
        stream = Stream(twin._stages(work), chunk)
        deque(stream.push(like), maxlen=0)
        return stream

    tile, tiles = _tiles(model, work, x)
    most, held = _counted(model, (work, chunk), (*x.shape[:2], steady, *tile), run)
    return most + (tiles - 1) * held + (tiles > 1) * _canvas(model, work, x, piece)


def whole_bytes(model: "VideoVAE", work: str, x: Tensor) -> int:
    """The same of a whole clip without gradients."""

    def run(twin: "VideoVAE", like: Tensor) -> None:
        twin._tiled_moments(like) if work == "encode" else twin._tiled_frames(like, work)

    tile, tiles = _tiles(model, work, x)
    most, _ = _counted(model, (work,), (*x.shape[:3], *tile), run)
    frames = x.shape[2] if work == "encode" else model.spec.frames(x.shape[2])
    return most + (tiles > 1) * _canvas(model, work, x, frames)


def return_freed_memory() -> None:
    """Gives the system what glibc keeps of freed tensors. (To have it map tensors of 1 MiB one by one instead, by
    mallopt, made the training steps after it 1.65 times as long, and streams 1.2 times.)"""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still have on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(psutil.virtual_memory().available, _left_in_container())


# ---------------------------------------------------------------------------------------------------------------------
# Counting


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, and the most there were: `with PeakBytes() as count: ...`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._hold(leaf.untyped_storage())
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


_KNOWN: dict[tuple, tuple[int, int]] = {}


def _counted(model: "VideoVAE", work: tuple, shape: tuple, run: Callable) -> tuple[int, int]:
    """The peak of `run(twin, input)` of the model without its weights, and what the object that it returns holds.
    Counted once for each model and shape."""
    options = json.dumps(dict(model.options), sort_keys=True, default=str)
    key = (type(model), options, model.dtype, work, tuple(shape))
    if key not in _KNOWN:
        twin = without_weights(model)
        with torch.no_grad(), torch.autocast("cpu", enabled=False), PeakBytes() as peak:
            kept = run(twin, torch.empty(shape, dtype=model.dtype, device="meta"))
            _KNOWN[key] = peak.most, peak.now
            del kept
        if len(_KNOWN) > REMEMBERED:
            del _KNOWN[next(iter(_KNOWN))]
    _KNOWN[key] = _KNOWN.pop(key)  # the last one asked for is the last to go
    return _KNOWN[key]


def _tiles(model: "VideoVAE", work: str, x: Tensor) -> tuple[tuple[int, int], int]:
    """Height and width of a tile, as `x` counts them, and how many make a frame."""
    (height, width), tiling, factor = x.shape[-2:], model._tiling, model.spec.space_factor
    if not tiling or not tiling.size:
        return (height, width), 1
    side = tiling.size if work == "encode" else tiling.size // factor
    pixels = 1 if work == "encode" else factor
    return (min(height, side), min(width, side)), tiling.count(height * pixels, width * pixels, factor)


def _canvas(model: "VideoVAE", work: str, x: Tensor, frames: int) -> int:
    """Bytes of whole frames beside their tiles: what is cut, or the fp32 sum that is blended."""
    factor = 1 if work == "encode" else model.spec.space_factor
    return 4 * 3 * len(x) * frames * (2 if work == "refine" else 1) * x.shape[-2] * x.shape[-1] * factor**2


def without_weights(model: "VideoVAE") -> "VideoVAE":
    """A copy whose parameters and buffers are on the meta device: they have shapes and no values."""
    memo: dict[int, Any] = {id(p): torch.nn.Parameter(p.to("meta"), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo | {id(b): b.to("meta") for b in model.buffers()})


def _room(device: torch.device) -> float:
    return SHARE.get(device.type, OTHER_SHARE) * free_bytes(device)


def _pixels(model: "VideoVAE", work: str, x: Tensor) -> int:
    """Pixels of one frame of all videos of the batch; of a tile, where the frame is cut."""
    factor = 1 if work == "encode" else model.spec.space_factor
    height, width = (factor * side for side in x.shape[-2:])
    if model._tiling and model._tiling.size:
        height, width = min(height, model._tiling.size), min(width, model._tiling.size)
    return len(x) * height * width


def _left_in_container() -> float:
    """Bytes under the limit of the control group, if there is one; pages of files give way."""
    groups = Path("/sys/fs/cgroup")
    for folder, limit, used in (
        (groups, "memory.max", "memory.current"),
        (groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            held = int((folder / used).read_text()) - int(stat.get("inactive_file", 0))
            return int((folder / limit).read_text()) - held
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return float("inf")


def _too_large(model: "VideoVAE", work: str, x: Tensor, needed: float, room: float) -> str:
    """What to say of a device without enough memory for a single frame at a time."""
    factor = 1 if work == "encode" else model.spec.space_factor
    height, width = (factor * side for side in x.shape[-2:])
    fitting = []
    for size in TILES:
        if not model.least_tile <= size < max(height, width) or size % model.spec.space_factor:
            continue
        twin = without_weights(model)
        twin.enable_tiling(size, frames=0)
        if (tiled := stream_bytes(twin, work, x, 1)) <= room:
            fitting.append(f"tile={size} needs {_size(tiled)}")
            break
    if model.dtype == torch.float32:
        fitting.append(f"bf16 needs about {_size(needed / 2)}")
    return (
        f"{work} of {height}x{width} (height x width), batch {len(x)}: a single frame at a time needs"
        f" {_size(needed)} in {str(model.dtype).removeprefix('torch.')}, and {_size(max(0, room))} of {x.device.type}"
        " memory may be taken; " + ("; ".join(fitting) or "take smaller frames")
    )


def _size(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
