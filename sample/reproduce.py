"""Tables of the papers once more (`lvdm reproduce`): a plan that trains every model of a table, scores, and a page.

A table is a YAML file in configs/tables: its models ("arms") with recipe and changed keys, what the paper says of them,
and what every scale changes. Printing the plan of a table needs neither videos nor torch.
"""

import dataclasses
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvdm import config as configs
from lvdm.cli import program
from lvdm.config import choice
from lvdm.errors import UserError, nearest
from lvdm.run import RunFolder
from sample.configs import Reproduce
from sample.plan import Plan, Step

if TYPE_CHECKING:
    from lvdm.data.clips import ClipPolicy
    from sample.scores import Measure
    from train.configs import Rendering

HOLDOUT = 0.2
"""The part of each shot that is measured on, where there is no folder for that."""
PIXEL_SECONDS = 0.631 / (8 * 17 * 128 * 128)
"""A training step a pixel and frame at full width: OD-VAE's published code on 8x17x128x128, one H200, bf16."""
IMAGE_SHARE = 1 / 2.2
"""The same of an image, whose convolutions are 2D."""
PARAMETERS = {"train vae": 240e6, "train refine": 380e6, "vae init": 240e6}
"""Of the full width, about."""


@dataclass
class Stage:
    """What all models of a table need first."""

    name: str = ""
    """Its folder."""
    verb: str = ""
    """The verb of the command line."""
    config: str = ""
    """Its recipe."""
    set: dict[str, Any] = field(default_factory=dict)
    """Keys that override the recipe."""


@dataclass
class Arm:
    """One model of a table."""

    name: str = ""
    """As the table calls it."""
    config: str = ""
    """Its recipe."""
    set: dict[str, Any] = field(default_factory=dict)
    """Keys that override the recipe."""
    paper: dict[str, float] = field(default_factory=dict)
    """The paper's own numbers, by metric."""

    @property
    def folder(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@dataclass
class Scale:
    """How much is trained and measured."""

    note: str = ""
    """What may be expected of it."""
    seeds: int = 1
    """Trainings of each model."""
    width: int = 128
    """Channels of the models' first level."""
    frames: list[int] = field(default_factory=lambda: [17])
    """Lengths of the clips that are measured."""
    size: int = 128
    """Their height and width."""
    per_video: int = 1
    """Clips a video."""
    batch: int = 4
    """Clips at a time."""
    set: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Keys that override recipes, by verb, then by the name of a stage or arm; null leaves a key as it was."""


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
    """What is measured: reconstruction, or refinement of UniVAEs with a D2."""
    steps: list[Stage] = field(default_factory=list)
    """What all models need first."""
    arms: list[Arm] = field(default_factory=list)
    """The models; differences are taken from the first."""
    scales: dict[str, Scale] = field(default_factory=dict)
    """tiny, small and paper."""

    def __post_init__(self) -> None:
        choice(self, "verb", ("train vae", "train refine"))
        choice(self, "what", ("reconstruction", "refinement"))
        folders = [arm.folder for arm in self.arms] + [stage.name for stage in self.steps]
        if len(set(folders)) < len(folders):
            raise UserError(f"arms: expected names that differ in letters or digits, got folders {', '.join(folders)}")


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
    return table


# ---------------------------------------------------------------------------------------------------------------------
# The plan


@dataclass(frozen=True)
class Model:
    """An arm trained with one seed."""

    arm: Arm
    seed: int

    @property
    def folder(self) -> str:
        return f"{self.arm.folder}-{self.seed}"


def models_of(config: Reproduce, table: Table) -> list[Model]:
    """All that are trained, in order: every arm once before any has a second seed."""
    seeds = config.seeds or table.scales[config.scale].seeds
    return [Model(arm, seed) for seed in range(seeds) for arm in table.arms]


def plan_of(config: Reproduce, table: Table) -> Plan:
    """The trainings: equal samples, batches and seeds for every arm."""
    scale = table.scales[config.scale]
    stages = [(stage, stage.name, 0, stage.verb) for stage in table.steps]
    trained = [(m.arm, m.folder, m.seed, table.verb) for m in models_of(config, table)]
    steps = []
    for stage, folder, seed, verb in stages + trained:
        step = Step(f"{stage.name}, seed {seed}" if seed else stage.name, verb, stage.config)
        common = {"out": f"{config.out}/{folder}", "seed": seed, "videos": config.videos, "labels": "none"}
        common["holdout"] = 0.0 if config.val else HOLDOUT
        known = {field.name for field in dataclasses.fields(step.config_class())}
        given = {key: value for key, value in common.items() if key in known} | stage.set
        step.set = over(given, {**scale.set.get(verb, {}), **scale.set.get(stage.name, {})})
        step.cost = 1 + seconds(step, scale.width)
        steps.append(step)
    return Plan(config.out, steps)


def over(given: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """`given` with what `changed` replaces: parts of a replaced key go with it, null leaves a key as it was."""
    changed = {key: value for key, value in changed.items() if value is not None}
    kept = {key: value for key, value in given.items() if not any(key.startswith(f"{whole}.") for whole in changed)}
    return {**kept, **changed}


def seconds(step: Step, width: int) -> float:
    """About what a training takes on one H200, from the published code's step."""
    shown = [(p.samples * kind.share, kind) for p in getattr(step.resolve(), "phases", []) for kind in p.kinds]
    pixels = sum(clips * k.frames * k.size**2 * (1 if k.frames > 1 else IMAGE_SHARE) for clips, k in shown)
    return pixels * PIXEL_SECONDS * width / 128


def disk(step: Step, width: int) -> float:
    """About the bytes of checkpoints (weights, Adam's moments, average) and the exported model."""
    checkpoints = getattr(step.resolve(), "keep", -1) + 1
    return (16 * checkpoints + 4) * PARAMETERS[step.verb] * (width / 128) ** 2


def measures(config: Reproduce, table: Table) -> Iterator[tuple[Model, "Measure"]]:
    """Every trained model with what is measured of it."""
    from sample.scores import Measure

    scale = table.scales[config.scale]
    for model in models_of(config, table):
        yield (
            model,
            Measure(
                out=f"{config.out}/scores/{model.folder}",
                vae=f"{config.out}/{model.folder}",
                what=table.what,
                videos=config.val or config.videos,
                holdout=0.0 if config.val else HOLDOUT,
                frames=scale.frames,
                size=scale.size,
                per_video=scale.per_video,
                batch=scale.batch,
            ),
        )


# ---------------------------------------------------------------------------------------------------------------------
# The program


def run(config: Reproduce) -> Path:
    """Trains and measures what is not finished, writes the page, and says where it is."""
    from lvdm.data.samples import sample_videos
    from sample import comparison, scores

    table = load_table(config)
    config = dataclasses.replace(config, videos=config.videos or str(sample_videos()))
    plan, measured = plan_of(config, table), list(measures(config, table))
    check(config, plan, measured[0][1])
    plan.run(config.table)
    for _, measure in measured:
        scores.run(measure)
    page = comparison.write(config, table, plan, measured)
    print(f"page: {page}")
    return page


def check(config: Reproduce, plan: Plan, measure: "Measure") -> None:
    """Refuses videos that a later step could not use, videos that have changed since the table began, and missing
    weights, before the first step spends time."""
    from lvdm import weights
    from lvdm.data.clips import Clips
    from lvdm.data.index import open_index
    from sample.scores import clips_of

    index, measured = open_index(config.videos, "none"), clips_of(measure)
    trained = [step.resolve() for step in plan.steps if step.verb.startswith("train ")]
    for policy in dict.fromkeys(policy for training in trained for policy in policies(training)):
        Clips(index, policy, seed=0)
    RunFolder(config.out, config).bind(videos=index.hash(), val=measured.index.hash())
    for name in ("lpips-alex", "lpips-vgg"):
        weights.load(name)


def policies(config: "Rendering") -> Iterator["ClipPolicy"]:
    """How a training cuts its clips out of videos: every kind, at each of its strides."""
    from lvdm.data.clips import ClipPolicy

    for _, kind in config.kinds():
        if config.images and kind.frames == 1:
            continue
        rest = {"holdout": config.holdout, "fps": kind.fps, "short": config.short, "across_cuts": config.across_cuts}
        for stride in kind.strides or [kind.stride]:
            yield ClipPolicy(kind.frames, stride, kind.size, split="train", **rest)


def describe(config: Reproduce) -> str:
    """The steps as commands, hours and disk; needs neither videos nor torch."""
    table = load_table(config)
    scale = table.scales[config.scale]
    plan = plan_of(dataclasses.replace(config, videos=config.videos or "(fetched)"), table)
    models, clips = len(models_of(config, table)), f"{scale.frames} frames of {scale.size}x{scale.size}"
    hours = sum(seconds(step, scale.width) for step in plan.steps) / 3600
    gigabytes = sum(disk(step, scale.width) for step in plan.steps) / 1e9
    about = "under 0.1" if hours < 0.1 else f"about {hours:,.1f}"
    return "\n".join(
        [
            f"{table.title}. {config.scale}: {scale.note}",
            plan.describe(),
            f"{len(plan.steps) + 1}. {table.what} of {models} models: {clips}",
            f"{about} hours of one H200 (reckoned from the step of OD-VAE's published code there, not measured),"
            f" up to {gigabytes:,.1f} GB of disk",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """`lvdm reproduce`."""
    return program(Reproduce, argv, run, describe, describe)


if __name__ == "__main__":
    sys.exit(main())
