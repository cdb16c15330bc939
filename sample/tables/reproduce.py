"""Tables of the papers once more (`lvdm reproduce`): a plan that makes every model of a table, measurements, a page.

A table is a YAML file in configs/tables: its models ("arms") with recipe and changed keys, what the paper says of them,
what follows each model (its latents, transformer, samples), and what every scale changes. Printing the plan of a table
needs neither videos nor torch.
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
from sample.plan import Plan, Step
from sample.tables.configs import Reproduce
from sample.tables.estimate import disk, seconds, start

if TYPE_CHECKING:
    from lvdm.data.clips import ClipPolicy
    from sample.measure.scores import Measure
    from sample.tables.timing import Timing
    from train.configs import Latents, Rendering

HOLDOUT = 0.2
"""The part of each shot that is measured on, where there is no folder for that."""
KINDS = ("reconstruction", "positions", "refinement", "generation", "speed")


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
    {recipe} and {labels} are the dataset's, and {c3d} what was given as such; without it there is no such stage."""


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
    paper: dict[str, float] = field(default_factory=dict)
    """The paper's own numbers, by metric."""

    @property
    def folder(self) -> str:
        return slug(self.name)


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
    works: list[str] = field(default_factory=list)
    """What is timed: encode, decode, refine or step, a training step of `transformer` on the latents."""
    transformer: dict[str, Any] = field(default_factory=dict)
    """Keys of lvdm bench dit for that step."""
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
        for name, arm in self.arms.items():
            arm.name = name
        folders = [arm.folder for arm in self.arms.values()] + [stage.name for stage in self.steps]
        if len(set(folders)) < len(folders):
            raise UserError(f"arms: expected names that differ in letters or digits, got folders {', '.join(folders)}")


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
    models = [] if table.what == "speed" else [*table.arms, *(stage.name for stage in table.steps)]
    refuse_unknown("given", config.given, models)
    refuse_unknown("sets", config.sets, [*table.datasets])
    return table


def refuse_unknown(key: str, given: dict[str, str], names: list[str]) -> None:
    """A UserError where `given` names what the table does not have."""
    known = [key_of(name) for name in names]
    for name in given:
        if key_of(name) not in known:
            takes = f"expected {key}. with one of {', '.join(known)}" if known else "this table has none"
            raise UserError(f"{key}.{name}: {takes}{nearest(key_of(name), known)}")


# ---------------------------------------------------------------------------------------------------------------------
# The plan


@dataclass(frozen=True)
class Model:
    """An arm trained with one seed, or a trained one."""

    arm: Arm
    seed: int
    vae: str
    """Its run folder, or what was given."""
    trained: bool
    """Whether the plan trains it."""

    @property
    def folder(self) -> str:
        return f"{self.arm.folder}-{self.seed}"


def given_of(config: Reproduce, name: str) -> str:
    """The model that was given in the place of that arm or stage, if any."""
    return {key_of(key): spec for key, spec in config.given.items()}.get(key_of(name), "")


def trains(config: Reproduce, table: Table, arm: Arm) -> bool:
    """Whether the plan trains an arm."""
    published = table.scales[config.scale].published and arm.weights
    return bool(arm.config and not arm.vae and not published and not given_of(config, arm.name))


def models_of(config: Reproduce, table: Table) -> list[Model]:
    """All that can be had, in order: every arm once before any is trained with a second seed."""
    models = []
    for seed in range(config.seeds or table.scales[config.scale].seeds):
        for arm in table.arms.values():
            if trains(config, table, arm):
                models.append(Model(arm, seed, f"{config.out}/{arm.folder}-{seed}", True))
            elif (spec := given_of(config, arm.name) or moved(config, table, arm.vae)) and not seed:
                models.append(Model(arm, seed, spec, False))
    return models


def left_out(config: Reproduce, table: Table) -> dict[str, str]:
    """The arms that cannot be had here, and how to have them."""
    had = {model.arm.name for model in models_of(config, table)}
    return {
        name: f"given.{key_of(name)}=WEIGHTS ({arm.weights or 'a trained one'})"
        for name, arm in table.arms.items()
        if name not in had
    }


def moved(config: Reproduce, table: Table, value: Any) -> Any:
    """`value`, or the model that was given in the place of the stage whose folder it is."""
    for stage in table.steps:
        if value == f"{table.out}/{stage.name}":
            return given_of(config, stage.name) or value
    return value


def plan_of(config: Reproduce, table: Table) -> Plan:
    """The trainings, of equal samples, batches and seeds for every arm, and what follows them."""
    if table.what == "speed":
        return Plan(config.out, [])
    scale, models = table.scales[config.scale], models_of(config, table)
    data = {"videos": config.videos, "labels": "none", "holdout": 0.0 if config.val else HOLDOUT}
    steps = []
    for stage in table.steps:
        if not given_of(config, stage.name):
            keys = data | {"out": f"{config.out}/{stage.name}", "seed": 0}
            steps.append(step_of(config, table, stage, stage.verb, stage.name, keys))
    for model in models:
        if model.trained:
            name = f"{model.arm.name}, seed {model.seed}" if model.seed else model.arm.name
            keys = data | {"out": model.vae, "seed": model.seed}
            steps.append(step_of(config, table, model.arm, table.verb, name, keys))
    for step in steps:
        step.cost = start(step.verb) + seconds(step.verb, step.resolve(), scale.width)
    steps += [step for model in models for _, step in chains_of(config, table, model)]
    return Plan(config.out, steps)


def step_of(
    config: Reproduce, table: Table, stage: Stage | Arm, verb: str, name: str, keys: dict[str, Any], *also: str
) -> Step:
    """A stage or arm as a step: its keys over `keys`, of which the program takes those it knows, and the scale's over
    those; `also` are further names by which the scale may change keys."""
    changes = table.scales[config.scale].set
    step = Step(name, verb, stage.config)
    known = {field.name for field in dataclasses.fields(step.config_class())}
    step.set = {key: value for key, value in keys.items() if key in known}
    step.set |= {key: moved(config, table, value) for key, value in stage.set.items()}
    model = stage.set.get("model") or (configs.read_yaml(stage.config).get("model") if stage.config else "")
    for which in dict.fromkeys((verb, model, stage.name, *also)):
        step.set = over(step.set, changes.get(which, {}))
    return step


def over(given: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """`given` with what `changed` replaces: parts of a replaced key go with it, null takes a key back."""
    kept = {key: value for key, value in given.items() if not any(key.startswith(f"{whole}.") for whole in changed)}
    return {key: value for key, value in {**kept, **changed}.items() if value is not None}


def chains_of(config: Reproduce, table: Table, model: Model) -> Iterator[tuple[str, Step]]:
    """(dataset, step) of all that follows a model."""
    width = table.scales[config.scale].width
    for name, data in table.datasets.items():
        places = {"vae": model.vae, "recipe": data.recipe, "labels": data.labels, "c3d": config.c3d}
        keys = {"videos": folder_of(config, name), "seed": model.seed}
        before: dict[str, Any] = {}
        for stage in table.chain:
            if "{c3d}" in stage.set.values() and not config.c3d:
                continue
            places[stage.name] = f"{config.out}/{model.folder}-{name}-{stage.name}"
            filled = dataclasses.replace(
                stage,
                config=stage.config.format(**places),
                set={k: v.format(**places) if isinstance(v, str) else v for k, v in stage.set.items()},
            )
            title = f"{model.arm.name}{f', seed {model.seed}' if model.seed else ''}, {data.title}: {stage.name}"
            step = step_of(config, table, filled, stage.verb, title, keys | {"out": places[stage.name]}, name)
            before[stage.verb] = step.resolve()
            step.cost = start(stage.verb) + seconds(stage.verb, before[stage.verb], width, before, data.videos)
            yield name, step


def folder_of(config: Reproduce, name: str) -> str:
    """The folder of a dataset's videos."""
    return {key_of(key): folder for key, folder in config.sets.items()}.get(key_of(name), config.videos)


def measures(config: Reproduce, table: Table) -> Iterator[tuple[Model, "Measure"]]:
    """Every model with what is measured of its frames."""
    from sample.measure.scores import Measure

    scale = table.scales[config.scale]
    for model in models_of(config, table):
        keys = {
            "vae": model.vae,
            "what": "refinement" if table.what == "refinement" else "reconstruction",
            "videos": config.val or config.videos,
            "holdout": 0.0 if config.val else HOLDOUT,
            "frames": scale.frames,
            "size": scale.size,
            "per_video": scale.per_video,
            "batch": scale.batch,
        }
        own = over(model.arm.set, scale.set.get(model.arm.name, {})) if model.arm.vae else {}
        yield model, Measure(out=f"{config.out}/scores/{model.folder}", **keys | own)


def timing_of(config: Reproduce, table: Table) -> "Timing":
    """What is timed: the models of all arms, untrained, as the scale has them."""
    from sample.tables.timing import Timing

    scale, models = table.scales[config.scale], {}
    for arm in table.arms.values():
        built = step_of(config, table, arm, table.verb, arm.name, {}).resolve()
        models[arm.name] = {"model": built.model, "model_args": built.model_args}
    return Timing(
        out=f"{config.out}/timing",
        models=models,
        works=table.works,
        frames=scale.frames[-1],
        size=[scale.size, round(scale.size * scale.aspect)],
        rounds=scale.rounds,
        precision=scale.precision,
        transformer=over(table.transformer, scale.set.get("transformer", {})),
    )


# ---------------------------------------------------------------------------------------------------------------------
# The program


def run(config: Reproduce) -> Path:
    """Trains and measures what is not finished, writes the page, and says where it is."""
    from lvdm.data.samples import sample_videos
    from sample.measure import scores
    from sample.tables import comparison, speed, timing

    table = load_table(config)
    if table.what == "speed":
        timed = timing_of(config, table)
        timing.run(timed)
        page = speed.write(config, table, timed)
    else:
        config = dataclasses.replace(config, videos=config.videos or str(sample_videos()))
        for name, how in left_out(config, table).items():
            print(f"{name}: left out; to have it: {how}")
        plan, measured = plan_of(config, table), list(measures(config, table))
        check(config, table, plan, measured)
        plan.run(config.table)
        for _, measure in measured:
            scores.run(measure)
        page = comparison.write(config, table, plan, measured)
    print(f"page: {page}")
    return page


def check(config: Reproduce, table: Table, plan: Plan, measured: list[tuple[Model, "Measure"]]) -> None:
    """Refuses videos that a later step could not use, videos that have changed since the table began, and missing
    weights, before the first step spends time."""
    import vae
    from lvdm import weights
    from lvdm.data.clips import Clips
    from lvdm.data.index import open_index
    from sample.measure.scores import clips_of

    if not measured:
        give = ", ".join(left_out(config, table).values())
        raise UserError(f"{config.table}, scale={config.scale}: no model is trained; give some: {give}")
    if config.c3d and not Path(config.c3d).is_file():
        raise UserError(f"c3d={config.c3d}: no such file; expected a C3D trained on UCF101, e.g. c3d_ucf101.pt")
    for spec in config.given.values():
        vae.load(spec)
    index, held = open_index(config.videos, "none"), clips_of(measured[0][1])
    for videos, labels, policy in dict.fromkeys((c.videos, c.labels, p) for c in configs_of(plan) for p in policies(c)):
        Clips(open_index(videos, labels), policy, seed=0)
    sets = {name: open_index(folder_of(config, name), data.labels).hash() for name, data in table.datasets.items()}
    RunFolder(config.out, config).bind(videos=index.hash(), val=held.index.hash(), **sets)
    for name in ("lpips-alex", "lpips-vgg"):
        weights.load(name)


def configs_of(plan: Plan) -> Iterator["Rendering | Latents"]:
    """Of the steps that cut clips out of videos to learn from."""
    for step in plan.steps:
        if step.verb in ("train vae", "train refine", "train latents"):
            yield step.resolve()


def policies(config: "Rendering | Latents") -> Iterator["ClipPolicy"]:
    """How a program cuts its clips out of videos: a training every kind, at each of its strides."""
    from lvdm.data.clips import ClipPolicy

    if not hasattr(config, "kinds"):
        rest = {"holdout": config.holdout, "fps": config.fps, "short": config.short, "across_cuts": config.across_cuts}
        yield ClipPolicy(config.frames, config.stride, config.size, split=config.split, **rest)
        return
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
    models = len(table.arms) if table.what == "speed" else len(models_of(config, table))
    shape = f"{scale.size}x{round(scale.size * scale.aspect)}"
    what = f"speed ({', '.join(table.works)})" if table.what == "speed" else table.what
    hours = sum(step.cost - start(step.verb) for step in plan.steps) / 3600
    gigabytes = sum(disk(step.verb, step.resolve(), scale.width) for step in plan.steps) / 1e9
    about = "under 0.1" if hours < 0.1 else f"about {hours:,.1f}"
    lines = [f"{table.title}. {config.scale}: {scale.note}", plan.describe()]
    lines.append(f"{len(plan.steps) + 1}. {what} of {models} models: {scale.frames} frames of {shape}")
    if table.what != "speed":
        lines += [f"left out: {name}; to have it: {how}" for name, how in left_out(config, table).items()]
    lines.append(
        f"{about} hours of one H200 (reckoned from the steps of published code there, not measured),"
        f" up to {gigabytes:,.1f} GB of disk"
    )
    return "\n".join(line for line in lines if line)


def main(argv: list[str] | None = None) -> int:
    """`lvdm reproduce`."""
    return program(Reproduce, argv, run, describe, describe)


if __name__ == "__main__":
    sys.exit(main())
