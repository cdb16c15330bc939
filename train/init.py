"""A video VAE that starts from an image VAE (`lvdm vae init`): a folder for `lvdm train vae init=FOLDER`."""

import json
import math
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

import vae
from lvdm.cli import program
from lvdm.errors import UserError
from lvdm.metrics.frames import psnr
from lvdm.rng import generator
from train.configs import InitVAE
from vae.adapter import DiffusersVAE
from vae.base import VideoVAE
from vae.blocks import norm_groups
from vae.cvvae import CVVAE
from vae.inflation import inflate

SIZE = 64
"""Height and width of the image that both VAEs see."""
SAME = 1e-4
"""What rounding makes of two equal images in [-1, 1]."""


def run(config: InitVAE) -> Path:
    """Writes `config.out`, and prints how far an image is from the image VAE's and how to train on."""
    out = folder(config.out)
    source = image_vae(config.source)
    options = options_of(config, source)
    torch.manual_seed(config.seed)
    model = vae.build(config.model, **options).eval()
    inflate(model, source.inner.state_dict(), config.mode)
    save(model, out)
    print(f"{out}: {config.model} with the weights of {config.source}, mode={config.mode}")
    print(comparison(model, source, config.mode))
    words = f"model={config.model}", f"model_args={json.dumps(options)}", f"init={out}"
    print(f"train it: lvdm train vae {shlex.join(words)} ...")
    return out


def folder(out: str) -> Path:
    """The folder to write, which is not there yet or empty."""
    if not out:
        raise UserError("out: expected the folder to write, e.g. out=runs/init")
    path = Path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"out={out}: there is something already; name a new folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out={out}: cannot make its folder: {error.strerror}") from None
    return path


def image_vae(spec: str) -> DiffusersVAE:
    """The AutoencoderKL that `spec` names."""
    if not spec:
        raise UserError("source: expected an image VAE, e.g. source=FOLDER of an SD-VAE")
    model = vae.load(spec)
    if model.title != "AutoencoderKL":
        raise UserError(
            f"source={spec}: {model.title}, which is no image VAE; expected diffusers' AutoencoderKL, like SD-VAE"
        )
    return model


def options_of(config: InitVAE, source: DiffusersVAE) -> dict[str, Any]:
    """The options that make the model fit the image VAE, where they are not its defaults, and `config.model_args`."""
    widths = source.inner.config.block_out_channels
    width = math.gcd(*widths)
    fitting = {
        "z": source.inner.config.latent_channels,
        "width": width,
        "mult": [channels // width for channels in widths],
        "blocks": source.inner.config.layers_per_block,
    }
    with torch.device("meta"):
        usual = vae.build(config.model).options
        fitting = {k: v for k, v in fitting.items() if k in usual and json.dumps(usual[k]) != json.dumps(v)}
        options = {**fitting, **config.model_args}
        spec = vae.build(config.model, **options).spec
    if spec.latent_channels == source.spec.latent_channels:
        for key in ("latent_mean", "latent_std"):
            if getattr(spec, key) != getattr(source.spec, key):
                options.setdefault(key, list(getattr(source.spec, key)))
    return options


def save(model: VideoVAE, out: Path) -> None:
    """The from_pretrained format at `out`, whole or not at all."""
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        model.save_pretrained(part)
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@torch.no_grad()
def comparison(model: VideoVAE, source: DiffusersVAE, mode: str) -> str:
    """How far apart both reconstruct one random image, in a line, and why."""
    x = torch.rand(1, 3, SIZE, SIZE, generator=generator(0, "image")) * 2 - 1
    ours, theirs = model.reconstruct(x), source.reconstruct(x)
    decibels, furthest = psnr(ours[:, :, None], theirs[:, :, None]).item(), (ours - theirs).abs().max().item()
    line = f"an image through both: PSNR {decibels:.2f} dB, largest difference {furthest:.2g}, "
    if furthest < SAME:
        return line + "so images go through as before"
    return f"{line}since {' and '.join(reasons(model, source, mode)) or 'their arithmetic differs'}"


def reasons(model: VideoVAE, source: DiffusersVAE, mode: str) -> list[str]:
    """Why an image does not go through both alike (see vae/inflation.py)."""
    c, groups = model.options, source.inner.config.norm_num_groups
    theirs = sorted({(n, norm_groups(n)) for n in source.inner.config.block_out_channels if norm_groups(n) != groups})
    found = [f"norms of {n} channels have {own} groups here and {groups} there" for n, own in theirs]
    if mode == "random":
        found.append("its temporal kernels are fresh")
    if c.get("upsample") == "trilinear":
        found.append("its upsampling is trilinear (model_args.upsample=nearest is not)")
    if len(c.get("kernels", ())) > 1:
        found.append("its temporal kernels each see a part of the channels (model_args.kernels=[3] sees all)")
    if mode in ("tail", "average") and (c.get("conv") == "group" or isinstance(model, CVVAE)):
        found.append("its convolutions see zeros after the last frame (mode=center does not)")
    if isinstance(model, CVVAE):
        found.append("its norms have another eps, its decoder attends over time")
    return found


def main(argv: list[str] | None = None) -> int:
    """`lvdm vae init`."""
    return program(InitVAE, argv, run)


if __name__ == "__main__":
    sys.exit(main())
