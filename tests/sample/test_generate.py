"""Sampling: video i is a function of (seed, i), of its class and of guidance; runs resume; wrong parts are refused."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dit
import vae
from dit.conditioning import Condition
from dit.latte import Latte
from lvdm.data.reader import probe
from lvdm.files import replacing
from lvdm.latents import LatentSpace, LatentStore, load_latent
from lvdm.media import read_video, to_uint8
from lvdm.rng import generator
from lvdm.samplers import DDPM, sample
from sample import generate
from sample.configs import Generate
from sample.render import frames


def latents(out: Path) -> list[torch.Tensor]:
    return [load_latent(path).latent for path in sorted(out.glob("latents/*.safetensors"))]


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Within rounding: to 1e-4 of the spread."""
    return bool((a - b).abs().max() < 1e-4 * b.std())


@pytest.fixture
def draw(lvdm, transformer, vae_of, tmp_path, monkeypatch):
    """`draw("name", **keys)`: a run without the videos, its folder."""
    monkeypatch.setattr(generate.Job, "render", lambda *_: None)
    monkeypatch.setattr(generate, "read_video", lambda *_: None)
    monkeypatch.setattr(generate, "contact_sheet", lambda *_, **__: None)

    def run(name: str, **keys: object) -> Path:
        keys = {"dit": transformer, "vae": vae_of(), "count": 1, "batch": 4, "steps": 3, "guidance": 3, **keys}
        assert lvdm("sample", out=tmp_path / name, **keys) == 0
        return tmp_path / name

    return run


# ---------------------------------------------------------------------------------------------------------------------
# What a run writes


def test_a_run_writes_latents_and_videos_at_both_rates(samples, store):
    names = [f"{i:06d}" for i in range(5)]
    for kind in ("latents", "d1", "d2"):
        assert sorted(path.stem for path in (samples / kind).iterdir()) == names
    for name in names:
        d1, d2 = (probe(samples / kind / f"{name}.mp4") for kind in ("d1", "d2"))
        assert (d1.frames, d1.fps, d1.width, d1.height) == (9, 12, 32, 32)
        assert (d2.frames, d2.fps, d2.width, d2.height) == (17, 24, 32, 32)
    latent = load_latent(samples / "latents" / "000003.safetensors")
    assert latent.latent.shape == (4, 3, 4, 4) and (latent.num_frames, latent.fps) == (9, 12)
    assert latent.vae_sha256 == LatentStore(store).manifest.vae_sha256
    assert latent.extra == {"class": "right", "seed": "0"}
    assert (samples / "sheet.png").stat().st_size > 1000
    assert json.loads((samples / "finished.json").read_text()) == {"videos": 5}


def test_classes_are_drawn_in_turn(samples):
    names = ["left", "right", "left", "right", "left"]
    same = {"seed": 0, "fps": 12, "stride": 2, "sampler": "ddpm", "steps": 3, "guidance": 3}
    assert lines(samples) == [{"id": i, "class": name, **same} for i, name in enumerate(names)]


def test_latents_are_the_samplers_own_in_the_scale_of_the_vae(samples, transformer):
    model = dit.load(transformer)
    scale = LatentSpace(**model.config.latents).scale
    condition, null = Condition.of_classes([1], 2), Condition.of_classes([-1], 2)

    def denoise(x, t):
        conditional, unconditional = model(x, t, condition), model(x, t, null)
        eps = unconditional[:, :4] + 3 * (conditional[:, :4] - unconditional[:, :4])
        return torch.cat([eps, conditional[:, 4:]], 1)

    expected = sample(denoise, DDPM(), (4, 3, 4, 4), 3, [generator(0, "sample", 3)])
    assert agree(latents(samples)[3], scale.denormalise(expected)[0])


def test_without_a_d2_there_is_no_d2(lvdm, transformer, vae_of, refiner, tmp_path):
    keys = {"dit": transformer, "count": 1, "batch": 1, "steps": 1}
    assert lvdm("sample", out=tmp_path / "none", vae=vae_of(), **keys) == 0
    assert lvdm("sample", out=tmp_path / "no", vae=refiner, refine="false", **keys) == 0
    for name in ("none", "no"):
        assert (tmp_path / name / "d1" / "000000.mp4").is_file() and not (tmp_path / name / "d2").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Video i is a function of (seed, i)


def test_neighbours_do_not_matter(draw, samples):
    alone, five = latents(draw("three", count=3)), latents(samples)
    assert len(alone) == 3 and all(torch.equal(a, b) for a, b in zip(alone, five, strict=False))
    assert all(not torch.equal(a, b) for a in five for b in five if a is not b)


def test_every_batch_is_padded_to_one_size(draw, monkeypatch):
    """Bitwise equality holds between batches of one shape only."""
    sizes, drawn = [], generate.draw

    def spy(model, condition, generators, *rest):
        sizes.append(len(generators))
        return drawn(model, condition, generators, *rest)

    monkeypatch.setattr(generate, "draw", spy)
    draw("five", count=5, batch=4)
    assert sizes == [4, 4]


@pytest.mark.parametrize("batch", [1, 5])
def test_another_batch_size_agrees_within_rounding(batch, draw, samples):
    for a, b in zip(latents(draw("other", count=5, batch=batch)), latents(samples), strict=True):
        assert agree(a, b)


def test_another_seed_gives_other_videos(draw, samples):
    out = draw("other", seed=1, count=2)
    assert all(not torch.allclose(a, b, atol=0.1) for a, b in zip(latents(out), latents(samples), strict=False))
    assert [line["seed"] for line in lines(out)] == [1, 1]


def test_a_stopped_run_goes_on_and_touches_nothing_finished(lvdm, samples, transformer, refiner, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(samples, out)
    lost = [out / "finished.json", out / "samples.jsonl", out / "d2" / "000004.mp4"]
    lost += [
        out / kind / f"00000{i}.{end}" for i in (1, 3) for kind, end in (("latents", "safetensors"), ("d1", "mp4"))
    ]
    for path in lost:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*/*")}
    assert lvdm("sample", dit=transformer, vae=refiner, out=out, count=5, batch=4, steps=3, guidance=3) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert all(torch.equal(a, b) for a, b in zip(latents(out), latents(samples), strict=True))
    assert lines(out) == lines(samples) and (out / "finished.json").is_file()
    assert [probe(path).frames for path in lost if path.suffix == ".mp4"] == [17, 9, 9]


def test_a_finished_run_is_left_alone(lvdm, samples, transformer, refiner, capsys):
    before = {path: path.stat().st_mtime_ns for path in samples.glob("*/*")}
    keys = {"dit": transformer, "vae": refiner, "out": samples, "batch": 4, "steps": 3, "guidance": 3}
    assert lvdm("sample", count=5, **keys) == 0
    assert lvdm("sample", count=3, **keys) == 0
    assert f"{samples}: finished with 5 videos; count=3 asks for no more of them" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in samples.glob("*/*")} == before
    assert lvdm("sample", count=5, **{**keys, "steps": 4}) == 2
    assert "belongs to another config (different: steps)" in capsys.readouterr().err


def test_a_finished_run_that_is_asked_for_more_draws_the_others(lvdm, draw, samples, transformer, refiner, tmp_path):
    shutil.copytree(samples, tmp_path / "more")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "more").glob("*/*")}
    keys = {"dit": transformer, "vae": refiner, "batch": 4, "steps": 3, "guidance": 3}
    assert lvdm("sample", out=tmp_path / "more", count=6, **keys) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    at_once = draw("at-once", count=6)
    for one, other in zip(latents(tmp_path / "more"), latents(at_once), strict=True):
        assert torch.equal(one, other)
    assert [line["id"] for line in lines(tmp_path / "more")] == list(range(6))


def test_what_a_killed_run_left_half_written_goes_and_never_counts(lvdm, samples, transformer, refiner, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(samples, out)
    parts = []
    for path in (out / "latents" / "000004.safetensors", out / "d1" / "000004.mp4", out / "d2" / "000004.mp4"):
        with pytest.raises(FileNotFoundError), replacing(path) as part:
            parts.append(part)
        path.rename(part)  # at worst it is whole, but for its name
    (out / "finished.json").unlink()
    assert lvdm("render", out / "latents", vae=refiner, out=tmp_path / "rendered") == 0
    assert [path.stem for path in sorted((tmp_path / "rendered").glob("*.mp4"))] == [f"{i:06d}" for i in range(4)]
    assert lvdm("sample", dit=transformer, vae=refiner, out=out, count=5, batch=4, steps=3, guidance=3) == 0
    assert not any(part.exists() for part in parts) and len(list(out.glob("*/*"))) == 15
    assert all(torch.equal(a, b) for a, b in zip(latents(out), latents(samples), strict=True))


def test_real_processes_draw_bitwise_what_one_does(lvdm, cache, transformer, refiner, tmp_path):
    keys = {"dit": transformer, "vae": refiner, "count": 5, "batch": 2, "steps": 3, "guidance": 3, "format": "npy"}
    assert lvdm("sample", out=tmp_path / "one", threads=1, **keys) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [f"{key}={value}" for key, value in {**keys, "threads": 1, "out": tmp_path / "two"}.items()]
    environment = {**os.environ, "LVDM_CACHE": str(cache), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("ACCELERATE_USE_CPU", None)
    done = subprocess.run([*launch, "-m", "sample.generate", *words], env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    files = {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").glob("*/*")}
    assert len(files) == 15 and files == {path.relative_to(tmp_path / "two") for path in (tmp_path / "two").glob("*/*")}
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)


def test_two_processes_share_the_work_whoever_is_late(samples, transformer, refiner, tmp_path, monkeypatch):
    """Each process lists what is missing; one that starts late must not see what the other has already drawn."""
    barrier, rank = threading.Barrier(2, timeout=20), threading.local()
    models = {refiner: vae.load(refiner), transformer: dit.load(transformer)}

    @contextmanager
    def in_turn():
        if rank.value:
            barrier.wait()
        yield
        if not rank.value:
            barrier.wait()

    def accelerator(_):
        return SimpleNamespace(
            process_index=rank.value,
            num_processes=2,
            is_main_process=rank.value == 0,
            device="cpu",
            first=True,
            autocast=torch.no_grad,
            main_process_first=in_turn,
            wait_for_everyone=barrier.wait,
            end_training=lambda: None,
        )

    def load(spec):
        time.sleep(0.5 * rank.value)
        return models[spec]

    def run(value):
        rank.value = value
        generate.run(Generate(out=str(tmp_path), dit=transformer, vae=refiner, count=5, batch=2, steps=3, guidance=3))

    monkeypatch.setattr(generate.accelerators, "make_accelerator", accelerator)
    monkeypatch.setattr(generate.vae, "load", load)
    monkeypatch.setattr(generate.dit, "load", load)
    threads = [threading.Thread(target=run, args=(value,)) for value in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lines(tmp_path) == lines(samples) and len(list(tmp_path.glob("d2/*.mp4"))) == 5
    for a, b in zip(latents(tmp_path), latents(samples), strict=True):
        assert agree(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# Classes and guidance


def test_classes_by_name_and_by_number_in_the_order_asked(draw):
    named, numbered = (draw(name, classes=c, count=3) for name, c in (("a", "[right,left]"), ("b", "1,0")))
    for out in (named, numbered):
        assert [line["class"] for line in lines(out)] == ["right", "left", "right"]
    assert all(torch.equal(a, b) for a, b in zip(latents(named), latents(numbered), strict=True))


def test_class_and_guidance_reach_the_model(draw):
    keys = {"left": ("left", 3), "right": ("right", 3), "weak": ("left", 1)}
    one, two, weak = (latents(draw(name, classes=f"[{c}]", guidance=g))[0] for name, (c, g) in keys.items())
    assert not torch.allclose(one, two, atol=1e-3) and not torch.allclose(one, weak, atol=1e-3)


def test_unconditional_videos_have_no_class(draw, dit_of):
    """Also where the store has classes that the transformer was not trained on; guidance is 1 unless asked."""
    space = dict(dit.load(dit_of()).config.latents)
    for name, classes in (("with", space["classes"]), ("without", [])):
        options = {
            "condition": "none",
            "num_classes": 0,
            "label_dropout": 0.0,
            "latents": {**space, "classes": classes},
        }
        out = draw(name, dit=dit_of(**options), count=2, guidance="null")
        assert [(line["class"], line["guidance"]) for line in lines(out)] == [(None, 1), (None, 1)]
        assert load_latent(out / "latents" / "000001.safetensors").extra["class"] == ""
        plain = draw(f"{name}-1", dit=dit_of(**options), count=2, guidance=1)
        assert all(torch.equal(a, b) for a, b in zip(latents(out), latents(plain), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Refused

REFUSED = {
    "unknown class": ({"classes": "[lefty]"}, {}, "unknown class 'lefty' (did you mean 'left'?); known: left, right"),
    "unknown number": ({"classes": "[2]"}, {}, "unknown class '2'; known: left, right"),
    "no steps": ({"steps": 0}, {}, "steps=0: expected at least 1"),
    "too many steps": ({"steps": 1001}, {}, "steps=1001: expected 1 to 1000"),
    "no D2": ({"refine": "true"}, {}, "has no refinement decoder"),
    "unconditional": ({"classes": "[left]"}, {"condition": "none", "num_classes": 0}, "trained without classes"),
    "no condition": (
        {"guidance": 7},
        {"condition": "none", "num_classes": 0},
        "guidance=7.0: this transformer is unconditional; use guidance=1, or leave it out",
    ),
    "negative guidance": ({"guidance": -1}, {}, "guidance=-1.0: expected at least 0"),
    "no null class": ({"guidance": 2}, {"label_dropout": 0.0}, "has no null class (label_dropout=0); use guidance=1"),
    "no latents": ({}, {"latents": None}, "does not say which latents it was trained on"),
    "sampler of flows": (
        {"sampler": "euler"},
        {},
        "sampler=euler: not for a model with objective=noise; expected auto, ddpm, ddim, dpm++",
    ),
    "sampler of noise": (
        {"sampler": "ddim"},
        {"objective": "flow", "learn_sigma": False},
        "not for a model with objective=flow; expected auto, euler",
    ),
    "unknown attention": ({"attention": "spda"}, {}, "unknown attention backend 'spda' (did you mean 'sdpa'?)"),
    "unknown format": ({"format": "gif"}, {}, "format='gif': expected one of mp4, npy, ffv1"),
    "unknown labels": ({"labels": "random"}, {}, "labels='random': expected one of balanced, drawn"),
    "no out": ({"out": ""}, {}, "out: expected the folder"),
}


@pytest.mark.parametrize("keys, options, message", REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(keys, options, message, lvdm, dit_of, transformer, vae_of, tmp_path, capsys):
    parts = {"dit": dit_of(**options) if options else transformer, "vae": vae_of(), "out": tmp_path / "out"}
    assert lvdm("sample", **{**parts, "count": 1, "steps": 1, **keys}) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_vae_of_other_weights_is_refused_and_the_right_one_may_follow(lvdm, transformer, vae_of, tmp_path, capsys):
    keys = {"dit": transformer, "out": tmp_path / "out", "count": 1, "steps": 1, "batch": 1}
    other = vae_of(seed=1)
    assert lvdm("sample", vae=other, **keys) == 2
    hashes = [vae.load(folder).latent_sha256()[:12] for folder in (other, vae_of())]
    error = capsys.readouterr().err
    assert f"vae={other}: not the VAE whose latents dit={transformer} was trained on" in error
    assert f"(weights {hashes[0]}, expected {hashes[1]})" in error
    assert lvdm("sample", vae=vae_of(), **keys) == 0


def test_a_full_disk_is_told_before_the_work_and_changes_nothing(lvdm, transformer, refiner, tmp_path, capsys):
    """A video: 4x3x4x4 fp32 latents; 9 and 17 frames of 32x32, as they are or, in mp4, at an eighth."""
    usage, keys = SimpleNamespace(free=500), {"dit": transformer, "vae": refiner, "out": tmp_path, "count": 10**4}
    sizes = {"mp4": 4 * 192 + 26 * 32 * 32 * 3 // 8, "npy": 4 * 192 + 26 * 32 * 32 * 3}
    for name, size in sizes.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lvdm.files.shutil.disk_usage", lambda _: usage)
            assert lvdm("sample", format=name, **keys) == 2
        error = capsys.readouterr().err
        assert f"{size / 1e5:.2f} GB are needed for 10000 videos, only 0.00 GB are free" in error
    keys |= {"count": 1, "batch": 1, "steps": 1}
    assert lvdm("sample", **keys) == 0  # another config may follow in the same folder


def test_guidance_1_needs_no_null_class_and_is_what_a_model_without_one_gets(draw, dit_of):
    for name, guidance in (("one", 1), ("none", "null")):
        out = draw(name, dit=dit_of(label_dropout=0.0), guidance=guidance)
        assert len(latents(out)) == 1 and lines(out)[0]["guidance"] == 1


def test_guidance_is_7_where_there_is_a_null_class(draw):
    out = draw("default", guidance="null")
    assert lines(out)[0]["guidance"] == 7
    assert torch.equal(latents(out)[0], latents(draw("seven", guidance=7))[0])


# ---------------------------------------------------------------------------------------------------------------------
# Labels, samplers, formats


def test_drawn_labels_are_a_function_of_the_seed_and_the_number(draw, monkeypatch):
    monkeypatch.setattr(generate.Job, "draw", lambda *_: None)
    names = [[line["class"] for line in lines(draw(str(n), labels="drawn", count=n))] for n in (8, 64)]
    assert names[1][:8] == names[0] and 16 < names[1].count("left") < 48
    assert names[1] != [line["class"] for line in lines(draw("other", labels="drawn", count=64, seed=1))]
    right = lines(draw("asked", labels="drawn", count=8, classes="[right]"))
    assert {line["class"] for line in right} == {"right"}


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_other_samplers_of_the_same_model(sampler, draw, samples):
    """Deterministic after the noise, so the neighbours do not matter either."""
    one, three = (draw(f"{sampler}-{count}", sampler=sampler, count=count) for count in (1, 3))
    assert torch.equal(latents(one)[0], latents(three)[0]) and lines(one)[0]["sampler"] == sampler
    assert not torch.allclose(latents(one)[0], latents(samples)[0], atol=1e-3)


def test_models_of_a_flow_are_drawn_by_euler(draw, dit_of):
    out = draw("flow", dit=dit_of(objective="flow", learn_sigma=False))
    assert lines(out)[0]["sampler"] == "euler" and latents(out)[0].isfinite().all()


def test_attention_compile_and_precision_reach_the_transformer(draw, samples, monkeypatch):
    asked, seen, forward = [], [], Latte.forward

    def spy(self, *inputs):
        output = forward(self, *inputs)
        seen.append(output.dtype)
        return output

    monkeypatch.setattr(Latte, "forward", spy)
    monkeypatch.setattr(Latte, "compile_repeated_blocks", lambda self: asked.append(self.blocks[1].attention.backend))
    assert agree(latents(draw("math", attention="math", compile="true"))[0], latents(samples)[0])
    assert asked == ["math"] and seen == [torch.float32] * 3
    draw("rough", precision="bf16")
    assert seen[3:] == [torch.bfloat16] * 3


def assert_rendered(out: Path, suffix: str, kept: Path, spec: str) -> None:
    """The videos in `out` are, bit by bit, those of the latents in `kept`."""
    model, files = vae.load(spec), sorted(kept.glob("latents/*"))
    for decoder, double in (("d1", False), ("d2", True)):
        assert len(files) == len(list(out.glob(f"{decoder}/*"))) > 0
        for file in files:
            latent = load_latent(file)
            pieces = torch.cat(list(frames(model, latent.latent[None], latent.num_frames, double)), 2)
            expected = to_uint8(pieces[0]).permute(1, 2, 3, 0)
            assert torch.equal(read_video(out / decoder / f"{file.stem}{suffix}"), expected)


@pytest.mark.parametrize("name, suffix", [("npy", ".npy"), ("ffv1", ".mkv")])
def test_formats_without_loss_hold_what_the_decoders_give(name, suffix, lvdm, transformer, refiner, tmp_path):
    out, keys = tmp_path / "out", {"dit": transformer, "vae": refiner, "count": 2, "batch": 2, "steps": 1}
    assert lvdm("sample", out=out, format=name, **keys) == 0
    assert_rendered(out, suffix, out, refiner)
    assert (out / "sheet.png").is_file() and not (out / "index.html").exists()


def test_latents_may_go_once_they_are_rendered(lvdm, samples, transformer, refiner, tmp_path, monkeypatch):
    """A run that is killed on the way goes on with what is missing, and draws nothing twice."""
    keys = {"dit": transformer, "vae": refiner, "out": tmp_path, "count": 5, "batch": 4, "steps": 3, "guidance": 3}
    keys |= {"keep_latents": "false", "format": "npy"}  # x264 is not repeatable bit by bit at this size
    written, write = [], generate.render

    def dies(*arguments):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(arguments)
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "render", dies)
        assert lvdm("sample", **keys) == 130
    assert sorted(path.stem for path in tmp_path.glob("latents/*")) == ["000002", "000003"]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("d?/*.npy")}
    assert len(before) == 5
    assert lvdm("sample", **keys) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not (tmp_path / "latents").exists() and lines(tmp_path) == lines(samples)
    assert_rendered(tmp_path, ".npy", samples, refiner)


def test_what_needs_latents_that_are_gone_says_where_it_looked(lvdm, samples, refiner, tmp_path, capsys):
    shutil.copytree(samples, tmp_path / "out", ignore=shutil.ignore_patterns("latents"))
    assert lvdm("render", tmp_path / "out" / "latents", vae=refiner, out=tmp_path / "again") == 2
    assert f"latents={tmp_path}/out/latents: expected a .safetensors latent file or a folder" in capsys.readouterr().err


def test_dry_run_counts_guided_passes_twice(lvdm, dit_of, transformer, vae_of, capsys):
    def flops(**keys):
        assert lvdm("sample", "--dry-run", vae=vae_of(), steps=10, **keys) == 0
        return re.search(r"([\d.]+ \w?FLOPs?)", capsys.readouterr().out)[1]

    plain = dit_of(condition="none", num_classes=0)
    assert flops(dit=transformer) != flops(dit=transformer, guidance=1) and flops(dit=plain)
