"""The card of a VAE: its numbers are those of its clips, statistics closed forms, and it says what it leaves out."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import vae
from sample.measure.card import bands, nested, psnr_by_position
from sample.measure.latent_stats import normal_curve, stats_of, stats_of_codes
from sample.measure.views import lacking

KEYS = {"size": 32, "frames": 9, "long": 30, "speed": "5", "speed_size": 16, "features": "pixels", "show": 2}


@pytest.fixture(scope="module")
def videos(videos, tmp_path_factory) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(videos, tmp_path_factory.mktemp("own") / "videos"))


@pytest.fixture(scope="module")
def card(lvdm, refiner, videos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("card") / "out"
    assert lvdm("vae card", refiner, videos=videos, out=out, **KEYS) == 0
    return out


def stored(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def test_every_section_has_its_numbers(card):
    found = stored(card)
    assert found["model"]["compression"] == "4x8x8" and found["model"]["latents of 9x32x32"] == "4x3x4x4"
    assert sum(found["model"]["parts"].values()) == int(found["model"]["parameters"].replace(",", ""))
    assert [len(clip) for clip in found["quality"]["values"]["model"]["PSNR"]] == [9] * 3
    assert sorted(map(len, found["positions"].values())) == [30] * 3
    assert len(found["latents"]["mean"]) == 4 and found["latents"]["correlation"][2][2] == pytest.approx(1)
    assert found["rfvd"]["protocol"]["count_real"] == 3 and "rfvd" in found["rfvd"]["protocol"]["preset"]
    works = {(row["work"], row["length"]) for row in found["speed"]}
    assert works == {(f"{w}{way}", 5) for w in ("encode", "decode", "refine") for way in ("", ", streamed")}
    assert {row["frames"] for row in found["speed"] if "refine" in row["work"]} == {9}, "D2 renders 2T - 1"
    assert all(min(row["seconds"]) > 0 for row in found["speed"]) and len(found["shown"]) == 2
    page = (card / "index.html").read_text()
    for title in ("Parameters", "Clips", "Long videos", "Latents", "rFVD", "Speed and memory", "Side by side"):
        assert f"<h2>{title}</h2>" in page
    assert page.count("<video") == 6 and "By position in the group of 4" in page


def test_a_finished_card_is_left_alone_and_another_config_is_refused(card, lvdm, refiner, videos, capsys):
    before = (card / "index.html").stat().st_mtime_ns
    assert lvdm("vae card", refiner, videos=videos, out=card, **KEYS) == 0
    assert (card / "index.html").stat().st_mtime_ns == before
    assert lvdm("vae card", refiner, videos=videos, out=card, **{**KEYS, "size": 64}) == 2
    assert "different: size" in capsys.readouterr().err


def test_other_videos_or_another_model_in_the_same_place_get_no_old_card(
    card, lvdm, refiner, vae_of, videos, tmp_path, capsys
):
    left = videos / "left" / "a.mp4"
    left.rename(tmp_path / "a.mp4")
    assert lvdm("vae card", refiner, videos=videos, out=card, **KEYS) == 2
    assert "its videos changed since" in capsys.readouterr().err
    (tmp_path / "a.mp4").rename(left)
    assert lvdm("vae card", refiner, videos=videos, out=card, **KEYS) == 0
    model = Path(shutil.copytree(vae_of(), tmp_path / "vae"))
    assert lvdm("vae card", model, out=tmp_path / "out", speed="[]") == 0
    shutil.copytree(vae_of(norm="clip"), model, dirs_exist_ok=True)
    assert lvdm("vae card", model, out=tmp_path / "out", speed="[]") == 2
    assert "its vae changed since" in capsys.readouterr().err


def test_what_rfvd_lacks_is_said():
    network = SimpleNamespace(name="i3d", min_frames=9)
    few = [lacking(SimpleNamespace(frames=f, count=n), network) for f, n in ((9, 2), (8, 2), (9, 1))]
    assert few[:2] == ["", "frames=8: i3d needs at least 9"] and "at least 2 clips" in few[2]


def test_a_discrete_model_shows_its_codes(lvdm, videos, tmp_path):
    vae.build("tats", **vae.registry.entry("tats").tiny).save_pretrained(tmp_path / "tats")
    keys = {**KEYS, "speed": "[]", "frames": 8, "long": 12}
    assert lvdm("vae card", tmp_path / "tats", videos=videos, out=tmp_path / "out", **keys) == 0
    found = stored(tmp_path / "out")["latents"]
    assert found["codes"] == 64 and 1 <= found["perplexity"] <= found["used"] <= 64
    page = (tmp_path / "out" / "index.html").read_text()
    assert "no posterior" in page and "needs at least 9" not in page


def test_without_videos_the_card_says_so(lvdm, vae_of, tmp_path):
    assert lvdm("vae card", vae_of(), out=tmp_path / "out", speed="[]") == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert "No videos were given" in page and "<h2>Parameters</h2>" in page and "<video" not in page


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"size": 20}, "size=20"),
        ({"size": 16}, "size=16: lpips needs at least 31"),
        ({"speed_size": 20}, "speed_size=20"),
        ({"videos": "/nowhere"}, "/nowhere"),
        ({"vae": "univae"}, "no published"),
        ({"features": "pixelz"}, "unknown features 'pixelz'"),
        ({"features": "c3d"}, "c3d"),
        ({"weights.c3d": "c3d.pt"}, "weights.c3d: nobody takes it"),
        ({"speed": "5,0"}, "speed=0: expected lengths of at least 1"),
        ({"speed": "[-1]"}, "speed=-1: expected lengths of at least 1"),
    ],
)
def test_mistakes_are_one_line(lvdm, vae_of, videos, tmp_path, capsys, keys, message):
    assert lvdm("vae card", **{"vae": vae_of(), "videos": videos, "out": tmp_path / "out", **KEYS, **keys}) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "out" / "scores.json").exists(), "said before anything is measured"


def test_a_card_of_single_frames_leaves_out_what_they_have_none_of(lvdm, vae_of, videos, tmp_path):
    """No flicker, no later latent frames, no FVD: in results.json, which knows no NaN, as on the page."""
    keys = {**KEYS, "frames": 1, "long": 3, "speed": "[]", "show": 1, "features": "i3d"}
    assert lvdm("vae card", vae_of(), videos=videos, out=tmp_path, **keys) == 0
    found = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert [*found["quality"]["values"]["model"]] == ["PSNR", "SSIM", "LPIPS"]
    assert found["latents"]["later_std"] == [None] * 4 and found["rfvd"] is None
    assert ">nan" not in (tmp_path / "index.html").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Closed forms


def test_long_videos_are_streamed_as_whole_ones_are_reconstructed(refiner, videos):
    from lvdm.data.index import open_index
    from lvdm.media import to_float
    from lvdm.metrics.frames import psnr
    from sample.measure.card import shot_pieces

    model, index = vae.load(refiner), open_index(videos, "none")
    found = psnr_by_position(model, index, 21, 32)
    row = index.ok[0]
    x = torch.cat(list(shot_pieces(index, row, 0, 21, 32)), 2)
    assert x.shape == (1, 3, 21, 32, 32) and x.abs().max() <= to_float(torch.tensor(255))
    with torch.no_grad():
        whole = psnr(x, model.reconstruct(x).clamp(-1, 1))[0]
    assert found[row.path] == pytest.approx(whole.tolist(), abs=1e-3)


def test_lines_by_position_are_of_the_same_videos_throughout():
    shots = {"a": [1.0] * 10, "b": [2.0] * 20, "c": [3.0] * 30}
    lines = nested(shots)
    assert list(lines) == ["3 videos, 10 frames", "2 videos, 20 frames", "1 video, 30 frames"]
    assert [{y for _, y in line} for line in lines.values()] == [{2.0}, {2.5}, {3.0}]
    assert list(nested({"a": [1.0] * 5, "b": [2.0] * 5})) == ["2 videos, 5 frames"]
    rows = bands({"a": [20.0] + [30.0] * 16, "b": [22.0] + [30.0] * 16 + [27.0] * 48})
    assert rows == [["0", 2, 21.0, -9.0], ["1 to 16", 2, 30.0, 0.0], ["17 to 64", 1, 27.0, -3.0]]


def test_statistics_of_latents_are_closed_forms():
    signs = torch.tensor([1.0, -1.0]).repeat(8).double().view(1, 1, 4, 2, 2)
    means = torch.cat([signs, 3 - 2 * signs], 1)
    stats = stats_of(means, torch.ones_like(means))
    assert (
        stats.mean == [0, 3] and stats.std == pytest.approx([1, 2]) and stats.excess_kurtosis == pytest.approx([-2, -2])
    )
    assert torch.tensor(stats.correlation).flatten().tolist() == pytest.approx([1, -1, -1, 1])
    assert stats.first_std == stats.later_std == pytest.approx([1, 2])
    assert stats.kl == pytest.approx((0.5 + 0.5 * (9 + 4)) / 2)
    assert sum(y for _, y in stats.histogram) * (stats.histogram[1][0] - stats.histogram[0][0]) == pytest.approx(1)
    drawn = torch.randn(1, 1, 2, 200, 200, generator=torch.Generator().manual_seed(0)).double()
    assert stats_of(drawn, torch.zeros_like(drawn)).kl is None  # infinite, which JSON has no word for
    normal = stats_of(drawn, torch.ones_like(drawn))
    assert normal.excess_kurtosis[0] == pytest.approx(0, abs=0.1)
    assert [y for _, y in normal.histogram] == pytest.approx([y for _, y in normal_curve(normal.histogram)], abs=0.02)


def test_perplexity_counts_codes_in_equal_use():
    stats = stats_of_codes(torch.arange(8).repeat(5), 64)
    assert (stats.codes, stats.used) == (64, 8) and stats.perplexity == pytest.approx(8)
    assert stats_of_codes(torch.zeros(9, dtype=torch.int64), 64).perplexity == pytest.approx(1)
