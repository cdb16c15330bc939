import sys
from types import SimpleNamespace

import pytest
import torch

from lvdm.errors import UserError
from lvdm.metrics.flow import raft, warping_error
from lvdm.rng import generator


def moving(step: int, frames: int = 4, size: int = 24) -> torch.Tensor:
    """A texture that moves `step` pixels to the right each frame, round the border."""
    texture = torch.rand(1, 3, size, size, generator=generator(0)) * 2 - 1
    return torch.stack([texture.roll(step * t, 3) for t in range(frames)], 2)


def known(step: int):
    """The flow of `moving`: forwards for a pair in order, backwards for one that is not."""

    def flow(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        forwards = torch.allclose(b, a.roll(step, 3))
        return torch.tensor([step if forwards else -step, 0.0]).view(1, 2, 1, 1).expand(len(a), 2, *a.shape[2:])

    return flow


@pytest.mark.parametrize("step", [0, 2, -3])
def test_what_moves_with_the_flow_has_no_error(step):
    """What leaves the frame, and comes in on the other side, is not seen twice."""
    error = warping_error(moving(step), moving(step), known(step))
    assert error.shape == (1, 3) and error.dtype == torch.float64
    torch.testing.assert_close(error, torch.zeros(1, 3, dtype=torch.float64), atol=1e-10, rtol=0)
    assert warping_error(moving(step), moving(step + 1), known(step)).min() > 0.01


def test_a_frame_that_flashes_counts_twice_and_by_its_square():
    x = moving(0).double()
    y = 0.5 * x
    y[:, :, 1] += 0.2  # 0.1 on the scale [0, 1]
    expected = torch.tensor([[0.01, 0.01, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(warping_error(x, y, known(0)), expected, atol=1e-8, rtol=0)


def test_pixels_that_are_seen_once_do_not_count():
    def inconsistent(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        flow = torch.zeros(len(a), 2, *a.shape[2:])
        flow[:, :, :, 12:] = 3  # the same in both directions: nothing comes back
        return flow

    x = moving(0)
    y = x.clone()
    y[:, :, 1, :, 16:] = -y[:, :, 1, :, 16:]
    assert warping_error(x, y, inconsistent).abs().max() < 1e-10
    assert warping_error(x, y, known(0))[0, 0] > 0.01


def test_raft_is_asked_for_by_path(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision.models.optical_flow", None)
    with pytest.raises(UserError, match=r"needs torchvision .* pip install 'lvdm\[timm\]'"):
        raft(str(tmp_path / "raft.pth"))
    monkeypatch.setitem(
        sys.modules, "torchvision.models.optical_flow", SimpleNamespace(raft_large=None, raft_small=None)
    )
    with pytest.raises(UserError, match=r"raft_large_\*\.pth, whose name ends in the beginning of its sha256"):
        raft(str(tmp_path / "raft.pth"))


def test_raft_reads_its_own_weights_only(tmp_path):
    try:
        from torchvision.models.optical_flow import raft_small
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision: {error}")
    path = tmp_path / "raft.pth"
    with pytest.raises(UserError, match="no such file"):
        raft(str(path))
    torch.save(raft_small().state_dict(), path)
    x = moving(1, frames=2, size=40)[:, :, 0]
    assert raft(str(path))(x, x).shape == (1, 2, 40, 40)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not a RAFT of torchvision"):
        raft(str(path))
