"""Every number equals a direct computation on the same clips, and goes with the protocol that made it."""

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import vae
from lvdm.data.clips import ClipPolicy, Clips
from lvdm.data.index import open_index
from lvdm.errors import UserError
from lvdm.latents import load_latent, save_latent
from lvdm.media import read_video, to_float, write_video
from lvdm.metrics import flow
from lvdm.metrics.frames import WINDOW, pooled_psnr, psnr, ssim
from lvdm.metrics.lpips import LPIPS, TRUNKS
from lvdm.metrics.protocol import Protocol, require_same
from lvdm.metrics.sets import FeatureSet, floor, frechet
from lvdm.rng import generator
from sample.measure import evaluate
from sample.measure.configs import SMALLEST, EvaluateGeneration, EvaluateReconstruction, EvaluateRefinement, by_features
from sample.measure.evaluate import Table, read_results
from sample.measure.scores import NETS, Scores, interval, of_clips, weights_of
from sample.measure.scores import measure as measure_frames
from sample.measure.sets import Files

SIZE = 32


def clips_of(videos: Path, frames: int, stride: int = 1, per_video: int = 1, **policy) -> torch.Tensor:
    """(N, 3, T, 32, 32) in [-1, 1]."""
    clips = Clips(open_index(videos), ClipPolicy(frames, stride, SIZE, **{"holdout": 0.0, **policy}), seed=0)
    return to_float(torch.stack([clips.read(window).video for window in clips.grid(per_video)]))


def scores(x: torch.Tensor, y: torch.Tensor) -> list[float]:
    """PSNR, SSIM and LPIPS: means over frames, then over clips."""
    return [metric(x, y).double().mean(1).mean().item() for metric in (psnr, ssim, LPIPS("alex").video)]


def means(row: list) -> list[float]:
    """PSNR, SSIM and LPIPS of a row, whose every second cell is half of an interval."""
    return row[1:7:2]


@pytest.fixture
def measure(lvdm, videos, tmp_path):
    """`measure("reconstruction", vae=..., **keys)`: the tables."""

    def run(what: str, **keys: object) -> list[Table]:
        keys = {"videos": videos, "size": SIZE, "split": "all", "out": tmp_path / what, **keys}
        assert lvdm(f"evaluate {what}", **keys) == 0
        return read_results(Path(keys["out"]))

    return run


# ---------------------------------------------------------------------------------------------------------------------
# Reconstruction


@torch.no_grad()
def test_reconstruction_and_thumbnail_equal_a_direct_computation(measure, videos, vae_of, capsys):
    (table,) = measure("reconstruction", vae=vae_of(), frames=7, stride=2, per_video=2, batch=4)
    x, model = clips_of(videos, 7, 2, per_video=2), vae.load(vae_of())
    y = model.decode(model.encode(x).latent_dist.mean).sample[:, :, :7].clamp(-1, 1)
    small = F.interpolate(x.transpose(1, 2).flatten(0, 1), scale_factor=1 / 8, mode="bilinear", antialias=True)
    large = F.interpolate(small, scale_factor=8, mode="bilinear").unflatten(0, (6, 7)).transpose(1, 2)
    assert table.header[1::2] == ["PSNR (dB)", "SSIM", "LPIPS", "flicker"]
    assert table.header[2::2] == ["± PSNR", "± SSIM", "± LPIPS", "± flicker"]
    assert [row[0] for row in table.rows] == ["UniVAE, D1", "upscaled 1/8 thumbnail"]
    assert means(table.rows[0]) == pytest.approx(scores(x, y), rel=1e-4)
    assert means(table.rows[1]) == pytest.approx(scores(x, large), rel=1e-4)
    out = capsys.readouterr().out
    assert table.title in out and f"[{Protocol(**table.protocol).describe()}]" in out
    assert f"{table.rows[0][1]:.4g}" in out
    per_clip = torch.stack([psnr(x, y), psnr(x, large)]).double().mean(2)
    sources = [f"{i // 2}" for i in range(6)]
    half = [(high - low) / 2 for low, high in (interval(values, sources) for values in per_clip)]
    assert [row[2] for row in table.rows] == pytest.approx(half, rel=1e-3) and table.rows[0][8] > 0


def test_protocol_of_a_reconstruction(measure, videos, vae_of):
    keys = {"frames": 5, "stride": 3, "per_video": 1, "holdout": 0.5, "split": "val"}
    protocol = Protocol(**measure("reconstruction", vae=vae_of(), **keys)[0].protocol)
    assert (protocol.frames, protocol.stride_real, protocol.stride_fake) == (5, 3, 3)
    assert (protocol.count_real, protocol.count_fake, protocol.seed) == (3, 3, 0)
    assert protocol.features == "lpips-alex" and protocol.weights_sha256 == LPIPS("alex").weights_sha256
    assert "32" in protocol.resize and protocol.split == f"{videos.name}, val"


def test_batch_is_no_part_of_the_result_and_a_finished_one_is_read_back(measure, vae_of, monkeypatch, capsys):
    first = measure("reconstruction", vae=vae_of(), frames=5, batch=1)
    printed = capsys.readouterr().out
    monkeypatch.setattr(evaluate, "reconstruction", None)  # nothing is measured again
    assert measure("reconstruction", vae=vae_of(), frames=5, batch=3) == first
    assert capsys.readouterr().out == printed


def test_another_config_is_refused(measure, lvdm, videos, vae_of, tmp_path, capsys):
    measure("reconstruction", vae=vae_of(), frames=5)
    out = tmp_path / "reconstruction"
    assert lvdm("evaluate reconstruction", vae=vae_of(), videos=videos, size=SIZE, split="all", out=out) == 2
    assert "belongs to another config (different: frames)" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Refinement


def test_refinement_compares_middle_frames_with_middle_frames(videos, monkeypatch, tmp_path):
    """A model that renders the real frames with known offsets, from the even ones alone as far as it can be seen."""
    clips = clips_of(videos, 17)

    def encode(x: torch.Tensor):
        (full,) = [clip for clip in clips[:, None] if torch.equal(clip[:, :, ::2], x)]
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=full))

    def refine(full: torch.Tensor):
        y = full + 0.002
        y[:, :, 1::2] = full[:, :, 1::2] + 0.2
        return SimpleNamespace(sample=y)

    model = SimpleNamespace(
        spec=SimpleNamespace(refines=True, check_square=lambda size, key: None),
        encode=encode,
        decode=lambda full: SimpleNamespace(sample=full[:, :, ::2] + 0.02),
        refine=refine,
    )
    config = EvaluateRefinement(videos=str(videos), size=SIZE, split="all", vae="stub", out="x", batch=1)
    middle, even = evaluate.refinement(config, model)
    # An offset d on the scale [-1, 1] is a PSNR of -20 log10(d / 2).
    assert middle.rows[0][0] == "D2" and middle.rows[0][1] == pytest.approx(20, abs=1e-3)
    assert [row[0] for row in even.rows] == ["D2", "D1"]
    assert [row[1] for row in even.rows] == pytest.approx([60, 40], abs=1e-2)
    d1 = clips[:, :, ::2] + 0.02
    assert middle.rows[1][0] == "linear blend of D1's neighbours"
    assert means(middle.rows[1]) == pytest.approx(
        scores(clips[:, :, 1::2], (d1[:, :, 1:] + d1[:, :, :-1]) / 2), rel=1e-4
    )
    assert "middle frames only" in middle.protocol["estimator"] and "even frames only" in even.protocol["estimator"]


@torch.no_grad()
def test_refinement_of_a_real_model(measure, videos, refiner):
    middle, even = measure("refinement", vae=refiner, frames=9)
    x, model = clips_of(videos, 9), vae.load(refiner)
    z = model.encode(x[:, :, ::2]).latent_dist.mean
    d1, d2 = model.decode(z).sample.clamp(-1, 1), model.refine(z).sample.clamp(-1, 1)
    assert means(middle.rows[0]) == pytest.approx(scores(x[:, :, 1::2], d2[:, :, 1::2]), rel=1e-4)
    assert means(even.rows[0]) == pytest.approx(scores(x[:, :, ::2], d2[:, :, ::2]), rel=1e-4)
    assert means(even.rows[1]) == pytest.approx(scores(x[:, :, ::2], d1), rel=1e-4)


def test_every_other_metric_of_a_reconstruction(measure, videos, vae_of):
    metrics = "pooled_psnr,ip,lpips-spatial,group"
    first, second = measure("reconstruction", vae=vae_of(), frames=9, metrics=metrics, batch=2)
    x, model = clips_of(videos, 9), vae.load(vae_of())
    with torch.no_grad():
        y = model.decode(model.encode(x).latent_dist.mean).sample.clamp(-1, 1)
    spatial = LPIPS("alex", spatial=True)
    preserved = 1 - (x - y).double().abs().sum() / x.double().abs().sum()  # of all clips together
    expected = [pooled_psnr(x, y).mean(), preserved, spatial.video(x, y).mean()]
    assert first.header[1::2] == ["pooled PSNR (dB)", "IP", "LPIPS (spatial)"]
    assert first.rows[0][1::2] == pytest.approx([value.item() for value in expected], rel=1e-4)
    assert Protocol(**first.protocol).features == "lpips-alex-spatial"
    by_position = ssim(x, y)[:, 1:].unflatten(1, (2, 4)).mean((0, 1)).tolist()
    assert second.title == "SSIM by position in the group" and second.rows[0][1:] == pytest.approx(
        by_position, rel=1e-4
    )


def test_information_preservation_is_of_the_totals_and_so_is_its_interval():
    """A clip that is mid-grey throughout has no ratio of its own, and takes nothing from the others but its error."""
    kept = {"a": [[30.0, 40.0], [9.0, 10.0], [-1.0, 0.0]], "b": [[20.0, 40.0], [9.0, 10.0], [0.0, 0.0]]}
    ours, theirs = (Scores({}, ["x", "y", "z"], {"model": {"IP": rows}}) for rows in kept.values())
    values, weights = of_clips([ours, theirs], "model", "IP"), weights_of(ours, "IP")
    assert values.mean(1).tolist() == pytest.approx([38 / 50, 29 / 50]) and weights.mean() == pytest.approx(1)
    assert (values[0] - values[1]).tolist() == pytest.approx([0.6, 0, -0.06])  # of the mean original, 50 / 3
    pairs = [([30.0, 9.0], [40.0, 10.0]), ([9.0, 9.0], [10.0, 10.0])]  # two videos: as often both as one of them twice
    draws = torch.tensor([[i, j] for i in (0, 1) for j in (0, 1)])
    for sums, whole in pairs:
        sums, whole = torch.tensor(sums), torch.tensor(whole)
        drawn = sums[draws].sum(1) / whole[draws].sum(1)
        assert interval(sums, ["x", "y"], whole) == pytest.approx((drawn.min().item(), drawn.max().item()))


def test_the_smallest_sizes_are_those_of_the_metrics():
    nets = {key: TRUNKS[net].smallest for key, (_, net, _) in NETS.items()}
    assert {**nets, "ssim": WINDOW, "group": WINDOW} == SMALLEST


def test_the_protocol_says_how_each_metric_becomes_a_number(measure, videos, vae_of):
    keys = {
        "vae": vae_of(),
        "frames": 5,
        "size": SIZE,
        "videos": videos / "right",
        "metrics": "psnr,pooled_psnr,ip,group",
    }
    table, by_group = measure("reconstruction", **keys)
    assert table.protocol["estimator"] == (
        "mean over frames, then over clips; pooled PSNR of a clip at once, then mean over clips; "
        "IP of the sums of all clips; PSNR capped at 100 dB; posterior mean; all frames"
    )
    assert "PSNR" not in by_group.protocol["estimator"] and "groups of 4" in by_group.protocol["estimator"]
    assert table.rows[0][2::2] == [None] * 3  # one video has no interval


class Stub(SimpleNamespace):
    """In the place of a VAE: `reconstruct` is its own."""

    title, spec = "stub", SimpleNamespace(check_square=lambda size, key: None)


def files_of(videos: Path, frames: int) -> Files:
    clips = Clips(open_index(videos), ClipPolicy(frames, 1, SIZE, holdout=0.0), seed=0)
    return Files(clips, clips.grid(1))


def test_what_is_not_finite_is_named_by_clip_and_frame(videos):
    def reconstruct(x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        y[-1, 1, 3, 5, 7] = torch.inf
        return y

    with pytest.raises(UserError, match=r"left/b\.mp4: the VAE makes NaN or infinity of its clip, in frame 3"):
        measure_frames(Stub(reconstruct=reconstruct), files_of(videos, 5), [5], metrics=["psnr"], batch=2)


def test_clips_are_read_ahead_in_one_stream(videos, monkeypatch):
    asked, grouped = [], Files.grouped
    monkeypatch.setattr(Files, "grouped", lambda self, *args: asked.append(args) or grouped(self, *args))
    found = measure_frames(Stub(reconstruct=lambda x: x), files_of(videos, 5), [3, 5], metrics=["psnr"], batch=2)
    assert asked == [([range(2), range(2, 3)], 2)]
    assert found[5].values["model"]["PSNR"] == [[100.0] * 5] * 3


def test_the_warping_error_of_a_translation_is_zero(tmp_path, monkeypatch):
    texture = torch.randint(256, (SIZE, SIZE, 3), generator=generator(0), dtype=torch.uint8)
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mkv", torch.stack([texture.roll(2 * t, 1) for t in range(9)]), 24)

    def raft(path: str, device: object):
        right = torch.tensor([2.0, 0.0]).view(1, 2, 1, 1)
        return lambda a, b: (right if torch.equal(b, a.roll(2, 3)) else -right).expand(len(a), 2, *a.shape[2:])

    (tmp_path / "raft.pth").write_bytes(b"flow")
    monkeypatch.setattr(flow, "raft", raft)
    keys = {"weights": {"raft": str(tmp_path / "raft.pth")}, "vae": "stub", "out": "x", "size": SIZE, "split": "all"}
    keys |= {"videos": str(tmp_path / "videos"), "metrics": ["psnr", "warping"], "across_cuts": True, "frames": 9}
    (table,) = evaluate.reconstruction(EvaluateReconstruction(**keys), Stub(reconstruct=lambda x: x))
    assert table.header[3] == "warping error" and table.rows[0][3] == pytest.approx(0, abs=1e-10)
    assert table.rows[1][3] > 1e-5  # a thumbnail's pixels do not move by two
    sha256 = hashlib.sha256(b"flow").hexdigest()
    assert (table.protocol["features"], table.protocol["weights_sha256"]) == ("raft", sha256)
    model = Stub(encode=lambda x: SimpleNamespace(latent_dist=SimpleNamespace(mean=x)))
    model.spec = SimpleNamespace(refines=True, check_square=lambda size, key: None)
    model.decode = lambda z: SimpleNamespace(sample=z)
    model.refine = lambda z: SimpleNamespace(
        sample=torch.stack([z[:, :, i // 2].roll(2 * (i % 2), 3) for i in range(9)], 2)
    )
    middle, even = evaluate.refinement(EvaluateRefinement(**keys), model)
    assert middle.rows[0][1::2] == [100, pytest.approx(0, abs=1e-10)] and middle.rows[1][3] > 0.01
    assert middle.protocol["estimator"].endswith("middle frames only; warping error of all pairs of neighbours")
    assert even.header[1::2] == ["PSNR (dB)"]


# ---------------------------------------------------------------------------------------------------------------------
# Generation


class Brightness:
    """In the place of I3D, which takes a second a clip: the mean of a video, whose FVD has a closed form."""

    name, weights_sha256, resize, dim, min_frames, per = "brightness", "0" * 64, "as it is", 1, 1, "clip"

    def __call__(self, video):
        assert video.abs().max() <= 1
        return video.mean((1, 2, 3, 4))[:, None]


@pytest.fixture(autouse=True)
def brightness(monkeypatch):
    monkeypatch.setattr(evaluate, "make_extractor", lambda name, device, weights: Brightness())


def fvd(real: torch.Tensor, fake: torch.Tensor) -> float:
    """The Fréchet distance of two sets of numbers."""
    real, fake = real.double(), fake.double()
    return ((real.mean() - fake.mean()) ** 2 + (real.std(correction=0) - fake.std(correction=0)) ** 2).item()


@torch.no_grad()
def test_fvd_of_both_decoders_against_real_clips_at_their_rate(measure, videos, samples, refiner, tmp_path, capsys):
    tables = measure("generation", vae=refiner, samples=samples, stride=2, per_video=2, batch=4)
    printed = capsys.readouterr().out
    model, names = vae.load(refiner), ["generated, D1", "generated, D2 (twice the rate)"]
    files = [load_latent(path) for path in sorted((samples / "latents").iterdir())]
    for table, name, decode, frames, stride, preset in zip(
        tables, names, (model.decode, model.refine), (9, 17), (2, 1), ("univae", "univae-2x"), strict=True
    ):
        rendered = torch.cat([decode(file.latent[None]).sample.clamp(-1, 1) for file in files])
        clips = clips_of(videos, frames, stride, per_video=2)
        expected = fvd(clips.mean((1, 2, 3, 4)), rendered.mean((1, 2, 3, 4)))
        assert table.header[:5] == ["", "FVD", "95 % from", "to", "floor"]
        assert table.header[5:] == ["floor's draws", "floor N real / fake", "N real", "N fake"]
        (row,) = table.rows
        names = [row.path for row in open_index(videos).ok for _ in range(2)]
        reals = FeatureSet(clips.mean((1, 2, 3, 4))[:, None], torch.arange(6), names)
        bottom = floor(frechet, reals, 6, 5)
        assert row[0] == name and row[1] == pytest.approx(expected, rel=1e-3) and expected > 1e-4
        assert row[2] < row[1] < row[3] and row[4] == pytest.approx(bottom.mean, rel=1e-3) and bottom.mean > 1e-6
        assert row[5:] == [f"{bottom.low:.4g} to {bottom.high:.4g}", "3 / 3", 6, 5]
        protocol = Protocol(**table.protocol)
        assert (protocol.frames, protocol.stride_real, protocol.stride_fake) == (frames, stride, 1)
        assert (protocol.count_real, protocol.count_fake, protocol.preset) == (6, 5, preset)
        assert (protocol.metric, protocol.features, protocol.split) == ("FVD", "brightness", f"{videos.name}, all")
        kept = ("real clips kept as mp4 (h264)", "fake clips kept as latents (rendered, not quantised)")
        assert protocol.inputs == ", ".join(kept)
        assert "biased upwards" in table.note and table.note in printed
    stored = json.loads((tmp_path / "generation" / "results.json").read_text())
    assert [Table(**table) for table in stored] == tables
    with pytest.raises(UserError, match="differ in frames"):
        require_same([Protocol(**table.protocol) for table in tables])


def test_the_files_of_samples_are_measured_where_no_vae_is_named(measure, videos, samples):
    """They passed through mp4, which the protocol says; their rates are those that lvdm sample has noted."""
    tables = measure("generation", samples=samples, stride=2)
    assert [table.rows[0][0] for table in tables] == ["samples, d1", "samples, d2"]
    for table, folder, frames, stride in zip(tables, ("d1", "d2"), (9, 17), (2, 1), strict=True):
        fake = torch.stack([to_float(read_video(path)).mean() for path in sorted((samples / folder).iterdir())])
        real = clips_of(videos, frames, stride).mean((1, 2, 3, 4))
        assert table.rows[0][1] == pytest.approx(fvd(real, fake), rel=1e-3)
        assert table.protocol["inputs"].endswith("fake clips kept as mp4 (h264)")


def test_a_changed_key_is_seen_in_the_name_of_the_protocol(measure, samples, refiner):
    keys = {
        "vae": refiner,
        "samples": samples,
        "protocol": "latte,tats",
        "frames": 8,
        "stride": 2,
        "metrics": "fvd,kvd",
    }
    tables = measure("generation", **keys)
    assert [(t.protocol["metric"], t.protocol["preset"]) for t in tables] == [
        *((metric, "latte, changed: frames, stride_real") for metric in ("FVD", "KVD")),
        *((metric, "tats, changed: frames, stride_real, subset") for metric in ("FVD", "KVD")),
    ]
    assert [t.protocol["covariance"] for t in tables] == ["N", "", "N-1", ""]
    assert [t.protocol["draw"] for t in tables] == 4 * ["random"]


def test_rfvd_is_that_of_reconstructions_and_their_own_originals(measure, videos, vae_of, tmp_path):
    (by_frames,) = measure("reconstruction", vae=vae_of(), frames=9, metrics="rfvd")
    keys = {"protocol": "rfvd", "frames": 9, "out": tmp_path / "generation"}
    (by_sets,) = measure("generation", vae=vae_of(), **keys)
    x, model = clips_of(videos, 9), vae.load(vae_of())
    with torch.no_grad():
        y = model.reconstruct(x).clamp(-1, 1)
    expected = fvd(x.mean((1, 2, 3, 4)), y.mean((1, 2, 3, 4)))
    assert by_frames.rows[0][1] == pytest.approx(expected, rel=1e-3) and by_sets.rows == by_frames.rows
    assert by_frames.protocol["preset"] == "rfvd" and by_frames.protocol["stride_fake"] == 1


@pytest.fixture
def eight_fps(refiner, tmp_path):
    """Two latents at 8 fps, a third of the videos' rate."""
    (tmp_path / "slow" / "latents").mkdir(parents=True)
    for i in range(2):
        z = torch.randn(4, 3, 4, 4, generator=generator(0, "latent", i))
        save_latent(tmp_path / "slow" / "latents" / f"{i}.safetensors", z, 9, 8.0, vae.load(refiner).latent_sha256())
    return tmp_path / "slow"


def test_at_an_odd_stride_d2_has_no_counterpart(measure, eight_fps, refiner):
    (table,) = measure("generation", vae=refiner, samples=eight_fps, stride=3)
    assert table.rows[0][0] == "generated, D1" and "take an even stride" in table.note


def test_without_a_stride_real_clips_play_as_the_samples_do(measure, eight_fps, samples, refiner, tmp_path):
    (slow,) = measure("generation", vae=refiner, samples=eight_fps)
    half, full = measure("generation", vae=refiner, samples=samples, out=tmp_path / "at-12")
    assert [table.protocol["stride_real"] for table in (slow, half, full)] == [3, 2, 1]


def test_a_stride_of_another_rate_is_refused(lvdm, videos, eight_fps, refiner, tmp_path, capsys):
    keys = {"samples": eight_fps, "videos": videos, "out": tmp_path / "out", "stride": 2, "size": SIZE}
    assert lvdm("evaluate generation", vae=refiner, **keys) == 2
    assert "stride=2: real clips play at 12 fps then, samples at 8" in (error := capsys.readouterr().err)
    assert "about 3" in error


def test_a_rate_takes_the_clips_of_its_stride_and_the_protocol_names_it(measure, videos, vae_of, tmp_path):
    """The videos have 24 fps."""
    keys = {"vae": vae_of(), "frames": 5, "metrics": "psnr"}
    (by_rate,) = measure("reconstruction", fps=8, out=tmp_path / "rate", **keys)
    (by_stride,) = measure("reconstruction", stride=3, out=tmp_path / "stride", **keys)
    assert by_rate.rows == by_stride.rows
    assert by_rate.protocol["fps"] == 8 and by_rate.protocol["stride_real"] is None
    assert by_stride.protocol["fps"] is None and by_stride.protocol["stride_real"] == 3
    assert by_rate.protocol["split"] == by_stride.protocol["split"] == f"{videos.name}, all"


def test_generation_by_rate_is_generation_by_its_stride(measure, samples, refiner, tmp_path):
    by_rate = measure("generation", vae=refiner, samples=samples, fps=12, out=tmp_path / "rate")
    by_stride = measure("generation", vae=refiner, samples=samples, stride=2, out=tmp_path / "stride")
    assert [table.rows for table in by_rate] == [table.rows for table in by_stride] and len(by_rate) == 2
    assert [table.protocol["fps"] for table in by_rate] == [12, 24]


def test_a_rate_whose_double_no_video_has_is_measured_for_d1_alone(measure, eight_fps, refiner):
    (table,) = measure("generation", vae=refiner, samples=eight_fps, fps=8)
    assert table.rows[0][0] == "generated, D1" and "no real counterpart at 16 fps" in table.note


def test_a_rate_other_than_the_samples_is_refused_with_both(lvdm, videos, eight_fps, refiner, tmp_path, capsys):
    keys = {"samples": eight_fps, "videos": videos, "out": tmp_path / "out", "size": SIZE}
    assert lvdm("evaluate generation", vae=refiner, fps=12, **keys) == 2
    assert "fps=12: real clips play at 12 fps then, samples at 8" in capsys.readouterr().err


def test_without_d2_there_is_one_table_and_no_word_of_it(measure, samples, vae_of):
    (table,) = measure("generation", vae=vae_of(), samples=samples, stride=2)
    assert "D2" not in table.note


# ---------------------------------------------------------------------------------------------------------------------
# Refused

REFUSED = {
    "what": ("recon", {}, "lvdm evaluate: expected one of reconstruction, refinement, generation after it"),
    "metric": ("reconstruction", {"metrics": "psnr,sim"}, "metrics=sim: expected some of psnr, pooled_psnr, ssim"),
    "no metric": ("reconstruction", {"metrics": "[]"}, "metrics=[]: expected some of psnr, pooled_psnr"),
    "no set metric": ("generation", {"metrics": "[]"}, "metrics=[]: expected some of fvd, kvd"),
    "metric twice": ("reconstruction", {"metrics": "psnr,ssim,psnr"}, "metrics=psnr,ssim,psnr: psnr is there twice"),
    "protocol twice": ("generation", {"protocol": "latte,latte"}, "protocol=latte,latte: latte is there twice"),
    "threads": ("reconstruction", {"threads": -3}, "threads=-3: expected at least 0"),
    "group": ("reconstruction", {"frames": 7, "metrics": "group"}, "frames=7: group needs 4n+1, e.g. 5 or 9"),
    "rfvd frames": ("reconstruction", {"frames": 8, "metrics": "rfvd"}, "frames=8: rfvd needs at least 9"),
    "flicker": ("reconstruction", {"frames": 1}, "frames=1: flicker is of neighbours, so at least 2"),
    "one refined": ("refinement", {"frames": 1}, "frames=1: flicker is of neighbours"),
    "one refined frame": ("refinement", {"frames": 1, "metrics": "psnr"}, "refinement needs 8n+1, e.g. 9 or 17"),
    "no flow": ("refinement", {"metrics": "warping"}, "metrics=warping: set weights.raft to torchvision's raft_small"),
    "flow for nothing": ("reconstruction", {"weights.raft": "x"}, "weights.raft: nothing here takes it"),
    "weights": (
        "generation",
        {"weights.foo": "x"},
        "weights.foo: nobody takes it, features are i3d; files are for i3d-",
    ),
    "metric of another": ("refinement", {"metrics": "ip"}, "metrics=ip: expected some of psnr, ssim"),
    "refinement frames": ("refinement", {"frames": 13}, "frames=13: refinement needs 8n+1, e.g. 9 or 17"),
    "no D2": ("refinement", {}, "has no refinement decoder"),
    "no VAE": ("reconstruction", {"vae": ""}, "vae: expected the VAE to measure"),
    "no samples": ("generation", {}, "samples=: expected the folder that lvdm sample wrote"),
    "preset": ("generation", {"protocol": "late"}, "unknown preset 'late' (did you mean 'latte'?)"),
    "too long": ("reconstruction", {"frames": 41}, "need 41 consecutive frames in the all split"),
    "fps": ("reconstruction", {"fps": 9}, "fps=9: left/a.mp4 has 24 frames a second"),
    "negative fps": ("reconstruction", {"fps": -1}, "fps=-1"),
    "size": ("reconstruction", {"size": 36}, "size=36: must be divisible by 8"),
    "size of ssim": ("reconstruction", {"size": 8}, "size=8: ssim needs at least 11"),
    "size of lpips": ("refinement", {"size": 24, "metrics": "psnr,lpips"}, "size=24: lpips needs at least 31"),
    "no out": ("reconstruction", {"out": ""}, "out: expected the folder"),
    "no videos": ("reconstruction", {"videos": "/nowhere"}, "videos=/nowhere: expected a folder of videos"),
}


@pytest.mark.parametrize("what, keys, message", REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(what, keys, message, lvdm, videos, vae_of, tmp_path, capsys):
    open_index(videos)
    keys = {"vae": vae_of(), "videos": videos, "out": tmp_path / "out", "size": SIZE, "split": "all", **keys}
    assert lvdm(f"evaluate {what}", **keys) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("results.json"))


@pytest.mark.parametrize("left, real", [(1, 3), (5, 1)])
def test_a_distance_of_fewer_than_two_is_refused(left, real, lvdm, videos, samples, refiner, tmp_path, capsys):
    for kind, kept, source in (("latents", left, samples / "latents"), ("videos", real, videos)):
        (tmp_path / kind).mkdir()
        for path in sorted(path for path in source.rglob("*") if path.is_file())[:kept]:
            (tmp_path / kind / path.name).symlink_to(path)
    keys = {"samples": tmp_path, "videos": tmp_path / "videos", "out": tmp_path / "out", "stride": 2, "size": SIZE}
    assert lvdm("evaluate generation", vae=refiner, split="all", **keys) == 2
    assert f"needs at least 2 videos a side, got {real} real and {left} samples" in capsys.readouterr().err


def test_rfvd_of_one_clip_is_refused_before_anything_is_measured(lvdm, videos, vae_of, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate.scores, "measure", None)
    keys = {"vae": vae_of(), "videos": videos / "right", "size": SIZE, "out": tmp_path, "metrics": "psnr,rfvd"}
    assert lvdm("evaluate reconstruction", **keys) == 2
    assert "metrics=rfvd: needs at least 2 clips" in capsys.readouterr().err


def test_weights_are_known_by_the_names_of_features():
    given = {"timm:vit_small_patch16_224": "a", "i3d_torchscript": "b"}
    assert by_features(given) == {"timm:vit_small_patch16_224": "a", "i3d-torchscript": "b"}
    EvaluateGeneration(features="timm:vit_small_patch16_224", weights={"timm:vit_small_patch16_224": "a"})
    EvaluateGeneration(metrics=["is", "fid"], weights={"c3d": "a", "inception": "b"})
    with pytest.raises(UserError, match=r"weights.c3d: nobody takes it"):
        EvaluateGeneration(weights={"c3d": "a"})


def test_latents_of_another_vae_are_refused(lvdm, videos, samples, vae_of, tmp_path, capsys):
    keys = {"samples": samples, "videos": videos, "out": tmp_path / "out", "stride": 2}
    assert lvdm("evaluate generation", vae=vae_of(seed=1), **keys) == 2
    assert "its latent belongs to another VAE" in capsys.readouterr().err


def test_numbers_of_another_vae_under_the_same_path_are_not_shown_again(lvdm, videos, vae_of, tmp_path, capsys):
    model = vae_of()
    keys = {"vae": tmp_path / "vae", "videos": videos, "out": tmp_path / "out", "size": SIZE, "frames": 5}
    shutil.copytree(model, tmp_path / "vae")
    assert lvdm("evaluate reconstruction", metrics="psnr", **keys) == 0
    shutil.rmtree(tmp_path / "vae")
    shutil.copytree(vae_of(seed=1), tmp_path / "vae")
    assert lvdm("evaluate reconstruction", metrics="psnr", **keys) == 2
    assert "its vae changed since this run began" in capsys.readouterr().err
