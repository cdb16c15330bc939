"""The benchmark of the transformer: small, it runs on a CPU, and what it times does what it says."""

import json

import pytest
import torch

from lvdm.diffusion import GaussianDiffusion
from sample import bench_dit
from sample.configs import BenchDiT

TINY = {"model": "latte-s/2", "model_args": {"depth": 2, "width": 32, "heads": 2}, "batch": 2, "frames": 3}
CPU = torch.device("cpu")


def config(**keys) -> BenchDiT:
    return BenchDiT(**{**TINY, "size": [4, 4], "precision": "fp32", "steps": 2, "rounds": 2, **keys})


def test_table_and_json(lvdm, tmp_path, capsys):
    keys = {"model": "latte-s/2", "model_args": "{depth: 2, width: 32, heads: 2}", "batch": 2, "frames": 3}
    keys |= {"size": "[4,4]", "compile": "false", "steps": 2, "rounds": 2, "out": tmp_path / "dit.json"}
    assert lvdm("bench dit", **keys) == 0
    table = capsys.readouterr().out
    assert "latte-s/2" in table and "training step" in table and "1.00x plain loop, two batches" in table
    rows = json.loads((tmp_path / "dit.json").read_text())["rows"]
    assert [len(row["seconds"]) for group in rows.values() for row in group.values()] == [2, 2, 2]


def test_a_timed_step_trains():
    """The loss of the same batch falls."""
    tiny, losses = config(), []
    original = GaussianDiffusion.losses
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GaussianDiffusion, "losses", lambda *a: losses.append(original(*a)) or losses[-1])
        step = bench_dit.training_step(tiny, bench_dit.build(tiny, "eager", CPU), CPU)
        for _ in range(30):
            step()
    mse = [terms["mse"].mean().item() for terms in losses]
    assert mse[-1] < mse[0]


def test_flops_are_those_of_the_sizes():
    small, wide = bench_dit.forward_flops(config()), bench_dit.forward_flops(config(frames=6))
    assert 1.9 < wide / small < 2.1


def test_bad_size_is_one_line(lvdm, capsys):
    assert lvdm("bench dit", size="[32]") == 2
    assert "size=[32]: expected latent height and width" in capsys.readouterr().err
