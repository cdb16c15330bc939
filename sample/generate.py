"""Draw new videos from a trained DiT (`lvdm sample`, `accelerate launch -m sample.generate`)."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import dit
import vae
from dit.conditioning import Condition
from lvdm import accelerator as accelerators
from lvdm import cost
from lvdm.cli import program
from lvdm.diffusion import GaussianDiffusion, guided
from lvdm.errors import UserError, nearest
from lvdm.files import write_text
from lvdm.latents import LatentSpace, load_latent, save_latent, weights_hash
from lvdm.media import contact_sheet, to_uint8
from lvdm.progress import bar
from lvdm.rng import generator
from lvdm.run import RunFolder
from sample.configs import Generate
from sample.render import frames, render, require_refiner
from vae.base import VideoVAE


def run(config: Generate) -> Path:
    """Draws what is missing of `config.count` videos, renders them, and writes samples.jsonl and sheet.png."""
    accelerator = accelerators.make_accelerator(config.precision)
    with accelerator.main_process_first():
        folder = RunFolder(config.out, config, accelerator.is_main_process)
    accelerators.threads(config.threads)
    transformer = dit.load(config.dit).to(accelerator.device)
    model = vae.load(config.vae).to(accelerator.device)
    space = space_of(transformer, model, config)
    folder.bind(dit=weights_hash(transformer.state_dict()), vae=weights_hash(model.state_dict()))
    if folder.finished:
        accelerators.close(accelerator)
        return folder.path
    refine = model.spec.refines if config.refine is None else config.refine
    require_refiner(model, refine, config.vae)
    labels = choose_labels(config, space)
    for name in ("latents", "d1", *(["d2"] if refine else [])):
        (folder.path / name).mkdir(exist_ok=True)

    # Latents
    missing = [i for i in range(config.count) if not latent_path(folder, i).exists()]
    accelerator.wait_for_everyone()  # all share out the same list: nobody draws before everybody has looked
    groups = [missing[i : i + config.batch] for i in range(0, len(missing), config.batch)]
    own = groups[accelerator.process_index :: accelerator.num_processes]
    with bar("sample", len(own) * config.steps, show=accelerator.is_main_process) as progress:
        for ids in own:
            with torch.no_grad(), accelerator.autocast():
                latents = draw(transformer, config, ids, labels, progress.advance)
            for i, latent in zip(ids, space.scale.denormalise(latents).cpu(), strict=False):
                extra = {"class": space.classes[labels[i]] if labels else "", "seed": str(config.seed)}
                save_latent(latent_path(folder, i), latent, space.num_frames, space.fps, space.vae_sha256, extra)
    accelerator.wait_for_everyone()

    # Videos
    for i in range(accelerator.process_index, config.count, accelerator.num_processes):
        latent = load_latent(latent_path(folder, i))
        for name, double in (("d1", False), ("d2", True)):
            path = folder.path / name / f"{i:06d}.mp4"
            if (refine or not double) and not path.exists():
                with accelerator.autocast():
                    render(model, latent, path, double)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_index(folder, config, space, labels)
        write_sheet(folder, model, min(config.count, 16))
        folder.finish(videos=config.count)
    accelerators.close(accelerator)
    return folder.path


def draw(transformer: Any, config: Generate, ids: list[int], labels: list[int], advance: Any) -> torch.Tensor:
    """Normalised latents (batch, C, t, h, w) of videos `ids`, in a batch padded to `config.batch`."""
    padded = ids + [ids[-1]] * (config.batch - len(ids))
    c = transformer.config
    conditional = c.condition == "class"
    condition = Condition.of_classes([labels[i] for i in padded], c.num_classes) if conditional else Condition()
    denoise = guided(transformer, condition.to(transformer.device), config.guidance if conditional else 1.0)
    return GaussianDiffusion().sample(
        denoise,
        (c.in_channels, c.frames, *c.size),
        config.steps,
        [generator(config.seed, "sample", i) for i in padded],
        transformer.device,
        lambda _: advance(),
    )


def space_of(transformer: Any, model: VideoVAE, config: Generate) -> LatentSpace:
    """The latent space of the transformer, refused when the VAE is another one."""
    if not transformer.config.latents:
        raise UserError(f"dit={config.dit}: does not say which latents it was trained on; give a run of lvdm train dit")
    space = LatentSpace(**transformer.config.latents)
    if transformer.config.condition == "none":  # its store may have classes all the same
        space = replace(space, classes=[])
    if space.classes and config.guidance != 1 and not transformer.config.label_dropout:
        raise UserError(
            f"guidance={config.guidance}: dit={config.dit} has no null class (label_dropout=0); use guidance=1"
        )
    if space.vae_sha256 != model.latent_sha256():
        raise UserError(
            f"vae={config.vae}: not the VAE whose latents dit={config.dit} was trained on (weights"
            f" {model.latent_sha256()[:12]}, expected {space.vae_sha256[:12]})"
        )
    return space


def choose_labels(config: Generate, space: LatentSpace) -> list[int]:
    """The class of each video: the asked ones, or all, in turn; [] for an unconditional model."""
    if not space.classes:
        if config.classes:
            raise UserError("classes: this DiT was trained without classes")
        return []
    chosen = []
    for name in config.classes or space.classes:
        if name in space.classes:
            chosen.append(space.classes.index(name))
        elif name.isdecimal() and int(name) < len(space.classes):
            chosen.append(int(name))
        else:
            raise UserError(
                f"classes: unknown class {name!r}{nearest(name, space.classes)}; known: {', '.join(space.classes)}"
            )
    return [chosen[i % len(chosen)] for i in range(config.count)]


def latent_path(folder: RunFolder, i: int) -> Path:
    return folder.path / "latents" / f"{i:06d}.safetensors"


def write_index(folder: RunFolder, config: Generate, space: LatentSpace, labels: list[int]) -> None:
    """samples.jsonl: a line a video."""
    names = [space.classes[label] for label in labels] or [None] * config.count
    same = {"seed": config.seed, "fps": space.fps, "stride": space.stride}
    lines = [json.dumps({"id": i, "class": name, **same}) for i, name in enumerate(names)]
    write_text(folder.path / "samples.jsonl", "\n".join(lines) + "\n")


def write_sheet(folder: RunFolder, model: VideoVAE, count: int) -> None:
    """sheet.png: a row a video, to look at."""
    videos, names = [], []
    for i in range(count):
        latent = load_latent(latent_path(folder, i))
        video = torch.cat(list(frames(model, latent.latent[None], latent.num_frames)), 2)[0]
        videos.append(to_uint8(video.cpu()).permute(1, 2, 3, 0))
        names.append(f"{i} {latent.extra['class']}".strip())
    contact_sheet(videos, folder.path / "sheet.png", labels=names)


def describe(config: Generate) -> str:
    """Parameters and FLOPs of a video, for `--dry-run`."""
    transformer = dit.load(config.dit).to("meta")
    c = transformer.config
    with torch.device("meta"):
        latent = torch.empty(1, c.in_channels, c.frames, *c.size)
        condition = Condition(torch.zeros(1, dtype=torch.int64) if c.condition == "class" else None)
        step = cost.forward_cost(lambda: transformer(latent, torch.zeros(1), condition))
    passes = config.steps * (2 if c.condition == "class" and config.guidance != 1 else 1)
    return cost.describe_forward(f"a video in {config.steps} steps", cost.parameters(transformer), step, passes)


def main(argv: list[str] | None = None) -> int:
    """`lvdm sample`."""
    return program(Generate, argv, run, describe)


if __name__ == "__main__":
    sys.exit(main())
