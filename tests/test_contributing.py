"""The VAE of CONTRIBUTING.md: one short file that the whole house works with."""

import copy
import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import vae
from lvdm import cli
from lvdm.media import write_mp4
from lvdm.run import read_log

BLOCKS = re.findall(r"^```python\n(.*?)^```", (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(), re.M | re.S)


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Puts the example where it says it goes, without touching the checkout, and registers it with its line."""
    (tmp_path / "mine.py").write_text(BLOCKS[0])
    spec = importlib.util.spec_from_file_location("vae.mine", tmp_path / "mine.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "vae.mine", module)
    shipped, registry = vae.names(), copy.deepcopy(vae.registry)
    monkeypatch.setattr(vae, "registry", registry)
    exec(BLOCKS[1], {"registry": registry})
    torch.manual_seed(0)
    (name,) = set(registry.names()) - set(shipped)
    return name


def test_it_is_short():
    lines = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert len(BLOCKS) == 2 and len(lines) < 40


@torch.no_grad()
def test_shapes_and_streams(example):
    model = vae.build(example, **vae.registry.entry(example).tiny).eval()
    x = torch.rand(2, 3, 11, 16, 24) * 2 - 1
    z = model.encode(x).latent_dist.mean
    y = model.decode(z, num_frames=11).sample
    assert z.shape == (2, *model.spec.latent_shape(11, 16, 24)) == (2, 4, 4, 2, 3) and y.shape == x.shape
    assert model.spec.exact_streaming and not model.spec.refines
    latents = torch.cat([p.mean for p in model.stream_encode(x.split([1, 4, 6], 2), chunk_frames=4)], 2)
    torch.testing.assert_close(latents, z, rtol=0, atol=1e-5)
    frames = torch.cat(list(model.stream_decode(z.split(1, 2), num_frames=11)), 2)
    torch.testing.assert_close(frames, y, rtol=0, atol=1e-5)
    image = model.decode(model.encode(x[:, :, 0]).latent_dist.mean).sample
    torch.testing.assert_close(image, y[:, :, 0], rtol=0, atol=1e-5)


def test_it_trains_against_an_adversary_and_fills_a_store(example, tmp_path, monkeypatch):
    monkeypatch.setenv("LVDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    t, y, x = np.mgrid[:16, :40, :40]
    (tmp_path / "videos").mkdir()
    waves = np.stack([np.sin((x + t) / k) * np.cos(y / k) for k in (5, 6, 7)], -1)
    write_mp4(tmp_path / "videos" / "a.mp4", (127.5 + 87 * waves).astype(np.uint8), 24)
    run, keys = tmp_path / "run", [f"videos={tmp_path / 'videos'}", "workers=0"]
    phases = "phases=[{samples: 4, batch: 2, frames: 5, size: 16, lr: 0.001}]"
    words = ["train", "vae", f"model={example}", "model_args={width: 8}", phases, "precision=fp32", f"out={run}"]
    assert cli.main([*words, *keys, "lpips_weight=0", "adversarial_start=2", "discriminator_width=8"]) == 0
    last = read_log(run)[-1]
    assert last["samples"] == 4 and last["adaptive"] > 0 and {"l1", "kl", "g", "d"} <= last.keys()
    assert type(vae.load(str(run))).__name__ == "PatchVAE"
    store = ["train", "latents", f"vae={run}", f"out={tmp_path / 'store'}", "frames=5", "size=16", "stride=1"]
    assert cli.main([*store, keys[0]]) == 0
