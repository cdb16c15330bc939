"""A run folder: the config it belongs to, a log that never lies, checkpoints that are whole, and the export.

    config.yaml            the resolved config
    inputs.json            hashes of the data it reads
    log.jsonl              one JSON object a line
    checkpoints/<samples>/ all that is needed to go on; those that were the best when written say so in best.json
    export/                EMA weights in the from_pretrained format
    export-best/           the same of the best checkpoint, in runs that validate
    validation/            what validations measured and saw
    wandb/, lvdm/          what the tracker, wandb or TensorBoard, was told
    finished.json          written last

To resume, run the same command again.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lvdm.config import defaults, read_yaml, to_dict, to_yaml
from lvdm.errors import UserError
from lvdm.files import write_text


class RunFolder:
    """The folder `out` of one config; creating it checks that the folder is new or belongs to an equal config.

    Keys of the config named in its `operational` tuple (workers, logging) may differ between starts. `main` is whether
    this process writes: every process reads, one writes.
    """

    def __init__(self, out: str | Path, config: Any, main: bool = True):
        if not str(out):
            raise UserError("out: expected the folder to write this run to, e.g. out=runs/my-run")
        self.path, self.main = Path(out), main
        _require_same_config(self.path, config)
        if main:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"out={out}: cannot make this folder ({error.strerror}); choose another out") from None
            if _is_free(self.path):
                (self.path / "inputs.json").unlink(missing_ok=True)
            _write_new(self.path / "config.yaml", to_yaml(config))

    # ---- finished or not ---------------------------------------------------------------------------------------------

    @property
    def finished(self) -> dict[str, Any] | None:
        """The summary the run ended with, or None while it has not ended."""
        return finished(self.path)

    def finish(self, **summary: Any) -> None:
        """Marks the run as finished, with figures worth keeping."""
        if self.main:
            write_text(self.path / "finished.json", json.dumps(summary, indent=2))

    def bind(self, **inputs: str) -> None:
        """Ties the run to what it reads (hashes of an index or a store); a UserError when that has changed since."""
        path = self.path / "inputs.json"
        before = json.loads(path.read_text()) if path.is_file() else {}
        changed = [name for name, value in inputs.items() if before.get(name, value) != value]
        if changed:
            raise UserError(
                f"out={self.path}: its {', '.join(changed)} changed since this run began;"
                " choose another out, or put them back as they were"
            )
        if self.main:
            _write_new(path, json.dumps({**before, **inputs}, indent=2))

    # ---- log ---------------------------------------------------------------------------------------------------------

    def log(self, **record: Any) -> None:
        """Appends a record; numbers that are not finite are kept as text, so that the file stays JSON."""
        if self.main:
            clean = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
            with open(self.path / "log.jsonl", "a") as file:
                file.write(json.dumps(clean) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """The log so far."""
        return read_log(self.path)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def latest(self) -> int:
        """Samples seen at the last whole checkpoint; 0 without one."""
        return max((int(path.name) for path in self._checkpoints()), default=0)

    def best(self) -> dict[str, Any] | None:
        """What `save` was given with the best checkpoint, and its `samples`; None without one."""
        marks = [path / "best.json" for path in self._checkpoints() if (path / "best.json").is_file()]
        return json.loads(marks[-1].read_text()) if marks else None

    def save(
        self,
        samples: int,
        write: Callable[[str], Any],
        keep: int,
        barrier: Callable[[], None],
        best: dict[str, Any] | None = None,
    ) -> None:
        """Writes a checkpoint with `write(folder)` on every process, and renames it into place once it is whole.

        The last `keep` are kept, and the best: the last one that came with `best`, figures that say what it is best in.
        They are in the checkpoint itself, so that a kill never leaves one without the other.
        """
        final = self.path / "checkpoints" / f"{samples:09d}"
        partial = final.with_name(f"partial-{final.name}")
        if self.main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        barrier()
        write(str(partial))
        barrier()
        if self.main:
            if best:
                write_text(partial / "best.json", json.dumps({"samples": samples, **best}, indent=2))
            os.replace(partial, final)
            top = self.best() or {}
            for old in self._checkpoints()[:-keep]:
                if int(old.name) != top.get("samples"):
                    shutil.rmtree(old)
        barrier()

    def resume(self, read: Callable[[str], Any]) -> int:
        """Loads the last whole checkpoint with `read(folder)`, cuts the log back to it, and returns its samples.

        Checkpoints that a kill left half written go.
        """
        samples = self.latest()
        for partial in self.path.glob("checkpoints/partial-*") if self.main else ():
            shutil.rmtree(partial)
        if samples:
            read(str(self._checkpoints()[-1]))
        kept = [record for record in self.records() if record.get("samples", 0) <= samples]
        if self.main and (self.path / "log.jsonl").is_file():
            write_text(self.path / "log.jsonl", "".join(json.dumps(record) + "\n" for record in kept))
        return samples

    def _checkpoints(self) -> list[Path]:
        folders = self.path.glob("checkpoints/*")
        return sorted((path for path in folders if path.name.isdigit()), key=lambda path: int(path.name))

    # ---- export ------------------------------------------------------------------------------------------------------

    def export(self, model: Any, name: str = "export") -> Path:
        """Writes the folder `name` with the model's `save_pretrained`, replaced as a whole."""
        final, partial = self.path / name, self.path / f"partial-{name}"
        if self.main:
            shutil.rmtree(partial, ignore_errors=True)
            model.save_pretrained(partial, safe_serialization=True)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
        return final


class Timer:
    """Seconds of work over all starts of a run, kept in its checkpoints."""

    def __init__(self) -> None:
        self.before, self.started = 0.0, time.monotonic()

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.before, self.started = float(state["seconds"]), time.monotonic()


def finished(folder: Path) -> dict[str, Any] | None:
    """The summary that the run in `folder` ended with, or None while it has not ended."""
    path = folder / "finished.json"
    return json.loads(path.read_text()) if path.is_file() else None


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The records of `log.jsonl` in a run folder; a line cut off by a kill is left out."""
    path = folder / "log.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _write_new(path: Path, text: str) -> None:
    """Leaves a file alone that says so already."""
    if not path.is_file() or path.read_text() != text:
        write_text(path, text)


def same_config(folder: Path, config: Any) -> list[str]:
    """The keys in which `config` differs from the one stored in `folder`, those named `operational` left out. A key
    that was not there yet when that was stored had its default."""
    stored, free = read_yaml(folder / "config.yaml"), {"out", *getattr(config, "operational", ())}
    asked = json.loads(json.dumps(to_dict(config)))
    before = {**json.loads(json.dumps(defaults(type(config)))), **stored}
    return [key for key in asked if key not in free and before.get(key) != asked[key]]


def _is_free(folder: Path) -> bool:
    """Whether a folder is new, or holds what a start left that failed before it did anything."""
    # A hidden file may be a config.yaml in the making: another process's, or one left by a kill.
    return {path.name for path in folder.glob("[!.]*")} <= {"config.yaml", "inputs.json"}


def _require_same_config(folder: Path, config: Any) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out={folder}: is a file; expected a folder")
    if _is_free(folder):
        return
    if (folder / "config.yaml").is_file():
        different = same_config(folder, config)
        if different:
            raise UserError(
                f"out={folder}: belongs to another config (different: {', '.join(different)});"
                " choose another out, or remove the folder"
            )
    else:
        raise UserError(f"out={folder}: not empty and not a run folder; choose another out")
