"""The transformer's training: draws that are pure in the sample's number, conditions, and what the export carries."""

from dataclasses import asdict

import pytest
import torch

import dit
from lvdm.latents import LatentSpace, LatentStore
from train import dit as program
from train.configs import TrainDiT
from train.dit import Draws

STILL = [{"samples": 4, "batch": 4, "lr": 0.0}]


@pytest.fixture(scope="session")
def unlabelled(launch, vae_run):
    """A store without classes."""
    out = vae_run.with_name("unlabelled")
    assert launch("train latents", out=out, vae=vae_run, labels="none") == 0
    return out


def killed(*_):
    """Stands in for the step at which a run dies."""
    raise KeyboardInterrupt


def draws_of(store, **keys) -> Draws:
    return Draws(TrainDiT(latents=str(store), **keys), LatentStore(store))


# ----------------------------------------------------------------------------------------------------------------------
# Draws


def test_draws_are_a_function_of_seed_and_sample(store):
    one, two = draws_of(store), draws_of(store)
    later = [one(sample) for sample in (7, 8, 0)]
    for sample, expected in zip((0, 8, 7), reversed(later), strict=True):
        drawn = two(sample)
        assert drawn.keys() == expected.keys() and drawn["name"] == expected["name"]
        assert all(torch.equal(drawn[key], expected[key]) for key in drawn if key != "name")
    assert not torch.equal(one(7)["noise"], one(8)["noise"])
    assert not torch.equal(one(7)["noise"], draws_of(store, seed=1)(7)["noise"])


def test_an_item_is_drawn_anew_in_each_epoch(store):
    stored, draws = LatentStore(store), draws_of(store)
    epochs = [[draws(first + i) for i in range(len(stored))] for first in (0, len(stored))]
    names = [[drawn["name"] for drawn in epoch] for epoch in epochs]
    assert sorted(names[0]) == sorted(names[1]) and names[0] != names[1]
    for drawn in epochs[0]:
        record = stored.scale.denormalise(drawn["latent"])
        assert all(not torch.equal(record, stored[i]["mean"]) for i in range(len(stored)))  # a sample, not the mean


def test_latents_are_normalised_and_noise_and_timesteps_spread(store):
    draws = draws_of(store)
    drawn = [draws(sample) for sample in range(600)]
    latents, noise = (torch.stack([d[key] for d in drawn]).transpose(0, 1).flatten(1) for key in ("latent", "noise"))
    assert latents.mean(1).abs().max() < 0.1 and (latents.std(1) - 1).abs().max() < 0.1
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    timesteps = torch.stack([d["timestep"] for d in drawn])
    assert 0 <= timesteps.min() < 30 and 970 <= timesteps.max() <= 999
    assert abs(timesteps.double().mean() - 499.5) < 4 * 288.7 / 600**0.5


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_labels_are_dropped_at_their_rate(rate, store):
    draws = draws_of(store, label_dropout=rate)
    share = sum(bool(draws(sample)["dropped"]) for sample in range(1500)) / 1500
    assert abs(share - rate) <= 4 * (rate * (1 - rate) / 1500) ** 0.5


def test_timestep_does_not_hang_on_the_label_dropout(store):
    one, two = (draws_of(store, label_dropout=rate) for rate in (0.0, 0.5))
    assert all(torch.equal(one(i)["timestep"], two(i)["timestep"]) for i in range(20))


# ----------------------------------------------------------------------------------------------------------------------
# Learning


def test_loss_falls(launch, steps, store, tmp_path):
    phases = [{"samples": 1600, "batch": 16, "lr": 3e-3}]
    assert launch("train dit", out=tmp_path / "run", latents=store, phases=phases) == 0
    mse = [record["mse"] for record in steps(tmp_path / "run").values()]
    assert sum(mse[-10:]) < 0.5 * sum(mse[:10])


def test_export_carries_its_latents(store, dit_run, vae_run):
    model, stored = dit.load(str(dit_run)), LatentStore(store)
    assert dict(model.config.latents) == asdict(LatentSpace.of(stored))
    carried = LatentSpace(**model.config.latents)
    assert carried.vae_sha256 == stored.manifest.vae_sha256 and carried.classes == ["left", "right"]
    assert (carried.mean, carried.std) == (stored.manifest.mean, stored.manifest.std)
    assert (carried.num_frames, carried.fps, carried.stride) == (9, 12.0, 2)


@pytest.mark.parametrize("condition, classes", [("auto", 2), ("class", 2), ("none", 0)])
def test_condition_of_a_store_with_classes(condition, classes, launch, store, tmp_path):
    assert launch("train dit", out=tmp_path / "run", latents=store, condition=condition, phases=STILL) == 0
    config = dit.load(str(tmp_path / "run")).config
    assert (config.condition, config.num_classes) == ("class" if classes else "none", classes)


def test_store_without_classes_trains_unconditionally(launch, unlabelled, tmp_path, capsys):
    assert launch("train dit", out=tmp_path / "run", latents=unlabelled) == 0
    assert dit.load(str(tmp_path / "run")).config.condition == "none"
    assert launch("train dit", out=tmp_path / "other", latents=unlabelled, condition="class") == 2
    assert "condition=class: the store" in (error := capsys.readouterr().err) and "labels=folder" in error


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_model_sees_the_labels_that_are_not_dropped(rate, launch, store, tmp_path, monkeypatch):
    batches, shown = [], []
    collate, embed = program.collate, dit.registry.entry("latte-s/2").resolve()._embed

    def spy(self, timestep, condition):
        shown.extend(condition.labels.tolist())
        return embed(self, timestep, condition)

    monkeypatch.setattr(program, "collate", lambda items: batches.append(collate(items)) or batches[-1])
    monkeypatch.setattr("dit.latte.Latte._embed", spy)
    keys = {"phases": [{"samples": 24, "batch": 4, "lr": 1e-3}], "label_dropout": rate}
    assert launch("train dit", out=tmp_path / "run", latents=store, **keys) == 0
    expected = [-1 if d else label for b in batches for d, label in zip(b.dropped, b.label.tolist(), strict=True)]
    assert shown == expected
    assert set(shown) == {0.0: {0, 1}, 0.5: {-1, 0, 1}, 1.0: {-1}}[rate]


def test_accumulation_gives_the_same_losses(launch, steps, store, tmp_path):
    keys = {"latents": store, "phases": [{"samples": 32, "batch": 8, "lr": 1e-3}], "clip": 0.01}
    assert launch("train dit", out=tmp_path / "one", **keys) == 0
    assert launch("train dit", out=tmp_path / "four", **keys, accumulate=4) == 0
    for a, b in zip(steps(tmp_path / "one").values(), steps(tmp_path / "four").values(), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("keys", [{"workers": 1}, {"gradient_checkpointing": True}])
def test_how_it_is_computed_changes_nothing(keys, launch, steps, store, dit_run, tmp_path):
    assert launch("train dit", out=tmp_path / "run", latents=store, **keys) == 0
    assert steps(tmp_path / "run") == steps(dit_run)


def test_a_loss_that_is_not_finite_stops_the_run(launch, store, tmp_path, capsys):
    phases = [{"samples": 16, "batch": 4, "lr": 1e30}]
    assert launch("train dit", out=tmp_path / "run", latents=store, phases=phases) == 2
    error = capsys.readouterr().err
    assert "not finite at sample 4 (clips: " in error and "no checkpoint was written yet" in error


# ----------------------------------------------------------------------------------------------------------------------
# Where it starts from


def test_init_takes_the_weights_of_a_run(launch, weights, store, dit_run, tmp_path):
    keys = {"latents": store, "init": dit_run, "phases": STILL, "seed": 5}
    assert launch("train dit", out=tmp_path / "run", **keys) == 0
    assert all(torch.equal(tensor, weights(dit_run)[name]) for name, tensor in weights(tmp_path / "run").items())


@pytest.mark.parametrize("keys", [{"frames": 5}, {"size": 32}])
def test_store_of_another_shape_than_init_is_refused(keys, launch, vae_run, dit_run, tmp_path, capsys):
    assert launch("train latents", out=tmp_path / "latents", vae=vae_run, per_video=1, **keys) == 0
    assert launch("train dit", out=tmp_path / "run", latents=tmp_path / "latents", init=dit_run) == 2
    shape = LatentStore(tmp_path / "latents").manifest.shape
    assert f"made for latents of [4, 3, 2, 2], those of {tmp_path}/latents are {shape}" in capsys.readouterr().err


def test_init_of_another_architecture_is_refused(launch, store, dit_run, tmp_path, capsys):
    args = {"depth": 4, "width": 32, "heads": 2}
    assert launch("train dit", out=tmp_path / "run", latents=store, init=dit_run, model_args=args) == 2
    error = capsys.readouterr().err
    assert f"init={dit_run}" in error and "another architecture" in error


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def test_dry_run_counts_and_writes_nothing(launch, store, dit_run, tmp_path, capsys):
    assert launch("train dit", "--dry-run", out=tmp_path / "run", latents=store) == 0
    count = sum(p.numel() for p in dit.load(str(dit_run)).parameters())
    out = capsys.readouterr().out
    assert f"latte-s/2, 4 latents of (4, 3, 2, 2): {count:,} of {count:,} parameters trained" in out
    assert not (tmp_path / "run").exists()


BAD = {
    "no store": ({"latents": ""}, "is no latent store"),
    "no out": ({"out": ""}, "out: expected the folder"),
    "unknown model": ({"model": "latte-s/3"}, "did you mean 'latte-s/"),
    "samples off the batch": ({"phases": [{"samples": 6, "batch": 4}]}, "phases[0].samples=6: must be a multiple"),
    "batch off accumulate": ({"accumulate": 3}, "phases[0].batch=4: must be divisible by accumulate=3"),
    "patch off the latents": ({"model": "latte-s/4"}, "expected multiples of patch=4"),
    "unknown condition": ({"condition": "text"}, "condition='text': expected one of auto, class, none"),
}


@pytest.mark.parametrize("keys, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_2(keys, message, launch, store, tmp_path, capsys):
    assert launch("train dit", **{"out": tmp_path / "run", "latents": store, **keys}) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_incomplete_store_is_refused(launch, vae_run, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("lvdm.latents.LatentWriter.finish", killed)
        assert launch("train latents", out=tmp_path / "latents", vae=vae_run) == 130
    assert launch("train dit", out=tmp_path / "run", latents=tmp_path / "latents") == 2
    assert "the latent store is incomplete" in capsys.readouterr().err
