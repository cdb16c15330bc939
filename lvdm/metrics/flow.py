"""Warping error: whether what moves in a video keeps its look, by the optical flow of the original."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lvdm.errors import UserError
from lvdm.metrics.frames import require_pair
from lvdm.torchfile import differences, read_tree
from lvdm.weights import sha256_of

Flow = Callable[[Tensor, Tensor], Tensor]
"""Frames (N, 3, H, W) twice, in [-1, 1], to where each pixel of the first is in the second: (N, 2, H, W), (x, y)."""


def warping_error(x: Tensor, y: Tensor, flow: Flow) -> Tensor:
    """How far each frame of y is from the next one moved back by the flow of x: (B, 3, T, H, W) twice to (B, T-1).

    The mean squared difference on the scale [0, 1] over the pixels that are seen in both frames (Lai et al. 2018,
    arXiv:1808.00449; occlusions by forward-backward consistency, Ruder et al. 2016). `x` is the original; that of y = x
    is the error of the flow itself. 0 where no pixel is seen twice. fp64.
    """
    require_pair(x, y)
    (a, b), (before, after) = _neighbours(x), _neighbours(y)
    forward, backward = flow(a, b), flow(b, a)
    seen = _seen(forward, _warped(backward, forward)).double()
    error = ((_warped(after, forward) - before).double() / 2).square().mean(1)
    return ((error * seen).sum((1, 2)) / seen.sum((1, 2)).clamp(min=1)).unflatten(0, (len(x), -1))


def _neighbours(video: Tensor) -> tuple[Tensor, Tensor]:
    """The frames but the last, and those after them: (B * (T-1), 3, H, W) each."""
    return tuple(video.float()[:, :, part].transpose(1, 2).flatten(0, 1) for part in (slice(-1), slice(1, None)))


def _places(flow: Tensor) -> Tensor:
    """(N, H, W, 2): each pixel's place plus its flow, from -1 to 1 within the frame."""
    h, w = flow.shape[-2:]
    place = torch.stack(torch.meshgrid(torch.arange(w), torch.arange(h), indexing="xy")).to(flow) + flow
    size = torch.tensor([w, h]).to(flow).view(2, 1, 1)
    return ((2 * place + 1) / size - 1).movedim(1, -1)


def _warped(images: Tensor, flow: Tensor) -> Tensor:
    """Images (N, C, H, W) read at each pixel's place plus its flow."""
    return F.grid_sample(images, _places(flow), mode="bilinear", padding_mode="border", align_corners=False)


def _seen(forward: Tensor, back: Tensor) -> Tensor:
    """(N, H, W): pixels that stay within the frame, and whose flow there and `back` cancel."""
    gap = (forward + back).square().sum(1)
    cancel = gap < 0.01 * (forward.square().sum(1) + back.square().sum(1)) + 0.5
    return cancel & (_places(forward).abs() <= 1).all(-1)


def raft(path: str, device: torch.device | str = "cpu") -> Flow:
    """RAFT (Teed and Deng 2020) of torchvision with the state dict in `path`, small or large by its keys.

    UserError without torchvision and for a file that is none of the two.
    """
    try:
        from torchvision.models.optical_flow import raft_large, raft_small
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch
        raise UserError(f"the warping error needs torchvision ({error}): pip install 'lvdm[timm]'") from None
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(
            f"{path}: no such file; expected torchvision's raft_small_*.pth or raft_large_*.pth, whose name ends in the"
            " beginning of its sha256"
        )
    state = read_tree(file)
    model = (raft_small if "mask_predictor.convrelu.0.weight" not in state else raft_large)()
    shapes = [{key: tuple(value.shape) for key, value in tree.items()} for tree in (state, model.state_dict())]
    if wrong := differences(*shapes):
        raise UserError(f"{path}: not a RAFT of torchvision: {wrong}")
    model.load_state_dict(state)
    model.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def flow(a: Tensor, b: Tensor) -> Tensor:
        height, width = a.shape[-2:]
        pairs = zip(*(_padded(frames.to(device)).split(1) for frames in (a, b)), strict=True)
        return torch.cat([model(*pair)[-1] for pair in pairs])[..., :height, :width].to(a.device)

    return flow


class WarpingError:
    """The warping error of clips by RAFT, called as `lvdm.metrics.lpips.LPIPS` is."""

    name = "raft"

    def __init__(self, path: str, device: torch.device | str = "cpu"):
        self.flow = raft(path, device)
        self.weights_sha256 = sha256_of(Path(path).expanduser())

    def video(self, x: Tensor, y: Tensor) -> Tensor:
        """(B, 3, T, H, W) twice, in [-1, 1], the original first, to (B, T-1) fp64."""
        return warping_error(x, y, self.flow)


def _padded(frames: Tensor) -> Tensor:
    """(N, 3, H, W) as RAFT takes them: sides of at least 128 that 8 divides."""
    h, w = frames.shape[-2:]
    return F.pad(frames, (0, max(128 - w, -w % 8), 0, max(128 - h, -h % 8)), mode="replicate")
