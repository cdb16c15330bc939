"""A video through a VAE and back: any size and length, streamed or whole, with the metrics of what is shown."""

import re
from itertools import accumulate

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import vae
from lvdm.data.reader import iter_frames, probe, read_frames
from lvdm.media import to_float, to_uint8, write_mp4
from lvdm.metrics.frames import psnr, ssim
from lvdm.metrics.lpips import LPIPS
from lvdm.rng import generator
from sample.reconstruct import reconstruct

CUTS = {"whole": [99], "frame by frame": [1] * 99, "uneven": [1, 3, 8, 2, 5, 99]}


def clip(frames: int, height: int = 24, width: int = 40) -> torch.Tensor:
    return torch.rand(1, 3, frames, height, width, generator=generator(0, "clip", frames)) * 2 - 1


def autoencoded(model, x: torch.Tensor, refine: bool) -> torch.Tensor:
    """The whole clip at once, sizes padded by replication; with `refine` the last frame is one the encoder sees."""
    h, w = x.shape[-2:]
    padded = F.pad(x, (0, -w % 8, 0, -h % 8, 0, 0), mode="replicate")
    if x.shape[2] % 2 == 0:
        padded = torch.cat([padded, padded[:, :, -1:]], 2)
    z = model.encode(padded[:, :, ::2] if refine else padded).latent_dist.mean
    return (model.refine if refine else model.decode)(z).sample[:, :, : x.shape[2], :h, :w].clamp(-1, 1)


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("frames", [1, 2, 9, 18, 19])
@torch.no_grad()
def test_pieces_are_whole_and_in_order(frames, cut, refine, refiner):
    model, x = vae.load(refiner), clip(frames, 13, 19)
    ends = sorted({min(end, frames) for end in accumulate(CUTS[cut])})
    pieces = x.tensor_split(ends[:-1], 2)
    pairs = list(reconstruct(model, iter(pieces), frames, refine))
    assert all(a.shape == b.shape and a.shape[2] for a, b in pairs)
    assert torch.equal(torch.cat([a for a, _ in pairs], 2), x)
    torch.testing.assert_close(torch.cat([b for _, b in pairs], 2), autoencoded(model, x, refine), atol=1e-5, rtol=0)


@pytest.mark.parametrize("refine", [False, True])
@torch.no_grad()
def test_models_that_do_not_stream_see_the_whole(refine, inexact):
    model, x = vae.load(inexact), clip(10)
    ((original, y),) = reconstruct(model, iter(x.split(4, 2)), 10, refine, 33)
    assert torch.equal(original, x) and torch.equal(y, autoencoded(model, x, refine))


@pytest.mark.parametrize("name", ["vqgan", "tats", "osvae", "svdvae", "ivvae"])
@torch.no_grad()
def test_any_family_gives_every_frame(name):
    torch.manual_seed(0)
    model, x = vae.build(name, **vae.registry.entry(name).tiny).eval(), clip(11, 13, 19)
    pairs = list(reconstruct(model, iter(x.split(4, 2)), 11, False, 33))
    assert torch.equal(torch.cat([a for a, _ in pairs], 2), x)
    padded = F.pad(x, (0, -19 % 8, 0, -13 % 8, 0, 0), mode="replicate")
    whole = model.reconstruct(padded)[..., :13, :19].clamp(-1, 1)
    torch.testing.assert_close(torch.cat([b for _, b in pairs], 2), whole, atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """11 frames of 50x38 at 12.5 fps."""
    path = tmp_path_factory.mktemp("odd") / "odd.mp4"
    t, _, x = np.mgrid[:11, :38, :50]
    write_mp4(path, (127.5 + 80 * np.stack([np.sin((x + t) / k) for k in (4, 5, 6)], -1)).astype(np.uint8), 12.5)
    return path


def printed(text: str) -> list[float]:
    return [
        float(number)
        for number in re.search(r"PSNR ([\d.]+) dB, SSIM ([-\d.]+), LPIPS \(alex\) ([\d.]+)", text).groups()
    ]


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "inexact"])
@pytest.mark.parametrize("refine", [False, True], ids=["D1", "D2"])
@torch.no_grad()
def test_side_by_side_and_its_metrics(refine, exact, lvdm, odd, refiner, inexact, tmp_path, capsys):
    spec, out = refiner if exact else inexact, tmp_path / "new" / "out.mp4"
    assert lvdm("reconstruct", odd, vae=spec, refine=str(refine).lower(), out=out) == 0
    info = probe(out)
    assert (info.frames, info.width, info.height, info.fps) == (11, 100, 38, 12.5)
    x = to_float(torch.stack([torch.as_tensor(frame) for frame in iter_frames(odd)]).permute(3, 0, 1, 2)[None])
    y = autoencoded(vae.load(spec), x, refine)
    means = [metric(x, y).mean().item() for metric in (psnr, ssim, LPIPS("alex").video)]
    assert printed(capsys.readouterr().out) == pytest.approx(means, abs=0.006)
    shown = to_uint8(torch.cat([x, y], -1)[0]).permute(1, 2, 3, 0).float().mean(-1)
    assert (read_frames(out, range(11)).float().mean(-1) - shown).abs().mean() < 6


def test_max_frames_short_side_and_the_name_by_default(lvdm, odd, vae_of, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert lvdm("reconstruct", odd, vae=vae_of(), max_frames=6, short_side=32) == 0
    info = probe("odd-reconstructed.mp4")
    assert (info.frames, info.width, info.height) == (6, 84, 32)
    assert "odd-reconstructed.mp4: original | reconstruction, 6 frames" in capsys.readouterr().out


@torch.no_grad()
def test_longer_videos_of_inexact_models_go_in_runs_that_share_a_frame(inexact):
    model, x = vae.load(inexact), clip(22)
    model.enable_tiling(size=0, frames=9)
    pairs = list(reconstruct(model, iter(x.split(4, 2)), 22, False, 9))
    assert torch.equal(torch.cat([a for a, _ in pairs], 2), x)
    y = torch.cat([b for _, b in pairs], 2)
    first = autoencoded(model, x[:, :, :9], False)
    assert torch.equal(y[:, :, :9], first)
    assert not torch.equal(y, vae.load(inexact).reconstruct(x).clamp(-1, 1))


def test_an_image_is_a_video_of_one_frame_and_gives_a_picture(lvdm, vae_of, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture = np.random.default_rng(0).integers(0, 255, (39, 47, 3), np.uint8)
    Image.fromarray(picture).save("noise.png")
    assert lvdm("reconstruct", "noise.png", vae=vae_of()) == 0
    assert "noise-reconstructed.png: original | reconstruction\n" in capsys.readouterr().out
    shown = np.asarray(Image.open("noise-reconstructed.png"))
    assert shown.shape == (39, 94, 3) and np.array_equal(shown[:, :47], picture)
    assert lvdm("reconstruct", "noise.png", vae=vae_of(), out="out.mp4") == 0
    assert probe("out.mp4").frames == 1


@pytest.mark.parametrize("what", ["no video", "no D2", "not a video"])
def test_refused_in_one_line(what, lvdm, odd, vae_of, tmp_path, capsys):
    video, refine, message = odd, "false", ""
    if what == "no video":
        video, message = tmp_path / "none.mp4", "none.mp4: no such file"
    elif what == "no D2":
        refine, message = "true", "has no refinement decoder"
    else:
        (video := tmp_path / "text.mp4").write_text("no video")
        message = "text.mp4: "
    assert lvdm("reconstruct", video, vae=vae_of(), refine=refine, out=tmp_path / "out.mp4") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not list(tmp_path.glob("out*"))
