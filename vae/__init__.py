"""Video autoencoders: `vae.names()`, `vae.build(name, **options)`, `vae.load(spec)`. Imports no torch itself."""

from typing import Any

from lvdm.registry import Registry

registry = Registry("VAE")
_TINY = {"width": 16, "blocks": 1}
registry.add("univae", "vae.univae:UniVAE", tiny=_TINY)
registry.add("odvae", "vae.odvae:ODVAE", tiny=_TINY)
registry.add("cvvae", "vae.cvvae:CVVAE", tiny=_TINY)


def names() -> list[str]:
    """The registered VAEs."""
    return registry.names()


def build(name: str, **overrides: Any) -> Any:
    """The VAE called `name` with fresh weights: full size, unless `overrides` say otherwise."""
    return registry.build(name, **overrides)


def load(spec: str) -> Any:
    """The trained VAE that `spec` names: a run folder, an export folder or a hub id (see `Registry.load`)."""
    return registry.load(spec)
