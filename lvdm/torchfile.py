"""Weight files of other code: the tensors in a pickle or a safetensors file, read without running code from it."""

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lvdm.errors import UserError

SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
"""Of weight files."""


def weight_file(spec: str) -> Path | None:
    """The weight file that `spec` names, None for a folder and for what is no path at all (a hub id, a name).

    UserError for a weight file that is not there, and for a file of another kind.
    """
    path = Path(spec).expanduser()
    known = path.suffix in SUFFIXES
    if path.is_file() and not known:
        raise UserError(f"{path}: expected a weight file ({', '.join(SUFFIXES)}), a run folder or an export folder")
    if known and not path.exists():
        raise UserError(f"{path}: no such file")
    return path if path.is_file() else None


def read_tree(file: Path) -> Any:
    """What is in a weight file, on the CPU; of pickles, nothing that runs code.

    UserError for a file that is damaged or asks to unpickle more than tensors and plain containers.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError:
        raise UserError(
            f"{file}: holds Python objects other than tensors, which could run code and are not loaded; save its state"
            " dict alone, best as .safetensors"
        ) from None
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{file}: damaged, or no checkpoint ({' '.join(str(error).split())[:150]})") from None


def state_dict(tree: Any, file: Path, averaged: str, wrappers: Sequence[str]) -> tuple[dict[str, Tensor], str]:
    """The tensors inside what a trainer saved in `file`, and a note for the user.

    Those under the key `averaged` where there are any, else those inside the first keys of `wrappers` that are there,
    else `tree` itself. UserError where that is no dict.
    """
    note = ""
    if isinstance(tree, dict) and tree.get(averaged):
        tree, note = tree[averaged], "EMA weights, "
    for wrapper in wrappers:
        tree = tree[wrapper] if isinstance(tree, dict) and wrapper in tree else tree
    if not isinstance(tree, dict):
        raise UserError(f"{file}: expected a state dict, found a {type(tree).__name__}")
    return {key: value for key, value in tree.items() if isinstance(value, Tensor)}, note


def differences(found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]) -> str:
    """What is missing, unexpected or of another shape, in words: how many, and the first five; "" where all fits."""
    wrong = {
        "missing": [key for key in expected if key not in found],
        "unexpected": [key for key in found if key not in expected],
        "of another shape": [
            f"{key}: {tuple(found[key])}, expected {tuple(shape)}"
            for key, shape in expected.items()
            if key in found and tuple(found[key]) != tuple(shape)
        ],
    }
    parts = (f"{len(v)} {what} ({'; '.join(v[:5])}{'; ...' if len(v) > 5 else ''})" for what, v in wrong.items() if v)
    return ", ".join(parts)
