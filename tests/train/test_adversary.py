"""The adversary: what it judges is frozen, what it learns from is detached, and its steps are of all micro-batches."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lvdm import accelerator as accelerators
from lvdm.accelerator import make_accelerator
from lvdm.meter import Meter
from train.adversary import Adversary
from train.configs import TrainVAE
from train.loop import LossGuard
from vae import losses
from vae.losses import Rendered


@pytest.fixture
def scene():
    """An adversary, and a renderer of one layer with its rendering of two clips."""
    torch.manual_seed(0)
    accelerator, config = make_accelerator("fp32"), TrainVAE(discriminator_width=8, accumulate=2, non_finite="skip")
    guard, layer = LossGuard(config, SimpleNamespace(latest=lambda: 0), accelerator), nn.Conv3d(3, 3, 1)
    adversary = Adversary(config, accelerator, layer.weight, guard, Meter(accelerator))
    x = torch.rand(2, 3, 5, 16, 16, device=accelerator.device) * 2 - 1
    empty = torch.zeros(0)
    yield adversary, Rendered(x, layer.to(x.device)(x), empty, empty, empty, [0, 1], 0), layer
    accelerators.close(accelerator)


def test_it_opposes_without_a_gradient_of_its_own(scene):
    adversary, rendered, layer = scene
    reconstruction = losses.l1(rendered.x, rendered.y)
    opposition, terms = adversary.oppose(rendered, reconstruction)
    g = -adversary.critic(rendered.y).mean()
    torch.testing.assert_close(terms["g"], g)
    weight = losses.adaptive_weight(reconstruction, g, layer.weight, 3 * 16 * 16)
    torch.testing.assert_close(terms["adaptive"], weight * 3 * 16 * 16)
    torch.testing.assert_close(opposition, 0.5 * weight * g)
    opposition.backward()
    assert layer.weight.grad.abs().max() > 0 and all(p.grad is None for p in adversary.critic.parameters())


def test_it_learns_from_detached_renderings(scene):
    adversary, rendered, layer = scene
    seen = []
    adversary.critic.register_forward_pre_hook(lambda _, given: seen.append(given[0].requires_grad))
    adversary.learn(rendered)
    assert seen == [False, False] and layer.weight.grad is None
    assert all(p.grad.abs().max() > 0 for p in adversary.critic.parameters() if p.ndim > 1)


def test_its_step_is_of_all_micro_batches(scene):
    adversary, rendered, _ = scene
    adversary.learn(rendered)
    (loss,) = adversary.learnt
    once = [p.grad.clone() for p in adversary.critic.parameters()]
    adversary.learn(rendered)
    for gradient, p in zip(once, adversary.critic.parameters(), strict=True):
        torch.testing.assert_close(p.grad, 2 * gradient)  # each half of the mean
    before = [p.detach().clone() for p in adversary.critic.parameters()]
    adversary.step(1e-3, 0, [])
    for old, p in zip(before, adversary.critic.parameters(), strict=True):
        if p.ndim > 1:
            assert (p - old).abs().max().item() == pytest.approx(1e-3, rel=1e-2)  # Adam's first step is the rate
        assert p.grad is None
    adversary.meter.step()
    read = adversary.meter.read()
    assert set(read) == {"d", "grad_d"} and read["d"] == pytest.approx(loss.item())


def test_it_stays_where_nothing_was_learnt_or_the_gradient_is_not_finite(scene):
    adversary, rendered, _ = scene
    before = {name: tensor.clone() for name, tensor in adversary.critic.state_dict().items()}
    adversary.step(1e-3, 0, [])
    assert adversary.guard.skipped == 0
    rendered.y.data[0, 0, 0, 0, 0] = torch.nan
    adversary.learn(rendered)
    adversary.step(1e-3, 2, ["a.mp4@3"])
    adversary.meter.step()
    assert not adversary.meter.read() and not adversary.learnt
    assert adversary.guard.skipped == 1 and not adversary.optimizer.state
    assert all(torch.equal(tensor, before[name]) for name, tensor in adversary.critic.state_dict().items())
