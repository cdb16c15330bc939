"""One side of a comparison is the same whatever it comes from; features are kept under a key of everything."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vae
from lvdm.errors import UserError
from lvdm.latents import save_latent
from lvdm.media import write_video
from lvdm.metrics.features import PixelFeatures
from lvdm.metrics.protocol import Protocol, preset, require_same
from lvdm.progress import bar
from lvdm.rng import generator
from sample.measure.configs import EvaluateGeneration
from sample.measure.distances import Row, features_of, measure
from sample.measure.evaluate import set_tables
from sample.measure.recode import CODECS, Recoded
from sample.measure.sets import ahead, compression
from sample.measure.sides import Sides, changed, sides_of


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
    return measure(pair.real, pair.fake, pair.preset, ["fvd"], lambda name: PixelFeatures())[0].value


def test_lossless_copies_give_one_number_whatever_their_format(tmp_path):
    """npy, mkv and avi (ffv1), folders of png frames, and mp4 (H.264 without loss, in RGB)."""
    arrays, videos = noise(tmp_path / "npy", 4), noise(tmp_path / "real", 5, seed=1)
    for path in arrays.iterdir():
        frames = np.load(path)
        for name in ("mkv", "avi", "png", "mp4"):
            (tmp_path / name).mkdir(exist_ok=True)
        write_video(tmp_path / "mkv" / f"{path.stem}.mkv", frames, 24)
        remux(tmp_path / "mkv" / f"{path.stem}.mkv", tmp_path / "avi" / f"{path.stem}.avi")
        lossless_mp4(tmp_path / "mp4" / f"{path.stem}.mp4", frames)
        (tmp_path / "png" / path.stem).mkdir()
        for i, frame in enumerate(frames):
            Image.fromarray(frame).save(tmp_path / "png" / path.stem / f"{i:04}.png")
    numbers = [fvd(tmp_path / name, videos, stride=1) for name in ("npy", "mkv", "avi", "png", "mp4")]
    assert numbers[0] > 0.1 and numbers[1:] == 4 * numbers[:1]
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


def lossless_mp4(path: Path, frames: np.ndarray) -> None:
    """uint8 (T, H, W, 3) as H.264 at a quantiser of 0, in RGB."""
    import av

    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264rgb", rate=24, pix_fmt="rgb24", options={"qp": "0"})
        stream.height, stream.width = frames.shape[1:3]
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


class Counting(PixelFeatures):
    """Pixels, and how many clips were looked at."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __call__(self, videos):
        self.seen += len(videos)
        return super().__call__(videos)


def test_one_changed_file_or_parameter_misses_the_cache_and_nothing_else_does(tmp_path, monkeypatch):
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
    assert looked_at() == 0  # copies: the same content
    for path in noise(videos, 4, seed=7).iterdir():
        os.utime(path, (1.7e9, 1.7e9))
    assert looked_at() == 4  # other content under the same names
    videos = noise(tmp_path / "third" / "real", 4, seed=8)
    for path in videos.iterdir():
        os.utime(path, (1.7e9, 1.7e9))
    assert looked_at() == 4  # names, sizes and times are those of another dataset
    monkeypatch.setattr("lvdm.metrics.cache.VERSION", 0)
    assert looked_at() == 7  # what other code made
    monkeypatch.setattr("sample.measure.sets.version", lambda name: "0")
    assert looked_at() == 0  # arrays need no decoder
    videos = tmp_path / "coded"
    videos.mkdir()
    for path in samples.iterdir():
        write_video(videos / f"{path.stem}.mkv", np.load(path), 24)
    assert [looked_at(), looked_at()] == [3, 0]
    monkeypatch.undo()
    monkeypatch.setattr("lvdm.metrics.cache.VERSION", 0)
    assert looked_at() == 3  # what another decoder made


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


def test_two_processes_measure_what_one_does(tmp_path, monkeypatch):
    """More clips than one file of the cache, so that both have a share; forked, for the time that imports take."""
    monkeypatch.setattr("sample.measure.distances.PART", 2)
    samples, videos = noise(tmp_path / "samples", 5), noise(tmp_path / "real", 7, seed=1)

    def measured() -> list[Row]:
        pair = sides_of(config_of(samples, videos, stride=1, count=5), preset("univae"), None)
        pixels = PixelFeatures()
        return measure(
            pair.real, pair.fake, pair.preset, ["fvd", "kvd"], lambda name: pixels, workers=0, beyond=pair.beyond
        )

    def child(rank: int) -> None:
        monkeypatch.setenv("LVDM_CACHE", str(tmp_path / "cache"))
        torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=rank, world_size=2)
        (tmp_path / f"{rank}.txt").write_text(repr(measured()))
        torch.distributed.destroy_process_group()

    started = [multiprocessing.get_context("fork").Process(target=child, args=(rank,)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0, 0]
    one = repr(measured())
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == [one, one] and "nan" not in one
    assert len(list((tmp_path / "cache" / "features").iterdir())) == 7  # 5 samples, 5 videos and 2 more of them by twos


class Level:
    """The mean of a video, and logits of eleven classes by it: features whose sets can be worked out."""

    name, weights_sha256, resize, min_frames, per = "level", "0" * 64, "as it is", 1, "clip"

    def __init__(self, dim: int = 1):
        self.dim = dim

    def __call__(self, video):
        return torch.arange(self.dim)[None] + video.mean((1, 2, 3, 4))[:, None]


def rows_of(samples: Path, videos: Path, metric: str = "fvd", protocol: str = "univae", **keys) -> Row:
    config = config_of(samples, videos, **{"stride": 1, "metrics": [metric], **keys})
    pair = sides_of(config, preset(protocol), None)
    network = Level(11 if metric == "is" else 1)
    (row,) = measure(
        pair.real, pair.fake, pair.preset, [metric], lambda _: network, beyond=pair.beyond, floor=config.floor
    )
    return row


def test_the_floor_is_at_the_counts_of_the_number_where_there_are_so_many_real_clips(tmp_path):
    samples, videos = noise(tmp_path / "samples", 4), noise(tmp_path / "real", 11, seed=1)

    def counts(**keys) -> list[int]:
        row = rows_of(samples, videos, **keys)
        return [row.protocol.count_real, row.protocol.count_fake, row.floor.real, row.floor.fake]

    row = rows_of(samples, videos, count=4)
    assert counts(count=4) == [4, 4, 4, 4]
    without = rows_of(samples, videos, count=4, floor=False)
    assert without.floor is None and (without.value, without.low, without.high) == (row.value, row.low, row.high)
    assert counts(count=4, holdout=0.5, split="val", frames=4) == [4, 4, 4, 4]
    assert counts(count=7) == [7, 4, 7, 4]  # four more real clips in the place of the samples
    assert counts(count=9) == [9, 4, 7, 4] and counts() == [11, 4, 7, 4]  # and where there are no four more
    assert counts(protocol="latte", count=4, frames=4, stride=3) == [4, 4, 4, 4]


def test_what_the_floor_takes_is_beyond_what_is_compared(tmp_path):
    samples, videos = noise(tmp_path / "samples", 3), noise(tmp_path / "real", 8, seed=1)
    for protocol in ("univae", "latte"):
        pair = sides_of(config_of(samples, videos, count=3, frames=4, stride=1), preset(protocol), None)
        assert pair.real.count == pair.beyond.count == 3
        assert not {*pair.real.sources} & {*pair.beyond.sources}


def test_the_protocol_says_which_real_clips_and_no_two_sets_of_them_are_mixed(tmp_path):
    samples, videos = noise(tmp_path / "samples", 3), noise(tmp_path / "a" / "real", 4, seed=1)
    other = noise(tmp_path / "b" / "real", 5, seed=1)
    first = rows_of(samples, videos).protocol
    assert (first.subset, first.holdout, first.per_video, first.short) == ("all", 0, 1, "drop")
    for field, keys in {
        "dataset": {"videos": other, "count": 3},
        "holdout": {"videos": videos, "holdout": 0.5, "split": "all", "count": 3},
        "per_video": {"videos": videos, "per_video": 2, "count": 3},
        "short": {"videos": videos, "short": "loop", "count": 3},
        "across_cuts": {"videos": videos, "across_cuts": True, "count": 3},
    }.items():
        found = rows_of(samples, frames=4, **keys).protocol
        same = rows_of(samples, videos, frames=4, count=3).protocol
        if field == "holdout":
            assert found == same  # split=all: no clip is another
        else:
            with pytest.raises(UserError, match=f"differ in {field}"):
                require_same([found, same])


def test_the_digest_is_that_of_what_is_drawn_not_of_labels(tmp_path):
    samples, videos = noise(tmp_path / "samples", 2), noise(tmp_path / "real", 2, frames=24, seed=1)
    for path in [*videos.iterdir()]:
        (videos / "one class").mkdir(exist_ok=True)
        path.rename(videos / "one class" / path.name)

    def digest(**keys) -> str:
        return rows_of(samples, videos, frames=8, **keys).protocol.dataset

    first = digest(labels="none")
    assert first == digest(labels="folder") and len(first) == 8
    assert first != digest(stride=2) and first != digest(per_video=2)
    noise(videos / "one class", 1, frames=24, seed=7)
    assert digest() != first  # another file under the same name


def test_a_preset_that_is_departed_from_says_so():
    def name(protocol: str, **keys) -> str:
        return changed(EvaluateGeneration(**keys), preset(protocol)).name

    assert [name(protocol) for protocol in ("latte", "fvd2048_16f", "univae")] == ["latte", "fvd2048_16f", "univae"]
    assert name("tats", subset="train01") == "tats" and name("tats") == "tats, changed: subset"
    assert name("fvd2048_16f", subset="test01", per_video=3) == "fvd2048_16f, changed: subset, per_video"
    assert name("latte", holdout=0.3, subset="train01") == "latte, changed: split"
    assert name("univae", holdout=0.3, per_video=3) == "univae"  # the paper names neither


def test_the_score_of_is_stands_beside_that_of_real_clips_with_its_deviation(tmp_path):
    samples, videos = noise(tmp_path / "samples", 10), noise(tmp_path / "real", 11, seed=1)
    row = rows_of(samples, videos, "is")
    (table,) = set_tables([row], "samples")
    assert table.header[2:7] == ["- one standard deviation", "+ one", "of real clips", "- to + one", "of N"]
    assert table.rows[0][6:] == ["11", 11, 10] and table.rows[0][4] == row.floor.mean
    assert row.value == pytest.approx(1, abs=1e-6) and "downwards" in table.note
    assert row.low <= row.value <= row.high


def test_an_average_over_batches_is_called_biased_in_its_title(tmp_path):
    samples, videos = noise(tmp_path / "samples", 4), noise(tmp_path / "real", 4, seed=1)
    for metric, biased in (("fvd", True), ("kvd", False)):
        (table,) = set_tables([rows_of(samples, videos, metric, "small_batch_legacy(2)")], "samples")
        assert table.title.endswith(": biased, not for comparison") is biased
        assert ("averaged over small batches" in table.note) is biased
        assert Protocol(**table.protocol).describe().count("covariance") == biased


def test_numbers_of_clips_that_are_gone_are_not_shown_again(lvdm, videos, tmp_path, capsys):
    """The files of both sides, and those of weights, are what they were, whatever their names, sizes and times."""
    samples, real = noise(tmp_path / "samples", 3), noise(tmp_path / "real", 3, seed=1)
    words = {"samples": samples, "videos": real, "out": samples / "metrics", "features": "pixels", "stride": 1}
    assert lvdm("evaluate generation", **words) == 0
    first = capsys.readouterr().out
    (samples / "notes.txt").write_text("not looked at, as the results in this folder are not")
    assert lvdm("evaluate generation", **words) == 0 and capsys.readouterr().out == first
    for name, folder, seed in (("samples", samples, 0), ("videos", real, 1)):
        noise(folder, 1, seed=7)
        assert lvdm("evaluate generation", **words) == 2
        assert f"its {name} changed since this run began" in capsys.readouterr().err
        noise(folder, 1, seed=seed)
    assert lvdm("evaluate generation", **words) == 0


def test_real_clips_of_mixed_rates_are_refused_by_name(tmp_path):
    samples, real = noise(tmp_path / "samples", 2), noise(tmp_path / "real", 5, seed=1)

    def rates(folder: Path, *fps: float) -> None:
        for path, rate in zip(sorted(folder.glob("*.npy")), fps, strict=False):
            path.with_suffix(".json").write_text(json.dumps({"fps": rate}))

    def sides(**keys) -> Sides:
        return sides_of(config_of(samples, real, **{"stride": 1, **keys}), preset("univae"), None)

    rates(samples, 20, 20)
    rates(real, 20, 20, 20, 40, 10)
    with pytest.raises(UserError, match=r"stride=1: 003.npy plays at 40 fps then, samples at 20; leave it out"):
        sides()
    rates(real, 20, 20, 20, 24, 20)  # UCF101 is of 25 and 29.97
    assert sides().real.rates == (20, 24)
    rates(real, 10, 40, 40, 40, 40)
    with pytest.raises(UserError, match=r"stride=1: 000.npy plays at 10 fps then, samples at 20; give the stride"):
        sides()
    rates(samples, 20, 30)
    with pytest.raises(UserError, match=r"samples: 000.npy plays at 20 fps, others at 30: a set plays at one rate"):
        sides()
    rates(samples, 25, 29.97)  # raw UCF101 on both sides
    rates(real, 25, 29.97, 25, 25, 25)
    assert sides().fake.rates == (25, 29.97)
    rates(real, 25, 25, 25, 25, 25)
    assert sides().real.rates == (25, 25)
    rates(samples, 29.97, 29.97)
    with pytest.raises(UserError, match=r"stride=1: real clips play at 25 fps then, samples at 29.97"):
        sides()


def test_latents_of_mixed_rates_are_samples_as_real_clips_of_them_are(tmp_path, refiner):
    """A store of UCF101 holds latents of 25 and of 29.97 frames a second."""
    model, real = vae.load(refiner).eval(), noise(tmp_path / "real", 3, seed=1)
    for path, fps in zip(sorted(real.glob("*.npy")), (25, 29.97, 25), strict=True):
        path.with_suffix(".json").write_text(json.dumps({"fps": fps}))

    def sides(*kinds: tuple[float, int]) -> Sides:
        shutil.rmtree(tmp_path / "samples", ignore_errors=True)
        (tmp_path / "samples" / "latents").mkdir(parents=True)
        for i, (fps, frames) in enumerate(kinds):
            z = torch.randn(4, (frames - 1) // 4 + 1, 4, 4, generator=generator(0, "latent", i))
            path = tmp_path / "samples" / "latents" / f"{i}.safetensors"
            save_latent(path, z, frames, fps, model.latent_sha256())
        return sides_of(config_of(tmp_path / "samples", real), preset("univae"), model)

    fake = sides((25, 9), (29.97, 9), (25, 9)).fake
    assert (fake.paces, fake.usual_rate, fake.size) == ([25, 29.97, 25], 25, 32)
    with pytest.raises(UserError, match=r"one size and length, got 5 frames of 32x32, 9 frames of 32x32$"):
        sides((25, 9), (25, 5))


def test_a_store_of_mixed_rates_is_measured(lvdm, refiner, tmp_path, capsys):
    """As `lvdm train latents` writes it, against the videos that it is of."""
    real = noise(tmp_path / "real", 3, seed=1)
    for path, fps in zip(sorted(real.glob("*.npy")), (25, 29.97, 25), strict=True):
        path.with_suffix(".json").write_text(json.dumps({"fps": fps}))
    keys = {"videos": real, "vae": refiner}
    assert lvdm("train latents", **keys, frames=9, size=32, stride=1, holdout=0, out=tmp_path / "store") == 0
    keys |= {"samples": tmp_path / "store", "features": "pixels", "protocol": "univae"}
    assert lvdm("evaluate generation", **keys, out=tmp_path / "out") == 0, capsys.readouterr().err


def test_what_a_vae_makes_nan_of_is_named_by_clip_and_frame(samples, refiner, videos):
    model = vae.load(refiner).eval()
    fake = sides_of(config_of(samples, videos), preset("univae"), model).fake
    fake.latents[3].latent[:, 2:] = torch.nan
    message = r"000003\.safetensors: the VAE makes NaN or infinity of its clip, in frame 5$"
    with bar("features", 5, show=False) as progress, pytest.raises(UserError, match=message):
        features_of(fake, PixelFeatures(), 2, 0, progress)


def test_what_else_lies_in_a_folder_of_pictures_is_not_what_it_is_kept_as(tmp_path):
    (tmp_path / "clip").mkdir()
    for name in (".DS_Store", "._0.jpg", "Thumbs.db", "notes.txt"):
        (tmp_path / "clip" / name).write_bytes(b"x")
    for suffix, said in (("png", ""), ("jpg", "jpg (jpg)")):
        Image.new("RGB", (8, 8)).save(tmp_path / "clip" / f"frame_1.{suffix}")
        assert compression([tmp_path / "clip"]) == said
        (tmp_path / "clip" / f"frame_1.{suffix}").unlink()


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
    elif case == "note":
        (folder / "samples.jsonl").write_text("garbage")
    elif case == "no rate":
        lines = [{"id": 0, "class": None, "fps": 12.0}, {"id": 1, "class": None, "fps": "abc"}]
        (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
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
    "splits": ("", {"metrics": "is"}, "metrics=is: 10 splits need as many videos a side, got 3 real and 3 samples"),
    "batches": ("", {"protocol": "small_batch_legacy(9)"}, "batches of 9 clips, and there are 3 real and 3"),
    "one frame": ("", {"stride_fake": 20}, "stride_fake=20: of the 12 frames of "),
    "every window": (
        "",
        {"protocol": "latte", "frames": 4, "per_video": 0},
        "latte draws clips at random",
    ),
    "note": ("note", {}, "samples.jsonl, line 1: expected what lvdm sample writes"),
    "no rate": ("no rate", {}, "samples.jsonl, line 2: expected what lvdm sample writes"),
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
