"""On a CUDA device: the transformer against the CPU, and the speed and memory of its training step."""

import pytest
import torch

from dit.conditioning import Condition
from lvdm.accelerator import device
from lvdm.bench import time_all
from sample.bench import dit as bench_dit
from sample.bench.configs import BenchDiT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

H200 = "H200" in torch.cuda.get_device_name() if torch.cuda.is_available() else False
OFFICIAL = [(8, 16, 0.3206, 57.7), (16, 5, 0.253, 40.4), (4, 21, 0.220, 43.5)]
"""Batch, latent frames, seconds and peak GiB of a step of the official Latte-XL/2 on one H200 (bf16, 32x32x4)."""


@pytest.mark.parametrize("compiled", [False, True])
def test_equals_the_cpu(compiled):
    device()  # fp32 means fp32
    config = BenchDiT(model="latte-s/2", batch=2, frames=5, size=[16, 16], precision="fp32")
    model = bench_dit.build(config, "eager", torch.device("cpu")).eval()
    x, t, labels = torch.randn(2, 4, 5, 16, 16), torch.tensor([3, 700]), torch.tensor([1, -1])
    with torch.no_grad():
        expected = model(x, t, Condition(labels))
        model = model.cuda()
        if compiled:
            model.compile_repeated_blocks()
        found = model(x.cuda(), t.cuda(), Condition(labels.cuda())).cpu()
        with torch.autocast("cuda", torch.bfloat16):
            rough = model(x.cuda(), t.cuda(), Condition(labels.cuda())).float().cpu()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (rough - expected).square().mean().sqrt() < 0.02 * expected.std()


@pytest.mark.slow
@pytest.mark.skipif(not H200, reason="the figures to beat are of an H200")
@pytest.mark.parametrize("batch, frames, seconds, gib", OFFICIAL)
def test_training_step_is_1_6_times_as_fast_as_the_official_one_in_60_percent_of_its_memory(
    batch, frames, seconds, gib
):
    config = BenchDiT(batch=batch, frames=frames, rounds=10)
    model = bench_dit.build(config, "compiled", device())
    works = {"step": bench_dit.training_step(config, model, device())}
    (row,) = time_all(works, config.rounds, device()).values()
    assert row.median <= seconds / 1.6
    assert row.peak_gib <= 0.6 * gib


@pytest.mark.slow
def test_sampling_in_250_steps_is_1_6_times_as_fast_as_a_plain_loop():
    """Four guided videos are 4 x 2 x 250 passes of 1.22 TFLOP: 9.4 s at the official code's 260 TFLOP/s and 5.9 s where
    the target is met, so 46 s with the first turns and two rounds, and what compilation takes."""
    config = BenchDiT(model="latte-xl/2", batch=4, frames=5, steps=250, rounds=2)
    eager, compiled = (bench_dit.build(config, way, device()) for way in ("eager", "compiled"))
    ways = {"ours": bench_dit.sampling(config, compiled, device())}
    ways["plain"] = bench_dit.plain_loop(config, eager, device())
    rows = time_all(ways, config.rounds, device())
    assert rows["plain"].median >= 1.6 * rows["ours"].median
