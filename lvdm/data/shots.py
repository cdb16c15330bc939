"""Where the shots of a video begin, seen on thumbnails."""

import numpy as np
import torch
import torch.nn.functional as F

THUMBNAIL = (32, 18)  # width, height of what the detector sees
CUT = 13.0  # distance of two thumbnails, in levels of 255, from which they may be of different shots


def find_cuts(thumbnails: np.ndarray) -> list[int]:
    """The first frame of every new shot among `thumbnails`, uint8 (N, h, w, 3), about 32 pixels wide.

    Hard cuts only, no dissolves. The distance of two frames forgives motion of one thumbnail pixel (1/32 of the
    picture); a cut is a distance that is large, that stands out from its neighbours (fast motion does not), and that
    parts all frames just before from all just after (a flash does not).
    """
    frames = torch.from_numpy(thumbnails).permute(0, 3, 1, 2)
    cuts = []
    for i in _changes(frames):
        start, stop = max(1, i - 8), min(len(frames), i + 9)
        step = _distance(frames[start - 1 : stop - 1], frames[start:stop])  # step[k] leads to frame start + k
        here = i - start
        neighbours = torch.cat([step[:here], step[here + 1 :]])
        motion = neighbours.sort(descending=True).values[2:3].sum()  # two other cuts or flashes may be near
        before, after = frames[max(0, i - 3) : i], frames[i : i + 3]
        apart = min(_distance(before, frame.expand_as(before)).min() for frame in after)
        if step[here] > 3 * (motion + 1) and apart > CUT:
            cuts.append(i)
    return cuts


def _changes(frames: torch.Tensor) -> list[int]:
    """Frames far from the one before. The plain difference is a bound of the distance, and leaves few to look at."""
    pairs = zip(frames[:-1].split(4096), frames[1:].split(4096), strict=True)
    differences = [(b.short() - a.short()).abs().float().mean((1, 2, 3)) for a, b in pairs]
    changes = torch.nonzero(torch.cat(differences or [torch.zeros(0)]) > CUT).flatten() + 1
    return changes[_distance(frames[changes - 1], frames[changes]) > CUT].tolist()


def _distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean distance (levels of 255) of each pixel to the range of the 3x3 pixels around it in the other frame, the
    larger of both directions; uint8 (N, 3, h, w) twice -> (N,)."""
    a, b = a.float(), b.float()

    def outside(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        high, low = F.max_pool2d(y, 3, 1, 1), -F.max_pool2d(-y, 3, 1, 1)
        return ((x - high).clamp_min(0) + (low - x).clamp_min(0)).mean((1, 2, 3))

    return torch.maximum(outside(a, b), outside(b, a))
