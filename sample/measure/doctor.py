"""Why an FVD is what it is (`lvdm fvd doctor`): one set of samples, one knob of the protocol turned at a time."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

import vae
from lvdm import accelerator as accelerators
from lvdm.accelerator import device, is_main, world_size
from lvdm.cli import program
from lvdm.data.datasets import SUBSETS, open_dataset
from lvdm.errors import UserError
from lvdm.files import write_text
from lvdm.metrics.features import FeatureExtractor
from lvdm.metrics.protocol import Preset, preset
from lvdm.metrics.sets import FeatureSet, floor
from lvdm.progress import bar
from lvdm.report import Page
from lvdm.rng import generator
from lvdm.run import RunFolder
from sample.measure.configs import KNOBS, Doctor
from sample.measure.distances import bounds_of, estimator, features_of, protocol_of, require
from sample.measure.evaluate import Table, inputs_of, networks, unknown_rate
from sample.measure.figures import finite
from sample.measure.recode import CODECS, Recoded
from sample.measure.sets import Files, VideoSet
from sample.measure.sides import Sides, sides_of
from vae.base import VideoVAE

HEADER = ["knob", "turned to", "FVD", "95 % from", "to", "change", "ratio", "N real", "N fake"]
SAYS = {
    "stride": "Real clips whose frames lie farther apart or closer together than those of the samples move faster or "
    "slower. Published numbers differ in this most of all.",
    "frames": "Shorter clips have less motion to get wrong.",
    "resize": "How real frames become square: their aspect, and what of them is seen.",
    "split": "Which videos the real clips are from.",
    "draw": "Which clips of these videos: what is left when all else is equal.",
    "count": "Fewer clips on both sides: the bias of a small N.",
    "codec": "Samples stored with loss before they are measured.",
    "covariance": "Division by N or by N-1.",
    "batches": "The mean over small batches, a biased number that some published tables hold.",
}
"""What a knob is."""
RESIZED = {
    "crop": "short side first, then the centre",
    "whole": "whole frames, aspect not kept",
    "crop_first": "centre square first, then resized",
}
"""How frames become square, in words; the keys are those of `resize`."""


@dataclass(frozen=True)
class Turn:
    """One knob turned: how to come by both sides then, of which a part of the clips is compared."""

    knob: str
    to: str
    sides: Callable[[], Sides]
    part: float = 1.0


@dataclass(frozen=True)
class Skip:
    """A knob that could not be turned, and why."""

    knob: str
    to: str
    reason: str


def run(config: Doctor) -> Path:
    """Writes results.json and index.html to `config.out` and prints the table."""
    accelerator = accelerators.make_accelerator("fp32")
    model = vae.load(config.vae).to(device()).eval() if config.vae else None
    with accelerator.main_process_first():
        folder = RunFolder(config.out, config, accelerator.is_main_process)
        folder.bind(**inputs_of(config, model))
    accelerators.threads(config.threads)
    tables = examine(config, model)
    if accelerator.is_main_process:
        write_text(
            folder.path / "results.json", json.dumps([asdict(table) for table in tables], indent=2, allow_nan=False)
        )
        page = page_of(config, tables).write(folder.path / "index.html")
        folder.finish(turns=len(tables[0].rows) - 1)
        print("\n\n".join(table.text() for table in tables) + f"\n\nto look at: {page}")
    accelerators.close(accelerator)
    return folder.path


@torch.no_grad()
def examine(config: Doctor, model: VideoVAE | None) -> list[Table]:
    """The effect of every knob, sorted by size, and the knobs that could not be turned."""
    base = sides_of(config, preset(config.protocol), model)
    network = networks(config.weights)(base.preset.features)
    require(base.real, base.fake, base.preset, ["fvd"], lambda _: network)
    turns = [turn for knob in config.knobs or KNOBS for turn in KNOB[knob](config, base, model, network)]
    clips = base.real.count + base.fake.count
    with bar("doctor", (1 + len(turns)) * clips, show=is_main()) as progress:

        def features(side: VideoSet) -> FeatureSet:
            return features_of(side, network, config.batch, config.workers, progress)

        def row(turn: Turn, sides: Sides, base: float | None = None) -> list:
            return row_of(turn, sides.preset, features(sides.real), features(sides.fake), config.seed, base)

        first = row(Turn("", "as the protocol has it", lambda: base), base)
        bottom = floor_of(base, features) if config.floor and base.preset.against == "reals" else ""
        done = [attempt(turn, network, partial(row, base=first[2])) for turn in turns]
    rows = sorted((row for row in done if isinstance(row, list)), key=lambda row: -abs(row[5]))
    protocol = protocol_of("fvd", base.real, base.fake, base.preset, network, config.seed)
    rates = unknown_rate(base.real, base.fake) if base.preset.against == "reals" else ""
    note = f"{bottom}{protocol.warning() or ''}{rates}".strip()
    tables = [Table("What moves this FVD", HEADER, [first, *rows], protocol.to_dict(), note)]
    if cells := [[skip.knob, skip.to, skip.reason] for skip in done if isinstance(skip, Skip)]:
        tables.append(Table("Not turned", ["knob", "turned to", "because"], cells, protocol.to_dict()))
    return tables


def attempt(turn: Turn | Skip, network: FeatureExtractor, row: Callable[[Turn, Sides], list]) -> list | Skip:
    """The cells of a turn, or why there are none: what fails in one takes nothing from the others."""
    if isinstance(turn, Skip):
        return turn
    try:
        sides = turn.sides()
        require(sides.real, sides.fake, sides.preset, ["fvd"], lambda _: network)
    except UserError as error:
        return Skip(turn.knob, turn.to, str(error))
    try:
        return row(turn, sides)
    except UserError as error:
        if world_size() > 1:  # other processes may not have failed, and wait for this one's share
            raise
        return Skip(turn.knob, turn.to, str(error))


def row_of(
    turn: Turn, preset: Preset, real: FeatureSet, fake: FeatureSet, seed: int, base: float | None = None
) -> list:
    """The cells of a line: value, interval, and the change from `base`."""
    if turn.part < 1:
        real, fake = (part_of(side, turn.part, seed) for side in (real, fake))
    of = estimator("fvd", preset)[0]
    value = of(real, fake)
    bounds = [finite(bound) for bound in bounds_of("fvd", of, real, fake, preset)]
    base = value if base is None else base
    return [turn.knob, turn.to, value, *bounds, value - base, value / base if base else None, real.count, fake.count]


def part_of(side: FeatureSet, part: float, seed: int) -> FeatureSet:
    """A random part of the clips, of equally many the same ones."""
    order = torch.randperm(side.count, generator=generator(seed, "part"))
    return side.of(order[: round(part * side.count)].sort().values)


def floor_of(base: Sides, features: Callable[[VideoSet], FeatureSet]) -> str:
    """What real clips score against other real clips, in words; "" where they are too few."""
    reals = [features(side) for side in (base.real, base.beyond) if side]
    of = estimator("fvd", base.preset)[0]
    bottom = floor(of, FeatureSet.join(reals), base.real.count, base.fake.count)
    if not math.isfinite(bottom.mean):
        return ""
    return f"Floor, {bottom.real} real clips against {bottom.fake} others: {bottom.mean:.4g}. "


# ---------------------------------------------------------------------------------------------------------------------
# Knobs: each gives what it turns, or why it does not

Turns = Iterator[Turn | Skip]


def turned(
    knob: str, to: str, config: Doctor, model: VideoVAE | None, how: dict[str, str] | None = None, **keys: int | str
) -> Turn:
    """Both sides anew under other `keys` of the config, `how` replaced in the preset. The rates may differ where a
    stride is turned: that is what is looked at."""

    def sides() -> Sides:
        start = replace(preset(config.protocol), **(how or {}))
        return sides_of(replace(config, floor=False, **keys), start, model, any_rate="stride" in keys)

    return Turn(knob, to, sides)


def stride(config: Doctor, base: Sides, model: VideoVAE | None, network: FeatureExtractor) -> Turns:
    if base.real.fps:
        yield Skip("stride", "any", f"fps={base.real.fps:g} decides; set stride instead")
        return
    for step in (1, 2, 3, 4, 6):
        if step != base.real.stride:
            to = f"real stride {step}, not {base.real.stride}"
            yield turned("stride", to, config, model, stride=step * base.preset.rate)


def frames(config: Doctor, base: Sides, model: VideoVAE | None, network: FeatureExtractor) -> Turns:
    shorter = [usual for usual in (9, 16, 32, 64) if network.min_frames <= usual < base.fake.frames]
    if not shorter:
        yield Skip("frames", "fewer", f"clips have {base.fake.frames}, {network.name} needs {network.min_frames}")
    for count in shorter[-2:]:
        yield turned("frames", f"the first {count}, not {base.fake.frames}", config, model, frames=count)


def resize(config: Doctor, base: Sides, model: VideoVAE | None, network: FeatureExtractor) -> Turns:
    for fit, to in RESIZED.items():
        if fit != (config.resize or "crop"):
            yield turned("resize", to, config, model, resize=fit)


def split(config: Doctor, base: Sides, model: VideoVAE | None, network: FeatureExtractor) -> Turns:
    official = SUBSETS[open_dataset(config.videos, config.labels, config.subset).kind]
    subsets = [name for name in ("all", "train01", "test01", "train", "test") if name in official]
    if config.holdout:
        for part in ("train", "val", "all"):
            if part != config.split:
                yield turned("split", f"{part}, not {config.split}", config, model, split=part)
    elif len(subsets) < 2:
        yield Skip("split", "any", "nothing is held out: set holdout=0.2, or give UCF101 or SkyTimelapse with splits")
    for name in subsets:
        if name != config.subset:
            yield turned("split", f"subset {name}, not {config.subset}", config, model, subset=name)


def draw(config: Doctor, base: Sides, model: VideoVAE | None, network: FeatureExtractor) -> Turns:
    for seed in range(config.seed + 1, config.seed + 4):
        yield turned("draw", f"random clips, seed {seed}", config, model, {"draw": "random"}, seed=seed)


def count(config: Doctor, base: Sides, model: VideoVAE | None, network: FeatureExtractor) -> Turns:
    for part, to in ((0.5, "half of both sides"), (0.25, "a quarter of both sides")):
        if round(part * min(base.real.count, base.fake.count)) < max(2, base.preset.batch):
            yield Skip("count", to, f"{base.real.count} real clips and {base.fake.count} samples are too few")
        else:
            yield Turn("count", to, lambda: base, part)


def codec(config: Doctor, base: Sides, model: VideoVAE | None, network: FeatureExtractor) -> Turns:
    lossy = base.fake.note if isinstance(base.fake, Files) else ""
    before = f", after {lossy}" if lossy else ""
    for name in CODECS:
        stored = replace(base, fake=Recoded(base.fake, name))
        yield Turn("codec", f"samples as {name}{before}", lambda stored=stored: stored)
    name = "jpg, quality 75"
    both = replace(base, real=Recoded(base.real, name), fake=Recoded(base.fake, name))
    yield Turn("codec", f"both sides as {name}", lambda: both)


def covariance(config: Doctor, base: Sides, model: VideoVAE | None, network: FeatureExtractor) -> Turns:
    other = "N" if base.preset.covariance == "N-1" else "N-1"
    if base.preset.batch:
        yield Skip("covariance", f"1/({other})", "that of a batch is always divided by N-1")
        return
    changed = replace(base, preset=replace(base.preset, covariance=other))
    yield Turn("covariance", f"1/({other})", lambda: changed)


def batches(config: Doctor, base: Sides, model: VideoVAE | None, network: FeatureExtractor) -> Turns:
    for size in (2, 8):
        to = f"mean over batches of {size}"
        if min(base.real.count, base.fake.count) < size:
            yield Skip("batches", to, "fewer clips than that")
        elif size != base.preset.batch:
            changed = replace(base, preset=replace(base.preset, batch=size))
            yield Turn("batches", to, lambda changed=changed: changed)


KNOB = {knob.__name__: knob for knob in (stride, frames, resize, split, draw, count, codec, covariance, batches)}

# ---------------------------------------------------------------------------------------------------------------------
# The page


def page_of(config: Doctor, tables: list[Table]) -> Page:
    """The tables, and what each knob is."""
    from lvdm.metrics.protocol import Protocol

    page = Page(
        "FVD doctor",
        f"One set of samples, `{config.samples or config.vae}`, against `{config.videos}`: one knob turned at a time, "
        "sorted by how far the number moves.",
    )
    page.note(
        "A change within the spread of draw is none. None of these numbers is wrong: each is the answer to another "
        "question, and only numbers of one protocol may be compared."
    )
    for table in tables:
        page.section(table.title)
        described = Protocol(**table.protocol).describe() if table is tables[0] else ""
        page.table(table.header, table.rows, table.title, described, table.note)
    page.section("The knobs")
    turned = {row[0] for table in tables for row in table.rows if row[0]}
    page.facts({knob: says for knob, says in SAYS.items() if knob in turned})
    return page


def main(argv: list[str] | None = None) -> int:
    """`lvdm fvd doctor`."""
    return program(Doctor, argv, run)


if __name__ == "__main__":
    sys.exit(main())
