"""A video at twice its frame rate: its own frames untouched, D2's between, streamed as the whole, judged honestly."""

import re
from itertools import accumulate

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import vae
from lvdm import rife
from lvdm.data.reader import iter_frames, probe
from lvdm.errors import UserError
from lvdm.media import to_float, to_uint8, write_mp4
from lvdm.metrics.lpips import LPIPS
from lvdm.rng import generator
from sample import interpolate as program
from sample.configs import Interpolate
from sample.interpolate import doubled, interpolate, mean, precision
from sample.measure.scores import score

CUTS = {"whole": [99], "frame by frame": [1] * 99, "uneven": [1, 3, 8, 2, 5, 99]}


def clip(frames: int, height: int = 13, width: int = 19) -> torch.Tensor:
    """Random levels of 255 as floats."""
    shape = (1, 3, frames, height, width)
    return to_float(torch.randint(256, shape, generator=generator(0, "clip", frames)))


def pieces(x: torch.Tensor, cut: str) -> list[torch.Tensor]:
    ends = sorted({min(end, x.shape[2]) for end in accumulate(CUTS[cut])})
    return list(x.tensor_split(ends[:-1], 2))


def refined(model, x: torch.Tensor) -> torch.Tensor:
    """The whole clip by D2 at once, sizes padded by replication."""
    h, w = x.shape[-2:]
    z = model.encode(F.pad(x, (0, -w % 8, 0, -h % 8, 0, 0), mode="replicate")).latent_dist.mean
    return model.refine(z, num_frames=2 * x.shape[2] - 1).sample[..., :h, :w].clamp(-1, 1)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("frames", [2, 5, 6, 11])
@torch.no_grad()
def test_originals_are_untouched_and_the_stream_is_the_whole_clip(frames, cut, refiner):
    model, x = vae.load(refiner), clip(frames)
    found = torch.cat(list(interpolate(model, pieces(x, cut), frames)), 2)
    assert found.shape == (1, 3, 2 * frames - 1, 13, 19)
    assert torch.equal(found[:, :, ::2], x)
    assert torch.equal(to_uint8(found[:, :, ::2]), ((x + 1) * 127.5).round().to(torch.uint8))
    torch.testing.assert_close(found[:, :, 1::2], refined(model, x)[:, :, 1::2], atol=1e-5, rtol=0)


@torch.no_grad()
def test_bf16_is_close_and_stays_within_the_model(refiner):
    """Who takes the frames is not in autocast, and the video's own frames are whole."""
    model, x = vae.load(refiner), clip(6)
    found = []
    for piece in interpolate(model, pieces(x, "uneven"), 6, dtype=torch.bfloat16):
        assert piece.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        found.append(piece)
    found, exact = torch.cat(found, 2), interpolate_whole(model, x)
    assert torch.equal(found[:, :, ::2], x)
    error = (found - exact)[:, :, 1::2]
    assert error.abs().max() > 0 and error.square().mean().sqrt() < 0.05 * exact.std()


def test_auto_is_bf16_where_it_is_native(monkeypatch):
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        assert precision(Interpolate(), torch.device("cpu")) == dtype
    assert precision(Interpolate(precision="fp32"), torch.device("cpu")) == torch.float32


@torch.no_grad()
def test_without_originals_all_frames_are_by_d2(refiner):
    model, x = vae.load(refiner), clip(7)
    found = torch.cat(list(interpolate(model, pieces(x, "uneven"), 7, keep_originals=False)), 2)
    torch.testing.assert_close(found, refined(model, x), atol=1e-5, rtol=0)


@torch.no_grad()
def test_models_that_do_not_stream_see_the_whole_or_go_in_runs(inexact):
    model, x = vae.load(inexact), clip(10)
    (found,) = interpolate(model, pieces(x, "uneven"), 10, tile_frames=33)
    assert torch.equal(found[:, :, 1::2], refined(model, x)[:, :, 1::2])
    model.enable_tiling(size=0, frames=5)
    runs = torch.cat(list(interpolate(model, pieces(x, "uneven"), 10, tile_frames=5)), 2)
    assert torch.equal(runs[:, :, ::2], x)
    assert torch.equal(runs[:, :, :9], interpolate_whole(vae.load(inexact), x[:, :, :5]))


def interpolate_whole(model, x: torch.Tensor) -> torch.Tensor:
    return torch.cat(list(interpolate(model, [x], x.shape[2])), 2)


@pytest.mark.parametrize("cut", CUTS)
def test_a_doubled_video_has_the_means_between(cut):
    x = clip(11)
    found = torch.cat(list(doubled(pieces(x, cut), mean)), 2)
    assert torch.equal(found[:, :, ::2], x)
    torch.testing.assert_close(found[:, :, 1::2], (x[:, :, 1:] + x[:, :, :-1]) / 2)


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """12 frames of 49x37 at 12.5 fps."""
    path = tmp_path_factory.mktemp("odd") / "odd.mp4"
    t, _, x = np.mgrid[:12, :37, :49]
    write_mp4(path, (127.5 + 80 * np.stack([np.sin((x + t) / k) for k in (4, 5, 6)], -1)).astype(np.uint8), 12.5)
    return path


def frames_of(path) -> torch.Tensor:
    """(1, 3, T, H, W)."""
    return to_float(torch.stack([torch.as_tensor(frame) for frame in iter_frames(path)]).permute(3, 0, 1, 2)[None])


def means(x: torch.Tensor, y: torch.Tensor) -> list[float]:
    """Of the frames between: PSNR, SSIM, LPIPS."""
    scores = score(x[:, :, 1::2], y[:, :, 1::2], LPIPS("alex"))
    return [scores[key].mean().item() for key in ("PSNR", "SSIM", "LPIPS")]


def printed(text: str) -> dict[str, list[float]]:
    """The table of scores."""
    rows = re.findall(r"^  ([\w ]+?) +PSNR ([\d.]+) dB, SSIM ([-\d.]+), LPIPS \(alex\) ([\d.]+)$", text, re.M)
    return {name: [float(number) for number in numbers] for name, *numbers in rows}


def test_twice_the_frames_at_twice_the_rate(lvdm, odd, refiner, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert lvdm("interpolate", odd, vae=refiner) == 0
    info = probe("odd-2x.mp4")
    assert (info.frames, info.width, info.height, info.fps) == (23, 50, 38, 25.0)  # mp4 takes even sizes
    found, x = frames_of("odd-2x.mp4")[..., :37, :49], frames_of(odd)[..., :37, :49]
    assert (found[:, :, ::2] - x).abs().mean() < 0.03  # but for the codec
    assert capsys.readouterr().out == "odd-2x.mp4: 23 frames at 25 fps\n" and len(list(tmp_path.iterdir())) == 1


@torch.no_grad()
def test_every_second_frame_is_dropped_and_the_scores_are_against_those(lvdm, odd, refiner, tmp_path, capsys):
    out = tmp_path / "new" / "test.mp4"
    keys = {"every_second": "true", "compare": "true", "max_frames": 10, "precision": "fp32"}
    assert lvdm("interpolate", odd, vae=refiner, out=out, **keys) == 0
    info, beside = probe(out), probe(out.with_name("test-compare.mp4"))
    assert (info.frames, info.fps) == (9, 12.5)  # the tenth frame has none after it
    columns = ["dropped", "linear blend", "D2", *(["RIFE"] if rife.available() else [])]
    assert (beside.frames, beside.fps, beside.width, beside.height) == (9, 12.5, 50 * len(columns), 38 + 16)
    text, x = capsys.readouterr().out, frames_of(odd)[:, :, :9]
    assert f"test-compare.mp4: {' | '.join(columns)}" in text
    assert ("RIFE is not installed" in text) is not rife.available()
    scores = printed(text)
    assert set(scores) == set(columns[1:])
    of_d2 = interpolate_whole(vae.load(refiner), x[:, :, ::2])
    of_blend = torch.cat(list(doubled([x[:, :, ::2]], mean)), 2)
    assert scores["D2"] == pytest.approx(means(x, of_d2), abs=0.006)
    assert scores["linear blend"] == pytest.approx(means(x, of_blend), abs=0.006)
    shown = frames_of(out.with_name("test-compare.mp4"))[..., 16:, :]
    for column, wanted in enumerate((x, of_blend, of_d2)):
        there = shown[..., 50 * column : 50 * column + 50]
        assert (there.mean(1) - wanted.mean(1)).abs().mean() < 0.06, columns[column]


def test_rife_is_a_column_where_it_is_installed(lvdm, odd, refiner, tmp_path, monkeypatch, capsys):
    """A stand-in that shows the first of its two frames again."""
    monkeypatch.setattr(rife, "available", lambda: True)
    monkeypatch.setattr(rife, "middle_frames", lambda video: video[:, :, :-1])
    keys = {"compare": "true", "every_second": "true", "max_frames": 9}
    assert lvdm("interpolate", odd, vae=refiner, out=tmp_path / "out.mp4", **keys) == 0
    text, x = capsys.readouterr().out, frames_of(odd)[:, :, :9]
    assert "linear blend | D2 | RIFE\n" in text
    assert printed(text)["RIFE"] == pytest.approx(means(x, x[:, :, ::2].repeat_interleave(2, 2)[:, :, :9]), abs=0.006)


def test_a_comparison_without_a_test_measures_nothing(lvdm, odd, refiner, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "LPIPS", None)
    out = tmp_path / "out.mp4"
    assert lvdm("interpolate", odd, vae=refiner, out=out, compare="true", max_frames=3, short_side=24) == 0
    text = capsys.readouterr().out
    assert "PSNR" not in text and probe(out).height == 24 and probe(tmp_path / "out-compare.mp4").frames == 5


def write_one_frame(path) -> None:
    write_mp4(path, np.zeros((1, 32, 32, 3), np.uint8), 10)


@pytest.mark.parametrize(
    "what", ["none", "a text", "one frame", "an image", "two frames to drop of", "no D2", "itself"]
)
def test_refused_in_one_line(what, lvdm, odd, vae_of, refiner, tmp_path, capsys):
    video, keys = odd, {"vae": refiner, "out": tmp_path / "out.mp4"}
    if what == "none":
        video, message = tmp_path / "none.mp4", "none.mp4: no such file"
    elif what == "a text":
        (video := tmp_path / "text.mp4").write_text("no video")
        message = "text.mp4: "
    elif what == "one frame":
        write_one_frame(video := tmp_path / "one.mp4")
        message = "one.mp4: expected a video of at least 2 frames, found 1"
    elif what == "an image":
        Image.new("RGB", (32, 32)).save(video := tmp_path / "still.png")
        message = "still.png: expected a video of at least 2 frames, found 1"
    elif what == "two frames to drop of":
        keys |= {"every_second": "true", "max_frames": 2}
        message = "odd.mp4: expected a video of at least 3 frames, found 2"
    elif what == "no D2":
        keys["vae"], message = vae_of(), "has no refinement decoder to draw frames"
    else:
        (video := tmp_path / "out-compare.mp4").write_bytes(odd.read_bytes())
        keys["compare"], message = "true", "out-compare.mp4: expected the name of a file ending in .mp4, other than"
    before = sorted(tmp_path.iterdir())
    assert lvdm("interpolate", video, **keys) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and sorted(tmp_path.iterdir()) == before


# ---------------------------------------------------------------------------------------------------------------------
# univae-tiny


def test_without_its_weights_the_name_says_how_to_make_them(lvdm, odd, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vae, "SHIPPED", tmp_path)
    assert lvdm("interpolate", odd) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "vae=univae-tiny: its weights are not in this installation" in error
    for command in ("lvdm train vae --config vae/univae-tiny.yaml", "--config vae/univae-tiny-refine.yaml"):
        assert command in error
    with pytest.raises(UserError, match="unknown VAE 'univae-tiny'"):
        vae.build("univae-tiny")  # a name of weights, not of a class


def test_its_recipes_train_what_the_name_then_loads(lvdm, videos, odd, tmp_path, monkeypatch):
    few = {"videos": videos, "workers": 0, "precision": "fp32", "threads": 1, "warmup": 0}
    first = {"phases": "[{samples: 4, batch: 2, frames: 9, size: 32}]", "out": tmp_path / "one"}
    assert lvdm("train vae --config vae/univae-tiny.yaml", **few, **first) == 0
    second = {"phases": "[{samples: 4, batch: 2, frames: 17, size: 32}]", "out": tmp_path / "two"}
    assert lvdm("train refine --config vae/univae-tiny-refine.yaml", vae=tmp_path / "one", **few, **second) == 0
    trained = vae.load(str(tmp_path / "two"))
    assert sum(p.numel() for p in trained.parameters()) == 4_477_326

    monkeypatch.setattr(vae, "SHIPPED", tmp_path / "weights")
    trained.half().save_pretrained(tmp_path / "weights" / "univae-tiny")
    (file,) = (tmp_path / "weights" / "univae-tiny").glob("*.safetensors")
    assert file.stat().st_size < 12e6
    loaded = vae.load("univae-tiny")
    assert loaded.dtype == torch.float32 and loaded.spec.refines and not loaded.training
    assert all(torch.equal(a, b.float()) for a, b in zip(loaded.parameters(), trained.parameters(), strict=True))
    assert (
        lvdm("interpolate", odd, max_frames=3, out=tmp_path / "out.mp4") == 0
        and probe(tmp_path / "out.mp4").frames == 5
    )


def test_a_folder_of_that_name_goes_first(refiner, tmp_path, monkeypatch):
    vae.load(refiner).save_pretrained(tmp_path / "univae-tiny")
    monkeypatch.setattr(vae, "SHIPPED", tmp_path / "none")
    monkeypatch.chdir(tmp_path)
    assert vae.load("univae-tiny").latent_sha256() == vae.load(refiner).latent_sha256()
