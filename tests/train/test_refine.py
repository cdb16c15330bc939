"""Stage 2: D2 alone learns, from the latents of every second frame."""

import pytest
import torch

import vae
from train.refine import Refinement
from vae.univae import UniVAE

PHASE = {"batch": 2, "lr": 1e-3, "size": 16, "frames": 9}


def test_encoder_and_decoder_stay_as_they_were(weights, vae_run, refine_run):
    before, after = weights(vae_run), weights(refine_run)
    assert {name for name in after if not name.startswith("refiner.")} == before.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert vae.load(str(refine_run)).latent_sha256() == vae.load(str(vae_run)).latent_sha256()
    d1 = {name.replace("decoder.", "refiner.", 1): tensor for name, tensor in before.items() if name[:8] == "decoder."}
    assert d1.keys() == after.keys() - before.keys()
    assert not any(torch.equal(tensor, after[name]) for name, tensor in d1.items())


def test_only_the_refiner_gets_gradients(launch, vae_run, tmp_path, monkeypatch):
    models, reached = [], []

    def grow(self, init, inject):
        models.append(add_refiner(self, init, inject))
        return models[-1]

    def spy(self, *args, **kwargs):
        backward(self, *args, **kwargs)
        reached.append({name.split(".")[0] for name, p in models[0].named_parameters() if p.grad is not None})

    add_refiner, backward = UniVAE.add_refiner, torch.Tensor.backward
    monkeypatch.setattr(UniVAE, "add_refiner", grow)
    monkeypatch.setattr(torch.Tensor, "backward", spy)
    assert launch("train refine", out=tmp_path / "run", vae=vae_run, adversarial_weight=0.5) == 0
    assert reached == [{"refiner"}, set()] * 2  # the renderer's turn, the adversary's turn
    assert not models[0].encoder.training and not models[0].decoder.training and models[0].refiner.training


def test_encoder_sees_the_even_frames_and_the_refiner_renders_all(refine_run):
    renderer = Refinement(vae.load(str(refine_run)))
    x = torch.rand(1, 3, 9, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = torch.zeros(1, 4, 2, 2, 2)
    y, mean, logvar = renderer(x, noise)
    assert y.shape == x.shape and mean.shape == logvar.shape == noise.shape
    assert torch.equal(mean, renderer.model.encode(x[:, :, 0::2]).latent_dist.mean)
    x[:, :, 1::2] = 0
    assert torch.equal(renderer(x, noise)[0], y)
    x[:, :, 2] = 0
    assert not torch.equal(renderer(x, noise)[0], y)
    # One standard deviation of noise is one of the posterior.
    moved, mean, logvar = renderer(x, noise + 1)
    assert torch.equal(moved, renderer.model.refine(mean + (0.5 * logvar).exp()).sample)


def test_loss_is_of_all_frames(launch, steps, vae_run, tmp_path, monkeypatch):
    from train import vae as program

    shapes = []
    monkeypatch.setattr(program.losses, "l1", lambda x, y: shapes.append((x.shape, y.shape)) or (x - y).abs().mean())
    assert launch("train refine", out=tmp_path / "run", vae=vae_run) == 0
    assert shapes == [((2, 3, 9, 16, 16),) * 2] * 2
    assert all("kl" not in record for record in steps(tmp_path / "run").values())


def test_middle_frames_can_weigh_more(launch, steps, vae_run, tmp_path, monkeypatch):
    from train import vae as program

    shown, l1 = [], program.losses.l1

    class OfPixels(torch.nn.Module):
        def forward(self, x, y):
            return (x - y).square().mean((1, 2, 3))

    monkeypatch.setattr(program, "LPIPS", lambda net: OfPixels())
    monkeypatch.setattr(
        program.losses, "l1", lambda x, y, weights=None: shown.append((x, y, weights)) or l1(x, y, weights)
    )
    keys = {"vae": vae_run, "middle_weight": 3.0, "lpips_weight": 1.0, "phases": [{**PHASE, "samples": 2}]}
    assert launch("train refine", out=tmp_path / "run", **keys) == 0
    (x, y, weights), record = shown[0], steps(tmp_path / "run")[2]
    assert weights.tolist() == [1, 3, 1, 3, 1, 3, 1, 3, 1]
    for name, distance in (("l1", (x - y).abs()), ("lpips", (x - y).square())):
        known, middle = (distance[:, :, first::2].mean().item() for first in (0, 1))
        assert record[name] == pytest.approx((5 * known + 3 * 4 * middle) / (5 + 3 * 4), rel=1e-5)


def test_the_first_decoder_stops_at_the_tap(refine_run):
    renderer, ran = Refinement(vae.load(str(refine_run))), []
    decoder = renderer.model.decoder
    for name, part in (("first", decoder.conv_in), ("tap", decoder.ups[1]), ("last", decoder.levels[2][0])):
        part.register_forward_hook(lambda *_, name=name: ran.append(name))
    y, _, _ = renderer(torch.zeros(1, 3, 9, 16, 16), torch.zeros(1, 4, 2, 2, 2))
    assert ran == ["first", "tap"]
    y.sum().backward()
    assert all(p.grad is None for p in decoder.parameters())


def test_export_loads_and_refines(refine_run):
    model = vae.load(str(refine_run))
    assert model.spec.refines
    with torch.no_grad():
        assert model.refine(torch.zeros(1, 4, 3, 2, 2)).sample.shape == (1, 3, 2 * 9 - 1, 16, 16)


@pytest.mark.parametrize("init", ["d1", "fresh"])
def test_fresh_refiner_starts_from_d1_or_from_noise(init, launch, weights, vae_run, tmp_path):
    still = [{**PHASE, "samples": 2, "lr": 0.0}]
    assert launch("train refine", out=tmp_path / "run", vae=vae_run, init=init, phases=still) == 0
    exported = weights(tmp_path / "run")
    d1, d2 = ({k.split(".", 1)[1]: v for k, v in exported.items() if k.startswith(p)} for p in ("decoder.", "refiner."))
    same = [torch.equal(tensor, d2[name]) for name, tensor in d1.items()]
    assert all(same) if init == "d1" else not all(same)


def test_refiner_can_start_from_a_trained_one(launch, weights, vae_run, refine_run, tmp_path):
    still = [{**PHASE, "samples": 2, "lr": 0.0}]
    assert launch("train refine", out=tmp_path / "run", vae=vae_run, init=refine_run, phases=still) == 0
    assert all(torch.equal(tensor, weights(refine_run)[name]) for name, tensor in weights(tmp_path / "run").items())


@pytest.mark.parametrize("frames, fits", [(5, "1 or 9"), (13, "9 or 17")])
def test_frames_off_the_rule_are_refused(frames, fits, launch, vae_run, tmp_path, capsys):
    phases = [{**PHASE, "samples": 4, "frames": frames}]
    assert launch("train refine", out=tmp_path / "run", vae=vae_run, phases=phases) == 2
    assert f"phases[0].frames={frames}: expected 8n+1, e.g. {fits}" in capsys.readouterr().err


@pytest.mark.parametrize("init, message", [("vae", "has no refinement decoder to start from"), ("d2", "d2: no such")])
def test_init_without_a_refiner_is_refused(init, message, launch, vae_run, tmp_path, capsys):
    init = vae_run if init == "vae" else init
    assert launch("train refine", out=tmp_path / "run", vae=vae_run, init=init) == 2
    assert message in capsys.readouterr().err


def test_vae_that_cannot_refine_is_refused(launch, tmp_path, capsys):
    vae.build("odvae", width=16, blocks=1).save_pretrained(tmp_path / "odvae")
    assert launch("train refine", out=tmp_path / "run", vae=tmp_path / "odvae") == 2
    assert "ODVAE cannot have a refinement decoder" in capsys.readouterr().err


@pytest.mark.parametrize("spec, message", [("", "no VAE given"), ("nowhere/at/all", "no such folder")])
def test_vae_that_is_not_there_is_refused(spec, message, launch, tmp_path, capsys):
    assert launch("train refine", out=tmp_path / "run", vae=spec) == 2
    assert message in capsys.readouterr().err


def test_dry_run_counts_what_is_trained(launch, vae_run, tmp_path, capsys):
    assert launch("train refine", "--dry-run", out=tmp_path / "run", vae=vae_run) == 0
    model = vae.build("univae", width=16, blocks=1, refine=True)
    trained, held = (sum(p.numel() for p in module.parameters()) for module in (model.refiner, model))
    assert f"D2, 2 clips of 9x16x16: {trained:,} of {held:,} parameters trained" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
