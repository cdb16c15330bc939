"""The benchmark of the transformer: small, it runs on a CPU, and what it times does what it says."""

import json

import pytest
import torch

from dit.cost import sample_cost
from lvdm import bench
from lvdm.bench import ratio
from lvdm.diffusion import GaussianDiffusion
from sample.bench import dit as bench_dit
from sample.bench.configs import BenchDiT

TINY = {"model": "latte-s/2", "model_args": {"depth": 2, "width": 32, "heads": 2}, "batch": 2, "frames": 3}
CPU = torch.device("cpu")


def config(**keys) -> BenchDiT:
    return BenchDiT(**{**TINY, "size": [4, 4], "precision": "fp32", "steps": 2, "rounds": 2, **keys})


def test_table_and_json(lvdm, tmp_path, capsys):
    keys = {"model": "latte-s/2", "model_args": "{depth: 2, width: 32, heads: 2}", "batch": 2, "frames": 3}
    keys |= {
        "size": "[4,4]",
        "attention": "math",
        "compile": "false",
        "steps": 2,
        "rounds": 2,
        "out": tmp_path / "dit.json",
    }
    assert lvdm("bench dit", **keys) == 0
    table = capsys.readouterr().out
    product, step, guided, plain = json.loads((tmp_path / "dit.json").read_text())["rows"]
    assert (product["work"], step["work"], guided["work"]) == ("matrix product", "training step", "2 guided steps")
    assert all(len(row["seconds"]) == 2 and row["peak_gib"] > 0 for row in (step, guided, plain))
    times = ratio({0: guided["seconds"], 1: plain["seconds"]}, 0, 1)
    assert f"{times:.4g}" in next(line for line in table.splitlines() if "one doubled batch" in line)
    assert "latte-s/2" in (tmp_path / "dit.html").read_text()


def test_what_is_compiled_is_marked(monkeypatch):
    """Without a child on a CPU, which would wait for the processes that compile."""
    works = {}
    monkeypatch.setattr(bench, "time_all", lambda given, *rest: works.update(given) or {})
    monkeypatch.setattr(bench, "report", lambda *given, **keys: None)
    bench_dit.run(config(compile=True))
    assert [way for (_, way), work in works.items() if work.compiled] == ["compiled", "compiled, one doubled batch"]


def test_memory_of_a_step_is_that_of_weights_average_moments_and_gradients():
    """Five times the weights, and little more for two small latents."""
    wide = config(model_args={"depth": 2, "width": 512, "heads": 2}, batch=1)
    model = bench_dit.build(wide, "eager", CPU)
    row = bench.time_all({"step": bench_dit.training_step(wide, model, CPU)}, 1, CPU)["step"]
    weights = bench.size_of(model.parameters()) / 2**30
    assert 4.9 * weights < row.peak_gib < 6 * weights


def test_a_timed_step_trains():
    """The loss of the same batch falls."""
    tiny, losses = config(), []
    original = GaussianDiffusion.losses
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GaussianDiffusion, "losses", lambda *a: losses.append(original(*a)) or losses[-1])
        step = bench_dit.training_step(tiny, bench_dit.build(tiny, "eager", CPU), CPU)
        for _ in range(30):
            step.run()
    mse = [terms["mse"].mean().item() for terms in losses]
    assert mse[-1] < mse[0]


@pytest.mark.parametrize("attention", ["sdpa", "math"])
def test_flops_are_those_of_the_passes_over_the_batch(attention):
    tiny = config(batch=3, attention=attention, gradient_checkpointing=True)
    model = bench_dit.build(tiny, "eager", CPU)
    passes = sample_cost(model, backward=True)
    assert bench_dit.training_step(tiny, model, CPU).flops == 3 * (passes.flops + passes.backward_flops)
    for way in (bench_dit.sampling, bench_dit.plain_loop):  # two steps, each with the class and without
        assert way(tiny, model, CPU).flops == 3 * 2 * 2 * passes.flops


def test_bad_size_is_one_line(lvdm, capsys):
    assert lvdm("bench dit", size="[32]") == 2
    assert "size=[32]: expected latent height and width" in capsys.readouterr().err
