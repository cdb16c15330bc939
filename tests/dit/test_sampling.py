"""`draw` gives the sampler's latents for a model, its condition and its generators; guidance where it makes sense."""

import pytest
import torch

import dit
from dit.conditioning import Condition
from dit.sampling import draw, guidance_of
from lvdm.errors import UserError
from lvdm.rng import generator
from lvdm.samplers import guided, make_scheduler, sample

SHAPE = (4, 2, 4, 4)
SIZE = {"in_channels": 4, "frames": 2, "size": (4, 4), "depth": 2, "width": 32, "heads": 2}
CLASSES = {"condition": "class", "num_classes": 3}


def latte(**options):
    torch.manual_seed(0)
    model = dit.build("latte-s/2", **{**SIZE, **options}).eval()
    for parameter in model.parameters():  # a fresh one predicts zero, whatever its input
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def generators(count):
    return [generator(0, "sample", i) for i in range(count)]


@pytest.mark.parametrize(
    "objective, sampler", [("noise", "ddpm"), ("noise", "ddim"), ("noise", "dpm++"), ("flow", "euler")]
)
def test_latents_are_those_of_the_sampler(objective, sampler):
    model = latte(objective=objective, learn_sigma=objective == "noise", **CLASSES)
    condition, done = Condition.of_classes([0, 2], 3), []
    got = draw(model, condition, generators(2), make_scheduler(objective, sampler), 4, 3.0, lambda i, x: done.append(i))
    denoise = guided(model, condition, 3.0)
    assert torch.equal(got, sample(denoise, make_scheduler(objective, sampler), SHAPE, 4, generators(2)))
    assert got.dtype == torch.float32 and got.shape == (2, *SHAPE) and done == [1, 2, 3, 4]


def test_an_unconditional_model_ignores_guidance_and_is_asked_once_a_step():
    model, scheduler = latte(), make_scheduler("noise")
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    one, seven = (draw(model, Condition(), generators(2), scheduler, 3, scale) for scale in (1.0, 7.0))
    assert torch.equal(one, seven) and len(calls) == 6


def test_class_and_guidance_matter():
    model, scheduler = latte(**CLASSES), make_scheduler("noise")
    drawn = [
        draw(model, Condition.of_classes([label], 3), generators(1), scheduler, 3, scale)
        for label, scale in ((0, 1.0), (1, 1.0), (0, 4.0))
    ]
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in ((drawn[0], drawn[1]), (drawn[0], drawn[2])))


def test_a_model_in_bfloat16_is_drawn_from_in_float32():
    got = draw(
        latte(**CLASSES).to(torch.bfloat16), Condition.of_classes([0], 3), generators(1), make_scheduler("noise"), 2
    )
    assert got.dtype == torch.float32 and got.isfinite().all()


def test_guidance_is_7_with_a_null_class_and_1_without():
    plain, null, none = latte(), latte(**CLASSES), latte(label_dropout=0.0, **CLASSES)
    assert [guidance_of(model) for model in (plain, null, none)] == [1.0, 7.0, 1.0]
    assert [guidance_of(model, 1) for model in (plain, null, none)] == [1.0, 1.0, 1.0]
    assert guidance_of(null, 0) == 0.0 and guidance_of(null, 2.5) == 2.5


@pytest.mark.parametrize(
    "options, scale, message",
    [
        ({}, 7.0, r"guidance=7.0: this transformer is unconditional; use guidance=1"),
        ({"label_dropout": 0.0, **CLASSES}, 0.0, r"has no null class \(label_dropout=0\)"),
        (CLASSES, -1.0, "guidance=-1.0: expected at least 0"),
    ],
)
def test_guidance_that_cannot_be_is_refused(options, scale, message):
    with pytest.raises(UserError, match=message):
        guidance_of(latte(**options), scale)
