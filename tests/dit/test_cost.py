"""What a sample costs: the products that the equations ask for, whatever kernel the model runs with."""

import pytest
import torch

from dit.conditioning import Condition
from dit.cost import sample_cost
from dit.latte import Latte
from lvdm import cost

SHAPE = {"in_channels": 4, "frames": 3, "size": (4, 8), "patch": 2, "depth": 4, "width": 24, "heads": 3}
CLASSES = {"condition": "class", "num_classes": 5}


def products(images: int) -> int:
    """FLOPs of all products of a video of 3 frames of 2x4 tokens and of the images behind it, a term a layer."""
    d, n, t = 24, 8, 3
    of_tokens = 2 * (16 * d + 32 * d)  # the patch, in and out
    block = 2 * 12 * d * d  # qkv, out, and twice the MLP
    vector = 2 * (256 * d + d * d + 2 * d * d)  # the timestep's MLP and the modulation of the head
    modulation = 2 * 6 * d * d
    video = vector + 4 * modulation + t * n * (of_tokens + 4 * block + 2 * 4 * n * d + 2 * 4 * t * d)
    image = vector + 2 * modulation + n * (of_tokens + 2 * block + 2 * 4 * n * d)
    return video + images * image


@pytest.mark.parametrize("options", [{}, CLASSES], ids=["none", "class"])
@pytest.mark.parametrize("images", [0, 2])
def test_a_forward_pass_is_the_products_of_its_layers(images, options):
    assert sample_cost(Latte(**SHAPE, **options), images).flops == products(images)


def test_how_the_model_runs_changes_nothing():
    plain, ours = Latte(**SHAPE), Latte(**SHAPE)
    ours.set_attention_backend("math")
    ours.enable_gradient_checkpointing()
    ours.compile_repeated_blocks(backend=lambda *_: pytest.fail("what only counts is compiled"))
    assert sample_cost(ours, backward=True) == sample_cost(plain, backward=True)


def test_checkpointing_computes_blocks_again_and_keeps_less():
    model = Latte(**SHAPE, **CLASSES)
    plain, again = (sample_cost(model, 2, True, checkpointing) for checkpointing in (False, True))
    assert plain.flops == again.flops and plain.activation_bytes > 2 * again.activation_bytes
    blocks = products(2) - products_outside_of_blocks(2)
    assert again.backward_flops - plain.backward_flops == pytest.approx(blocks, rel=0.2)  # products again, not norms


def products_outside_of_blocks(images: int) -> int:
    """Of these: the patches, the timestep's MLP and the head."""
    d, n, t = 24, 8, 3
    return (1 + images) * 2 * (256 * d + 3 * d * d) + (t + images) * n * 2 * 48 * d


def test_it_is_what_the_model_itself_counts():
    with torch.device("meta"):
        model = Latte(**SHAPE, **CLASSES)
        x, t, condition = torch.empty(1, 4, 3, 4, 8), torch.zeros(1), Condition(torch.zeros(1, dtype=torch.int64))
        expected = cost.forward_cost(lambda: model(x, t, condition), backward=True)
    assert sample_cost(Latte(**SHAPE, **CLASSES), backward=True) == expected
