"""Stage 1: the loop does what its losses, thresholds and draws say, and bad input is told in one line."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import vae
from lvdm.media import write_mp4
from lvdm.run import read_log
from train import adversary
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

    class Critic(adversary.PatchGAN):
        def __init__(self, *args):
            super().__init__(*args)
            critics.append(self)

    def spy(self, *args, **kwargs):
        backward(self, *args, **kwargs)
        grads = [[p.grad for p in m.parameters()] for m in (models[0], critics[0])]
        reached.append(tuple(any(g is not None and g.abs().max() > 0 for g in of_model) for of_model in grads))

    build_model, backward = program.build_model, torch.Tensor.backward
    monkeypatch.setattr(program, "build_model", build)
    monkeypatch.setattr(adversary, "PatchGAN", Critic)
    monkeypatch.setattr(torch.Tensor, "backward", spy)
    assert launch("train vae", out=tmp_path / "run", adversarial_weight=0.5) == 0
    assert reached == [(True, False), (False, True)] * 2


def test_alternating_updates_touch_one_network_a_step(launch, steps, tmp_path):
    keys = {"adversarial_weight": 0.5, "adversarial_start": 4, "update": "alternate", "ema": 0, "save_every": 2}
    assert launch("train vae", out=tmp_path / "run", phases=phase(12), keep=6, accumulate=2, **keys) == 0
    records = steps(tmp_path / "run")
    assert [name for name in ("loss", "d") for record in records.values() if name in record] == ["loss"] * 4 + ["d"] * 2
    assert [samples for samples, record in records.items() if "d" in record] == [8, 12]  # odd steps, once it has joined
    assert [samples for samples, record in records.items() if "g" in record] == [6, 10]

    def states(samples):
        folder = tmp_path / "run" / "checkpoints" / f"{samples:09d}"
        judge = torch.load(folder / "custom_checkpoint_4.pkl", weights_only=True)
        return load_file(folder / "model.safetensors"), judge["critic"]

    def moved(before, after):
        return tuple(any(not torch.equal(a[k], b[k]) for k in a) for a, b in zip(before, after, strict=True))

    numbers = [2, 4, 6, 8, 10, 12]
    changes = [moved(states(a), states(b)) for a, b in pairwise(numbers)]
    assert changes == [(True, False), (True, False), (False, True), (True, False), (False, True)]


@pytest.mark.parametrize("kind, norm", [("2d", "group"), ("2d", "batch"), ("3d", "batch")])
def test_every_discriminator_trains(kind, norm, launch, steps, tmp_path):
    keys = {"adversarial_weight": 0.5, "discriminator": kind, "discriminator_norm": norm}
    assert launch("train vae", out=tmp_path / "run", phases=phase(4, size=24), **keys) == 0
    assert all(record.keys() >= {"g", "d", "adaptive", "grad_d"} for record in steps(tmp_path / "run").values())


def test_the_adversary_keeps_its_rate_its_own_or_the_phase_s(launch, tmp_path):
    keys = {"adversarial_weight": 0.5, "phases": phase(4), "warmup": 4}
    for name, rate, expected in (("phase", 0.0, 1e-3), ("own", 5e-4, 5e-4)):
        assert launch("train vae", out=tmp_path / name, discriminator_lr=rate, **keys) == 0
        saved = tmp_path / name / "checkpoints" / "000000004" / "custom_checkpoint_4.pkl"
        optimizer = torch.load(saved, weights_only=True)["optimizer"]
        assert optimizer["param_groups"][0]["lr"] == expected and len(optimizer["state"]) == 13


def test_a_cosine_ends_at_the_final_rate(launch, steps, tmp_path):
    keys = {"phases": phase(8), "schedule": "cosine", "final_lr": 1e-4, "warmup": 2}
    assert launch("train vae", out=tmp_path / "run", **keys) == 0
    rates = [record["lr"] for record in steps(tmp_path / "run").values()]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4 + 9e-4 * 0.75, 1e-4 + 9e-4 * 0.25])


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


def test_latents_can_be_held_to_those_of_an_image_vae(launch, steps, weights, tmp_path):
    vae.build("sdvae", **vae.registry.entry("sdvae").tiny).save_pretrained(tmp_path / "image")
    keys = {"align_vae": tmp_path / "image", "align": "both", "align_weight": 0.25, "kl_weight": 0, "phases": phase(4)}
    assert launch("train vae", out=tmp_path / "run", **keys) == 0
    for record in steps(tmp_path / "run").values():
        loss = record["l1"] + 0.25 * (record["align_decoder"] + record["align_encoder"])
        assert record["loss"] == pytest.approx(loss, rel=1e-5) and "kl" not in record
    assert launch("train vae", out=tmp_path / "free", phases=phase(4), kl_weight=0) == 0
    assert any(not torch.equal(t, weights(tmp_path / "free")[name]) for name, t in weights(tmp_path / "run").items())


def test_identity_is_asked_of_images_alone(launch, steps, tmp_path):
    keys = {"model": "osvae", "model_args": vae.registry.entry("osvae").tiny, "identity_weight": 2.0, "kl_weight": 0}
    phases = phase(2, frames=1) + phase(2, frames=8)
    assert launch("train vae", out=tmp_path / "run", phases=phases, **keys) == 0
    image, clip = steps(tmp_path / "run").values()
    assert image["loss"] == pytest.approx(image["l1"] + 2 * image["identity"], rel=1e-5)
    assert "identity" not in clip and clip["loss"] == pytest.approx(clip["l1"], rel=1e-5)


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


def test_compiled_blocks_give_the_same_losses(launch, steps, weights, tmp_path, vae_run, monkeypatch, capsys):
    compiled = []

    def traced(self, **options):  # all but the kernels, which take minutes to build on a CPU
        compiled.append(type(self).__name__)
        compile_(self, backend="aot_eager", **options)

    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", traced)
    assert launch("train vae", out=tmp_path / "run", compile=True, gradient_checkpointing=True) == 0
    assert compiled == ["ResBlock"] * 16
    for a, b in zip(steps(tmp_path / "run").values(), steps(vae_run).values(), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert weights(tmp_path / "run").keys() == weights(vae_run).keys()

    tiny = {"model": "sdvae", "model_args": vae.registry.entry("sdvae").tiny}
    assert launch("train vae", out=tmp_path / "other", compile=True, **tiny) == 2
    assert "has no blocks to compile" in capsys.readouterr().err


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
    assert "loss" not in records[4] and records[2].keys() == records[6].keys() | {"loss"}
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())
    assert json.loads((tmp_path / "run" / "finished.json").read_text())["skipped"] == 1


# ----------------------------------------------------------------------------------------------------------------------
# Memory that runs out


def test_memory_that_runs_out_is_one_line_and_the_run_goes_on_in_smaller_parts(launch, steps, tmp_path, capsys):
    class Small(torch.overrides.TorchFunctionMode):
        """A device that holds the backward pass of one clip at a time after the first step."""

        steps = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.Tensor.backward:
                self.steps += 1
                if self.steps == 2:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total")
            return function(*args, **(kwargs or {}))

    keys = {"out": tmp_path / "run", "phases": phase(6), "save_every": 2}
    with Small():
        assert launch("train vae", **keys) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and error[0].startswith("error: CUDA out of memory. Tried to allocate 2.00 GiB; what takes")
    assert all(
        key in error[0] for key in ("accumulate", "gradient_checkpointing", "lpips_chunk", "batch, frames or size")
    )
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["000000002"]
    assert not (tmp_path / "run" / "export").exists()

    smaller = {"accumulate": 2, "gradient_checkpointing": True, "lpips_chunk": 4}
    assert launch("train vae", **keys, **smaller) == 0
    assert list(steps(tmp_path / "run")) == [2, 4, 6]


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
    "too small for 2D": (
        {"adversarial_weight": 0.5, "discriminator": "2d"},
        "phases[0].size=16: discriminator=2d needs at least 24, or take 3d",
    ),
    "no image VAE inside": ({"identity_weight": 1.0}, "identity_weight: UniVAE has no image VAE inside"),
    "no such image VAE": ({"align_vae": "no/such/run"}, "no/such/run: no such folder"),
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


# ----------------------------------------------------------------------------------------------------------------------
# Validation


def test_a_run_validates_and_keeps_its_best_without_training_noticing(launch, steps, weights, tmp_path):
    keys = {"phases": phase(12, size=32), "holdout": 0.4, "keep": 1}
    assert launch("train vae", out=tmp_path / "plain", **keys) == 0
    assert launch("train vae", out=tmp_path / "run", **keys, validate_every=4, validate_clips=2, save_every=6) == 0
    assert steps(tmp_path / "run") == steps(tmp_path / "plain")
    plain = weights(tmp_path / "plain")
    assert all(torch.equal(tensor, plain[name]) for name, tensor in weights(tmp_path / "run").items())
    validations = [r for r in read_log(tmp_path / "run") if r.get("event") == "validation"]
    assert [record["samples"] for record in validations] == [4, 8, 12]
    best = max(validations, key=lambda record: record["val_psnr"])
    kept = {int(path.name): path for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert best["samples"] in kept and (kept[best["samples"]] / "best.json").exists()
    assert vae.load(str(tmp_path / "run" / "export-best")).spec.latent_channels == 4
