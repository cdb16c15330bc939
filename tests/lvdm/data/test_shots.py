"""Shot boundaries: found at joins of clips, and nowhere else."""

import numpy as np
import torch

from lvdm.data.reader import iter_frames
from lvdm.data.samples import sample_videos
from lvdm.data.shots import CUT, THUMBNAIL, _changes, _distance, find_cuts


def test_find_cuts_joins_and_flashes():
    clips = [
        np.stack(list(iter_frames(sample_videos() / name, THUMBNAIL))) for name in ("bikes.mp4", "bigbuckbunny.mp4")
    ]
    a, b = clips[0][30:76], clips[1]
    assert find_cuts(np.concatenate([a[:9], b[:20], a[20:30], b[60:]])) == [9, 29, 39]
    flash = b.copy()
    flash[20], flash[50:52] = 255, 0
    assert find_cuts(flash) == []
    assert find_cuts(b[:1]) == []
    # motion so fast that every frame is another picture
    blocks = np.random.default_rng(0).integers(0, 256, (40, 3, 4, 3), np.uint8)
    assert find_cuts(blocks.repeat(6, 1).repeat(8, 2)) == []


def test_the_plain_difference_leaves_out_no_change():
    """Which is what makes looking fast."""
    numbers = np.random.default_rng(0)
    blocks = numbers.integers(0, 256, (300, 3, 3, 4), np.uint8).repeat(6, 2).repeat(8, 3)
    blocks = blocks * np.linspace(0, 1, 300)[:, None, None, None]  # so that differences lie on both sides of CUT
    frames = torch.from_numpy(blocks.astype(np.uint8))
    far = (torch.nonzero(_distance(frames[:-1], frames[1:]) > CUT).flatten() + 1).tolist()
    assert _changes(frames) == far and 50 < len(far) < 280
    assert _changes(frames[:1]) == _changes(frames[:0]) == []
