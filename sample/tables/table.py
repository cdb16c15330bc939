"""What a table of a paper is: models and the paper's numbers of them, what follows each, and what every scale changes.

Importing this imports no torch.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from lvdm import config as configs
from lvdm.config import PRECISIONS, at_least, choice
from lvdm.errors import UserError, nearest
from sample.tables.configs import Reproduce

KINDS = ("reconstruction", "positions", "refinement", "generation", "speed")
GROUPS = {"positions": 4, "refinement": 8}
"""Clips of those kinds have a multiple of so many frames, and one."""
WORKS = ("encode", "decode", "refine", "reconstruct")
"""What of a model can be timed."""
STEP = "training step"
"""What is timed of a transformer."""
FIGURES = {
    "encode": ("encode",),
    "decode": ("decode",),
    "both": ("encode", "decode"),
    "encode and step": ("encode", STEP),
}
"""What papers report of speed, as sums of what is timed; a unit of UNITS follows in brackets."""
UNITS = ("s", "it/s")


@dataclass
class Stage:
    """A program of a plan: what all models need first, or what follows each of them."""

    name: str = ""
    """Its folder."""
    verb: str = ""
    """The verb of the command line."""
    config: str = ""
    """Its recipe."""
    set: dict[str, Any] = field(default_factory=dict)
    """Keys that override the recipe. In a chain {vae} is the model, {latents} the folder of the stage of that name,
    {recipe} and {labels} are the dataset's, and {c3d} what was given as such; without it, or for datasets without an
    inception score, there is no such stage."""


@dataclass
class Arm:
    """One model of a table."""

    name: str = ""
    """As the table calls it: its key."""
    config: str = ""
    """Its recipe; empty where this project cannot train it."""
    set: dict[str, Any] = field(default_factory=dict)
    """Keys that override the recipe; those of the measurement where `vae` names a model."""
    vae: str = ""
    """A model that a stage has trained, in the place of a training of its own."""
    weights: str = ""
    """Where its published weights are, which given.ARM may name."""
    paper: dict[str, str] = field(default_factory=dict)
    """The paper's own numbers, by metric, as it prints them: in quotes where they end in 0."""

    def __post_init__(self) -> None:
        for metric, number in self.paper.items():
            try:
                float(number)
            except ValueError:
                raise UserError(f"paper.{metric}={number!r}: expected a number") from None

    @property
    def told(self) -> dict[str, float]:
        """The paper's own numbers, by metric."""
        return {metric: float(number) for metric, number in self.paper.items()}

    @property
    def folder(self) -> str:
        return slug(self.name)

    @property
    def built(self) -> bool:
        """Whether there is such a model in this project, trained here or given."""
        return bool(self.config or self.vae or self.weights)


@dataclass
class Dataset:
    """Videos that the models of a table generate."""

    title: str = ""
    """As the paper calls it."""
    labels: str = "none"
    """Where its classes are: auto, or none for unconditional models."""
    recipe: str = "dit/sky.yaml"
    """The recipe of its transformer."""
    videos: int = 0
    """How many the published set has, for the estimate."""
    inception: bool = False
    """Whether it has an inception score: C3D's classes are those of UCF101."""


@dataclass
class Scale:
    """How much is trained and measured."""

    note: str = ""
    """What may be expected of it."""
    seeds: int = 1
    """Trainings of each model."""
    published: bool = False
    """Models with published weights are not trained, but given."""
    width: int = 128
    """Channels of the models' first level."""
    frames: list[int] = field(default_factory=lambda: [17])
    """Lengths of the clips that are measured."""
    stride: int = 1
    """Every how many frames of a video they take one."""
    size: int = 128
    """Their height and width."""
    aspect: float = 1.0
    """Width by height, of what is timed."""
    per_video: int = 1
    """Clips a video."""
    batch: int = 4
    """Clips at a time."""
    rounds: int = 5
    """How often everything is timed, in turn."""
    precision: str = "bf16"
    """What is timed in: fp32, bf16 or fp16."""
    set: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Keys that override recipes: by verb, then by the registry's name of the model, then by the name of a stage,
    arm or dataset; null takes a key back."""

    def __post_init__(self) -> None:
        choice(self, "precision", PRECISIONS)
        at_least(self, seeds=1, width=1, stride=1, size=8, aspect=0.1, per_video=1, batch=1, rounds=1)
        if min(self.frames, default=0) < 1:
            raise UserError(f"frames={self.frames}: expected the lengths of the clips of a scale, e.g. [17]")


@dataclass
class Table:
    """One table of a paper."""

    out: str = ""
    """The folder of all, for stages to refer to."""
    title: str = ""
    """Paper, number, subject."""
    says: str = ""
    """What the paper finds."""
    protocol: str = ""
    """How the paper measured, and why its numbers are not comparable with ours."""
    shows_not: list[str] = field(default_factory=list)
    """What our runs do not show, besides what `lvdm reproduce` says of every table."""
    verb: str = "train vae"
    """The program that trains the models."""
    what: str = "reconstruction"
    """What is measured: reconstruction; positions (the same by position in the group of frames that a latent holds);
    refinement, of UniVAEs with a D2; generation, by transformers on the models' latents; or speed, of fresh models."""
    lpips: str = "lpips"
    """LPIPS as the paper's authors take it: lpips, or lpips-spatial, of spatial maps."""
    works: list[str] = field(default_factory=list)
    """What is timed: encode, decode, refine or reconstruct."""
    transformer: dict[str, Any] = field(default_factory=dict)
    """Keys of lvdm bench dit, of whose training step the time is taken, too."""
    steps: list[Stage] = field(default_factory=list)
    """What all models need first."""
    arms: dict[str, Arm] = field(default_factory=dict)
    """The models; differences are taken from the first."""
    datasets: dict[str, Dataset] = field(default_factory=dict)
    """What is generated, each with a chain of its own."""
    chain: list[Stage] = field(default_factory=list)
    """What follows each model, for each dataset."""
    scales: dict[str, Scale] = field(default_factory=dict)
    """tiny, small and paper."""

    def __post_init__(self) -> None:
        choice(self, "verb", ("train vae", "train refine"))
        choice(self, "what", KINDS)
        choice(self, "lpips", ("lpips", "lpips-spatial"))
        for name, arm in self.arms.items():
            arm.name = name
        folders = [arm.folder for arm in self.arms.values()] + [stage.name for stage in self.steps]
        if len(set(folders)) < len(folders):
            raise UserError(f"arms: expected names that differ in letters or digits, got folders {', '.join(folders)}")
        if self.what == "refinement" and self.verb != "train refine":
            raise UserError(f"verb={self.verb}: expected train refine, of whose D2 what=refinement is")
        self._check_lengths()
        if self.what == "speed":
            self._check_figures()

    def _check_lengths(self) -> None:
        group = GROUPS.get(self.what, 1)
        for name, scale in self.scales.items():
            if group > 1 and any(frames <= group or frames % group != 1 for frames in scale.frames):
                raise UserError(
                    f"scales.{name}.frames={scale.frames}: {self.what} needs {group}n+1, e.g. {2 * group + 1}"
                )

    def _check_figures(self) -> None:
        timed = {*self.works} | ({STEP} if self.transformer else set())
        for work in self.works:
            if work not in WORKS:
                raise UserError(f"works={work}: expected some of {', '.join(WORKS)}{nearest(work, WORKS)}")
        known = [f"{name} ({unit})" for name, parts in FIGURES.items() if timed >= {*parts} for unit in UNITS]
        for arm in self.arms.values():
            for metric in arm.paper:
                if metric not in known:
                    raise UserError(
                        f"arms.{arm.name}.paper: {metric!r} is nothing that this table times; expected some of"
                        f" {', '.join(known)}{nearest(metric, known)}"
                    )


def slug(name: str) -> str:
    """A name as a folder, and with _ for - as a key."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def key_of(name: str) -> str:
    """What given. and sets. call it."""
    return slug(name).replace("-", "_")


def load_table(config: Reproduce) -> Table:
    """The table that `config` names."""
    known = sorted(path.stem for path in (configs.configs_root() / "tables").glob("*.yaml"))
    if config.table not in known and not config.table.endswith(".yaml"):
        close = nearest(config.table, known)
        raise UserError(f"table={config.table!r}: expected one of {', '.join(known)}, or a .yaml file{close}")
    recipe = f"tables/{config.table}.yaml" if config.table in known else config.table
    table = configs.load(Table, recipe, {"out": config.out})
    if not table.arms or config.scale not in table.scales:
        raise UserError(f"{recipe}: expected arms and scales.{config.scale}")
    refuse_unused(config, table)
    return table


def refuse_unused(config: Reproduce, table: Table) -> None:
    """A UserError where something is given that the table does not have."""
    if table.what == "speed":
        for key in ("videos", "val", "sets", "given", "c3d", "seeds"):
            if getattr(config, key):
                raise UserError(f"{key}: this table times untrained models and reads no videos; leave {key} out")
    if config.c3d and not any(data.inception for data in table.datasets.values()):
        raise UserError("c3d: this table has no inception score; leave c3d out")
    if config.sets and not table.datasets:
        raise UserError(f"sets.{next(iter(config.sets))}: this table has no datasets; leave sets out")
    models = [name for name, arm in table.arms.items() if arm.built] + [stage.name for stage in table.steps]
    for key, given, names in (("given", config.given, models), ("sets", config.sets, [*table.datasets])):
        known = [key_of(name) for name in names]
        for name in given:
            if key_of(name) not in known:
                close = nearest(key_of(name), known)
                raise UserError(f"{key}.{name}: expected {key}. with one of {', '.join(known)}{close}")
