"""Named models: build one at full size, load a trained one, and hear the right names when the name is wrong."""

import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lvdm.errors import UserError, nearest


@dataclass(frozen=True)
class Entry:
    """A registered model: the class behind `target` ("module:Class"), imported when asked for, and its arguments."""

    target: str
    defaults: dict[str, Any] = field(default_factory=dict)
    """What makes this name of a shared class (Latte-S/2, Latte-XL/2)."""
    tiny: dict[str, Any] = field(default_factory=dict)
    """Overrides that bring the model to the size of a CPU test."""

    def resolve(self) -> Any:
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)


class Registry:
    """A table of models of one `kind` ("VAE", "DiT"): the one way from a name, a run or a folder to a model."""

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, Entry] = {}

    def add(self, name: str, target: str, tiny: dict[str, Any], defaults: dict[str, Any] | None = None) -> None:
        """Registers the class at `target` under `name`; a name is given once."""
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        self._entries[name] = Entry(target, defaults or {}, tiny)

    def names(self) -> list[str]:
        return sorted(self._entries)

    def entry(self, name: str) -> Entry:
        if name not in self._entries:
            known = ", ".join(self.names())
            raise UserError(f"unknown {self.kind} {name!r}{nearest(name, self._entries)}; known: {known}")
        return self._entries[name]

    def build(self, name: str, **overrides: Any) -> Any:
        """The model called `name`, full size unless `overrides` say otherwise; works under `torch.device("meta")`."""
        entry = self.entry(name)
        try:
            return entry.resolve()(**{**entry.defaults, **overrides})
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
            key = str(error).split("'")[1]
            raise UserError(f"{self.kind} {name!r} has no option {key!r}") from None

    def load(self, spec: str) -> Any:
        """The trained model that `spec` names, with its weights, in eval mode.

        `spec` is a run folder (its `export/` is taken), an export folder (config.json + safetensors), or a hub id
        "owner/name". A registry name without published weights, a folder without an export and weights of another
        architecture are UserErrors.
        """
        if not spec:
            raise UserError(f"no {self.kind} given: expected a run folder, an export folder or a hub id")
        folder = self._export_folder(spec)
        name = self._class_name(spec, folder)
        classes = {entry.target.partition(":")[2]: entry for entry in self._entries.values()}
        if name not in classes:
            raise UserError(f"{spec}: holds a {name}, not a {self.kind} of ours ({', '.join(sorted(classes))})")
        cls = classes[name].resolve()
        try:
            model, report = cls.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{spec}: cannot load a {name}: {' '.join(str(error).split())[:300]}") from None
        wrong = [*report["missing_keys"], *report["unexpected_keys"]]
        if wrong:
            raise UserError(f"{spec}: the weights are of another architecture than its config.json, e.g. {wrong[:3]}")
        return model.eval()

    def _export_folder(self, spec: str) -> str:
        path = Path(spec)
        for folder in (path / "export", path):
            if (folder / "config.json").is_file():
                return str(folder)
        if path.is_dir():
            hint = " (the run has not finished: run its command again)" if (path / "config.yaml").is_file() else ""
            raise UserError(f"{spec}: no export/ and no config.json here, so no trained {self.kind}{hint}")
        if spec in self._entries:
            raise UserError(f"{self.kind} {spec!r} has no published weights: train one, or give a run or export folder")
        if spec.count("/") != 1 or spec.startswith((".", "/", "~")):
            raise UserError(f"{spec}: no such folder; expected a run folder, an export folder or a hub id owner/name")
        return spec

    def _class_name(self, spec: str, folder: str) -> str:
        path = Path(folder) / "config.json"
        if not path.is_file():
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

            try:
                path = Path(hf_hub_download(folder, "config.json"))
            except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
                raise UserError(f"{spec}: not a folder here, and the hub did not give it ({error})") from None
        try:
            return json.loads(path.read_text())["_class_name"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: expected a diffusers config.json with a _class_name") from None
