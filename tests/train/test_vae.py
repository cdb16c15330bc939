"""Stage 1: the loop does what its losses, thresholds and draws say, and bad input is told in one line."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

import vae
from lvdm.media import write_mp4
from train import vae as program

PHASE = {"batch": 2, "lr": 1e-3, "size": 16, "frames": 5}


def phase(samples: int, **keys) -> list[dict]:
    return [{**PHASE, "samples": samples, **keys}]


class FakeLPIPS(nn.Module):
    """Squared error an image, remembering how many images it saw."""

    seen: list[int]

    def __init__(self, net: str):
        super().__init__()
        type(self).seen = []

    def forward(self, x, y):
        self.seen.append(len(x))
        return (x - y).square().mean((1, 2, 3))


@pytest.fixture
def fake_lpips(monkeypatch):
    monkeypatch.setattr(program, "LPIPS", FakeLPIPS)
    return FakeLPIPS


# ----------------------------------------------------------------------------------------------------------------------
# Learning


def test_one_clip_is_learnt(launch, steps, tmp_path):
    y, x, t = np.mgrid[:48, :48, :5]
    waves = [np.sin((x + t) / (5 + k)) * np.cos(y / (6 + 2 * k)) for k in range(3)]
    (tmp_path / "videos").mkdir()
    write_mp4(
        tmp_path / "videos" / "a.mp4", (127.5 * (np.stack(waves, -1).transpose(2, 0, 1, 3) + 1)).astype(np.uint8), 24
    )
    keys = {"videos": tmp_path / "videos", "flip": False, "crop": "center", "beta2": 0.95, "clip": 1}
    assert launch("train vae", out=tmp_path / "run", phases=phase(60, batch=1, lr=2e-3), **keys) == 0
    l1 = [record["l1"] for record in steps(tmp_path / "run").values()]
    assert sum(l1[-5:]) < 0.5 * sum(l1[:5])


def test_each_backward_reaches_its_own_network(launch, tmp_path, monkeypatch):
    models, critics, reached = [], [], []

    def build(config):
        models.append(build_model(config))
        return models[-1]

    class Critic(program.PatchGAN3D):
        def __init__(self, *args):
            super().__init__(*args)
            critics.append(self)

    def spy(self, loss, **kwargs):
        backward(self, loss, **kwargs)
        grads = [[p.grad for p in m.parameters()] for m in (models[0], critics[0])]
        reached.append(tuple(any(g is not None and g.abs().max() > 0 for g in of_model) for of_model in grads))

    build_model, backward = program.build_model, Accelerator.backward
    monkeypatch.setattr(program, "build_model", build)
    monkeypatch.setattr(program, "PatchGAN3D", Critic)
    monkeypatch.setattr(Accelerator, "backward", spy)
    assert launch("train vae", out=tmp_path / "run", adversarial_weight=0.5) == 0
    assert reached == [(True, False), (False, True)] * 2


def test_losses_begin_exactly_at_their_sample(launch, steps, tmp_path, fake_lpips):
    keys = {"lpips_weight": 1.0, "lpips_start": 4, "adversarial_weight": 0.5, "adversarial_start": 6, "lpips_frames": 2}
    assert launch("train vae", out=tmp_path / "run", phases=phase(10), **keys) == 0
    records = steps(tmp_path / "run")
    assert [samples - 2 for samples, record in records.items() if "lpips" in record] == [4, 6, 8]
    for term in ("g", "d", "adaptive"):
        assert [samples - 2 for samples, record in records.items() if term in record] == [6, 8]
    assert fake_lpips.seen == [2 * 2] * 3  # two frames of two clips


def test_terms_add_up(launch, steps, tmp_path, fake_lpips):
    keys = {"lpips_weight": 0.7, "adversarial_weight": 0.3, "kl_weight": 0.01}
    assert launch("train vae", out=tmp_path / "run", **keys) == 0
    elements = 3 * 16 * 16
    for record in steps(tmp_path / "run").values():
        loss = record["l1"] + 0.7 * record["lpips"] + 0.01 / elements * record["kl"]
        loss += 0.3 * record["adaptive"] / elements * record["g"]
        assert record["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_export_holds_the_averaged_weights(decay, launch, weights, tmp_path):
    assert launch("train vae", out=tmp_path / "run", ema=decay) == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "000000004"
    raw, exported = load_file(checkpoint / "model.safetensors"), weights(tmp_path / "run")
    shadow = torch.load(checkpoint / "custom_checkpoint_0.pkl", weights_only=True)
    assert all(torch.equal(tensor, shadow[f"shadow.{name}"]) for name, tensor in exported.items())
    same = [torch.equal(tensor, raw[name]) for name, tensor in exported.items()]
    assert all(same) if decay == 0 else not any(same)


def test_phases_change_rate_length_and_size(launch, steps, tmp_path, monkeypatch):
    shapes = []
    monkeypatch.setattr(program.losses, "l1", lambda x, y: shapes.append(tuple(x.shape)) or (x - y).abs().mean())
    phases = phase(4, frames=1, lr=1e-3) + phase(3, batch=1, size=24, lr=5e-4)
    assert launch("train vae", out=tmp_path / "run", phases=phases, warmup=4) == 0
    assert shapes == [(2, 3, 1, 16, 16)] * 2 + [(1, 3, 5, 24, 24)] * 3
    records = steps(tmp_path / "run")
    assert {samples: record["lr"] for samples, record in records.items()} == {
        2: 5e-4,
        4: 1e-3,
        5: 5e-4,
        6: 5e-4,
        7: 5e-4,
    }


def test_checkpoints_are_written_every_so_many_samples_and_the_last_are_kept(launch, tmp_path):
    phases = phase(7, frames=1, batch=1)
    assert launch("train vae", out=tmp_path / "run", phases=phases, save_every=2, keep=3) == 0
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["000000004", "000000006", "000000007"]


# ----------------------------------------------------------------------------------------------------------------------
# The same training, done otherwise


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The (sample, clip, noise) triples of a run, in order."""
    seen, collate, noise = [], program.collate, program.posterior_noise

    def collated(items):
        seen.extend([sample, clip.video] for sample, clip in items)
        return collate(items)

    def drawn(seed, samples, shape):
        drawn = noise(seed, samples, shape)
        for sample, of_sample in zip(samples, drawn, strict=True):
            next(entry for entry in seen if entry[0] == sample).append(of_sample)
        return drawn

    monkeypatch.setattr(program, "collate", collated)
    monkeypatch.setattr(program, "posterior_noise", drawn)
    return seen


def test_accumulation_sees_the_same_draws_and_gives_the_same_losses(launch, steps, tmp_path, drawn, fake_lpips):
    # The gradients differ by rounding alone, of which Adam makes steps of another sign where they are about zero.
    keys = {"phases": phase(12, batch=4, lr=1e-4), "lpips_weight": 1.0, "lpips_frames": 2, "clip": 1.0}
    assert launch("train vae", out=tmp_path / "one", **keys) == 0
    one = list(drawn)
    drawn.clear()
    assert launch("train vae", out=tmp_path / "two", **keys, accumulate=2) == 0
    assert [sample for sample, *_ in one] == list(range(12))
    for a, b in zip(one, drawn, strict=True):
        assert a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])
    for a, b in zip(steps(tmp_path / "one").values(), steps(tmp_path / "two").values(), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("keys", [{"workers": 1}, {"gradient_checkpointing": True}, {"cache_gib": 0}])
def test_how_it_is_computed_changes_nothing(keys, launch, steps, tmp_path, vae_run):
    assert launch("train vae", out=tmp_path / "run", **keys) == 0
    assert steps(tmp_path / "run") == steps(vae_run)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(command, launch, steps, tmp_path):
    keys = {"phases": phase(12, batch=4, lr=1e-5), "accumulate": 2, "clip": 1.0}
    keys |= {"adversarial_weight": 0.5, "adversarial_start": 8}
    assert launch("train vae", out=tmp_path / "one", **keys) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    argv = [*torchrun, "train.vae", *command("train vae", out=tmp_path / "two", **keys)[2:]]
    env = {key: value for key, value in os.environ.items() if key != "ACCELERATE_USE_CPU"} | {
        "CUDA_VISIBLE_DEVICES": ""
    }
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "two" / "log.jsonl").read_text().splitlines()
    assert json.loads(log[0])["processes"] == 2 and len(log) == 4
    one, two = steps(tmp_path / "one"), steps(tmp_path / "two")
    assert one[4] == pytest.approx(two[4], rel=1e-4)
    # Adam's first step is of full size even where a gradient is all rounding, so the next one's norm is less equal.
    assert one[8].pop("grad") == pytest.approx(two[8].pop("grad"), rel=5e-3)
    assert one[8] == pytest.approx(two[8], rel=1e-4)
    # The adaptive weight is of each process's own gradient.
    assert all(one[12][term] == pytest.approx(two[12][term], rel=1e-3) for term in ("l1", "kl", "g", "d"))
    assert vae.load(str(tmp_path / "two")).spec.latent_channels == 4


# ----------------------------------------------------------------------------------------------------------------------
# Where it starts from


@pytest.mark.parametrize("run", ["vae_run", "refine_run"])
def test_init_takes_the_weights_of_a_run(run, request, launch, weights, tmp_path, vae_run):
    still = {"phases": phase(2, lr=0.0), "seed": 5}
    assert launch("train vae", out=tmp_path / "run", init=request.getfixturevalue(run), **still) == 0
    assert all(torch.equal(tensor, weights(vae_run)[name]) for name, tensor in weights(tmp_path / "run").items())


def test_init_of_another_architecture_is_refused(launch, tmp_path, vae_run, capsys):
    args = {"width": 32, "blocks": 1}
    assert launch("train vae", out=tmp_path / "run", init=vae_run, model_args=args) == 2
    error = capsys.readouterr().err
    assert f"init={vae_run}" in error and "another architecture" in error


# ----------------------------------------------------------------------------------------------------------------------
# Losses that are not finite


def test_a_loss_that_is_not_finite_stops_the_run(launch, steps, tmp_path, capsys):
    keys = {"phases": phase(8, lr=1e30), "save_every": 2}
    assert launch("train vae", out=tmp_path / "run", **keys) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and "at sample 2 (" in error[0] and "checkpoint is at 2 samples" in error[0]
    assert error[0].count(".mp4@") == 2 and "non_finite=skip" in error[0]
    assert list(steps(tmp_path / "run")) == [2]


def test_a_loss_that_is_not_finite_can_be_skipped(launch, steps, weights, tmp_path, monkeypatch):
    l1, calls = program.losses.l1, []

    def sometimes(x, y):
        calls.append(0)
        return l1(x, y) * (float("inf") if len(calls) == 2 else 1.0)

    monkeypatch.setattr(program.losses, "l1", sometimes)
    assert launch("train vae", out=tmp_path / "run", phases=phase(6), non_finite="skip", ema=0) == 0
    records = steps(tmp_path / "run")
    assert [record["skipped"] for record in records.values()] == [0, 1, 1]
    assert records[4]["loss"] == "inf"
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())
    assert json.loads((tmp_path / "run" / "finished.json").read_text())["skipped"] == 1


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def test_dry_run_counts_and_writes_nothing(launch, tmp_path, capsys):
    assert launch("train vae", "--dry-run", out=tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "2,716,183 of 2,716,183 parameters trained" in out and "TFLOP a step" in out and "width: 16" in out
    assert not (tmp_path / "run").exists()


def test_dry_run_scales_with_the_batch(launch, tmp_path, capsys):
    phases = phase(16, batch=2) + phase(16, batch=16)
    assert launch("train vae", "--dry-run", out=tmp_path / "run", phases=phases) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "TFLOP" in line]
    two, sixteen = (float(line.split(" TFLOP")[0].split()[-1]) for line in lines)
    assert sixteen == pytest.approx(8 * two, rel=0.01)  # printed to three digits


BAD = {
    "no out": ({"out": ""}, "out: expected the folder"),
    "no videos": ({"videos": ""}, "expected a folder of videos"),
    "unknown model": ({"model": "univea"}, "did you mean 'univae'"),
    "unknown option": ({"model_args": {"wdith": 16}}, "has no option 'wdith'"),
    "unknown key": ({"phses": []}, "unknown key 'phses' (did you mean 'phases'?)"),
    "samples off the batch": ({"phases": phase(5)}, "phases[0].samples=5: must be a multiple of its batch, e.g. 6"),
    "size off 8": ({"phases": phase(4, size=20)}, "phases[0].size=20: must be divisible by 8, e.g. 16 or 24"),
    "frames off 4n+1": ({"phases": phase(4, frames=6)}, "phases[0].frames=6: expected 4n+1, e.g. 5 or 9"),
    "shots too short": ({"phases": phase(4, frames=17, stride=4)}, "need 65 consecutive frames"),
    "no such init": ({"init": "no/such/run"}, "no/such/run: no such folder"),
}


@pytest.mark.parametrize("keys, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_2(keys, message, launch, tmp_path, capsys):
    assert launch("train vae", **{"out": tmp_path / "run", **keys}) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("index videos")]
    assert len(error) == 1 and error[0].startswith("error: ") and message in error[0]


def test_shots_too_short_names_both_lengths(launch, tmp_path, capsys):
    assert launch("train vae", out=tmp_path / "run", phases=phase(4, frames=17, stride=4)) == 2
    assert "17 frames at stride 4 need 65 consecutive frames" in (error := capsys.readouterr().err)
    assert "the longest shot there has 48" in error


def test_start_that_failed_does_not_claim_its_folder(launch, tmp_path):
    assert launch("train vae", out=tmp_path / "run", videos=tmp_path / "typo") == 2
    assert launch("train vae", out=tmp_path / "run") == 0


def test_folder_with_other_things_is_refused(launch, contents, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert launch("train vae", out=tmp_path) == 2
    assert "not empty and not a run folder" in capsys.readouterr().err
    assert launch("train vae", out=tmp_path / "notes.txt") == 2
    assert "is a file" in capsys.readouterr().err
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_folder_without_videos_is_refused(launch, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert launch("train vae", out=tmp_path / "run", videos=tmp_path / "empty") == 2
    assert "no video in or below it" in capsys.readouterr().err


def test_broken_videos_are_named_and_left_out(launch, steps, videos, tmp_path, capsys):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "bad.mp4").write_bytes(b"no video at all")
    assert launch("train vae", out=tmp_path / "all", videos=mixed) == 2
    assert "none of the 1 videos can be read; bad.mp4" in capsys.readouterr().err
    (mixed / "good.mp4").write_bytes((videos / "left" / "a.mp4").read_bytes())
    assert launch("train vae", out=tmp_path / "some", videos=mixed) == 0
    assert "bad.mp4" in capsys.readouterr().err
    assert list(steps(tmp_path / "some")) == [2, 4]
