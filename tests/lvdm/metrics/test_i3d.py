import pytest
import torch

from lvdm.metrics.i3d import I3D, pad_same


@pytest.mark.parametrize(
    "size, kernel, stride, before, after",
    [(224, 7, 2, 2, 3), (15, 7, 2, 3, 3), (16, 3, 1, 1, 1), (112, 3, 2, 0, 1), (15, 2, 2, 0, 1), (16, 2, 2, 0, 0)],
)
def test_same_padding_is_tensorflows(size, kernel, stride, before, after):
    x = torch.ones(1, 1, size, 1, 1)
    padded = pad_same(x, (kernel, 1, 1), (stride, 1, 1)).flatten()
    assert padded.tolist() == [0] * before + [1] * size + [0] * after
    assert (len(padded) - kernel) // stride + 1 == -(-size // stride)


def test_padding_keeps_the_axes_apart():
    assert pad_same(torch.ones(1, 1, 4, 5, 6), (1, 3, 7), (1, 2, 2)).shape == (1, 1, 4, 7, 11)


def test_shapes_and_size():
    with torch.device("meta"):
        model = I3D()
        for frames in (9, 16, 33):
            assert model(torch.empty(2, 3, frames, 224, 224)).shape == (2, 400)
    # the original's 12,697,264, less one value for each of the 7,280 channels whose norm is folded
    assert sum(parameter.numel() for parameter in model.parameters()) == 12_697_264 - 7_280
