"""The benchmark of training: what it times is a step that learns."""

import json
from pathlib import Path

import pytest
import torch

from lvdm import accelerator as accelerators
from lvdm import bench as instruments
from lvdm.bench import MATMUL
from lvdm.cli import main
from train import bench
from train.configs import BenchTrainVAE
from vae.losses import Term

CPU = torch.device("cpu")
TINY = {"model_args": {"width": 16, "blocks": 1}, "frames": 5, "size": 16, "precision": "fp32"}


@pytest.fixture(autouse=True)
def _without_memory(monkeypatch):
    """Spares a process a work."""
    monkeypatch.setattr(instruments, "_peak_of_child", lambda work: None)


def launch(**keys) -> int:
    words = (f"{key}={value if isinstance(value, str | Path) else json.dumps(value)}" for key, value in keys.items())
    return main(["bench", "train-vae", *words])


@pytest.fixture
def learner():
    config = bench.recipe(BenchTrainVAE(**TINY), "l1", CPU)
    return config, bench.Learner(config, accelerators.for_training(config), "univae", TINY["model_args"], False)


def test_recipes_are_those_of_the_training():
    l1, whole = (bench.recipe(BenchTrainVAE(**TINY), losses, CPU) for losses in ("l1", "recipe"))
    assert (l1.lpips_weight, l1.adversarial_weight, l1.kl_weight) == (0, 0, 0)
    assert (whole.lpips_weight, whole.adversarial_weight, whole.kl_weight) == (1, 0.5, 1e-6)
    assert whole.adversarial_start == 0 and (whole.phases[0].frames, whole.phases[0].size) == (5, 16)


def test_a_timed_step_learns_with_activations_kept_or_not(learner, monkeypatch):
    """The loss of the same clip falls, and the two ways are one: the same losses from the same weights."""
    config, learner = learner
    losses: list[float] = []
    monkeypatch.setattr(bench, "total", lambda *a, of=bench.total: watched(of(*a), losses))
    start = {name: value.clone() for name, value in learner.model.state_dict().items()}
    for recompute in (False, True):
        learner.model.load_state_dict(start)
        learner.optimizer.state.clear()
        step = learner.work(config, recompute)
        for group in learner.optimizer.param_groups:
            group["lr"] = 1e-3
        for _ in range(8):
            step.run()
    assert losses[7] < 0.95 * losses[0] and losses[8:] == pytest.approx(losses[:8], rel=1e-5)


def watched(values: dict, losses: list[float]) -> dict:
    losses.append(values["loss"].item())
    return values


def test_what_is_held_is_weights_average_and_moments(learner):
    config, learner = learner
    weights = instruments.size_of(learner.model.parameters())
    assert instruments.size_of(learner.held()) == 2 * weights
    learner.work(config, False).run()
    assert 4 * weights <= instruments.size_of(learner.held()) < 4.01 * weights  # with a count of steps a weight


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "frame_terms", lambda config, accelerator: [Term("l1", 1.0, l1, reconstructs=True)])
    keys = {"against": "odvae:width=16:blocks=1", "rounds": 1, "out": tmp_path / "train.json", **TINY}
    assert launch(**keys) == 0
    rows = json.loads((tmp_path / "train.json").read_text())["rows"]
    assert rows[0]["losses"] == MATMUL
    found = [(row["losses"], row["activations"], row["model"]) for row in rows[1:]]
    models = ("univae", keys["against"])
    assert found == [(a, b, m) for a in ("l1", "recipe") for b in ("kept", "recomputed") for m in models]
    assert all(row["frames"] == 5 and row["flops"] > 0 for row in rows[1:])
    assert "times: how many times as long as univae" in capsys.readouterr().out


def l1(rendered) -> torch.Tensor:
    return (rendered.x - rendered.y).abs().mean()


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"model": "vqgan", "model_args": {}}, "is discrete"),
        ({"frames": 6}, "frames=6: expected 4n+1, e.g. 5 or 9"),
        ({"against": "univae"}, "against=univae: already a model of this run"),
        ({"losses": "[l2]"}, "losses=l2: expected l1, recipe or both"),
    ],
)
def test_bad_input_is_one_line(keys, says, capsys):
    assert launch(**{**TINY, **keys}) == 2
    assert says in capsys.readouterr().err
