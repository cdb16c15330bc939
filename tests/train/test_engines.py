"""The transformer's training under real launchers, two CPU processes over gloo: DDP and DeepSpeed ZeRO-2."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml

from lvdm import accelerator as accelerators
from lvdm.config import configs_root
from lvdm.errors import UserError

pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install 'lvdm[deepspeed]'")

# Micro-batches, and clipping as the paper has it: at 0.1, from a given sample on.
KEYS = {
    "phases": [{"samples": 48, "batch": 8, "lr": 1e-3}],
    "accumulate": 2,
    "clip": 0.1,
    "clip_start": 16,
    "ema": 0.9,
    "save_every": 16,
}


@pytest.fixture(scope="session")
def single(launch, store, tmp_path_factory) -> Path:
    """The run of one process that the others must equal."""
    out = tmp_path_factory.mktemp("engines") / "single"
    assert launch("train dit", out=out, latents=store, **KEYS) == 0
    return out


@pytest.fixture(scope="session")
def zero2(trained, store, single) -> Path:
    return trained("zero2", out=single.with_name("zero2"), latents=store, **KEYS)


@pytest.fixture(scope="session")
def ddp(trained, store, single) -> Path:
    return trained("ddp", out=single.with_name("ddp"), latents=store, **KEYS)


# ----------------------------------------------------------------------------------------------------------------------
# Equality


@pytest.mark.parametrize("engine", ["zero2", "ddp"])
def test_two_processes_train_as_one(engine, request, single, steps, weights):
    """Sums are taken in another order, so within rounding: 1e-5 of each loss and norm, 1e-5 of weights of about 0.1."""
    run = request.getfixturevalue(engine)
    ours, theirs = steps(single), steps(run)
    assert ours.keys() == theirs.keys() == set(range(8, 49, 8))
    for samples, record in ours.items():
        assert record.keys() == theirs[samples].keys() >= {"loss", "mse", "vlb", "grad"}
        assert theirs[samples] == pytest.approx(record, rel=1e-5)
    exported = weights(run)
    for name, tensor in weights(single).items():
        assert exported[name].dtype == torch.float32
        torch.testing.assert_close(exported[name], tensor, rtol=1e-4, atol=1e-5)


def test_the_log_says_what_ran(zero2, ddp):
    starts = [json.loads((run / "log.jsonl").read_text().splitlines()[0]) for run in (zero2, ddp)]
    assert [(start["engine"], start["processes"]) for start in starts] == [("zero2 x 2", 2), ("plain", 2)]


def test_clipping_begins_at_its_sample(launch, store, single, steps, weights, tmp_path):
    assert launch("train dit", out=tmp_path / "free", latents=store, **{**KEYS, "clip": 0.0}) == 0
    free, clipped = steps(tmp_path / "free"), steps(single)
    assert [free[n]["grad"] == clipped[n]["grad"] for n in sorted(free)] == [True, True, True, False, False, False]
    assert min(record["grad"] for record in clipped.values()) > 0.1  # the norm is that before clipping
    assert not torch.allclose(weights(single)["head.linear.weight"], weights(tmp_path / "free")["head.linear.weight"])


# ----------------------------------------------------------------------------------------------------------------------
# bf16, kill and resume


def test_zero2_in_bf16_goes_on_after_a_kill(accelerated, trained, store, single, steps, weights, tmp_path):
    phases = [{"samples": 800, "batch": 8, "lr": 1e-3}]
    keys = {**KEYS, "latents": store, "precision": "bf16", "phases": phases, "save_every": 160}
    process, log = accelerated("zero2", out=tmp_path / "broken", **keys), tmp_path / "broken" / "log.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and len(log.read_text().splitlines()) > 25):
        time.sleep(0.005)
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.kill()
    process.communicate()
    assert not (tmp_path / "broken" / "finished.json").exists()
    saved = {int(path.name) for path in (tmp_path / "broken" / "checkpoints").glob("[0-9]*")}
    assert saved and max(saved) < 800

    broken, whole = (trained("zero2", out=tmp_path / name, **keys) for name in ("broken", "whole"))
    assert steps(broken) == steps(whole)
    resumed = weights(broken)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in weights(whole).items())
    # fp32 averages of bf16 weights, not bf16 averages
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in resumed.values())
    first, bf16 = steps(single), steps(whole)
    assert all(bf16[n]["loss"] == pytest.approx(first[n]["loss"], rel=0.02) for n in first)


# ----------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    "wrote, latest, refused",
    [("zero2 x 2", 16, True), ("zero2 x 8", 16, True), ("plain", 16, False), ("zero2 x 2", 0, False)],
)
def test_a_checkpoint_of_another_engine_is_refused(wrote, latest, refused):
    plain = SimpleNamespace(distributed_type="NO", num_processes=1)
    log = [{"samples": 0, "event": "start", "engine": "plain"}, {"samples": 0, "event": "start", "engine": wrote}]
    if not refused:
        accelerators.check_engine(plain, log, latest)
        return
    with pytest.raises(UserError, match=f"at 16 samples was written under {wrote}, and this launch is plain"):
        accelerators.check_engine(plain, log, latest)


def test_deepspeed_missing_names_the_extra(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"pip install 'lvdm\[deepspeed\]'"):
        accelerators.make_accelerator("fp32")


def test_shipped_accelerate_configs_say_what_they_are():
    found = {path.stem: yaml.safe_load(path.read_text()) for path in (configs_root() / "accelerate").glob("*.yaml")}
    assert {"ddp", "zero2", "multinode"} == found.keys()
    for name in ("zero2", "multinode"):
        numbers = found[name]["deepspeed_config"]
        assert numbers["zero_stage"] == 2 and "auto" not in numbers.values() and numbers["gradient_clipping"] > 0
    assert found["ddp"]["distributed_type"] == "MULTI_GPU" and found["multinode"]["num_machines"] > 1
