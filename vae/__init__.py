"""Video autoencoders: `vae.names()`, `vae.build(name, **options)`, `vae.load(spec)`. Imports no torch itself."""

from importlib import import_module
from pathlib import Path
from typing import Any

from lvdm.errors import UserError
from lvdm.registry import Registry

registry = Registry("VAE")
_TINY = {"width": 16, "blocks": 1}
registry.add("univae", "vae.univae:UniVAE", tiny=_TINY, paper="UniVAE (anonymous, under review)")
registry.add("odvae", "vae.odvae:ODVAE", tiny=_TINY, paper="OD-VAE (Chen et al., 2024)")
registry.add("ospvae", "vae.ospvae:OSPVAE", tiny=_TINY, paper="Open-Sora-Plan 1.0, 1.1 (Lin et al., 2024)")
registry.add("cvvae", "vae.cvvae:CVVAE", tiny=_TINY, paper="CV-VAE (Zhao et al., 2024)")
registry.add("ivvae", "vae.ivvae:IVVAE", tiny={"dim": 16, "blocks": 1}, paper="IV-VAE (Wu et al., 2024)")
registry.add(
    "osvae",
    "vae.osvae:OSVAE",
    tiny={**_TINY, "filters": 8, "temporal_blocks": 1},
    paper="Open-Sora 1.2 (Zheng et al., 2024)",
)
_CODES = {**_TINY, "z": 8, "codes": 64}
registry.add("vqgan", "vae.vqgan:VQGAN", tiny=_CODES, paper="Taming Transformers (Esser et al., 2021)")
registry.add("tats", "vae.tats:TATS", tiny=_CODES, paper="TATS (Ge et al., 2022)")


def _adapted(name: str, kind: str, arguments: dict[str, Any], tiny: dict[str, Any], paper: str) -> None:
    """Registers one class of diffusers, at one size, behind our contract."""
    defaults = {"kind": kind, "arguments": arguments}
    registry.add(name, "vae.adapter:DiffusersVAE", {"arguments": {**arguments, **tiny}}, defaults, paper)


_SVD = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
}
_SD = {**_SVD, "up_block_types": ["UpDecoderBlock2D"] * 4}
_NARROW = {"block_out_channels": [8] * 4, "layers_per_block": 1, "norm_num_groups": 4}
_adapted("sdvae", "AutoencoderKL", _SD, _NARROW, "Latent Diffusion (Rombach et al., 2022)")
_adapted(
    "svdvae",
    "AutoencoderKLTemporalDecoder",
    _SVD,
    {"block_out_channels": [32] * 4, "layers_per_block": 1},
    "SVD (Blattmann et al., 2023)",
)
_adapted("cogvideox", "AutoencoderKLCogVideoX", {}, _NARROW, "CogVideoX (Yang et al., 2024)")

# Trained VAEs that come with the package, where it was made with their weights; and how to make those
SHIPPED = Path(__file__).parent / "weights"
TRAINED_BY = {
    "univae-tiny": (
        "lvdm train vae --config vae/univae-tiny.yaml videos=FOLDER out=runs/univae-tiny-1, then lvdm train refine"
        " --config vae/univae-tiny-refine.yaml videos=FOLDER vae=runs/univae-tiny-1 out=runs/univae-tiny"
    )
}

registry.add_library("diffusers", "vae.adapter:build")
registry.add_reader("vae:shipped")
registry.add_reader("vae.checkpoints:read")
registry.add_reader("vae.adapter:read")
registry.add_explainer("vae.checkpoints:explain")


def names() -> list[str]:
    """The registered VAEs."""
    return registry.names()


def build(name: str, **overrides: Any) -> Any:
    """The VAE called `name` with fresh weights: full size, unless `overrides` say otherwise.

    "diffusers:CLASS" is any autoencoder of diffusers that `vae.adapter` knows, built with its own arguments.
    """
    return registry.build(name, **overrides)


def inflate(model: Any, image: Any, mode: str = "tail") -> Any:
    """Gives `model` the weights of an image VAE's state dict, in place (see `vae.inflation`)."""
    return import_module("vae.inflation").inflate(model, image, mode)


def shipped(spec: str) -> Any:
    """The trained VAE of that name in this package; None for other names, and where a folder here is called so.

    A UserError that says how to train it where the package came without its weights.
    """
    if spec not in TRAINED_BY or Path(spec).is_dir():
        return None
    if not (SHIPPED / spec / "config.json").is_file():
        raise UserError(f"vae={spec}: its weights are not in this installation; make them: {TRAINED_BY[spec]}")
    return registry.load(str(SHIPPED / spec))


def load(spec: str) -> Any:
    """The trained VAE that `spec` names: a run folder, an export folder, a hub id (see `Registry.load`), or one that
    comes with the package (`TRAINED_BY`).

    Official weight files of Open-Sora-Plan, CV-VAE, IV-VAE, Open-Sora 1.2 and Stable Diffusion, alone or in a folder,
    are recognised by their keys (see `vae.checkpoints`). So are folders of diffusers' autoencoders, alone or in the
    `vae/` of a pipeline; "diffusers:FOLDER" and "diffusers:owner/name" say that it is one.
    """
    return registry.load(spec)
