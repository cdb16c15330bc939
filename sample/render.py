"""Latent files to mp4 (`lvdm render`): D1 at the clip's own rate, D2 at twice of it."""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import vae
from lvdm.accelerator import device
from lvdm.cli import program
from lvdm.errors import UserError
from lvdm.files import remove_parts
from lvdm.latents import LatentFile, load_latent
from lvdm.media import to_uint8, write_video
from lvdm.progress import bar
from lvdm.run import RunFolder
from sample.configs import Render
from vae.base import VideoVAE


def run(config: Render) -> Path:
    """Renders every latent file to `config.out`; the same command again goes on with those that are missing."""
    files = latent_files(config.latents)
    folder = RunFolder(config.out, config)
    model = vae.load(config.vae).to(device())
    require_refiner(model, config.refine, config.vae)
    model.enable_tiling(config.tile, frames=config.tile_frames)
    remove_parts(folder.path)
    missing = [file for file in files if not (folder.path / f"{file.stem}.mp4").exists()]
    with bar("render", len(missing)) as progress:
        latents = load_all(model, missing, config.vae)
        if note := max((model.approximation(latent.num_frames) for latent in latents), key=len, default=""):
            print(note)
        for file, latent in zip(missing, latents, strict=True):
            render(model, latent, folder.path / f"{file.stem}.mp4", config.refine)
            progress.advance()
    print(f"{folder.path}: {len(missing)} videos rendered, {len(files) - len(missing)} were there already")
    return folder.path


@torch.no_grad()
def frames(model: VideoVAE, latent: Tensor, num_frames: int, refine: bool = False) -> Iterator[Tensor]:
    """Rendered frames (B, 3, t, H, W) of latents (B, z, t, h, w), piece by piece where the model streams.

    `num_frames` counts the frames behind the latents; `refine` renders 2 * num_frames - 1.
    """
    wanted = 2 * num_frames - 1 if refine else num_frames
    latent = latent.to(model.device, model.dtype)
    if model.streams:
        yield from model.stream_decode([latent], refine=refine, num_frames=wanted)
    else:
        yield (model.refine if refine else model.decode)(latent, num_frames=wanted).sample


def render(model: VideoVAE, latent: LatentFile, path: Path, refine: bool) -> None:
    """Writes the video of one latent at its own rate, or with `refine` at twice of it; the suffix is its format."""
    pieces = frames(model, latent.latent[None], latent.num_frames, refine)
    height, width = latent.size or (None, None)
    pictures = (
        picture for piece in pieces for picture in to_uint8(piece[0, ..., :height, :width].cpu()).permute(1, 2, 3, 0)
    )
    write_video(path, pictures, latent.fps * (2 if refine else 1))


def latent_files(latents: str) -> list[Path]:
    """The latent files that a path names."""
    path = Path(latents)
    files = sorted(path.glob("[!.]*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        raise UserError(
            f"latents={latents}: expected a .safetensors latent file or a folder of them"
            " (lvdm sample keep_latents=false leaves none)"
        )
    return files


def load_all(model: VideoVAE, files: list[Path], spec: str) -> list[LatentFile]:
    """Latent files, refused when another VAE made one of them."""
    sha256, latents = model.latent_sha256(), [load_latent(file) for file in files]
    for file, latent in zip(files, latents, strict=True):
        if latent.vae_sha256 != sha256:
            raise UserError(
                f"{file}: its latent belongs to another VAE (weights {latent.vae_sha256[:12]}) than vae={spec}"
                f" ({sha256[:12]}): name the VAE that it was made with"
            )
    return latents


def require_refiner(model: VideoVAE, refine: bool, spec: str) -> None:
    """Refuses to refine with a VAE that has no D2."""
    if refine and not model.spec.refines:
        raise UserError(f"vae={spec} has no refinement decoder: train one (lvdm train refine) or drop refine")


def main(argv: list[str] | None = None) -> int:
    """`lvdm render`."""
    return program(Render, argv, run)


if __name__ == "__main__":
    sys.exit(main())
