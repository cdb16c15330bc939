"""One side of a comparison is the same whatever it comes from; features are kept under a key of everything."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vae
from lvdm.latents import save_latent
from lvdm.media import write_video
from lvdm.metrics.features import PixelFeatures
from lvdm.metrics.protocol import preset
from lvdm.progress import bar
from lvdm.rng import generator
from sample.measure.configs import EvaluateGeneration
from sample.measure.evaluate import read_results
from sample.measure.recode import CODECS, Recoded
from sample.measure.sets import ahead, features_of, measure
from sample.measure.sides import sides_of


def noise(folder: Path, count: int, frames: int = 12, size: int = 32, suffix: str = ".npy", seed: int = 0) -> Path:
    """`count` videos of blotches that differ and move."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        coarse = torch.rand(1, 3, frames // 2, size // 8, size // 8, generator=generator(seed, "video", i))
        video = torch.nn.functional.interpolate(coarse, (frames, size, size), mode="trilinear")[0]
        write_video(folder / f"{i:03}{suffix}", (video * 255).byte().permute(1, 2, 3, 0).numpy(), 24)
    return folder


def config_of(samples: Path, videos: Path, **keys) -> EvaluateGeneration:
    return EvaluateGeneration(**{"samples": str(samples), "videos": str(videos), "features": "pixels", **keys})


def fvd(samples: Path, videos: Path, **keys) -> float:
    """FVD of pixels under univae."""
    pair = sides_of(config_of(samples, videos, **keys), preset("univae"), None)
    return measure(pair.real, pair.fake, pair.preset, ["fvd"], lambda name: PixelFeatures()).rows[0].value


def test_lossless_copies_give_one_number_whatever_their_format(tmp_path):
    """npy, avi (ffv1), mkv (ffv1), and folders of png frames."""
    arrays, videos = noise(tmp_path / "npy", 4), noise(tmp_path / "real", 5, seed=1)
    for path in arrays.iterdir():
        frames = np.load(path)
        for name in ("mkv", "avi", "png"):
            (tmp_path / name).mkdir(exist_ok=True)
        write_video(tmp_path / "mkv" / f"{path.stem}.mkv", frames, 24)
        remux(tmp_path / "mkv" / f"{path.stem}.mkv", tmp_path / "avi" / f"{path.stem}.avi")
        (tmp_path / "png" / path.stem).mkdir()
        for i, frame in enumerate(frames):
            Image.fromarray(frame).save(tmp_path / "png" / path.stem / f"{i:04}.png")
    numbers = [fvd(tmp_path / name, videos, stride=1) for name in ("npy", "mkv", "avi", "png")]
    assert numbers[0] > 0.1 and numbers[1:] == 3 * numbers[:1]
    whole = [fvd(tmp_path / name, videos, stride=1, size=24, resize="crop_first") for name in ("npy", "mkv")]
    assert whole[0] == whole[1] != numbers[0]


def remux(source: Path, target: Path) -> None:
    """The same packets in another container."""
    import av

    with av.open(str(source)) as before, av.open(str(target), "w") as after:
        stream = after.add_stream_from_template(before.streams.video[0])
        for packet in before.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                after.mux(packet)


class Counting(PixelFeatures):
    """Pixels, and how many clips were looked at."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __call__(self, videos):
        self.seen += len(videos)
        return super().__call__(videos)


def test_one_changed_file_or_parameter_misses_the_cache_and_nothing_else_does(tmp_path):
    samples, videos = noise(tmp_path / "samples", 3), noise(tmp_path / "real", 4, seed=1)

    def looked_at(network: Counting | None = None, **keys) -> int:
        network = network or Counting()
        pair = sides_of(config_of(samples, videos, stride=1, **keys), preset("univae"), None)
        with bar("features", 7, show=False) as progress:
            features_of(pair.real, network, 2, 0, progress)
            features_of(pair.fake, network, 2, 0, progress)
        return network.seen

    assert [looked_at(), looked_at(), looked_at(batch=3, workers=0)] == [7, 0, 0]
    assert looked_at(size=24) == 7  # another size: both sides
    assert looked_at(frames=8) == 7
    assert looked_at(stride_fake=1, per_video=1, seed=5) == 0  # the same clips
    assert looked_at(resize="whole") == 7 and looked_at(resize="whole") == 0
    other = Counting()
    other.weights_sha256 = "f" * 64
    assert looked_at(other) == 7
    noise(samples, 1, seed=9)  # one file is another
    assert looked_at() == 3  # its side alone
    shutil.copytree(videos, tmp_path / "elsewhere")
    videos = tmp_path / "elsewhere"
    assert looked_at() == 0  # copies of equal times: the same files


def test_the_key_of_rendered_latents_is_that_of_latents_weights_and_decoder(tmp_path, samples, refiner, videos):
    model = vae.load(refiner).eval()
    config = config_of(samples, videos)
    one, twice = (sides_of(config, preset(name), model).fake for name in ("univae", "univae-2x"))
    key = one.key([0])
    assert key != twice.key([0]) and key != one.key([1])
    with torch.no_grad():
        next(model.parameters()).add_(0.1)
    config = config_of(without_hash(samples, model, tmp_path), videos)
    assert sides_of(config, preset("univae"), model).fake.key([0])["vae"] != key["vae"]


def without_hash(samples: Path, model, folder: Path) -> Path:
    """The latents of `samples` as those of a changed model."""
    from lvdm.latents import load_latent

    (folder / "latents").mkdir()
    for path in (samples / "latents").iterdir():
        z = load_latent(path)
        save_latent(folder / "latents" / path.name, z.latent, z.num_frames, z.fps, model.latent_sha256())
    return folder


def test_reading_ahead_keeps_the_order_and_passes_errors_on():
    assert list(ahead(lambda i: i * i, range(20), 3)) == [i * i for i in range(20)]

    def broken(i: int) -> int:
        if i == 5:
            raise ValueError("five")
        return i

    found = []
    with pytest.raises(ValueError, match="five"):
        found.extend(ahead(broken, range(20), 2))


def test_codecs_lose_more_and_more(tmp_path):
    pair = sides_of(config_of(noise(tmp_path / "s", 2), noise(tmp_path / "r", 2), stride=1), preset("univae"), None)
    (clean,) = pair.fake.batches(range(2), 2, 0)
    errors = {}
    for codec in CODECS:
        coded = Recoded(pair.fake, codec)
        (x,) = coded.batches(range(2), 2, 0)
        assert x.shape == clean.shape and coded.key([0]) != pair.fake.key([0])
        errors[codec] = (x - clean).abs().mean().item()
    assert errors["npy (8 bits)"] == 0 < errors["mp4, crf 18"] < errors["mp4, crf 28"]
    assert errors["jpg, quality 75"] > 0


def test_two_processes_measure_what_one_does(tmp_path, monkeypatch, videos, lvdm):
    """More clips than one file of the cache, so that both have a share."""
    monkeypatch.setattr("sample.measure.sets.PART", 2)
    samples = noise(tmp_path / "samples", 5)
    keys = [f"samples={samples}", f"videos={videos}", "features=pixels", "stride=1", "size=32", "metrics=fvd,kvd"]
    assert lvdm("evaluate generation", *keys, out=tmp_path / "one") == 0
    code = "import sys; from sample.measure import evaluate, sets; sets.PART = 2; sys.exit(evaluate.main())"
    (tmp_path / "launched.py").write_text(code)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = os.environ | {"LVDM_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    words = [str(tmp_path / "launched.py"), "generation", *keys, f"out={tmp_path / 'two'}"]
    done = subprocess.run([*launch, *words], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert read_results(tmp_path / "one") == read_results(tmp_path / "two")
    assert len(list((tmp_path / "cache" / "features").iterdir())) == 5  # 3 videos and 5 samples by twos


# ---------------------------------------------------------------------------------------------------------------------
# Refused


def broken(case: str, folder: Path) -> Path:
    """A folder of samples that something is wrong with."""
    noise(folder, 3)
    if case == "short":
        noise(folder / "b", 1, frames=6)
    elif case == "size":
        noise(folder / "b", 1, size=40)
    elif case == "nan":
        np.save(folder / "nan.npy", np.full((12, 32, 32, 3), np.nan, np.float32))
    elif case == "pickle":
        np.save(folder / "object.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif case == "one":
        for path in list(folder.iterdir())[1:]:
            path.unlink()
    return folder


REFUSED = {
    "lengths": ("short", {}, "videos of 6 to 12 frames; set frames"),
    "too short": ("short", {"frames": 8}, "000.npy has 6 frames, the protocol takes 8; set frames"),
    "sizes": ("size", {}, "videos of 32x32, 40x40; set size, to which both sides are then cut"),
    "nan": (
        "nan",
        {},
        "nan.npy: expected uint8 (T, H, W, 3), it holds float32 (12, 32, 32, 3), NaN or infinity",
    ),
    "pickle": ("pickle", {}, "object.npy: not an array of numbers that can be mapped"),
    "one": ("one", {}, "needs at least 2 videos a side, got 3 real and 1 samples"),
    "stride": ("", {"protocol": "univae-2x"}, "is of what D2 renders from latents at twice their rate"),
    "real length": ("", {"protocol": "fvd2048_16f"}, "has 12 frames, the protocol takes 16; set frames"),
    "weights": ("", {"metrics": "is", "features": "i3d"}, "c3d"),
    "network": ("", {"features": "i3d", "frames": 8}, "frames=8: i3d needs at least 9"),
}


@pytest.mark.parametrize("case, keys, message", REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(case, keys, message, lvdm, videos, tmp_path, capsys):
    samples = broken(case, tmp_path / "samples")
    words = {"samples": samples, "videos": videos, "out": tmp_path / "out", "features": "pixels", "stride": 1, **keys}
    assert lvdm("evaluate generation", **words) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]


def test_a_rate_beside_an_array_is_compared_with_that_of_the_real_clips(lvdm, videos, tmp_path, capsys):
    samples = noise(tmp_path / "samples", 3)
    words = {"samples": samples, "videos": videos, "out": tmp_path / "out", "features": "pixels", "stride": 1}
    assert lvdm("evaluate generation", **words) == 0
    assert "samples do not say their frame rate: equal rates were not checked" in capsys.readouterr().out
    for path in list(samples.iterdir()):
        path.with_suffix(".json").write_text(json.dumps({"fps": 8}))
    assert lvdm("evaluate generation", **{**words, "out": tmp_path / "again"}) == 2
    assert "stride=1: real clips play at 24 fps then, samples at 8; give the stride" in capsys.readouterr().err


@pytest.mark.gpu
def test_2048_clips_of_16_frames_take_a_minute_from_arrays(tmp_path):
    """Both the reading and I3D; the index is made before."""
    import time

    from lvdm.metrics.features import make_extractor

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    samples = noise(tmp_path / "samples", 64, frames=16, size=256)
    for i in range(64, 2048):
        os.link(samples / f"{i % 64:03}.npy", samples / f"{i:04}.npy")
    pair = sides_of(config_of(samples, samples, stride=1), preset("univae"), None)
    network = make_extractor("i3d", "cuda")
    started = time.monotonic()
    with bar("features", 2048, show=False) as progress:
        assert features_of(pair.fake, network, 16, 8, progress).count == 2048
    assert time.monotonic() - started < 60
