"""The transformer's training: draws that are pure in the sample's number, conditions, and what the export carries."""

from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

import dit
from dit.conditioning import LabelEmbedding
from dit.latte import Latte
from lvdm import diffusion
from lvdm.data.reader import iter_frames
from lvdm.latents import LatentSpace, LatentStore
from lvdm.meter import Meter
from lvdm.rng import generator, item_at
from train import dit as program
from train import preview
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


@pytest.fixture
def steps_of_latte(monkeypatch):
    """What the steps of a run show the model, and how it answers: (model, condition, output) of each."""
    seen, forward = [], Latte.forward

    def spy(self, x, timestep, condition=None):
        output = forward(self, x, timestep, condition)
        if x.device.type != "meta":  # where FLOPs are counted
            seen.append((self, condition, output))
        return output

    monkeypatch.setattr(Latte, "forward", spy)
    return seen


def draws_of(store, **keys) -> Draws:
    return Draws(TrainDiT(latents=str(store), **keys))


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
    collate, embed = program.collate, LabelEmbedding.forward

    def spy(self, labels):
        shown.extend(labels.tolist() if labels.device.type != "meta" else [])  # where FLOPs are counted
        return embed(self, labels)

    monkeypatch.setattr(program, "collate", lambda items: batches.append(collate(items)) or batches[-1])
    monkeypatch.setattr(LabelEmbedding, "forward", spy)
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


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_step_is_computed_as_the_keys_say(precision, dtype, launch, store, tmp_path, monkeypatch, steps_of_latte):
    """All but its results, which are to be the same."""
    keys = {"latents": store, "phases": STILL, "precision": precision}
    if precision == "bf16":
        keys |= {"attention": "math", "gradient_checkpointing": True, "compile": True}
    compiled = []
    monkeypatch.setattr(Latte, "compile_repeated_blocks", lambda self: compiled.append(self))
    assert launch("train dit", out=tmp_path / "run", **keys) == 0
    ((model, _, output),) = steps_of_latte
    assert output.dtype == dtype
    assert {block.attention.backend for block in model.blocks} == {keys.get("attention", "sdpa")}
    assert model.gradient_checkpointing == keys.get("gradient_checkpointing", False)
    assert compiled == ([model] if "compile" in keys else [])


def test_the_error_is_told_by_quarter_of_the_timesteps():
    alone = SimpleNamespace(reduce=lambda parts, how: parts)
    for timesteps in (
        torch.tensor([0, 249, 250, 499, 500, 749, 999]),
        torch.tensor([0.5, 249.9, 250, 499, 500, 749, 999]),
    ):
        meter, mse = Meter(alone), torch.tensor([1.0, 2.0, 4.0, 6.0, 10.0, 20.0, 40.0])
        program.measure(meter, {"loss": 2 * mse, "mse": mse}, timesteps)
        meter.step()
        means = meter.read()
        assert [means[f"mse_q{quarter}"] for quarter in (1, 2, 3, 4)] == [1.5, 5.0, 15.0, 40.0]
        assert means["loss"] == 2 * means["mse"] == pytest.approx(2 * 83 / 7)


@pytest.mark.parametrize("keys", [{"workers": 1}, {"gradient_checkpointing": True}])
def test_how_it_is_computed_changes_nothing(keys, launch, steps, store, dit_run, tmp_path):
    assert launch("train dit", out=tmp_path / "run", latents=store, **keys) == 0
    assert steps(tmp_path / "run") == steps(dit_run)


def test_the_reference_attention_gives_the_same_losses(launch, steps, store, dit_run, tmp_path):
    assert launch("train dit", out=tmp_path / "run", latents=store, attention="math") == 0
    for ours, theirs in zip(steps(tmp_path / "run").values(), steps(dit_run).values(), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run(launch, store, tmp_path, capsys):
    phases = [{"samples": 16, "batch": 4, "lr": 1e30}]
    assert launch("train dit", out=tmp_path / "run", latents=store, phases=phases) == 2
    error = capsys.readouterr().err
    assert "not finite at sample 4 (clips: " in error and "no checkpoint was written yet" in error


# ----------------------------------------------------------------------------------------------------------------------
# Rectified flow


def test_flow_draws_timesteps_of_its_own_and_learns_a_velocity(launch, steps, store, tmp_path):
    noise, flow = draws_of(store), draws_of(store, objective="flow")
    for i in range(5):
        assert torch.equal(noise(i)["latent"], flow(i)["latent"]) and torch.equal(noise(i)["noise"], flow(i)["noise"])
        assert flow(i)["timestep"].dtype == torch.float32 and 0 < flow(i)["timestep"] < 1000
    phases = [{"samples": 1600, "batch": 16, "lr": 3e-3}]
    assert launch("train dit", out=tmp_path / "run", latents=store, objective="flow", phases=phases) == 0
    config = dit.load(str(tmp_path / "run")).config
    assert config.objective == "flow" and not config.learn_sigma
    records = list(steps(tmp_path / "run").values())
    assert "vlb" not in records[0] and all(record["loss"] == record["mse"] for record in records)
    mse = [record["mse"] for record in records]
    assert sum(mse[-10:]) < 0.95 * sum(mse[:10])  # half of a velocity is data, here hardly more than noise


# ----------------------------------------------------------------------------------------------------------------------
# Joint training with images


@pytest.fixture(scope="session")
def stills(launch, vae_run):
    """A store of single frames, of the same classes."""
    out = vae_run.with_name("stills")
    assert launch("train latents", out=out, vae=vae_run, frames=1, per_video=3) == 0
    return out


def test_images_follow_the_frames_of_each_video(store, stills):
    alone, joint = draws_of(store), draws_of(store, images=str(stills), images_per_video=3)
    one, many = alone(7), joint(7)
    assert many["latent"].shape == (4, 3 + 3, 2, 2) and joint.shape == (4, 6, 2, 2)
    for key in ("latent", "noise"):  # the video's own draws are what they are without images
        assert torch.equal(many[key][:, :3], one[key])
    assert torch.equal(many["timestep"], one["timestep"])
    stored = LatentStore(stills)
    shown = [joint(sample)["image_label"] for sample in range(len(stored) // 3)]
    assert sorted(torch.cat(shown).tolist()) == sorted(stored[i]["label"] for i in range(len(stored)))  # an epoch
    assert not torch.equal(joint(7)["latent"], joint(8)["latent"])


def test_images_are_trained_on(launch, steps, store, stills, dit_run, tmp_path):
    keys = {"latents": store, "images": stills, "images_per_video": 2}
    assert launch("train dit", out=tmp_path / "run", **keys) == 0
    joint, alone = steps(tmp_path / "run"), steps(dit_run)
    assert joint.keys() == alone.keys() and joint[4]["mse"] != alone[4]["mse"]
    config = dit.load(str(tmp_path / "run")).config
    assert (config.frames, config.num_classes) == (3, 2)  # sampled as any other


def test_the_model_sees_the_labels_of_images_each_dropped_by_its_own_draw(
    launch, store, stills, tmp_path, monkeypatch, steps_of_latte
):
    batches, collate = [], program.collate
    monkeypatch.setattr(program, "collate", lambda items: batches.append(collate(items)) or batches[-1])
    keys = {"images": str(stills), "images_per_video": 2, "label_dropout": 0.5}
    assert launch("train dit", out=tmp_path / "run", latents=store, **keys) == 0
    stored, draws = LatentStore(stills), draws_of(store, **keys)
    assert len(batches) == len(steps_of_latte) == 4
    shown = torch.cat([condition.image_labels for _, condition, _ in steps_of_latte])
    dropped = torch.cat([batch.image_dropped for batch in batches])
    of_store = [stored[item_at(0, number, len(stored))]["label"] for number in range(2 * 16)]
    assert torch.equal(shown, torch.tensor(of_store).view(16, 2).masked_fill(dropped, -1))
    assert set(shown.flatten().tolist()) == {-1, 0, 1} and (dropped[:, 0] != dropped[:, 1]).any()
    rate = torch.stack([draws(sample)["image_dropped"] for sample in range(300)]).double().mean()
    assert abs(rate - 0.5) < 4 * 0.5 / 600**0.5


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"images_per_video": 8}, "images_per_video=8: expected images=STORE beside it"),
        ({"images": "elsewhere"}, "images=elsewhere: expected images_per_video beside it"),
    ],
)
def test_joint_training_needs_a_store_of_images_and_their_number(keys, message, launch, store, tmp_path, capsys):
    assert launch("train dit", out=tmp_path / "run", latents=store, **keys) == 2
    assert message in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_images_of_another_vae_size_or_length_are_refused(launch, store, vae_run, tmp_path, capsys):
    assert launch("train dit", out=tmp_path / "run", latents=store, images=store, images_per_video=1) == 2
    assert "shape: store says [4, 3, 2, 2], asked [4, 1, 2, 2]" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Previews


def test_previews_show_the_averaged_weights_from_the_same_noise(
    launch, steps, weights, store, vae_run, dit_run, tmp_path, monkeypatch
):
    drawn, draw = [], preview.draw

    def spy(model, condition, generators, *rest):
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        drawn.append((tensors, [g.get_state() for g in generators], condition.labels.tolist()))
        return draw(model, condition, generators, *rest)

    monkeypatch.setattr(preview, "draw", spy)
    keys = {"preview_every": 8, "preview_vae": vae_run, "preview_count": 3, "preview_steps": 2}
    assert launch("train dit", out=tmp_path / "run", latents=store, **keys) == 0
    previews = tmp_path / "run" / "previews"
    assert sorted(p.name for p in previews.iterdir()) == [f"{n:09d}.{s}" for n in (8, 16) for s in ("mp4", "png")]
    video = torch.stack(list(map(torch.as_tensor, iter_frames(previews / "000000016.mp4"))))
    assert video.shape == (9, 16, 3 * 16, 3)  # side by side
    (early, *_), (late, *_) = drawn
    assert all(torch.equal(tensor, late[name]) for name, tensor in weights(tmp_path / "run").items())  # the export's
    assert not torch.equal(early["head.linear.weight"], late["head.linear.weight"])
    noise = [generator(0, "sample", i).get_state() for i in range(3)]  # that of lvdm sample
    for _, states, labels in drawn:
        assert all(torch.equal(a, b) for a, b in zip(states, noise, strict=True)) and labels == [0, 1, 0]
    assert steps(tmp_path / "run") == steps(dit_run)  # and training does not notice
    assert all(torch.equal(tensor, weights(tmp_path / "run")[name]) for name, tensor in weights(dit_run).items())


def test_previews_need_the_vae_of_the_store(launch, store, refine_run, tmp_path, capsys):
    assert launch("train dit", out=tmp_path / "run", latents=store, preview_every=4) == 2
    assert "preview_vae: expected the VAE of the store" in capsys.readouterr().err
    keys = {"preview_every": 4, "preview_vae": refine_run, "condition": "none", "preview_guidance": 7}
    assert launch("train dit", out=tmp_path / "run", latents=store, **keys) == 2
    error = capsys.readouterr().err
    assert "guidance=7.0: this transformer is unconditional" in error and "DiT:" not in error  # before the first step
    other = tmp_path / "vae"
    assert launch("train vae", out=other, seed=1) == 0
    assert launch("train dit", out=tmp_path / "run", latents=store, preview_every=4, preview_vae=other) == 2
    assert f"preview_vae={other}: not the VAE whose latents are in {store}" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Steps that go wrong


def test_a_bad_micro_batch_is_left_out_of_its_step(launch, steps, store, tmp_path, monkeypatch):
    """Its neighbours still count, and where there are none there is no step."""
    losses, calls = diffusion.GaussianDiffusion.losses, []

    def spoilt(self, *args):
        calls.append(len(calls))
        terms = losses(self, *args)
        return {name: value * float("nan") for name, value in terms.items()} if len(calls) in (2, 5, 6) else terms

    keys = {"latents": store, "accumulate": 2, "non_finite": "skip", "ema": 0.0}
    monkeypatch.setattr(diffusion.GaussianDiffusion, "losses", spoilt)
    assert launch("train dit", out=tmp_path / "run", **keys) == 0
    records = steps(tmp_path / "run")
    assert [records[n]["skipped"] for n in (4, 8, 12, 16)] == [1, 1, 3, 3]
    assert [sorted(records[n].keys() & {"loss", "grad"}) for n in (4, 8, 12)] == [["grad", "loss"]] * 2 + [[]]


def test_a_gradient_that_is_not_finite_stops_the_run(launch, store, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *_: torch.tensor(float("inf")))
    assert launch("train dit", out=tmp_path / "run", latents=store) == 2
    assert "the gradient is not finite at sample 0 (clips: " in capsys.readouterr().err


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
