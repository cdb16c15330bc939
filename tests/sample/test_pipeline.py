"""The pipeline draws what `lvdm sample` draws, speaks diffusers' conventions, and comes back as it was saved."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict

import diffusers
import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.callbacks import PipelineCallback

import dit
import vae
from lvdm import LVDMPipeline
from lvdm.errors import UserError
from lvdm.latents import LatentSpace, LatentStore, load_latent
from lvdm.media import to_uint8
from lvdm.rng import generator
from lvdm.samplers import DDPM, make_scheduler
from sample.pipeline import space_of

QUICK = {"num_inference_steps": 2, "guidance_scale": 3}


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(transformer, refiner):
    return quiet(LVDMPipeline(vae.load(refiner), dit.load(transformer), make_scheduler("noise")))


@pytest.fixture
def plain(dit_of, vae_of):
    """Unconditional, without a D2."""
    model = dit.load(dit_of(condition="none", num_classes=0))
    return quiet(LVDMPipeline(vae.load(vae_of()), model, make_scheduler("noise")))


def generators(count):
    return [generator(0, "sample", i) for i in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# What it draws


def test_latents_are_those_of_lvdm_sample(pipe, samples):
    """The same generators, classes and batch: bit by bit."""
    labels = ["left", "right", "left", "right"]
    got = pipe(labels, num_inference_steps=3, guidance_scale=3, generator=generators(4), output_type="latent").frames
    kept = torch.stack([load_latent(samples / "latents" / f"{i:06d}.safetensors").latent for i in range(4)])
    assert torch.equal(pipe.space.scale.denormalise(got), kept)


def test_frames_are_what_the_decoders_make_of_the_latents(pipe):
    keys = {**QUICK, "class_labels": [0, 1]}
    z = pipe.space.scale.denormalise(pipe(**keys, generator=generators(2), output_type="latent").frames)
    with torch.no_grad():
        for refine, expected, fps in ((False, pipe.vae.decode(z).sample, 12), (True, pipe.vae.refine(z).sample, 24)):
            out = pipe(**keys, generator=generators(2), refine=refine, output_type="pt")
            expected = (expected.clamp(-1, 1) + 1) / 2
            assert out.frames.shape == (2, 17 if refine else 9, 3, 32, 32) and out.fps == fps
            assert torch.allclose(out.frames, expected.transpose(1, 2), atol=1e-5)
            assert out.frames.std() > 0.01


def test_output_types_are_those_of_diffusers(pipe):
    keys = {**QUICK, "class_labels": "left", "num_videos": 2, "refine": False}
    pt, arrays, pictures = (pipe(**keys, generator=generators(2), output_type=t).frames for t in ("pt", "np", "pil"))
    assert pt.dtype == torch.float32 and pt.min() >= 0 and pt.max() <= 1
    assert arrays.shape == (2, 9, 32, 32, 3) and np.array_equal(arrays, pt.permute(0, 1, 3, 4, 2).numpy())
    assert [len(video) for video in pictures] == [9, 9]
    shown = torch.from_numpy(np.stack([[np.asarray(picture) for picture in video] for video in pictures]))
    assert torch.equal(shown.permute(0, 1, 4, 2, 3), to_uint8(pt * 2 - 1))
    latents = pipe(**keys, generator=generators(2), output_type="latent").frames
    assert latents.shape == (2, 4, 3, 4, 4) and latents.dtype == torch.float32
    (returned,) = pipe(**keys, generator=generators(2), return_dict=False)
    assert np.array_equal(returned, arrays)


def test_a_generator_a_video_makes_it_independent_of_its_neighbours(pipe):
    keys = {**QUICK, "output_type": "latent"}
    both = pipe(["left", "right"], generator=generators(2), **keys).frames
    swapped = pipe(["right", "left"], generator=generators(2)[::-1], **keys).frames
    assert torch.equal(both, swapped.flip(0))


def test_one_generator_serves_all_and_none_follows_the_global_seed(pipe):
    keys = {**QUICK, "class_labels": "left", "num_videos": 2, "output_type": "latent"}
    one, same, other = (pipe(**keys, generator=torch.Generator().manual_seed(s)).frames for s in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other) and not torch.equal(one[0], one[1])
    torch.manual_seed(0)
    free = pipe(**keys).frames
    again = pipe(**keys).frames
    torch.manual_seed(0)
    assert torch.equal(pipe(**keys).frames, free) and not torch.equal(again, free)


def test_names_numbers_and_videos_a_label(pipe):
    keys = {**QUICK, "output_type": "latent"}
    named, numbered = (pipe(labels, generator=generators(2), **keys).frames for labels in (["right", "left"], [1, 0]))
    assert torch.equal(named, numbered)
    several = pipe(["right", "left"], num_videos=2, generator=generators(4), **keys).frames
    assert torch.equal(several, pipe([1, 1, 0, 0], generator=generators(4), **keys).frames)


def test_an_unconditional_model_takes_a_number_of_videos(plain):
    out = plain(num_videos=3, num_inference_steps=2, output_type="pt")
    assert out.frames.shape == (3, 9, 3, 32, 32) and out.fps == 12


STEPS = {"class_labels": "left", "num_inference_steps": 3, "output_type": "latent"}


def test_the_callback_hears_of_every_step_in_order_and_gets_the_latents(pipe):
    heard = []
    last = pipe(**STEPS, callback_on_step_end=lambda *a: heard.append(a)).frames
    assert [(step, int(t), list(more)) for _, step, t, more in heard] == [
        (step, t, ["latents"]) for step, t in ((0, 999), (1, 500), (2, 0))
    ]
    assert all(first is pipe for first, *_ in heard) and torch.equal(heard[-1][-1]["latents"], last)
    heard.clear()
    pipe(**STEPS, callback_on_step_end=lambda *a: heard.append(a), callback_on_step_end_tensor_inputs=[])
    assert [more for *_, more in heard] == [{}] * 3


@pytest.mark.parametrize("scheduler", [None, DDIMScheduler, DPMSolverMultistepScheduler])
def test_what_the_callback_returns_takes_the_place_of_the_latents(pipe, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config) if scheduler else pipe.scheduler
    other, heard, seen = torch.randn(1, 4, 3, 4, 4, generator=generator(0)), [], []

    def change(_, step, __, given):
        heard.append(given["latents"])
        return {0: {"latents": other}, 1: given, 2: {"latents": 2 * given["latents"]}}[step]

    pipe.transformer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    got = pipe(**STEPS, generator=generators(1), guidance_scale=1, callback_on_step_end=change).frames
    assert torch.equal(seen[1], other) and not torch.equal(heard[0], other)
    assert torch.equal(seen[2], heard[1]) and torch.equal(got, 2 * heard[2])


@pytest.mark.parametrize("scheduler", [None, DDIMScheduler, DPMSolverMultistepScheduler])
def test_an_interrupted_pipeline_gives_what_there_is_and_starts_anew(pipe, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config) if scheduler else pipe.scheduler
    heard, plain = [], pipe(**STEPS, generator=generators(1)).frames

    def stop(ours, step, _, given):
        heard.append(given["latents"])
        ours._interrupt = step == 1
        return {"latents": 2 * given["latents"]} if step == 1 else {}

    got = pipe(**STEPS, generator=generators(1), callback_on_step_end=stop).frames
    assert len(heard) == 2 and torch.equal(got, 2 * heard[1])
    assert torch.equal(pipe(**STEPS, generator=generators(1)).frames, plain)


def test_a_callback_of_diffusers_says_itself_what_it_takes(pipe):
    class Halves(PipelineCallback):
        tensor_inputs = ["latents"]  # noqa: RUF012

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return {"latents": callback_kwargs["latents"] / 2} if step_index == 2 else callback_kwargs

    whole = pipe(**STEPS, generator=generators(1)).frames
    half = pipe(
        **STEPS,
        generator=generators(1),
        callback_on_step_end=Halves(cutoff_step_ratio=None, cutoff_step_index=3),
        callback_on_step_end_tensor_inputs=[],
    ).frames
    assert torch.equal(half, whole / 2)


def test_another_pipeline_shares_the_parts(pipe):
    faster = make_scheduler("noise", "dpm++")
    again, other = LVDMPipeline.from_pipe(pipe), quiet(LVDMPipeline.from_pipe(pipe, scheduler=faster))
    assert all(part is again.components[name] for name, part in pipe.components.items())
    assert other.vae is pipe.vae and other.transformer is pipe.transformer and other.scheduler is faster
    assert other("left", **QUICK).frames.shape == (1, 17, 32, 32, 3)


def test_models_of_a_flow(dit_of, refiner):
    model = dit.load(dit_of(objective="flow", learn_sigma=False))
    pipe = quiet(LVDMPipeline(vae.load(refiner), model, make_scheduler("flow")))
    assert pipe("left", **QUICK, output_type="latent").frames.isfinite().all()
    pipe.scheduler = DDPM()
    with pytest.raises(UserError, match=r"DDPM takes prediction_type=epsilon, but .* objective=flow"):
        pipe("left", **QUICK)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_schedulers_of_diffusers_take_its_place(pipe, scheduler):
    one = pipe("left", **QUICK, generator=generators(1), output_type="latent").frames
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    other = pipe("left", **QUICK, generator=generators(1), output_type="latent").frames
    assert other.isfinite().all() and not torch.allclose(one, other, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Saved and loaded


@pytest.mark.parametrize("swapped", [None, DDIMScheduler])
def test_what_is_saved_comes_back_bit_by_bit(pipe, swapped, tmp_path):
    if swapped:
        pipe.scheduler = swapped.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    again = quiet(LVDMPipeline.from_pretrained(tmp_path))
    configs = [{k: v for k, v in p.scheduler.config.items() if k[0] != "_"} for p in (again, pipe)]
    assert type(again.scheduler) is (swapped or DDPM) and configs[0] == configs[1]
    assert not again.vae.training and not again.transformer.training
    keys = {**QUICK, "class_labels": ["left", "right"]}
    assert np.array_equal(again(**keys, generator=generators(2)).frames, pipe(**keys, generator=generators(2)).frames)


def test_the_folder_is_one_of_diffusers_without_code_or_pickles(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "LVDMPipeline" and index["_diffusers_version"] == diffusers.__version__
    assert {key for key in index if key[0] != "_"} == {"vae", "transformer", "scheduler"}
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json", ".safetensors"}


def test_parts_may_be_given_and_cast(pipe, refiner, tmp_path):
    pipe.save_pretrained(tmp_path / "one")
    model = vae.load(refiner)
    cast = LVDMPipeline.from_pretrained(
        tmp_path / "one", torch_dtype=torch.bfloat16, vae=model, scheduler=DDIMScheduler()
    )
    assert cast.vae is model and type(cast.scheduler) is DDIMScheduler
    assert cast.transformer.dtype == cast.vae.dtype == torch.bfloat16
    assert quiet(cast)("left", **QUICK).frames.dtype == np.float32
    with pytest.raises(UserError, match=r"the VAE is in torch\.bfloat16"):
        cast.save_pretrained(tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_a_hub_id_is_downloaded_as_data(pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path)
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda spec, **keys: asked.append((spec, keys)) or tmp_path
    )
    again = LVDMPipeline.from_pretrained("someone/pipeline", revision="v1")
    assert again.space == pipe.space
    assert asked == [("someone/pipeline", {"allow_patterns": ["*.json", "*.safetensors"], "revision": "v1"})]


def test_offloading_calls_the_hooks_of_both_models_and_sets_them_anew(pipe, monkeypatch):
    """On the CPU, where the hooks move nothing."""
    entered, enter, freed, free = [], CpuOffload.pre_forward, [], LVDMPipeline.maybe_free_model_hooks
    monkeypatch.setattr(
        CpuOffload,
        "pre_forward",
        lambda self, model, *given, **keys: entered.append(model) or enter(self, model, *given, **keys),
    )
    monkeypatch.setattr(LVDMPipeline, "maybe_free_model_hooks", lambda self: freed.append(self) or free(self))
    keys = {**QUICK, "class_labels": "left", "generator": None, "refine": True}
    expected = pipe(**{**keys, "generator": generators(1)}).frames
    pipe.enable_model_cpu_offload(device="cpu")
    freed.clear()
    for again in (1, 2):
        assert np.array_equal(pipe(**{**keys, "generator": generators(1)}).frames, expected)
        assert entered == ([pipe.transformer] * 2 + [pipe.vae]) * again and freed == [pipe] * again


def test_lvdm_gives_the_pipeline_when_asked_and_imports_no_torch_before():
    code = "import sys, lvdm; assert not {'torch', 'diffusers'} & set(sys.modules); print(lvdm.LVDMPipeline.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "LVDMPipeline"
    with pytest.raises(ImportError, match="LVDMPipelines"):
        from lvdm import LVDMPipelines  # noqa: F401


# ---------------------------------------------------------------------------------------------------------------------
# Refused

REFUSED = {
    "unknown class": ({"class_labels": ["lefty"]}, r"class_labels: unknown class 'lefty' \(did you mean 'left'\?\)"),
    "unknown number": ({"class_labels": [2]}, "class_labels: unknown class '2'; known: left, right"),
    "negative number": ({"class_labels": -1}, "unknown class '-1'"),
    "no class": ({}, "class_labels: expected names or numbers of classes: left, right"),
    "empty classes": ({"class_labels": []}, "class_labels: expected names or numbers"),
    "frames": ({"class_labels": 0, "num_frames": 17}, "num_frames=17: this transformer was trained on 9 frames"),
    "steps": ({"class_labels": 0, "num_inference_steps": 1001}, "1001 sampling steps: expected 1 to 1000"),
    "no steps": ({"class_labels": 0, "num_inference_steps": 0}, "0 sampling steps: expected 1 to 1000"),
    "type": ({"class_labels": 0, "output_type": "mp4"}, "output_type='mp4': expected one of np, pt, pil, latent"),
    "no videos": ({"class_labels": 0, "num_videos": 0}, "num_videos=0: expected at least 1"),
    "generators": ({"class_labels": 0, "generator": generators(2)}, "generator: 2 were given for 1 videos"),
    "tensors": (
        {"class_labels": 0, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]},
        r"callback_on_step_end_tensor_inputs: expected some of \['latents'\], got \['prompt_embeds'\]",
    ),
    "guidance": ({"class_labels": 0, "guidance_scale": -1}, "guidance=-1: expected at least 0"),
}


@pytest.mark.parametrize("keys, message", REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(keys, message, pipe):
    with pytest.raises(UserError, match=message):
        pipe(**keys)


def test_unconditional_models_refuse_what_is_of_others(plain):
    for keys, message in (
        ({"class_labels": "left"}, "trained without classes; give num_videos"),
        ({"guidance_scale": 7}, "is unconditional; use guidance=1"),
        ({"refine": True}, "has no refinement decoder"),
    ):
        with pytest.raises(UserError, match=message):
            plain(**keys)


def test_another_vae_is_refused(transformer, vae_of, dit_of):
    model, other = dit.load(transformer), vae.load(vae_of(seed=1))
    with pytest.raises(UserError, match="vae: not the VAE whose latents transformer was trained on"):
        LVDMPipeline(other, model, DDPM())
    with pytest.raises(UserError, match="transformer: does not say which latents it was trained on"):
        LVDMPipeline(vae.load(vae_of()), dit.load(dit_of(latents=None)), DDPM())


def test_folders_that_hold_no_pipeline_are_refused(pipe, refiner, tmp_path):
    folder = tmp_path / "pipe"
    pipe.save_pretrained(folder)
    for spec in (str(tmp_path / "none"), refiner):
        with pytest.raises(UserError, match=r"no model_index\.json here, so no pipeline"):
            LVDMPipeline.from_pretrained(spec)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("LVDMPipeline", "DiTPipeline"))
    with pytest.raises(UserError, match="holds a DiTPipeline, not an LVDMPipeline"):
        LVDMPipeline.from_pretrained(folder)
    index.write_text(index.read_text().replace("DiTPipeline", "LVDMPipeline"))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("DDPM", "AutoencoderKL"))
    with pytest.raises(UserError, match="AutoencoderKL is no scheduler"):
        LVDMPipeline.from_pretrained(folder)
    shutil.rmtree(folder / "vae")
    with pytest.raises(UserError, match="vae: no such folder"):
        LVDMPipeline.from_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Official checkpoints, which know only the kind of their VAE


def test_an_official_transformer_takes_any_vae_of_its_kind(dit_of, refiner, vae_of, store):
    space = {**asdict(LatentSpace.of(LatentStore(store))), "vae_sha256": ""}
    transformer = dit.load(dit_of(latents=space))
    for folder in (refiner, vae_of(seed=1)):
        model = vae.load(folder)
        assert space_of(transformer, model).vae_sha256 == model.latent_sha256()
    images = vae.build("sdvae", **vae.registry.entry("sdvae").tiny)  # a latent a frame
    with pytest.raises(UserError, match="was trained on latents of Stable Diffusion's VAE"):
        space_of(transformer, images)
