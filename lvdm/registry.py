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
    paper: str = ""
    """Where it comes from, e.g. "OD-VAE (Chen et al., 2024)"."""

    def resolve(self) -> Any:
        return _import(self.target)


class Registry:
    """A table of models of one `kind` ("VAE", "DiT"): the one way from a name, a run or a folder to a model."""

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, Entry] = {}
        self._libraries: dict[str, str] = {}
        self._readers: list[str] = []
        self._explainers: list[str] = []

    # ---- what there is -----------------------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        target: str,
        tiny: dict[str, Any],
        defaults: dict[str, Any] | None = None,
        paper: str = "",
    ) -> None:
        """Registers the class at `target` under `name`; a name is given once."""
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        self._entries[name] = Entry(target, defaults or {}, tiny, paper)

    def add_library(self, prefix: str, target: str) -> None:
        """Lets "PREFIX:CLASS" name any model of a library: `target` is called as `target(kind=CLASS, **overrides)`."""
        self._libraries[prefix] = target

    def add_reader(self, target: str) -> None:
        """Lets `load` read another format: `target` is called with its `spec` and gives a model, or None for not its
        format. Readers are asked in the order they were added, before our own folders are looked for."""
        self._readers.append(target)

    def add_explainer(self, target: str) -> None:
        """Lets `target`, called with an export folder whose weights did not fit its config, say more in the error."""
        self._explainers.append(target)

    def names(self) -> list[str]:
        return sorted(self._entries)

    def entry(self, name: str) -> Entry:
        prefix, _, rest = name.partition(":")
        if rest and prefix in self._libraries:
            return Entry(self._libraries[prefix], {"kind": rest})
        if name not in self._entries:
            known = ", ".join([*self.names(), *(f"{prefix}:CLASS" for prefix in self._libraries)])
            raise UserError(f"unknown {self.kind} {name!r}{nearest(name, self._entries)}; known: {known}")
        return self._entries[name]

    # ---- models ------------------------------------------------------------------------------------------------------

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

        `spec` is a run folder (its `export/` is taken), an export folder (config.json + safetensors), a hub id
        "owner/name", or what one of the readers knows. A registry name without published weights, a folder without an
        export and weights of another architecture are UserErrors.
        """
        if not spec:
            raise UserError(f"no {self.kind} given: expected a run folder, an export folder or a hub id")
        for target in self._readers:
            model = _import(target)(spec)
            if model is not None:
                return model.eval()
        return self._load_own(spec).eval()

    def _load_own(self, spec: str) -> Any:
        folder = self._export_folder(spec)
        name = class_name(spec, folder)
        classes = {entry.target.partition(":")[2]: entry for entry in self._entries.values()}
        if name not in classes:
            hint = "" if Path(folder).is_dir() else "".join(f"; try {prefix}:{spec}" for prefix in self._libraries)
            raise UserError(f"{spec}: holds a {name}, not a {self.kind} of ours ({', '.join(sorted(classes))}){hint}")
        try:
            return pretrained(classes[name].resolve(), spec, folder)
        except UserError as error:
            raise UserError(f"{error}{''.join(_import(target)(folder) for target in self._explainers)}") from None

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


def class_name(spec: str, folder: str, file: str = "config.json") -> str:
    """The class that `file` in a folder, or in the hub repository `folder`, says the weights beside it are of.

    A UserError, with `spec` for its name, where there is no such file or where it is no config of diffusers' format.
    """
    path = Path(folder) / file
    if not path.is_file():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            path = Path(hf_hub_download(folder, file))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            raise UserError(f"{spec}: not a folder here, and the hub did not give it ({error})") from None
    try:
        return json.loads(path.read_text())["_class_name"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: expected a diffusers config.json with a _class_name") from None


def pretrained(cls: Any, spec: str, folder: str, **where: Any) -> Any:
    """`cls.from_pretrained(folder, **where)`, safetensors only.

    A UserError, with `spec` for its name, where the weights are absent, damaged, or not those of the config.
    """
    try:
        model, report = cls.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **where)
    except (OSError, ValueError, RuntimeError) as error:
        first = " ".join(str(error).split()).split(". If you want")[0][:300]  # diffusers goes on with advice
        raise UserError(f"{spec}: cannot load {cls.__name__}: {first}") from None
    wrong = [*report["missing_keys"], *report["unexpected_keys"]]
    if wrong:
        raise UserError(f"{spec}: the weights are of another architecture than its config.json, e.g. {wrong[:3]}")
    return model


def _import(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
