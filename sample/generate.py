"""Draw new videos from a trained DiT (`lvdm sample`, `accelerate launch -m sample.generate`)."""

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import dit
import vae
from dit.conditioning import Condition
from dit.cost import sample_cost
from dit.sampling import draw, guidance_of
from lvdm import accelerator as accelerators
from lvdm import cost
from lvdm.cli import program
from lvdm.errors import UserError
from lvdm.files import remove_parts, require_space, write_text
from lvdm.latents import LatentSpace, load_latent, save_latent, weights_hash
from lvdm.media import contact_sheet, read_video
from lvdm.progress import bar
from lvdm.rng import generator
from lvdm.run import RunFolder
from lvdm.samplers import SAMPLERS, OnStep, make_scheduler
from sample.configs import Generate
from sample.gallery import Rendering, write_gallery
from sample.pipeline import class_ids, space_of
from sample.render import render, require_refiner
from vae.base import VideoVAE

SUFFIXES = {"mp4": ".mp4", "npy": ".npy", "ffv1": ".mkv"}
SHEET = 16  # videos on sheet.png


def run(config: Generate) -> Path:
    """Draws what is missing of `config.count` videos, renders them, and writes samples.jsonl and pages to look at."""
    accelerator = accelerators.make_accelerator(config.precision)
    with accelerator.main_process_first():
        folder = RunFolder(config.out, config, accelerator.is_main_process)
    accelerators.threads(config.threads)
    transformer = dit.load(config.dit).to(accelerator.device)
    model = vae.load(config.vae).to(accelerator.device)
    space = space_of(transformer, model, f"dit={config.dit}", f"vae={config.vae}")
    folder.bind(dit=weights_hash(transformer.state_dict()), vae=model.identity())
    there = (folder.finished or {"videos": 0})["videos"]
    if there >= config.count:  # a finished run may be asked for more
        if accelerator.is_main_process:
            print(f"{folder.path}: finished with {there} videos; count={config.count} asks for no more of them")
        accelerators.close(accelerator)
        return folder.path
    job = Job(config, folder.path, transformer, model, space)
    transformer.set_attention_backend(config.attention)
    if config.compile:
        transformer.compile_repeated_blocks()

    if accelerator.is_main_process:
        job.remove_parts()
    todo = [i for i in range(config.count) if not job.done(i)]
    accelerator.wait_for_everyone()  # all share out the same list: nobody draws before everybody has looked
    require_space(folder.path, len(todo) * job.bytes_a_video, f"for {len(todo)} videos")
    job.make_folders()
    groups = [todo[i : i + config.batch] for i in range(0, len(todo), config.batch)]
    own = groups[accelerator.process_index :: accelerator.num_processes]
    with bar("sample", len(own) * config.steps, show=accelerator.is_main_process) as progress:
        for ids in own:
            with torch.no_grad(), accelerator.autocast():
                job.draw(ids, lambda *_: progress.advance())
                job.render(ids)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        job.summarise()
        folder.finish(videos=config.count)
        print(f"{folder.path}: {config.count} videos; to look at: {job.page}")
    accelerators.close(accelerator)
    return folder.path


@dataclass
class Job:
    """What one command draws: its models and settings, resolved and checked, and where each video goes."""

    config: Generate
    path: Path
    transformer: Any
    model: VideoVAE
    space: LatentSpace

    def __post_init__(self) -> None:
        config, objective = self.config, self.transformer.config.objective
        self.guidance = guidance_of(self.transformer, config.guidance)
        self.scheduler = make_scheduler(objective, config.sampler)
        self.sampler = SAMPLERS[objective][0] if config.sampler == "auto" else config.sampler
        self.labels = choose_labels(config, self.space)
        refine = self.model.spec.refines if config.refine is None else config.refine
        require_refiner(self.model, refine, config.vae)
        self.decoders = {"d1": False, "d2": True} if refine else {"d1": False}  # and whether each refines

    # ---- files -------------------------------------------------------------------------------------------------------

    def make_folders(self) -> None:
        for name in ("latents", *self.decoders):
            (self.path / name).mkdir(exist_ok=True)

    def remove_parts(self) -> None:
        """What a killed run left half written."""
        for name in ("latents", *self.decoders):
            remove_parts(self.path / name)

    def latent(self, i: int) -> Path:
        return self.path / "latents" / f"{i:06d}.safetensors"

    def video(self, decoder: str, i: int) -> Path:
        return self.path / decoder / f"{i:06d}{SUFFIXES[self.config.format]}"

    def rendered(self, i: int) -> bool:
        return all(self.video(name, i).exists() for name in self.decoders)

    def done(self, i: int) -> bool:
        return self.rendered(i) and (self.latent(i).exists() or not self.config.keep_latents)

    @cached_property
    def renderings(self) -> list[Rendering]:
        """What the videos of each decoder are like."""
        c, factor, count = self.transformer.config, self.model.spec.space_factor, self.space.num_frames
        height, width = (side * factor for side in c.size)
        sizes = {False: (count, self.space.fps), True: (2 * count - 1, 2 * self.space.fps)}
        return [Rendering(name, name.upper(), *sizes[double], width, height) for name, double in self.decoders.items()]

    @property
    def bytes_a_video(self) -> int:
        """An estimate of its files."""
        c, raw = self.transformer.config, sum(3 * r.frames * r.height * r.width for r in self.renderings)
        return self.config.bytes_of((c.in_channels, c.frames, *c.size), raw)

    # ---- work --------------------------------------------------------------------------------------------------------

    def draw(self, ids: list[int], on_step: OnStep) -> None:
        """Writes the latents of videos `ids` that are missing, drawn in a batch padded to `config.batch`."""
        ids = [i for i in ids if not self.latent(i).exists() and not self.done(i)]
        if not ids:
            return
        padded = ids + [ids[-1]] * (self.config.batch - len(ids))
        chosen = [self.labels[i] for i in padded] if self.labels else None
        latents = draw(
            self.transformer,
            Condition.of_classes(chosen, self.transformer.config.num_classes) if chosen else Condition(),
            [generator(self.config.seed, "sample", i) for i in padded],
            self.scheduler,
            self.config.steps,
            self.guidance,
            on_step,
        )
        for i, latent in zip(ids, self.space.scale.denormalise(latents).cpu(), strict=False):
            extra = {"class": self.class_of(i) or "", "seed": str(self.config.seed)}
            save_latent(self.latent(i), latent, self.space.num_frames, self.space.fps, self.space.vae_sha256, extra)

    def render(self, ids: list[int]) -> None:
        """Writes the videos `ids` that are missing, and removes latents that shall not stay."""
        for i in ids:
            missing = [name for name in self.decoders if not self.video(name, i).exists()]
            latent = load_latent(self.latent(i)) if missing else None
            for name in missing:
                render(self.model, latent, self.video(name, i), self.decoders[name])
            if not self.config.keep_latents:
                self.latent(i).unlink(missing_ok=True)

    def class_of(self, i: int) -> str | None:
        """The name of its class."""
        return self.space.classes[self.labels[i]] if self.labels else None

    # ---- what all of it is -------------------------------------------------------------------------------------------

    @property
    def page(self) -> Path:
        """What to look at: the gallery, which shows mp4 files, or the sheet."""
        return self.path / ("index.html" if self.config.format == "mp4" else "sheet.png")

    def summarise(self) -> None:
        """samples.jsonl, a line a video; sheet.png, a row a video; of mp4 files index.html, all of them."""
        if not self.config.keep_latents:
            shutil.rmtree(self.path / "latents")  # with what a kill left in it
        same = {"seed": self.config.seed, "fps": self.space.fps, "stride": self.space.stride}
        same |= {"sampler": self.sampler, "steps": self.config.steps, "guidance": self.guidance}
        lines = [{"id": i, "class": self.class_of(i), **same} for i in range(self.config.count)]
        write_text(self.path / "samples.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        shown = lines[:SHEET]
        names = [f"{line['id']} {line['class'] or ''}".strip() for line in shown]
        videos = [read_video(self.video("d1", line["id"])) for line in shown]
        contact_sheet(videos, self.path / "sheet.png", labels=names)
        if self.config.format == "mp4":
            settings = ("dit", "vae", "steps", "seed", "labels", "precision")
            facts = {key: getattr(self.config, key) for key in settings}
            facts |= {"sampler": self.sampler, "guidance": self.guidance}
            write_gallery(self.page, lines, self.renderings, facts)


def choose_labels(config: Generate, space: LatentSpace) -> list[int]:
    """The class of each video, of the asked ones or of all, in turn or drawn; [] for an unconditional model."""
    if not space.classes:
        if config.classes:
            raise UserError("classes: this DiT was trained without classes")
        return []
    chosen = class_ids(config.classes or space.classes, space.classes, "classes")
    if config.labels == "balanced":
        return [chosen[i % len(chosen)] for i in range(config.count)]
    draws = [generator(config.seed, "class", i) for i in range(config.count)]
    return [chosen[int(torch.randint(len(chosen), (), generator=g))] for g in draws]


def describe(config: Generate) -> str:
    """Parameters and FLOPs of a video, for `--dry-run`."""
    transformer = dit.load(config.dit)
    passes = config.steps * (1 if guidance_of(transformer, config.guidance) == 1 else 2)
    count, step = cost.parameters(transformer), sample_cost(transformer)
    return cost.describe_forward(f"a video in {config.steps} steps", count, step, passes)


def main(argv: list[str] | None = None) -> int:
    """`lvdm sample`."""
    return program(Generate, argv, run, describe)


if __name__ == "__main__":
    accelerators.leave(main())
