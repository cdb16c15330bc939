"""`LVDMPipeline`: transformer, VAE and scheduler as one pipeline of diffusers, `from lvdm import LVDMPipeline`."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

import dit
import vae
from dit.conditioning import Condition
from dit.latte import Latte
from dit.sampling import draw, guidance_of
from lvdm import samplers
from lvdm.errors import UserError, nearest
from lvdm.latents import LatentSpace
from lvdm.media import to_uint8
from lvdm.registry import class_name
from sample.render import frames, require_refiner
from vae.base import VideoVAE


@dataclass
class LVDMPipelineOutput(BaseOutput):
    """What `LVDMPipeline` returns."""

    frames: np.ndarray | Tensor | list[list[Image.Image]]
    """(B, T, H, W, 3) or (B, T, 3, H, W) floats in [0, 1], B lists of T pictures, or latents (B, z, t, h, w)."""
    fps: float
    """Frames a second: twice the clips' own where D2 rendered them."""


class _Interrupted(Exception):
    """Ends the drawing, with what there is."""

    def __init__(self, latents: Tensor):
        super().__init__()
        self.latents = latents


class LVDMPipeline(DiffusionPipeline):
    """Draws videos: `pipe(class_labels=["Biking"], generator=torch.Generator().manual_seed(0)).frames`.

    `vae` is a VideoVAE and `transformer` a Latte trained on its latents, whose mean, std and VAE hash are in
    `transformer.config.latents`; another VAE is a UserError. `scheduler` is any of diffusers that fits the
    transformer's objective, e.g. of `lvdm.samplers.make_scheduler`. Give the VAE in float32: its weights are hashed. To
    go to another dtype use `.to(...)` or `torch_dtype` of `from_pretrained`.
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012 (diffusers' name)

    def __init__(self, vae: VideoVAE, transformer: Latte, scheduler: SchedulerMixin):
        super().__init__()
        self.space = space_of(transformer, vae)
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)

    # ---- load and save -----------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, torch_dtype: torch.dtype | None = None, **kwargs: Any
    ) -> "LVDMPipeline":
        """The pipeline in a folder (`lvdm export`, `save_pretrained`) or a hub repository, in eval mode.

        `vae`, `transformer` or `scheduler` take the place of the stored ones; other `kwargs` (revision, token,
        cache_dir ...) go to the hub's download. Reads configs and safetensors and runs no code from there.
        """
        given = {name: kwargs.pop(name, None) for name in ("vae", "transformer", "scheduler")}
        folder = _folder(str(pretrained_model_name_or_path), **kwargs)
        pipe = cls(
            given["vae"] or vae.load(f"{folder}/vae"),
            given["transformer"] or dit.load(f"{folder}/transformer"),
            given["scheduler"] or _load_scheduler(f"{folder}/scheduler"),
        )
        return pipe if torch_dtype is None else pipe.to(torch_dtype)

    @classmethod
    def from_pipe(cls, pipeline: "LVDMPipeline", **kwargs: Any) -> "LVDMPipeline":
        """Another pipeline of the same parts, but for those given: `LVDMPipeline.from_pipe(pipe, scheduler=...)`."""
        # diffusers takes over a part of exactly the class that __init__ names, and a VAE is of any
        return super().from_pipe(pipeline, **{"vae": pipeline.vae, **kwargs})

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As of any pipeline, `push_to_hub=True` included; UserError for a VAE that has left float32."""
        if self.vae.dtype != torch.float32:
            raise UserError(
                f"{save_directory}: the VAE is in {self.vae.dtype}, in which it is not the one that the transformer"
                " was trained with; save the pipeline as it was loaded, and give torch_dtype when loading"
            )
        super().save_pretrained(str(save_directory), **kwargs)

    # ---- draw --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str] | int | str | None = None,
        num_videos: int = 1,
        num_frames: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        refine: bool | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "np",
        callback_on_step_end: Callable[[Any, int, Tensor, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
    ) -> LVDMPipelineOutput | tuple:
        """Draws `num_videos` videos of each of `class_labels`, or so many of an unconditional model.

        Args:
            class_labels: names or numbers of classes, one or several; None for an unconditional model.
            num_videos: videos a label, next to each other in the result.
            num_frames: pixel frames of D1; only the trained number fits, which None takes.
            num_inference_steps: 1 to 1000.
            guidance_scale: 1 is none; None is 7 where the model has a null class, else 1.
            refine: render 2T - 1 frames at twice the rate with D2; None does so if the VAE has one.
            generator: a list gives every video its own noise, whatever its neighbours; one serves them in turn; None
                takes seeds from torch's global state.
            output_type: "np", "pt", "pil", or "latent", normalised ones (see `LatentScale`).
            callback_on_step_end: called as (pipe, step, timestep, {"latents": x}) after each step, x being normalised
                and fp32; the "latents" of what it returns take x's place. Setting `pipe._interrupt = True` in it leaves
                out the steps to come.
            callback_on_step_end_tensor_inputs: what the callback gets of ["latents"]; a PipelineCallback of diffusers
                says so itself.
            return_dict: False gives (frames,).

        Raises UserError for what does not fit.
        """
        labels = self._labels(class_labels, num_videos)
        refine = self.vae.spec.refines if refine is None else refine
        require_refiner(self.vae, refine, "pipeline")
        wanted = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        self._check(num_frames, output_type, wanted)
        condition = Condition.of_classes(labels, self.transformer.config.num_classes) if labels else Condition()
        generators = _generators(generator, len(labels) or num_videos)
        guidance = guidance_of(self.transformer, guidance_scale)

        self._interrupt = False
        with self.progress_bar(total=num_inference_steps) as progress:

            def on_step(done: int, x: Tensor) -> Tensor:
                progress.update()
                x = self._heard(callback_on_step_end, wanted, done, x)
                if self._interrupt:
                    raise _Interrupted(x)
                return x

            parts = self.transformer, condition, generators, self.scheduler
            try:
                latents = draw(*parts, num_inference_steps, guidance, on_step, self._execution_device)
            except _Interrupted as stop:
                latents = stop.latents
        shown = latents if output_type == "latent" else self._shown(latents, refine, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (shown,)
        return LVDMPipelineOutput(frames=shown, fps=self.space.fps * (2 if refine else 1))

    def _labels(self, asked: Sequence[int | str] | int | str | None, num_videos: int) -> list[int]:
        """The class of each video; [] for an unconditional model."""
        if num_videos < 1:
            raise UserError(f"num_videos={num_videos}: expected at least 1")
        if not self.space.classes:
            if asked is not None:
                raise UserError("class_labels: this transformer was trained without classes; give num_videos")
            return []
        if asked is None or (not isinstance(asked, int | str) and not len(asked)):
            raise UserError(f"class_labels: expected names or numbers of classes: {_some(self.space.classes)}")
        asked = asked.tolist() if isinstance(asked, Tensor) else asked
        ids = class_ids([asked] if isinstance(asked, int | str) else asked, self.space.classes, "class_labels")
        return [label for label in ids for _ in range(num_videos)]

    def _heard(self, callback: Callable | None, wanted: Sequence[str], done: int, x: Tensor) -> Tensor:
        """The latents `x` after `done` steps, or those that the callback puts in their place."""
        if callback is None:
            return x
        said = callback(self, done - 1, self.scheduler.timesteps[done - 1], {name: x for name in wanted})
        return (said or {}).get("latents", x)

    def _check(self, num_frames: int | None, output_type: str, tensor_inputs: Sequence[str]) -> None:
        """Refuses what neither the models nor the scheduler would."""
        if num_frames not in (None, self.space.num_frames):
            raise UserError(
                f"num_frames={num_frames}: this transformer was trained on {self.space.num_frames} frames and draws as"
                " many; leave num_frames out"
            )
        if output_type not in (known := ("np", "pt", "pil", "latent")):
            raise UserError(f"output_type={output_type!r}: expected one of {', '.join(known)}")
        if unknown := [name for name in tensor_inputs if name not in self._callback_tensor_inputs]:
            raise UserError(
                f"callback_on_step_end_tensor_inputs: expected some of {self._callback_tensor_inputs}, got {unknown}"
            )
        objective = self.transformer.config.objective
        wanted = {"noise": "epsilon", "flow": "flow_prediction"}[objective]
        found = self.scheduler.config.get("prediction_type", "flow_prediction")  # schedulers for flows alone have none
        if found != wanted:
            raise UserError(
                f"scheduler: {type(self.scheduler).__name__} takes prediction_type={found}, but the transformer has"
                f" objective={objective}; take one of lvdm.samplers.make_scheduler({objective!r})"
            )

    def _shown(self, latents: Tensor, refine: bool, output_type: str) -> Any:
        """The rendered videos in the asked form; one is decoded at a time."""
        hook = getattr(self.vae, "_hf_hook", None)
        if hook is not None:  # of enable_model_cpu_offload, which waits for a call of forward
            hook.pre_forward(self.vae)
        z = self.space.scale.denormalise(latents)
        rendered = [
            torch.cat([piece.float().cpu() for piece in frames(self.vae, one, self.space.num_frames, refine)], 2)
            for one in z.split(1)
        ]
        video = torch.cat(rendered).transpose(1, 2)  # (B, T, 3, H, W)
        if output_type == "pil":
            return [[Image.fromarray(frame) for frame in to_uint8(one).permute(0, 2, 3, 1).numpy()] for one in video]
        video = (video.clamp(-1, 1) + 1) / 2
        return video if output_type == "pt" else video.permute(0, 1, 3, 4, 2).numpy()


# ----------------------------------------------------------------------------------------------------------------------
# What fits together


def space_of(transformer: Any, model: Any, name: str = "transformer", vae_name: str = "vae") -> LatentSpace:
    """The latent space that `transformer` was trained in, refused when `model` is another VAE. Without classes for an
    unconditional transformer, whose store may have had some. `name` and `vae_name` stand in the messages."""
    if not transformer.config.latents:
        raise UserError(f"{name}: does not say which latents it was trained on; give a run of lvdm train dit")
    space, c, spec = LatentSpace(**transformer.config.latents), transformer.config, model.spec
    if not space.vae_sha256:  # an official checkpoint
        if (spec.latent_channels, spec.latent_frames(space.num_frames)) != (c.in_channels, c.frames):
            raise UserError(f"{vae_name}: {name} was trained on latents of Stable Diffusion's VAE; give one of those")
        space = replace(space, vae_sha256=model.latent_sha256())
    if space.vae_sha256 != model.latent_sha256():
        raise UserError(
            f"{vae_name}: not the VAE whose latents {name} was trained on (weights {model.latent_sha256()[:12]},"
            f" expected {space.vae_sha256[:12]})"
        )
    return replace(space, classes=[]) if transformer.config.condition == "none" else space


def class_ids(asked: Sequence[int | str], classes: Sequence[str], key: str) -> list[int]:
    """The numbers of classes given by name or number; UserError, beginning with `key`, for one that is not there."""
    ids = []
    for label in asked:
        name = str(label)
        if isinstance(label, str) and name in classes:
            ids.append(classes.index(name))
        elif name.isdecimal() and int(name) < len(classes):
            ids.append(int(name))
        else:
            raise UserError(f"{key}: unknown class {name!r}{nearest(name, classes)}; known: {_some(classes)}")
    return ids


def _some(classes: Sequence[str]) -> str:
    """Names to choose from, not hundreds of them."""
    return ", ".join(classes[:20]) + (f" ... ({len(classes)} in all)" if len(classes) > 20 else "")


def _generators(generator: Any, count: int) -> list[torch.Generator]:
    """A generator a video."""
    if generator is None:
        return [torch.Generator().manual_seed(int(torch.randint(2**63 - 1, ()))) for _ in range(count)]
    if isinstance(generator, torch.Generator):
        return [generator] * count
    if len(generator) != count:
        raise UserError(f"generator: {len(generator)} were given for {count} videos; give one, or one a video")
    return list(generator)


# ----------------------------------------------------------------------------------------------------------------------
# Folders


def _folder(spec: str, **hub: Any) -> str:
    """The local folder of a pipeline, downloaded where `spec` names a repository of the hub."""
    if not Path(spec).is_dir() and spec.count("/") == 1 and not spec.startswith((".", "~", "/")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            spec = snapshot_download(spec, allow_patterns=["*.json", "*.safetensors"], **hub)
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise UserError(f"{spec}: not a folder here, and the hub did not give it ({error})") from None
    if not (Path(spec) / "model_index.json").is_file():
        raise UserError(f"{spec}: no model_index.json here, so no pipeline; make one with lvdm export")
    found = json.loads((Path(spec) / "model_index.json").read_text()).get("_class_name")
    if found != LVDMPipeline.__name__:
        raise UserError(f"{spec}: holds a {found}, not an LVDMPipeline")
    return spec


def _load_scheduler(folder: str) -> SchedulerMixin:
    """Our own DDPM, or a scheduler of diffusers."""
    name = class_name(folder, folder, "scheduler_config.json")
    cls = getattr(samplers, name, None) or getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
        raise UserError(f"{folder}: {name} is no scheduler of diffusers")
    return cls.from_pretrained(folder)
