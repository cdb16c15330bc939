"""Plans: programs run one after another in one process, skipping what is finished and resuming what is not.

A plan is a YAML file: values that its steps refer to as `${values.name}`, and a list of steps, each a verb of the
command line with its recipe and keys, and the keys that differ at a scale. Printing a plan needs no data and no torch.
"""

import importlib
import json
import shlex
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from lvdm import config as configs
from lvdm.cli import VERBS
from lvdm.errors import UserError, nearest
from lvdm.files import write_text
from lvdm.progress import whole
from lvdm.run import finished, same_config

ALONE = ("vae init",)
"""Programs that one process of a launch runs; the others share the work of all that do."""


@dataclass
class Step:
    """One program of a plan."""

    name: str = ""
    """What the bar and the report call it."""
    verb: str = ""
    """The verb of the command line, e.g. train vae."""
    config: str = ""
    """Its recipe."""
    set: dict[str, Any] = field(default_factory=dict)
    """Keys that override the recipe."""
    cost: float = 1.0
    """Expected seconds, for the bar of the whole; only the ratios count."""
    disk: float = 0.0
    """Expected bytes of what it leaves."""

    def __post_init__(self) -> None:
        if self.verb not in VERBS:
            raise UserError(f"step {self.name!r}: unknown verb {self.verb!r}{nearest(self.verb, VERBS)}")

    def config_class(self) -> type:
        """The dataclass of its program's keys."""
        module, _, name = VERBS[self.verb].config.partition(":")
        return getattr(importlib.import_module(module), name)

    def resolve(self) -> Any:
        """The step's validated config."""
        return _loaded(self.config_class(), self.config, json.dumps(self.set))

    def finished(self) -> bool:
        """Whether its run folder says so, for this very config; a folder of another config is a UserError later.

        Programs that write a model and keep no run folder (vae init) write it whole or not at all.
        """
        config = self.resolve()
        folder = Path(config.out)
        if not (folder / "config.yaml").is_file():
            return (folder / "config.json").is_file()
        return finished(folder) is not None and not same_config(folder, config)

    def command(self) -> str:
        """The step as a user would type it."""
        words = [
            shlex.quote(f"{key}={value if isinstance(value, str) else json.dumps(value)}")
            for key, value in self.set.items()
        ]
        return " ".join(["lvdm", self.verb, *(["--config", self.config] if self.config else []), *words])

    def run(self) -> None:
        """Runs the program in this process."""
        importlib.import_module(VERBS[self.verb].program.partition(":")[0]).run(self.resolve())


@cache
def _loaded(cls: type, recipe: str, keys: str) -> Any:
    """A config, read once: a plan asks for it to reckon, to look what is finished, and to run."""
    return configs.load(cls, recipe or None, json.loads(keys))


@dataclass
class Plan:
    """Steps in order; a later one may use what an earlier one made."""

    out: str = ""
    """The folder of all."""
    steps: list[Step] = field(default_factory=list)

    @classmethod
    def load(cls, recipe: str, scale: str = "", **values: Any) -> "Plan":
        """The plan of a YAML file, its `values` replaced by those given, its steps with what they change at `scale`."""
        from omegaconf import OmegaConf

        plan = OmegaConf.merge(configs.read_yaml(recipe), {"values": values})
        resolved = OmegaConf.to_container(plan, resolve=True)
        steps = []
        for step in resolved["steps"]:
            changed = step.pop("scales", {}).get(scale, {})
            steps.append(Step(**{**step, "set": {**step.get("set", {}), **changed}}))
        return cls(resolved["values"]["out"], steps)

    def describe(self) -> str:
        """What `--plan` prints."""
        return "\n".join(f"{i}. {step.name}\n   {step.command()}" for i, step in enumerate(self.steps, 1))

    def run(self, name: str, main: bool = True) -> None:
        """Runs what is not finished, under one bar. Under a launch, whose process group is open, every process comes
        here, and `main` is whether this one speaks and writes for all."""
        from lvdm.accelerator import agreed

        with whole(name, [step.cost for step in self.steps]) as progress:
            for step in self.steps:
                if agreed(step.finished()):
                    if main:
                        print(f"{step.name}: finished before, skipped")
                    progress.step_skipped(step.cost)
                    continue
                started = time.monotonic()
                with progress.step(step.cost):
                    if main or step.verb not in ALONE:
                        step.run()
                agreed(None)
                if main:
                    self._record(step.name, time.monotonic() - started)

    def seconds(self) -> dict[str, float]:
        """How long each step took, the parts of interrupted runs that were lost left out."""
        path = self._times()
        return json.loads(path.read_text()) if path.is_file() else {}

    def _record(self, name: str, seconds: float) -> None:
        write_text(self._times(), json.dumps({**self.seconds(), name: round(seconds, 1)}, indent=2))

    def _times(self) -> Path:
        return Path(self.out) / "plan.json"
