"""Rendering latent files: streams equal whole clips, D2 comes at twice the rate, and only the right VAE renders."""

import shutil
from pathlib import Path

import pytest
import torch

import vae
from lvdm.data.reader import probe, read_frames
from lvdm.latents import save_latent
from lvdm.media import to_uint8
from lvdm.rng import generator
from sample.render import frames


def latent(key: str = "latent", t: int = 5) -> torch.Tensor:
    return torch.randn(4, t, 4, 6, generator=generator(0, key))


@pytest.fixture(scope="module")
def file_for(tmp_path_factory):
    """`file_for(vae, num_frames)`: a latent file of that VAE, at 10 fps."""

    def write(spec: str, num_frames: int, key: str = "latent") -> Path:
        path = tmp_path_factory.mktemp("latents") / f"{key}.safetensors"
        z = latent(key, vae.load(spec).spec.latent_frames(num_frames))
        save_latent(path, z, num_frames, 10.0, vae.load(spec).latent_sha256())
        return path

    return write


@pytest.mark.parametrize("refine", [False, True])
@torch.no_grad()
def test_stream_equals_the_whole_clip(refine, refiner):
    model, z = vae.load(refiner).double(), latent()[None, :, :, :2, :2]
    pieces = list(frames(model, z, 14, refine))
    whole = (model.refine if refine else model.decode)(z.double()).sample
    wanted = 27 if refine else 14
    assert len(pieces) > 1 and sum(piece.shape[2] for piece in pieces) == wanted
    assert torch.equal(to_uint8(torch.cat(pieces, 2)), to_uint8(whole[:, :, :wanted]))
    assert to_uint8(whole).float().std() > 20  # no flat grey, which would equal itself in any order


@pytest.mark.parametrize("refine", [False, True])
@torch.no_grad()
def test_models_that_do_not_stream_render_whole_clips(refine, inexact):
    model, z = vae.load(inexact), latent()[None]
    (piece,) = frames(model, z, 14, refine)
    whole = (model.refine if refine else model.decode)(z).sample
    assert torch.equal(piece, whole[:, :, : 27 if refine else 14])


@pytest.mark.parametrize("refine, count, fps", [("false", 14, 10), ("true", 27, 20)])
def test_mp4_has_the_frames_in_order_at_its_rate(refine, count, fps, lvdm, refiner, file_for, tmp_path):
    file = file_for(refiner, 14)
    assert lvdm("render", file, vae=refiner, refine=refine, out=tmp_path / "new" / "folder") == 0
    path = tmp_path / "new" / "folder" / "latent.mp4"
    info = probe(path)
    assert (info.frames, info.fps, info.width, info.height) == (count, fps, 48, 32)
    shown = torch.cat(list(frames(vae.load(refiner), latent(t=5)[None], 14, refine == "true")), 2)[0]
    shown = to_uint8(shown).permute(1, 2, 3, 0).float().mean((2, 3))  # rows: chroma is coded at half the size
    assert (read_frames(path, range(count)).float().mean((2, 3)) - shown).abs().max() < 12


def test_an_inexact_model_renders_files_too(lvdm, inexact, file_for, tmp_path):
    assert lvdm("render", file_for(inexact, 9), vae=inexact, refine="true", out=tmp_path) == 0
    assert probe(tmp_path / "latent.mp4").frames == 17


@torch.no_grad()
def test_with_runs_of_frames_inexact_models_render_piece_by_piece(inexact):
    model, z = vae.load(inexact), latent(t=7)[None]
    model.enable_tiling(size=0, frames=9)
    pieces = list(frames(model, z, 25))
    assert [piece.shape[2] for piece in pieces] == [9, 8, 8]
    assert torch.equal(torch.cat(pieces, 2), model.decode(z).sample)


def test_a_latent_that_covers_more_than_its_video_is_cropped(lvdm, refiner, tmp_path):
    file, sha = tmp_path / "odd.safetensors", vae.load(refiner).latent_sha256()
    save_latent(file, latent(), 14, 10.0, sha, size=(26, 44))
    assert lvdm("render", file, vae=refiner, out=tmp_path / "out") == 0
    info = probe(tmp_path / "out" / "odd.mp4")
    assert (info.frames, info.height, info.width) == (14, 26, 44)


def test_a_folder_is_rendered_file_by_file_and_goes_on(lvdm, samples, refiner, tmp_path, capsys):
    assert lvdm("render", samples / "latents", vae=refiner, out=tmp_path) == 0
    names = [f"{i:06d}.mp4" for i in range(5)]
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == names
    (tmp_path / names[1]).unlink()
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in names if name != names[1]}
    assert lvdm("render", samples / "latents", vae=refiner, out=tmp_path) == 0
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in before} == before
    assert (tmp_path / names[1]).is_file()
    assert f"{tmp_path}: 1 videos rendered, 4 were there already" in capsys.readouterr().out


def test_parts_of_killed_runs_are_no_latents_and_those_of_its_own_go(lvdm, samples, refiner, tmp_path):
    kept, out = tmp_path / "latents", tmp_path / "out"
    for folder in (kept, out):
        folder.mkdir()
    whole = samples / "latents" / "000000.safetensors"
    for name in (whole.name, ".000001.safetensors.0123abcd.part.safetensors"):
        shutil.copy(whole, kept / name)
    (out / ".000000.mp4.0123abcd.part.mp4").touch()
    assert lvdm("render", kept, vae=refiner, out=out) == 0
    assert sorted(path.name for path in out.glob("*.mp4")) == ["000000.mp4"]
    (kept / whole.name).unlink()
    assert lvdm("render", kept, vae=refiner, out=tmp_path / "none") == 2  # a part is nothing to render


def test_a_refiner_more_or_less_does_not_change_the_vae_of_a_latent(lvdm, vae_of, refiner, file_for, tmp_path):
    assert lvdm("render", file_for(refiner, 9), vae=vae_of(), out=tmp_path) == 0


def test_wrong_vae_is_refused(lvdm, vae_of, refiner, file_for, tmp_path, capsys):
    file, other = file_for(refiner, 9), vae_of(seed=1)
    assert lvdm("render", file, vae=other, out=tmp_path) == 2
    assert f"{file}: its latent belongs to another VAE" in (error := capsys.readouterr().err)
    assert f"than vae={other}" in error and error.count("\n") == 1
    assert not list(tmp_path.glob("*.mp4"))


@pytest.mark.parametrize("what", ["no D2", "nothing there", "empty folder", "no latent"])
def test_refused_in_one_line(what, lvdm, vae_of, refiner, file_for, tmp_path, capsys):
    model, file, message = refiner, tmp_path / "none.safetensors", "expected a .safetensors latent file or a folder"
    if what == "no D2":
        model, file, message = vae_of(), file_for(refiner, 9), "has no refinement decoder"
    elif what == "empty folder":
        file = tmp_path
    elif what == "no latent":
        file.write_bytes(b"nothing")
        message = "is no latent file, or a damaged one"
    assert lvdm("render", file, vae=model, refine="true", out=tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
