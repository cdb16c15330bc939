"""A run that is killed and started again goes on as if nothing had happened, bit for bit."""

import json
import multiprocessing
import time
from pathlib import Path

import pytest
import torch

from lvdm import cli
from train import vae

CLIP = {"batch": 2, "lr": 1e-3, "size": 16}
RUNS = {
    # Everything at once: warm-up, clipping, the adversary joining, changes of phase, micro-batches.
    "train vae": {
        "phases": [
            {"samples": 4, "frames": 1, **CLIP},
            {"samples": 16, "frames": 5, **CLIP},
            {"samples": 12, "frames": 1, **CLIP, "batch": 4, "lr": 5e-4},
        ],
        **{"adversarial_weight": 0.5, "adversarial_start": 2, "accumulate": 2, "clip": 1.0, "warmup": 8},
        "save_every": 6,
    },
    "train refine": {"phases": [{"samples": 36, "frames": 9, **CLIP}], "adversarial_weight": 0.5, "save_every": 6},
    "train dit": {"phases": [{"samples": 480, "batch": 4, "lr": 1e-3}], "clip": 1.0, "save_every": 28},
}
PAST = {"train vae": 6, "train refine": 6, "train dit": 20}
"""Lines of the log after which the kill comes, at whatever moment of the next steps."""


@pytest.fixture(scope="module")
def processes():
    """Processes that start with the programs imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train.vae", "train.refine", "train.dit", "vae.univae", "dit.latte"])
    return context


@pytest.fixture
def inputs(request, verb: str) -> dict[str, Path]:
    """What the program of `verb` starts from."""
    need = {"train refine": ("vae", "vae_run"), "train dit": ("latents", "store")}
    return {key: request.getfixturevalue(name) for key, name in [need[verb]]} if verb in need else {}


def killed(*_):
    """Stands in for the step at which a run dies."""
    raise KeyboardInterrupt


def lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize("verb", RUNS)
def test_killed_run_goes_on_bitwise(verb, inputs, processes, command, launch, steps, weights, tmp_path):
    keys, whole, broken = {**RUNS[verb], **inputs}, tmp_path / "whole", tmp_path / "broken"
    process = processes.Process(target=cli.main, args=(command(verb, out=broken, **keys),))
    process.start()
    deadline = time.monotonic() + 60
    while lines(broken / "log.jsonl") < PAST[verb] and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -9 and not (broken / "finished.json").exists()

    # What else a kill can leave: steps after the last checkpoint, half a line of the log, half a checkpoint.
    with open(broken / "log.jsonl", "a") as log:
        log.write(json.dumps({"samples": 10**6, "loss": -1.0}) + '\n{"samples": 48, "lo')
    saved = sorted(int(path.name) for path in (broken / "checkpoints").iterdir() if path.name.isdigit())
    partial = broken / "checkpoints" / f"partial-{saved[-1] + keys['save_every']:09d}"
    partial.mkdir(exist_ok=True)
    (partial / "model.safetensors").write_bytes(b"half")

    assert launch(verb, out=broken, **keys) == 0
    assert launch(verb, out=whole, **keys) == 0
    assert steps(broken) == steps(whole)
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(broken).items())


def test_killed_before_the_first_checkpoint_starts_anew(launch, steps, tmp_path, monkeypatch, vae_run):
    monkeypatch.setattr("lvdm.run.RunFolder.save", killed)
    assert launch("train vae", out=tmp_path / "run") == 130
    monkeypatch.undo()
    assert steps(tmp_path / "run") == steps(vae_run)  # all steps were done, none was saved
    assert launch("train vae", out=tmp_path / "run") == 0
    assert steps(tmp_path / "run") == steps(vae_run)


def test_killed_after_the_last_checkpoint_exports(launch, steps, weights, tmp_path, monkeypatch, vae_run):
    monkeypatch.setattr("lvdm.run.RunFolder.export", killed)
    assert launch("train vae", out=tmp_path / "run") == 130
    assert not (tmp_path / "run" / "export").exists()
    monkeypatch.undo()
    assert launch("train vae", out=tmp_path / "run") == 0
    assert steps(tmp_path / "run") == steps(vae_run)
    assert all(torch.equal(tensor, weights(vae_run)[name]) for name, tensor in weights(tmp_path / "run").items())


def test_skipped_steps_are_counted_over_a_restart(launch, steps, tmp_path, monkeypatch):
    l1, calls = vae.losses.l1, []

    def sometimes(x, y):
        calls.append(0)
        return l1(x, y) * (float("nan") if len(calls) == 2 else 1.0)

    keys = {"out": tmp_path / "run", "non_finite": "skip", "phases": [{"samples": 6, "frames": 1, **CLIP}]}
    monkeypatch.setattr(vae.losses, "l1", sometimes)
    with monkeypatch.context() as patch:
        patch.setattr("lvdm.run.RunFolder.export", killed)
        assert launch("train vae", **keys, save_every=4) == 130
    assert [record["skipped"] for record in steps(tmp_path / "run").values()] == [0, 1, 1]
    (tmp_path / "run" / "checkpoints" / "000000006").rename(tmp_path / "lost")
    assert launch("train vae", **keys, save_every=4) == 0
    assert [record["skipped"] for record in steps(tmp_path / "run").values()] == [0, 1, 1]


@pytest.mark.parametrize("verb", ["train vae", "train refine", "train latents", "train dit"])
class TestAgain:
    """The same command once more."""

    @pytest.fixture
    def finished(self, request, verb) -> dict[str, Path]:
        runs = {"train vae": "vae_run", "train refine": "refine_run", "train latents": "store", "train dit": "dit_run"}
        out = request.getfixturevalue(runs[verb])
        inputs = {"train refine": "vae", "train latents": "vae", "train dit": "latents"}
        return {"out": out} | ({inputs[verb]: out.with_name(inputs[verb])} if verb in inputs else {})

    def test_finished_run_is_skipped(self, verb, finished, launch, contents, monkeypatch):
        before = contents(finished["out"])
        for work in ("train.vae.fit", "train.refine.fit", "train.latents.encode_batch", "dit.build"):
            monkeypatch.setattr(work, None)
        assert launch(verb, **finished) == 0
        assert contents(finished["out"]) == before

    def test_another_config_is_refused_and_nothing_lost(self, verb, finished, launch, contents, capsys):
        before = contents(finished["out"])
        another = {"flip": False} if verb == "train latents" else {"seed": 1}
        assert launch(verb, **finished, **another) == 2
        message = capsys.readouterr().err
        assert next(iter(another)) in message and str(finished["out"]) in message and message.count("\n") == 1
        assert contents(finished["out"]) == before

    def test_operational_keys_may_differ(self, verb, finished, launch):
        workers = {} if verb == "train latents" else {"workers": 1}
        assert launch(verb, **{**finished, **workers, "threads": 0}) == 0
