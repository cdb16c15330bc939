"""The VAE's training with its adversary under real launchers, two CPU processes over gloo: DDP and DeepSpeed ZeRO-2."""

import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from lvdm.run import RunFolder, read_log

pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install 'lvdm[deepspeed]'")

# Micro-batches, clipping, and an adversary of GroupNorm that joins on the way.
PHASE = {"samples": 24, "batch": 4, "lr": 1e-5, "size": 16}
KEYS = {
    "accumulate": 2,
    "clip": 1.0,
    "adversarial_weight": 0.5,
    "adversarial_start": 8,
    "ema": 0.9,
    "save_every": 8,
}
ENGINES = ["ddp", "zero2"]
FRAMES = {"vae": 5, "refine": 9}


def keys_of(stage: str, **keys) -> dict:
    phases = [{**PHASE, "frames": FRAMES[stage]}]
    return {"phases": phases, **KEYS, **keys}


@pytest.fixture(scope="session")
def given(vae_run) -> dict[str, dict]:
    """What each stage starts from."""
    return {"vae": {}, "refine": {"vae": vae_run}}


@pytest.fixture(scope="session")
def singles(launch, given, tmp_path_factory) -> Path:
    """The runs of one process that the others must equal."""
    folder = tmp_path_factory.mktemp("vae_engines")
    for stage, inputs in given.items():
        assert launch(f"train {stage}", out=folder / stage, **keys_of(stage), **inputs) == 0
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# Equality


def near(samples: int, record: dict) -> dict:
    """Within 2e-5 of each term and norm, until the critic has learnt once. After that rounding may turn one of its
    LeakyReLUs, and gradients through it jump."""
    loose = {key: 2e-2 if "grad" in key or key == "adaptive" else 1e-3 for key in record}
    return {k: pytest.approx(v, rel=2e-5 if samples <= 12 else loose[k]) for k, v in record.items()}


@pytest.mark.parametrize("engine, stage", [("ddp", "vae"), ("zero2", "vae"), ("zero2", "refine")])
def test_two_processes_train_as_one(engine, stage, trained, singles, given, steps, weights, tmp_path):
    """Sums are taken in another order, so within rounding. Adam makes a whole step of a gradient that is all rounding,
    hence the small rate, and 6 of its steps as the bound of the weights."""
    run = trained(engine, f"train {stage}", out=tmp_path / engine, **keys_of(stage), **given[stage])
    ours, theirs = steps(singles / stage), steps(run)
    assert ours.keys() == theirs.keys() == set(range(4, 25, 4))
    for samples, record in ours.items():
        judged = {"g", "d", "adaptive", "grad_d"} if samples > 8 else set()
        assert record.keys() == theirs[samples].keys() >= {"loss", "l1", "grad"} | judged
        assert theirs[samples] == near(samples, record)
    exported = weights(run)
    for name, tensor in weights(singles / stage).items():
        assert exported[name].dtype == torch.float32
        torch.testing.assert_close(exported[name], tensor, rtol=0, atol=6e-5)
    starts = [record for record in read_log(run) if record.get("event") == "start"]
    assert [(start["engine"], start["processes"]) for start in starts] == [
        ("zero2 x 2" if engine == "zero2" else "plain", 2)
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Kill and resume


def test_another_number_of_processes_goes_on_in_the_same_order(
    launch, trained, singles, steps, weights, tmp_path, monkeypatch
):
    """Begun by one process, ended by two: terms depend on the clips of each step, within the rounding of the sums."""
    save, saved = RunFolder.save, []

    def once(self, *args):
        if saved:
            raise KeyboardInterrupt
        saved.append(save(self, *args))

    monkeypatch.setattr(RunFolder, "save", once)
    assert launch("train vae", out=tmp_path / "run", **keys_of("vae")) == 130
    monkeypatch.undo()
    run = trained("ddp", "train vae", out=tmp_path / "run", **keys_of("vae"))
    starts = [record for record in read_log(run) if record.get("event") == "start"]
    assert [(start["samples"], start["processes"]) for start in starts] == [(0, 1), (8, 2)]
    ours, theirs = steps(singles / "vae"), steps(run)
    assert list(theirs) == list(ours) == list(range(4, 25, 4))
    for samples, record in ours.items():
        assert theirs[samples] == (record if samples <= 8 else near(samples, record))
    exported = weights(run)
    for name, tensor in weights(singles / "vae").items():
        torch.testing.assert_close(exported[name], tensor, rtol=0, atol=6e-5)


@pytest.mark.parametrize("engine, precision", [("ddp", "fp32"), ("zero2", "bf16")])
def test_two_killed_processes_go_on_bitwise(engine, precision, accelerated, trained, steps, weights, tmp_path):
    keys = keys_of("vae", precision=precision, adversarial_start=4, update="alternate", save_every=12)
    keys |= {"discriminator": "2d", "phases": [{**PHASE, "samples": 60, "size": 32, "frames": 5}]}
    keys |= {"validate_every": 20, "validate_clips": 1, "holdout": 0.4}
    process, log = accelerated(engine, "train vae", out=tmp_path / "broken", **keys), tmp_path / "broken" / "log.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and len(log.read_text().splitlines()) > 8):
        time.sleep(0.005)
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.kill()
    process.communicate()
    assert not (tmp_path / "broken" / "finished.json").exists()
    saved = {int(path.name) for path in (tmp_path / "broken" / "checkpoints").glob("[0-9]*")}
    assert saved and max(saved) < 60

    broken, whole = (trained(engine, "train vae", out=tmp_path / name, **keys) for name in ("broken", "whole"))
    assert steps(broken) == steps(whole)
    resumed = weights(broken)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in weights(whole).items())
    last = [run / "checkpoints" / "000000060" / "custom_checkpoint_4.pkl" for run in (broken, whole)]
    ours, theirs = (torch.load(path, weights_only=True)["critic"] for path in last)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())

    best = max(whole.glob("checkpoints/*/best.json")).parent
    averaged = torch.load(best / "custom_checkpoint_0.pkl", weights_only=True)
    exported = load_file(whole / "export-best" / "diffusion_pytorch_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in exported.values())
    assert all(torch.equal(tensor, averaged[f"shadow.{name}"]) for name, tensor in exported.items())


def test_what_stage_2_freezes_leaves_a_bf16_engine_as_it_came(trained, vae_run, weights, tmp_path):
    phases = [{**PHASE, "samples": 8, "frames": 9}]
    keys = keys_of("refine", precision="bf16", phases=phases, adversarial_weight=0, vae=vae_run)
    exported = weights(trained("zero2", "train refine", out=tmp_path / "run", **keys))
    assert all(torch.equal(exported[name], tensor) for name, tensor in weights(vae_run).items())
    refiner = [tensor for name, tensor in exported.items() if name.startswith("refiner.")]
    assert refiner and any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in refiner)
