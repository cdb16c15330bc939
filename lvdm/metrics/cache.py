"""Features on disk, under a key of everything that made them."""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lvdm.errors import UserError
from lvdm.files import write_bytes
from lvdm.metrics.sets import FeatureSet
from lvdm.weights import cache_dir


def cached_features(key: dict[str, Any], make: Callable[[], FeatureSet]) -> FeatureSet:
    """What `make()` gives; the second time for the same `key`, what it gave the first time.

    `key` holds all that the features depend on (hashes of videos and weights, clips, protocol), as JSON. It is kept in
    the file and compared on reading, so a file never serves another key. A damaged one is made anew, with a warning.
    UserError where the cache cannot be written.
    """
    text = json.dumps(key, sort_keys=True)
    path = cache_dir() / "features" / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"
    found = _read(path, text) if path.exists() else None
    if found is None:
        found = make()
        _write(path, text, found)
    return found


def _read(path: Path, key: str) -> FeatureSet | None:
    try:
        with safe_open(path, framework="pt") as file:
            stored = file.metadata()
            if stored["key"] != key:
                raise ValueError("of another key")
            features, clips = file.get_tensor("features"), file.get_tensor("clips")
            return FeatureSet(features, clips, json.loads(stored["sources"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        print(f"{path}: damaged features ({error}), made anew", file=sys.stderr)
        return None


def _write(path: Path, key: str, features: FeatureSet) -> None:
    tensors = {"features": features.features.contiguous(), "clips": features.clips.contiguous()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, save(tensors, metadata={"key": key, "sources": json.dumps(features.sources)}))
    except OSError as error:
        raise UserError(f"cannot keep features: {error}; set LVDM_CACHE to a folder you can write") from None
