"""Batches by sample number over processes and accumulation, phases, rates, the guard of the loss, and steps."""

import math
from types import SimpleNamespace

import pytest
import torch

from lvdm import accelerator as accelerators
from lvdm.accelerator import make_accelerator
from lvdm.errors import UserError
from train.configs import Phase, Training
from train.loop import Descent, LossGuard, adam, crossed, learning_rate, micro_batches, phases_left, set_rate
from train.vae import frames_shown, posterior_noise


def process(rank: int = 0, world: int = 1) -> SimpleNamespace:
    """What the loop asks of an accelerator, of process `rank` of `world`."""
    return SimpleNamespace(process_index=rank, num_processes=world, device=torch.device("cpu"), gather=lambda x: x)


def samples_of(
    start: int, stop: int, batch: int, accumulate: int = 1, rank: int = 0, world: int = 1
) -> list[list[int]]:
    """The samples of each micro-batch of a process; the item of sample i is 10 i."""
    config = Training(phases=[Phase(samples=batch, batch=batch)], accumulate=accumulate)
    config.workers = 0
    batches = list(micro_batches(lambda i: 10 * i, list, start, stop, batch, config, process(rank, world)))
    assert all(item == 10 * sample for items in batches for sample, item in items)
    return [[sample for sample, _ in items] for items in batches]


# ----------------------------------------------------------------------------------------------------------------------
# Batches


def test_one_process_sees_all_samples_in_order():
    assert samples_of(12, 24, batch=4) == [[12, 13, 14, 15], [16, 17, 18, 19], [20, 21, 22, 23]]


@pytest.mark.parametrize("accumulate, world", [(1, 2), (2, 1), (2, 2), (4, 2), (1, 8)])
def test_steps_are_shared_without_gap_or_overlap(accumulate, world):
    shares = [samples_of(16, 40, 8, accumulate, rank, world) for rank in range(world)]
    assert {len(share) for share in shares} == {3 * accumulate}
    for step in range(3):
        in_step = [share[step * accumulate : (step + 1) * accumulate] for share in shares]
        sizes = {len(micro) for of_process in in_step for micro in of_process}
        seen = sorted(sample for of_process in in_step for micro in of_process for sample in micro)
        assert sizes == {8 // accumulate // world} and seen == list(range(16 + 8 * step, 24 + 8 * step))


def test_no_samples_left_is_no_batch():
    assert samples_of(8, 8, batch=4) == []


# ----------------------------------------------------------------------------------------------------------------------
# Phases and rates

PHASES = [Phase(samples=8, batch=2, lr=1.0), Phase(samples=12, batch=4, lr=0.5)]


@pytest.mark.parametrize(
    "seen, left",
    [
        (0, [(0, 0, 8), (1, 8, 20)]),
        (6, [(0, 6, 8), (1, 8, 20)]),
        (8, [(1, 8, 20)]),
        (12, [(1, 12, 20)]),
        (20, []),
    ],
)
def test_phases_left(seen, left):
    assert list(phases_left(PHASES, "ab", seen)) == [(PHASES[i], "ab"[i], start, end) for i, start, end in left]


def test_rate_rises_linearly_and_then_is_the_phase_s():
    config = Training(phases=PHASES, warmup=8)
    assert [learning_rate(config, PHASES[0], seen) for seen in (0, 2, 4, 6)] == [0.25, 0.5, 0.75, 1.0]
    assert [learning_rate(config, PHASES[1], seen) for seen in (8, 16)] == [0.5, 0.5]
    config = Training(phases=PHASES, warmup=16)  # over the border of the phases
    assert learning_rate(config, PHASES[1], 8) == 0.5 * 12 / 16
    assert learning_rate(Training(phases=PHASES), PHASES[0], 0) == 1.0


def test_cosine_falls_from_the_warmed_up_rate_to_the_final_one():
    config = Training(phases=PHASES, warmup=4, schedule="cosine", final_lr=0.1)  # 16 of 20 samples after the warm-up
    rates = [learning_rate(config, PHASES[0], seen) for seen in (0, 2, 4, 6)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[3] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 2 / 16)) / 2)
    half, late = (learning_rate(config, PHASES[1], seen) for seen in (12, 16))
    assert half == pytest.approx(0.1 + 0.4 / 2)  # from that phase's own rate
    assert late == pytest.approx(0.1 + 0.4 * (1 - math.cos(math.pi / 4)) / 2)
    assert learning_rate(config, PHASES[1], 20) == pytest.approx(0.1)
    assert learning_rate(config, PHASES[1], 12, peak=2.1) == pytest.approx(1.1)
    with pytest.raises(UserError, match="schedule='linear': expected one of constant, cosine"):
        Training(schedule="linear")


def test_first_step_of_adam_is_the_rate():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    optimizer = adam([weight], Training(beta1=0.8, beta2=0.9, weight_decay=0.1))
    weight.grad = torch.tensor([5.0, -0.01, 0.0])
    optimizer.step()
    assert weight.tolist() == [1.0, 2.0, 3.0]  # the rate is 0 until it is set
    optimizer = adam([weight], Training(beta1=0.8, beta2=0.9, weight_decay=0.1))
    set_rate(optimizer, 0.5)
    optimizer.step()
    decayed = torch.tensor([1.0, 2.0, 3.0]) * (1 - 0.5 * 0.1)
    assert torch.allclose(weight, decayed - 0.5 * torch.tensor([1.0, -1.0, 0.0]), atol=1e-5)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


# ----------------------------------------------------------------------------------------------------------------------
# Draws of the VAE's training


def test_posterior_noise_is_a_function_of_the_sample():
    whole = posterior_noise(0, [3, 4, 5, 6], (4, 2, 3, 3))
    assert whole.shape == (4, 4, 2, 3, 3)
    assert torch.equal(whole[1:3], posterior_noise(0, [4, 5], (4, 2, 3, 3)))
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole, posterior_noise(1, [3, 4, 5, 6], (4, 2, 3, 3)))


def test_frames_shown_are_distinct_sorted_and_drawn_anew():
    assert frames_shown(0, 0, count=0, frames=5) is None and frames_shown(0, 0, count=5, frames=5) is None
    draws = [tuple(frames_shown(0, seen, count=2, frames=5).tolist()) for seen in range(200)]
    assert all(0 <= a < b < 5 for a, b in draws) and len(set(draws)) == 10
    assert draws[7] == tuple(frames_shown(0, 7, count=2, frames=5).tolist())


# ----------------------------------------------------------------------------------------------------------------------
# The guard

GOOD, BAD = torch.tensor(1.0), torch.tensor(float("nan"))


def guard(samples: int = 0, accelerator=None, **keys) -> LossGuard:
    return LossGuard(Training(**keys), SimpleNamespace(latest=lambda: samples), accelerator or process())


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_guard_stops_and_names_what_led_to_it(loss):
    with pytest.raises(UserError) as error:
        guard(samples=640).accepts(torch.tensor(loss), 768, ["a.mp4@3", "b.mp4@7"])
    message = str(error.value)
    assert "not finite at sample 768 (clips: a.mp4@3, b.mp4@7)" in message and "checkpoint is at 640 samples" in message
    with pytest.raises(UserError, match="no checkpoint was written yet"):
        guard().accepts(BAD, 0, [])


def test_guard_skips_and_counts_up_to_twenty_in_a_row():
    skipping = guard(non_finite="skip")
    assert skipping.accepts(GOOD, 0, []) and not skipping.accepts(BAD, 1, [])
    for _ in range(18):
        assert not skipping.accepts(BAD, 2, [])
    assert skipping.accepts(GOOD, 3, []) and skipping.skipped == 19
    for _ in range(19):
        assert not skipping.accepts(BAD, 4, [])
    with pytest.raises(UserError, match="not finite at sample 5"):
        skipping.accepts(BAD, 5, [])


def test_guard_counts_networks_apart():
    skipping, of = guard(non_finite="skip"), "gradient of the adversary"
    for _ in range(19):
        assert not skipping.accepts_gradient(math.nan, 0, [], of) and skipping.accepts_gradient(1.0, 0, [])
    with pytest.raises(UserError, match="the gradient of the adversary is not finite at sample 6"):
        skipping.accepts_gradient(math.inf, 6, [], of)


@pytest.mark.parametrize("non_finite", ["stop", "skip"])
def test_fp16_finds_its_scale_but_not_for_ever(non_finite):
    searching = guard(precision="fp16", non_finite=non_finite)
    for _ in range(99):
        assert not searching.accepts_gradient(math.inf, 0, [])
    assert searching.accepts_gradient(1.0, 0, [])
    for _ in range(99):
        assert not searching.accepts_gradient(math.nan, 0, [])
    with pytest.raises(UserError, match="the gradient is not finite at sample 8"):
        searching.accepts_gradient(math.inf, 8, [])


def test_guard_heeds_every_process():
    elsewhere = process()
    elsewhere.gather = lambda here: torch.cat([here, torch.tensor([False])])
    assert not guard(accelerator=elsewhere, non_finite="skip").accepts(GOOD, 0, [])


def test_thresholds_are_crossed_once_whatever_the_batch():
    assert [seen for seen in range(3, 31, 3) if crossed(seen, 3, 10)] == [12, 21, 30]
    assert all(crossed(seen, 3, 1) for seen in range(3, 31, 3))


# ----------------------------------------------------------------------------------------------------------------------
# Steps


@pytest.mark.parametrize(
    "losses, moved",
    [((3.0, 5.0), -4.0), ((math.nan, 5.0), -2.5), ((3.0, math.nan), -1.5), ((math.nan, math.inf), None)],
)
def test_a_micro_batch_that_is_not_finite_leaves_the_others_of_its_step(losses, moved):
    accelerator = make_accelerator("fp32", accumulate=2)
    layer = torch.nn.Linear(1, 1, bias=False)
    before = layer.weight.item()
    model, optimizer = accelerator.prepare(layer, torch.optim.SGD(layer.parameters(), lr=1.0))
    descent = Descent(accelerator, model, optimizer, guard(accelerator=accelerator, non_finite="skip"))
    norms = []
    for loss in losses:
        with accelerator.accumulate(model):
            factor = torch.full((1, 1), loss)
            accepted, norm = descent.take(model(factor).sum(), 0, [])
            assert accepted == math.isfinite(loss)
            norms.append(norm)
    assert norms == [None, None if moved is None else pytest.approx(-moved)]
    assert layer.weight.item() == pytest.approx(before + (moved or 0.0))
    accelerators.close(accelerator)
