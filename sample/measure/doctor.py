"""Why an FVD is what it is (`lvdm fvd doctor`): one set of samples, one knob of the protocol turned at a time."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import vae
from lvdm import accelerator as accelerators
from lvdm.accelerator import device
from lvdm.cli import program
from lvdm.errors import UserError
from lvdm.files import write_text
from lvdm.metrics.features import FeatureExtractor
from lvdm.metrics.protocol import Preset, preset
from lvdm.metrics.sets import FeatureSet, floor, interval
from lvdm.progress import bar
from lvdm.report import Page
from lvdm.rng import generator
from lvdm.run import RunFolder
from sample.measure.configs import KNOBS, Doctor
from sample.measure.evaluate import Table, finite, inputs_of, networks
from sample.measure.recode import CODECS, Recoded
from sample.measure.sets import VideoSet, estimator, features_of, is_main, protocol_of
from sample.measure.sides import Sides, fake_side, real_side, sides_of
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


@dataclass(frozen=True)
class Turn:
    """One knob turned: what is then compared, of which part of the clips."""

    knob: str
    to: str
    real: VideoSet
    fake: VideoSet
    preset: Preset
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
        write_text(folder.path / "results.json", json.dumps([asdict(table) for table in tables], indent=2))
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
    turns: list[Turn] = []
    skips: list[Skip] = []
    for knob in config.knobs or KNOBS:
        for turn in KNOB[knob](config, base, model, network):
            (turns if isinstance(turn, Turn) else skips).append(turn)
    start = Turn("", "as the protocol has it", base.real, base.fake, base.preset)
    with bar("doctor", sum(t.real.count + t.fake.count for t in [start, *turns]), show=is_main()) as progress:

        def features(side: VideoSet) -> FeatureSet:
            return features_of(side, network, config.batch, config.workers, progress)

        first = row_of(start, features(base.real), features(base.fake), config.seed)
        rows = [row_of(turn, features(turn.real), features(turn.fake), config.seed, first[2]) for turn in turns]
    rows.sort(key=lambda row: -abs(row[5]))
    protocol = protocol_of("fvd", base.real, base.fake, base.preset, network, config.seed)
    of = estimator("fvd", base.preset)[0]
    bottom = floor(of, features_of(base.real, network, config.batch, config.workers, progress), base.fake.count)
    note = f"Floor, real clips against real clips, {bottom.count} a side: {bottom.mean:.4g}. {protocol.warning() or ''}"
    tables = [Table("What moves this FVD", HEADER, [first, *rows], protocol.to_dict(), note.strip())]
    if skips:
        cells = [[skip.knob, skip.to, skip.reason] for skip in skips]
        tables.append(Table("Not turned", ["knob", "turned to", "because"], cells, protocol.to_dict()))
    return tables


def row_of(turn: Turn, real: FeatureSet, fake: FeatureSet, seed: int, base: float | None = None) -> list:
    """The cells of a line: value, interval, and the change from `base`."""
    if turn.part < 1:
        real, fake = (part_of(side, turn.part, seed) for side in (real, fake))
    of = estimator("fvd", turn.preset)[0]
    value = of(real, fake)
    bounds = [finite(bound) for bound in interval(of, real, fake)]
    base = value if base is None else base
    return [turn.knob, turn.to, value, *bounds, value - base, finite(value / base), real.count, fake.count]


def part_of(side: FeatureSet, part: float, seed: int) -> FeatureSet:
    """A random part of the clips."""
    order = torch.randperm(side.count, generator=generator(seed, "part"))
    return side.of(order[: round(part * side.count)].sort().values)


# ---------------------------------------------------------------------------------------------------------------------
# Knobs: each gives what it turns, or why it does not

Turns = Iterator[Turn | Skip]


def of_reals(knob: str, to: str, config: Doctor, base: Sides, **changes: int | str) -> Turn | Skip:
    """Other real clips; `changes` are keys of the config, or the stride or draw."""
    stride = changes.pop("real_stride", base.real.stride or 1)
    changed = replace(base.preset, draw=changes.pop("draw", base.preset.draw))
    try:
        asked = replace(config, **changes)
        real = real_side(asked, changed, base.fake.size, base.fake.frames, stride, base.real.fps or 0.0)
        if real.count < 2:
            return Skip(knob, to, "fewer than 2 real clips")
        return Turn(knob, to, real, base.fake, changed)
    except UserError as error:
        return Skip(knob, to, str(error))


def stride(config: Doctor, base: Sides, model: VideoVAE | None, network: FeatureExtractor) -> Turns:
    if base.real.fps:
        yield Skip("stride", "any", f"fps={base.real.fps:g} decides; set stride instead")
        return
    for step in (1, 2, 3, 4, 6):
        if step != base.real.stride:
            yield of_reals("stride", f"real stride {step}, not {base.real.stride}", config, base, real_stride=step)


def frames(config: Doctor, base: Sides, model: VideoVAE | None, network: FeatureExtractor) -> Turns:
    shorter = [usual for usual in (9, 16, 32, 64) if network.min_frames <= usual < base.fake.frames]
    if not shorter:
        yield Skip("frames", "fewer", f"clips have {base.fake.frames}, {network.name} needs {network.min_frames}")
    for count in shorter[-2:]:
        changed = replace(base.preset, frames=count)
        fake = fake_side(config, changed, model)
        real = real_side(config, changed, fake.size, count, base.real.stride or 1, base.real.fps or 0.0)
        yield Turn("frames", f"the first {count}, not {base.fake.frames}", real, fake, changed)


def resize(config: Doctor, base: Sides, model: VideoVAE | None, network: FeatureExtractor) -> Turns:
    for fit, to in (("whole", "whole frames, aspect not kept"), ("crop_first", "centre square first, then resized")):
        if fit != config.resize:
            yield of_reals("resize", to, config, base, resize=fit)


def split(config: Doctor, base: Sides, model: VideoVAE | None, network: FeatureExtractor) -> Turns:
    if config.holdout:
        for part in ("train", "val", "all"):
            if part != config.split:
                yield of_reals("split", f"{part}, not {config.split}", config, base, split=part)
    there = [of_reals("split", name, config, base, subset=name) for name in ("train01", "test01", "train", "test")]
    turned = [turn for turn in there if isinstance(turn, Turn) and turn.to != config.subset]
    yield from turned
    if not config.holdout and not turned:
        yield Skip("split", "any", "nothing is held out: set holdout=0.2, or give UCF101 or SkyTimelapse with splits")


def draw(config: Doctor, base: Sides, model: VideoVAE | None, network: FeatureExtractor) -> Turns:
    for seed in range(config.seed + 1, config.seed + 4):
        yield of_reals("draw", f"random clips, seed {seed}", config, base, draw="random", seed=seed)


def count(config: Doctor, base: Sides, model: VideoVAE | None, network: FeatureExtractor) -> Turns:
    for part, to in ((0.5, "half of both sides"), (0.25, "a quarter of both sides")):
        if round(part * min(base.real.count, base.fake.count)) < 2:
            yield Skip("count", to, f"{base.real.count} real clips and {base.fake.count} samples are too few")
        else:
            yield Turn("count", to, base.real, base.fake, base.preset, part)


def codec(config: Doctor, base: Sides, model: VideoVAE | None, network: FeatureExtractor) -> Turns:
    before = f", after {base.fake.note}" if base.fake.note else ""
    for name in CODECS:
        yield Turn("codec", f"samples as {name}{before}", base.real, Recoded(base.fake, name), base.preset)
    name = "jpg, quality 75"
    yield Turn("codec", f"both sides as {name}", Recoded(base.real, name), Recoded(base.fake, name), base.preset)


def covariance(config: Doctor, base: Sides, model: VideoVAE | None, network: FeatureExtractor) -> Turns:
    other = "N" if base.preset.covariance == "N-1" else "N-1"
    yield Turn("covariance", f"1/({other})", base.real, base.fake, replace(base.preset, covariance=other))


def batches(config: Doctor, base: Sides, model: VideoVAE | None, network: FeatureExtractor) -> Turns:
    for size in (2, 8):
        if min(base.real.count, base.fake.count) < size:
            yield Skip("batches", f"mean over batches of {size}", "fewer clips than that")
        else:
            changed = replace(base.preset, batch=size)
            yield Turn("batches", f"mean over batches of {size}", base.real, base.fake, changed)


KNOB = {knob.__name__: knob for knob in (stride, frames, resize, split, draw, count, codec, covariance, batches)}

# ---------------------------------------------------------------------------------------------------------------------
# The page


def page_of(config: Doctor, tables: list[Table]) -> Page:
    """The tables, and what each knob is."""
    from lvdm.metrics.protocol import Protocol

    page = Page(
        "FVD doctor",
        f"One set of samples, `{config.samples}`, against `{config.videos}`: one knob turned at a time, "
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
