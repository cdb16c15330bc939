"""Tables of the papers once more (`lvdm reproduce`): a plan that makes every model of a table, measurements, a page.

A table is a YAML file in configs/tables: its models ("arms") with recipe and changed keys, what the paper says of them,
what follows each model (its latents, transformer, samples), and what every scale changes. Printing the plan of a table
needs neither videos nor torch. Several GPUs: accelerate launch -m sample.tables.reproduce TABLE ..., same keys.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvdm import config as configs
from lvdm.cli import program
from lvdm.errors import UserError
from lvdm.run import RunFolder
from sample.plan import Plan, Step
from sample.tables.configs import Reproduce
from sample.tables.estimate import NO_CHAIN, Chain, disk, seconds, start
from sample.tables.table import Arm, Stage, Table, key_of, load_table

if TYPE_CHECKING:
    from accelerate import Accelerator

    from lvdm.data.clips import ClipPolicy
    from sample.measure.scores import Measure
    from sample.tables.timing import Timing
    from train.configs import Latents, Rendering

HOLDOUT = 0.2
"""The part of each shot that is measured on, where there is no folder for that."""
SEEDED = ("train dit", "sample")
"""What follows a model with the model's own seed; the seed of measurements draws the real clips, the same for all."""

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

    @property
    def name(self) -> str:
        return named(self.arm.name, self.seed)


def named(arm: str, seed: int) -> str:
    """A model, as pages call it."""
    return f"{arm}, seed {seed}" if seed else arm


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
    """The arms that cannot be had here, and why, or how to have them."""
    had = {model.arm.name for model in models_of(config, table)}
    absent = {name: arm for name, arm in table.arms.items() if name not in had}
    return {
        name: f"to have it: given.{key_of(name)}=WEIGHTS ({arm.weights})" if arm.built else "not built here"
        for name, arm in absent.items()
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
    for stage in stages_of(config, table, models):
        keys = data | {"out": f"{config.out}/{stage.name}", "seed": 0}
        steps.append(step_of(config, table, stage, stage.verb, stage.name, keys))
    for model in models:
        if model.trained:
            keys = data | {"out": model.vae, "seed": model.seed}
            steps.append(step_of(config, table, model.arm, table.verb, model.name, keys))
    reckon(steps, scale.width)
    steps += [step for model in models for _, step in chains_of(config, table, model)]
    return Plan(config.out, steps)


def stages_of(config: Reproduce, table: Table, models: list[Model]) -> list[Stage]:
    """The stages that the models begin with, in order: those that are not given, and that something refers to."""
    used = [model.vae for model in models]
    used += [value for model in models if model.trained for value in model.arm.set.values()]
    stages: list[Stage] = []
    for stage in reversed(table.steps):
        if f"{table.out}/{stage.name}" in used and not given_of(config, stage.name):
            stages.insert(0, stage)
            used += stage.set.values()
    return stages


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
    for which in dict.fromkeys((verb, model_of(stage), stage.name, *also)):
        step.set = over(step.set, changes.get(which, {}))
    return step


def model_of(stage: Stage | Arm) -> str:
    """The registry's name of what it trains or makes, if any."""
    return stage.set.get("model") or (configs.read_yaml(stage.config).get("model") if stage.config else "")


def reckon(steps: list[Step], width: int, chain: Chain = NO_CHAIN) -> None:
    """Says of each step what it may cost."""
    for step in steps:
        config = step.resolve()
        step.cost = start(step.verb) + seconds(step.verb, config, width, chain)
        step.disk = disk(step.verb, config, width, chain)


def over(given: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """`given` with what `changed` replaces: parts of a replaced key go with it, null takes a key back."""
    kept = {key: value for key, value in given.items() if not any(key.startswith(f"{whole}.") for whole in changed)}
    return {key: value for key, value in {**kept, **changed}.items() if value is not None}


def chains_of(config: Reproduce, table: Table, model: Model) -> Iterator[tuple[str, Step]]:
    """(dataset, step) of all that follows a model."""
    for name, data in table.datasets.items():
        c3d = config.c3d if data.inception else ""
        places = {"vae": model.vae, "recipe": data.recipe, "labels": data.labels, "c3d": c3d}
        steps = []
        for stage in table.chain:
            if "{c3d}" in stage.set.values() and not c3d:
                continue
            places[stage.name] = f"{config.out}/{model.folder}-{name}-{stage.name}"
            filled = dataclasses.replace(
                stage,
                config=stage.config.format(**places),
                set={k: v.format(**places) if isinstance(v, str) else v for k, v in stage.set.items()},
            )
            title = f"{model.name}, {title_of(config, table, name)}: {stage.name}"
            keys = {"videos": folder_of(config, name), "out": places[stage.name]}
            if stage.verb in SEEDED:
                keys["seed"] = model.seed
            steps.append(step_of(config, table, filled, stage.verb, title, keys, name))
        by_verb = {step.verb: step.resolve() for step in steps}
        chain = Chain(data.videos, model_of(model.arm), model.arm.set.get("model_args.z", 4), by_verb)
        reckon(steps, table.scales[config.scale].width, chain)
        yield from ((name, step) for step in steps)


def set_of(config: Reproduce, name: str) -> str:
    """The folder that was given for a dataset, if any."""
    return {key_of(key): folder for key, folder in config.sets.items()}.get(key_of(name), "")


def folder_of(config: Reproduce, name: str) -> str:
    """The folder of a dataset's videos."""
    return set_of(config, name) or config.videos


def title_of(config: Reproduce, table: Table, name: str) -> str:
    """What the paper calls a dataset; where it was not given, that others are in its place."""
    title = table.datasets[name].title
    return title if set_of(config, name) else f"videos in the place of {title}"


def measures(config: Reproduce, table: Table) -> Iterator[tuple[Model, "Measure"]]:
    """Every model with what is measured of its frames."""
    from sample.measure.scores import Measure

    scale = table.scales[config.scale]
    metrics = ["psnr", "ssim", table.lpips, "flicker"]
    for model in models_of(config, table):
        keys = {
            "vae": model.vae,
            "what": "refinement" if table.what == "refinement" else "reconstruction",
            "videos": config.val or config.videos,
            "holdout": 0.0 if config.val else HOLDOUT,
            "frames": scale.frames,
            "stride": scale.stride,
            "size": scale.size,
            "per_video": scale.per_video,
            "batch": scale.batch,
            "metrics": metrics,
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
    """Trains and measures what is not finished, writes the page, and says where it is. Processes of a launch share
    trainings and measurements; the first one does the rest."""
    from lvdm import accelerator as accelerators

    table, accelerator = load_table(config), accelerators.make_accelerator("fp32")
    make = timed_page if table.what == "speed" else measured_page
    page = accelerators.agreed(make(config, table, accelerator))
    if accelerator.is_main_process:
        print(f"page: {page}")
    accelerators.close(accelerator)
    return page


def timed_page(config: Reproduce, table: Table, accelerator: "Accelerator") -> Path | None:
    """The page of a table of speeds, which one process makes."""
    from sample.tables import speed, timing

    if not accelerator.is_main_process:
        return None
    timed = timing_of(config, table)
    RunFolder(config.out, config)
    timing.run(timed)
    return speed.write(config, table, timed)


def measured_page(config: Reproduce, table: Table, accelerator: "Accelerator") -> Path | None:
    """The page of a table of trained models, in the process that writes it."""
    from lvdm.data.samples import sample_videos
    from sample.measure import scores
    from sample.tables import comparison

    main = accelerator.is_main_process
    with accelerator.main_process_first():  # which fetches, and fills the cache of indexes
        config = dataclasses.replace(config, videos=config.videos or str(sample_videos()))
        plan, measured = plan_of(config, table), list(measures(config, table))
        check(config, table, plan, measured, main)
    if main:
        for name, how in left_out(config, table).items():
            print(f"{name}: left out; {how}")
    plan.run(config.table, main)
    for _, measure in measured:
        scores.run(measure)
    return comparison.write(config, table, plan, measured) if main else None


def check(config: Reproduce, table: Table, plan: Plan, measured: list[tuple[Model, "Measure"]], main: bool) -> None:
    """Refuses videos that a later step could not use, models that do not fit the table, missing weights, and videos or
    models that have changed since the table began, before the first step spends time."""
    import vae
    from lvdm import weights
    from lvdm.data.clips import Clips
    from lvdm.data.index import open_index
    from sample.measure.scores import clips_of

    if not measured:
        absent = "; ".join(f"{name}: {how}" for name, how in left_out(config, table).items())
        raise UserError(f"{config.table}, scale={config.scale}: no model is trained or given. {absent}")
    if config.c3d and not Path(config.c3d).is_file():
        raise UserError(f"c3d={config.c3d}: no such file; expected a C3D trained on UCF101, e.g. c3d_ucf101.pt")
    for name, spec in config.given.items():
        refines, measured_as = vae.load(spec).spec.refines, {key_of(m.arm.name) for m, _ in measured if not m.trained}
        if table.what == "refinement" and key_of(name) in measured_as and not refines:
            raise UserError(f"given.{name}={spec}: has no D2, which this table measures; give a run of train refine")
    for begun in (*(step.resolve() for step in plan.steps), *(measure for _, measure in measured)):
        if (Path(begun.out) / "config.yaml").is_file():
            RunFolder(begun.out, begun, main=False)
    index, held = open_index(config.videos, "none"), clips_of(measured[0][1])
    for videos, labels, policy in dict.fromkeys((c.videos, c.labels, p) for c in configs_of(plan) for p in policies(c)):
        Clips(open_index(videos, labels), policy, seed=0)
    sets = {name: open_index(folder_of(config, name), data.labels).hash() for name, data in table.datasets.items()}
    RunFolder(config.out, config, main).bind(videos=index.hash(), val=held.index.hash(), **sets)
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
    gigabytes = sum(step.disk for step in plan.steps) / 1e9
    about = "under 0.1" if hours < 0.1 else f"about {hours:,.1f}"
    sets = ", for datasets of the published sizes" if table.datasets else ""
    lines = [f"{table.title}. {config.scale}: {scale.note}", plan.describe()]
    lines.append(f"{len(plan.steps) + 1}. {what} of {models} models: {scale.frames} frames of {shape}")
    if table.what != "speed":
        lines += [f"left out: {name}; {how}" for name, how in left_out(config, table).items()]
    lines.append(
        f"{about} hours of one H200 (reckoned from the steps of published code there, not measured{sets}),"
        f" up to {gigabytes:,.1f} GB of disk"
    )
    return "\n".join(line for line in lines if line)


def main(argv: list[str] | None = None) -> int:
    """`lvdm reproduce`."""
    return program(Reproduce, argv, run, describe, describe)


if __name__ == "__main__":
    from lvdm.accelerator import leave

    leave(main())
