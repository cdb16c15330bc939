"""The store holds what the VAE says of the clips, whoever wrote it and however often it was interrupted."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lvdm.latents
import vae
from lvdm.cli import main
from lvdm.data.clips import ClipPolicy, Clips, Cut, Window
from lvdm.data.index import open_index
from lvdm.data.reader import iter_frames
from lvdm.errors import UserError
from lvdm.latents import LatentStore, LatentWriter, load_latent
from lvdm.media import to_float, write_mp4


def killed(*_):
    """Stands in for the step at which a run dies."""
    raise KeyboardInterrupt


def encoded(model, clip) -> tuple[torch.Tensor, torch.Tensor]:
    """The posterior of a clip in the middle of a batch of four."""
    batch = torch.rand(4, *clip.video.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch[2] = to_float(clip.video)
    with torch.no_grad():
        posterior = model.encode(batch).latent_dist
    return posterior.mean[2], posterior.logvar[2]


def test_store_holds_the_posterior_of_each_clip(store, videos, vae_run):
    clips = Clips(open_index(videos), ClipPolicy(frames=9, stride=2, size=16, holdout=0.0, split="all"), seed=0)
    model, stored = vae.load(str(vae_run)), LatentStore(store)
    windows = clips.grid(2)
    assert len(stored) == 2 * len(windows) == 12
    for item in range(len(stored)):
        window = windows[item // 2]
        clip = clips.read(Window(window.row_index, window.start, flip=item % 2 == 1))
        record = stored[item]
        mean, logvar = encoded(model, clip)
        assert torch.equal(record["mean"], mean) and torch.equal(record["logvar"], logvar)
        assert stored.manifest.sources[record["source"]] == clip.source
        assert stored.manifest.classes[record["label"]] == clip.source.split("/")[0]
        assert (record["start"], record["flip"]) == (clip.start, item % 2 == 1)
        assert (record["num_frames"], record["fps"]) == (9, 12.0)


def test_flips_are_the_mirrored_clips(store, videos, vae_run, launch, tmp_path):
    assert launch("train latents", out=tmp_path / "run", vae=vae_run, flip=False) == 0
    plain, both = LatentStore(tmp_path / "run"), LatentStore(store)
    assert [both[i]["flip"] for i in range(4)] == [False, True, False, True]
    assert not any(plain[i]["flip"] for i in range(len(plain)))
    for i in range(len(plain)):
        assert plain[i]["start"] == both[2 * i]["start"] == both[2 * i + 1]["start"]
        assert not torch.equal(both[2 * i]["mean"], both[2 * i + 1]["mean"])


def test_manifest_says_how_it_was_made(store, vae_run):
    manifest, model = LatentStore(store).manifest, vae.load(str(vae_run))
    assert manifest.vae_sha256 == model.latent_sha256()
    assert manifest.vae["class"] == "UniVAE" and manifest.vae["config"]["width"] == 16
    assert (manifest.num_frames, manifest.stride, manifest.size, manifest.crop) == (9, 2, [16, 16], "center")
    assert manifest.shape == [4, 3, 2, 2] and manifest.count == 12 and manifest.shards == 3
    assert manifest.sources == ["left/a.mp4", "left/b.mp4", "right/c.mp4"] and manifest.classes == ["left", "right"]
    asked = {"per_video": 2, "flip": True, "split": "train", "holdout": 0.0, "precision": "fp32"}
    assert asked.items() <= manifest.data.items()


def test_statistics_are_those_of_posterior_samples(store):
    stored = LatentStore(store)
    records = [stored[i] for i in range(len(stored))]
    mean, logvar = (
        torch.stack([r[key] for r in records]).double().transpose(0, 1).flatten(1) for key in ("mean", "logvar")
    )
    std = (mean.var(1, correction=0) + logvar.exp().mean(1)).sqrt()
    assert stored.manifest.mean == pytest.approx(mean.mean(1).tolist(), rel=1e-9)
    assert stored.manifest.std == pytest.approx(std.tolist(), rel=1e-9)


def test_store_of_a_refining_vae_is_that_of_its_stage_1(store, vae_run, refine_run, launch, tmp_path):
    assert launch("train latents", out=tmp_path / "run", vae=refine_run) == 0
    one, two = LatentStore(store), LatentStore(tmp_path / "run")
    assert one.manifest.vae_sha256 == two.manifest.vae_sha256
    assert all(torch.equal(one[i]["mean"], two[i]["mean"]) for i in range(len(one)))


def test_killed_and_run_again_is_byte_identical(store, vae_run, launch, contents, tmp_path, monkeypatch):
    write = LatentWriter.write

    def dies(self, shard, records):
        if shard == 1:
            raise KeyboardInterrupt
        write(self, shard, records)

    out = tmp_path / "run"
    monkeypatch.setattr(LatentWriter, "write", dies)
    assert launch("train latents", out=out, vae=vae_run) == 130
    assert not json.loads((out / "manifest.json").read_text())["complete"] and not (out / "finished.json").exists()
    written = []
    monkeypatch.setattr(LatentWriter, "write", lambda self, *args: written.append(args[0]) or write(self, *args))
    assert launch("train latents", out=out, vae=vae_run) == 0
    assert written == [1, 2]
    once, twice = contents(store), contents(out)
    assert once.keys() == twice.keys()
    assert all(once[name] == twice[name] for name in once if name != "config.yaml")  # which says where it is


def test_every_window_of_the_held_out_part(vae_run, launch, tmp_path):
    keys = {"per_video": 0, "split": "val", "holdout": 0.5, "frames": 5, "stride": 1, "flip": False}
    assert launch("train latents", out=tmp_path / "run", vae=vae_run, **keys) == 0
    stored = LatentStore(tmp_path / "run")
    assert [stored[i]["start"] for i in range(len(stored))] == [24, 29, 34, 39] * 3


def test_videos_without_classes(vae_run, launch, tmp_path):
    assert launch("train latents", out=tmp_path / "run", vae=vae_run, labels="none") == 0
    stored = LatentStore(tmp_path / "run")
    assert stored.manifest.classes == [] and {stored[i]["label"] for i in range(len(stored))} == {0}


class TestAnotherVAE:
    """into the same folder is refused, and nothing is lost."""

    def test_of_another_name(self, store, refine_run, launch, contents, capsys):
        before = contents(store)
        assert launch("train latents", out=store, vae=refine_run) == 2
        assert "belongs to another config (different: vae)" in capsys.readouterr().err
        assert contents(store) == before

    def test_of_the_same_name_but_trained_anew(self, launch, contents, tmp_path, capsys, monkeypatch):
        model = vae.build("univae", width=16, blocks=1)
        model.save_pretrained(tmp_path / "vae")
        keys = {"out": tmp_path / "run", "vae": tmp_path / "vae"}
        with monkeypatch.context() as patch:
            patch.setattr(LatentWriter, "finish", killed)
            assert launch("train latents", **keys) == 130
        before = contents(tmp_path / "run")
        model.encoder.conv_out.weight.data.zero_()
        model.save_pretrained(tmp_path / "vae")
        assert launch("train latents", **keys) == 2
        error = capsys.readouterr().err
        assert "holds another latent store" in error and "vae_sha256" in error
        assert contents(tmp_path / "run") == before


def test_latents_that_are_not_finite_are_refused(launch, tmp_path, capsys):
    model = vae.build("univae", width=16, blocks=1)
    model.encoder.conv_out.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "vae")
    assert launch("train latents", out=tmp_path / "run", vae=tmp_path / "vae") == 2
    assert "item 0 (left/a.mp4): the VAE gave NaN or infinity" in capsys.readouterr().err


def test_dry_run_counts_and_writes_nothing(launch, vae_run, tmp_path, capsys):
    assert launch("train latents", "--dry-run", out=tmp_path / "run", vae=vae_run) == 0
    assert "12 clips of 3 videos, latents (4, 3, 2, 2), 0.0 MiB on disk" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


BAD = {
    "no vae": ({"vae": ""}, "no VAE given"),
    "size off 8": ({"size": 20}, "size=20: must be divisible by 8, e.g. 16 or 24"),
    "clips too long": ({"frames": 48}, "48 frames at stride 2 need 95 consecutive frames"),
    "unknown split": ({"split": "test"}, "split='test': expected one of train, val, all"),
}


@pytest.mark.parametrize("keys, message", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_2(keys, message, launch, vae_run, tmp_path, capsys):
    assert launch("train latents", **{"out": tmp_path / "run", "vae": vae_run, **keys}) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_writes_the_same_bytes(processes, command, store, vae_run, tmp_path):
    """`store` was written by this one process; its shards have four items, the last one fewer."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    argv = [*torchrun, "train.latents", *command("train latents", out=tmp_path / "store", vae=vae_run)[2:]]
    env = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"} | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in store.glob("*.safetensors"))
    assert len(names) == 3 == len(list((tmp_path / "store").glob("*.safetensors")))
    for name in [*names, "manifest.json"]:
        assert (tmp_path / "store" / name).read_bytes() == (store / name).read_bytes(), name


def test_a_disk_that_is_full_is_told_before_and_while(launch, store, vae_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    assert launch("train latents", out=tmp_path / "a", vae=vae_run) == 2
    assert re.search(r"0\.00 GB are needed for the latents, only 0\.00 GB are free", capsys.readouterr().err)
    monkeypatch.undo()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    whole = LatentStore(store)
    writer = LatentWriter(tmp_path / "b", whole.manifest)
    monkeypatch.setattr(lvdm.latents, "write_bytes", full)
    with pytest.raises(UserError, match=r"shard-00000\.safetensors: cannot be written \(No space left on device\)"):
        writer.write(0, [whole[i] for i in whole.manifest.items(0)])


# ---------------------------------------------------------------------------------------------------------------------
# One video to one latent file


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """14 frames of 42x50 (height x width) at 12.5 fps."""
    path = tmp_path_factory.mktemp("odd") / "odd.mp4"
    t, y, x = np.mgrid[:14, :42, :50]
    waves = np.stack([np.sin((x + t) / k) * np.cos(y / k) for k in (5, 6, 7)], -1)
    write_mp4(path, (127.5 + 87 * waves).astype(np.uint8), 12.5)
    return path


def encode(**keys) -> int:
    return main(["train", "latents", *(f"{key}={value}" for key, value in keys.items())])


def whole(path) -> torch.Tensor:
    frames = torch.stack([torch.as_tensor(frame) for frame in iter_frames(path)])
    return to_float(frames.permute(3, 0, 1, 2)[None])


@pytest.mark.parametrize("norm", ["frame", "clip"], ids=["exact", "inexact"])
@torch.no_grad()
def test_a_video_of_any_size_and_length_becomes_one_file(norm, odd, tmp_path):
    torch.manual_seed(0)
    vae.build("univae", width=16, blocks=1, norm=norm).save_pretrained(tmp_path / "vae")
    out = tmp_path / "new" / "odd.safetensors"
    assert encode(videos=odd, vae=tmp_path / "vae", out=out) == 0
    file, model = load_latent(out), vae.load(str(tmp_path / "vae"))
    assert (file.num_frames, file.fps, tuple(file.size)) == (14, 12.5, (42, 50))
    padded = F.pad(whole(odd), (0, 6, 0, 6, 0, 0), mode="replicate")
    torch.testing.assert_close(file.latent, model.encode(padded).latent_dist.mean[0], rtol=0, atol=1e-5)
    assert file.vae_sha256 == model.latent_sha256()


@torch.no_grad()
def test_frames_stride_and_size_choose_of_the_one_video(odd, vae_run, tmp_path):
    out = tmp_path / "odd.safetensors"
    assert encode(videos=odd, vae=vae_run, out=out, frames=5, stride=2, size=24) == 0
    file, model = load_latent(out), vae.load(str(vae_run))
    assert (file.num_frames, file.fps, tuple(file.size)) == (5, 6.25, (24, 24))
    frames = torch.stack([torch.as_tensor(frame) for frame in iter_frames(odd)])[:10:2]
    middle = Cut(24, 0.5, 0.5, False).of(frames)  # of 24x29: the very pixels that a store would have
    mean = model.encode(to_float(middle[None])).latent_dist.mean[0]
    torch.testing.assert_close(file.latent, mean, rtol=0, atol=1e-5)


def test_one_file_of_a_folder_and_codes_are_refused(launch, videos, vae_run, tmp_path, capsys):
    out = tmp_path / "a.safetensors"
    assert encode(videos=videos, vae=vae_run, out=out, dtype="bfloat16") == 2
    assert f"dtype: is of a store; out={out} names one file" in capsys.readouterr().err
    assert encode(videos=videos, vae=vae_run, out=out) == 2
    assert "names one latent file, so expected one video file" in capsys.readouterr().err
    vae.build("vqgan", width=8, blocks=1, z=8, codes=16).save_pretrained(tmp_path / "vqgan")
    assert launch("train latents", out=tmp_path / "store", vae=tmp_path / "vqgan") == 2
    assert "VQGAN is discrete, it has codes and no posterior" in capsys.readouterr().err
    assert not out.exists() and not (tmp_path / "store").exists()
