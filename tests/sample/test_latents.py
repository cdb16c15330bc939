"""A store to look at: its numbers, its checksums, one item decoded."""

import shutil

import pytest
import torch
from PIL import Image

import vae
from lvdm.data.reader import probe, read_frames
from lvdm.latents import LatentStore
from lvdm.media import to_uint8


@pytest.fixture
def copy(store, tmp_path):
    return shutil.copytree(store, tmp_path / "store")


def test_stats_are_those_of_the_manifest(store, lvdm, capsys):
    assert lvdm("latents stats", store) == 0
    text, m = capsys.readouterr().out, LatentStore(store).manifest
    assert f"{m.count} items of {len(m.sources)} videos" in text and "classes  2: left, right" in text
    assert f"latents  {tuple(m.shape)}, float32, of UniVAE ({m.vae_sha256[:12]})" in text
    for channel, (mean, std) in enumerate(zip(m.mean, m.std, strict=True)):
        assert f"channel {channel}   mean {mean:+.4f}  std {std:.4f}" in text


def test_a_flipped_bit_is_found_and_mended(copy, lvdm, videos, refiner, capsys):
    assert lvdm("latents verify", copy) == 0 and "as it was written" in capsys.readouterr().out
    shard = copy / "shard-00000.safetensors"
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert lvdm("latents verify", copy) == 1
    assert f"{shard}: its content is not what was written; delete it" in capsys.readouterr().err
    shard.unlink()
    keys = {"frames": 9, "size": 32, "stride": 2, "per_video": 2, "flip": "false"}
    assert lvdm("train latents", videos=videos, vae=refiner, out=copy, **keys) == 0
    assert shard.read_bytes() == good


@torch.no_grad()
def test_an_item_is_decoded(store, lvdm, refiner, tmp_path, capsys):
    assert lvdm("latents show", store, vae=refiner, item=4, out=tmp_path / "a.mp4") == 0
    record, model = LatentStore(store)[4], vae.load(refiner)
    info = probe(tmp_path / "a.mp4")
    assert (info.frames, info.fps, info.width, info.height) == (9, record["fps"], 32, 32)
    shown = to_uint8(model.decode(record["mean"][None], num_frames=9).sample[0]).permute(1, 2, 3, 0)
    written = read_frames(tmp_path / "a.mp4", range(9))
    assert (written.float().mean(-1) - shown.float().mean(-1)).abs().mean() < 6
    source = LatentStore(store).manifest.sources[record["source"]]
    assert f"a.mp4: {source}, frame {record['start']} on, right" in capsys.readouterr().out


def test_a_still_is_a_picture(lvdm, videos, refiner, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = {"frames": 1, "size": 32, "stride": 1, "flip": "false"}
    assert lvdm("train latents", videos=videos, vae=refiner, out="stills", **keys) == 0
    assert lvdm("latents show", "stills", vae=refiner) == 0
    assert Image.open("stills-0.png").size == (32, 32)


@pytest.mark.parametrize("what", ["item", "vae", "no store"])
def test_refused_in_one_line(what, store, lvdm, vae_of, refiner, tmp_path, capsys):
    keys = {"vae": refiner, "out": tmp_path / "a.mp4"}
    cases = {
        "item": (store, {**keys, "item": 6}, "item=6: .* has items 0 to 5"),
        "vae": (store, {**keys, "vae": vae_of(seed=3)}, "does not fit .*vae_sha256"),
        "no store": (tmp_path, keys, "is no latent store"),
    }
    folder, keys, message = cases[what]
    assert lvdm("latents show", folder, **keys) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    import re

    assert re.search(message, error)
    assert not (tmp_path / "a.mp4").exists()
