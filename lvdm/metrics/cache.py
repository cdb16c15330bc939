"""Features on disk, under a key of everything that made them."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lvdm.errors import UserError
from lvdm.files import write_bytes
from lvdm.metrics.sets import FeatureSet
from lvdm.weights import cache_dir

VERSION = 1  # raise it with every change of code that moves the pixels of a clip or the features of its frames


def load_features(key: dict[str, Any]) -> FeatureSet | None:
    """What `save_features` was given for an equal `key`; None without it, and with a warning where it is damaged.

    `key` holds all that the features depend on (hashes of videos and weights, clips, protocol), as JSON. It is kept in
    the file and compared on reading, as is a hash of the features: a file never serves another key, nor other numbers.
    """
    path, text = _place(key)
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            stored = file.metadata()
            if stored["key"] != text:
                raise ValueError("of another key")
            features, clips = file.get_tensor("features"), file.get_tensor("clips")
            if stored["sha256"] != _digest(features, clips, stored["sources"]):
                raise ValueError("not what was written")
            return FeatureSet(features, clips, json.loads(stored["sources"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        print(f"{path}: damaged features ({error}), made anew", file=sys.stderr)
        return None


def save_features(key: dict[str, Any], found: FeatureSet) -> None:
    """Keeps features for `load_features`. UserError where the cache cannot be written."""
    path, text = _place(key)
    features, clips, sources = found.features.contiguous(), found.clips.contiguous(), json.dumps(found.sources)
    metadata = {"key": text, "sources": sources, "sha256": _digest(features, clips, sources)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, save({"features": features, "clips": clips}, metadata=metadata))
    except OSError as error:
        raise UserError(f"cannot keep features: {error}; set LVDM_CACHE to a folder you can write") from None


def _place(key: dict[str, Any]) -> tuple[Path, str]:
    """Where the features of a key are, and the key as text."""
    text = json.dumps({**key, "version": VERSION}, sort_keys=True)
    return cache_dir() / "features" / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors", text


def _digest(features: Tensor, clips: Tensor, sources: str) -> str:
    """Of all that a file holds but its key."""
    digest = hashlib.sha256(sources.encode())
    for tensor in (features, clips):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
