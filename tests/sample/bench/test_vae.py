"""The benchmarks of VAEs: small, they run on a CPU; on one H200 they hold the figures to beat."""

import json

import pytest
import torch

import vae
from lvdm import bench
from lvdm.bench import MATMUL
from sample.bench.vae import Case, measure

TINY = {"width": 16, "blocks": 1}
KEYS = {"model_args.width": 16, "model_args.blocks": 1, "size": 16, "rounds": 2, "precision": "fp32"}


@pytest.fixture(autouse=True)
def _without_memory(monkeypatch, request):
    """Spares a process a work, where the test does not look at memory."""
    if "command" not in request.node.name:
        monkeypatch.setattr(bench, "_peak_of_child", lambda work: None)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return vae.build("univae", refine=True, **TINY).eval()


def flops(table: dict, model: str) -> dict[str, float]:
    return {work: row.flops for work, row in table[model].items()}


def test_measure_gives_a_row_a_model_and_work(model):
    models = {"ours": model, "twin": model, "codes": vae.build("vqgan", **vae.registry.entry("vqgan").tiny)}
    found = measure(models, ["encode", "decode", "reconstruct"], (2, 5, 16, 16), rounds=2)
    assert list(found) == list(models) and all(
        list(rows) == ["encode", "decode", "reconstruct"] for rows in found.values()
    )
    assert all(len(row.seconds) == 2 and row.frames == 10 for rows in found.values() for row in rows.values())
    for name in models:
        counted = flops(found, name)
        assert counted["encode"] + counted["decode"] == counted["reconstruct"] and counted["encode"] > 0
    assert flops(found, "ours") == flops(found, "twin")


def test_a_stream_renders_what_the_whole_clip_does(model):
    seen = []
    for stream in (False, True):
        frames: list[int] = []
        hook = model.decoder.conv_out.register_forward_hook(lambda m, args, y, frames=frames: frames.append(y.shape[2]))
        rows = measure({"a": model}, ["decode", "refine"], (1, 17, 16, 16), rounds=1, stream=stream)["a"]
        hook.remove()
        assert (rows["decode"].frames, rows["refine"].frames) == (17, 33)
        seen.append(sum(frames))
    assert seen == [2 * 17, 2 * 17]  # D1's last layer, in a turn to warm up and a round; D2 does without


def test_a_model_of_another_precision_stays_as_it_is(model):
    rows = measure({"a": model}, ["encode"], (1, 5, 16, 16), rounds=1, precision="bf16")
    assert model.dtype == torch.float32 and rows["a"]["encode"].seconds


def test_command(lvdm, tmp_path, capsys):
    out = tmp_path / "vae.json"
    against = "odvae:width=16:blocks=1"
    assert lvdm("bench vae", "univae", against=against, frames="1,5", out=out, **KEYS) == 0
    printed, kept = capsys.readouterr().out, json.loads(out.read_text())
    cases = [Case(row["work"], row["way"], row["T"], row["model"]) for row in kept["rows"] if row["work"] != MATMUL]
    whole = [Case(work, "whole", t, m) for work in ("encode", "decode") for t in (1, 5) for m in ("univae", against)]
    assert cases == whole + [Case(work, "stream", t, "univae") for work in ("encode", "decode") for t in (1, 5)]
    assert f"{against} does not stream" in printed and f"{out.with_suffix('.html')}" in printed
    assert all(row["peak_gib"] > 0 and len(row["seconds"]) == 2 for row in kept["rows"])
    page = out.with_suffix(".html").read_text()
    assert all(f"{work}, {unit}" in page for work in ("encode", "decode") for unit in ("seconds", "GiB"))


def test_refine_is_told_a_rendered_frame(lvdm, tmp_path, capsys):
    out = tmp_path / "refine.json"
    assert lvdm("bench refine", frames=9, ways="whole", out=out, **KEYS) == 0
    _, d1, d2 = json.loads(out.read_text())["rows"]
    assert (d1["work"], d1["frames"], d2["work"], d2["frames"]) == ("decode", 9, "refine", 17)
    times = sorted(9 / 17 * b / a for a, b in zip(d1["seconds"], d2["seconds"], strict=True))
    counted = 9 / 17 * d2["flops"] / d1["flops"]
    assert f"{sum(times) / 2:.2f} times one of D1 (FLOPs: {counted:.2f})" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verb", "words", "keys", "says"),
    [
        ("bench refine", ["odvae"], {"model_args.width": 16}, "odvae: has no refinement decoder to time"),
        ("bench vae", [], {"frames": 16}, "frames=16: expected 4n+1, e.g. 13 or 17"),
        ("bench vae", [], {"frames": "5,0"}, "expected lengths of at least 1"),
        ("bench vae", [], {"frames": 5, "size": 30}, "size=30: must be divisible by 8"),
        ("bench vae", [], {"frames": 5, "works": "encod"}, "works=encod: expected some of encode, decode"),
        ("bench vae", [], {"frames": 5, "ways": "streams"}, "ways=streams: expected whole, stream or both"),
        ("bench vae", [], {"frames": 5, "against": "odvea"}, "did you mean 'odvae'"),
        ("bench vae", [], {"frames": 5, "against": "univae:widht=16"}, "widht"),
        ("bench vae", [], {"frames": 5, "against": "univae"}, "against=univae: already a model of this run"),
        ("bench vae", ["sdvae"], {"frames": 5, "compile": "true"}, "AutoencoderKL has no blocks to compile"),
    ],
)
def test_bad_input_is_one_line(lvdm, verb, words, keys, says, capsys):
    given = {} if words else KEYS
    assert lvdm(verb, *words, **{**given, **keys}) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and error.count("\n") == 1
