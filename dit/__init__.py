"""Diffusion transformers: `dit.names()`, `dit.build(name, **overrides)`, `dit.load(spec)`. Imports no torch itself."""

from typing import Any

from lvdm.registry import Registry

registry = Registry("DiT")


def names() -> list[str]:
    """The registered transformers."""
    return registry.names()


def build(name: str, **overrides: Any) -> Any:
    """The transformer called `name` with fresh weights; `overrides` are config keys of its class (see dit/latte.py)."""
    return registry.build(name, **overrides)


def load(spec: str) -> Any:
    """The trained transformer that `spec` names: a run folder, an export folder, a hub id or a checkpoint of Latte's
    authors (see `Registry.load` and dit/official.py)."""
    return registry.load(spec)


# ----------------------------------------------------------------------------------------------------------------------
# Latte: size / patch (Ma et al. 2024, table 1). Half of the blocks are spatial, half temporal.

_LATTE = {
    "s": {"depth": 12, "width": 384, "heads": 6},
    "b": {"depth": 12, "width": 768, "heads": 12},
    "l": {"depth": 24, "width": 1024, "heads": 16},
    "xl": {"depth": 28, "width": 1152, "heads": 16},
}
_TINY = {"depth": 2, "width": 32, "heads": 2}

for _name, _size in _LATTE.items():
    for _patch in (2, 4, 8):
        registry.add(f"latte-{_name}/{_patch}", "dit.latte:Latte", tiny=_TINY, defaults={**_size, "patch": _patch})

registry.add_reader("dit.official:read")
