"""Generators in one protocol, side by side (`lvdm compare`): FVD and KVD with intervals and floor, and their videos."""

import json
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from lvdm.errors import UserError
from lvdm.files import write_text
from lvdm.media import write_mp4
from lvdm.metrics.protocol import preset, require_same
from lvdm.report import Page, Player
from lvdm.run import RunFolder
from sample.measure.configs import OWN_FEATURES, Compare, EvaluateGeneration
from sample.measure.distances import Row, cells, header, measure, protocol_of
from sample.measure.evaluate import networks
from sample.measure.figures import best_of, good_end, versions
from sample.measure.sides import Sides, noted, sides_of
from sample.measure.views import command, labels

ALIKE = {"count": "videos", "frames": "frames", "size": "pixels a side"}
"""What sets that are compared have in common, and how it is counted."""
Titles = dict[str, dict[str, int]]
"""Title -> generator -> the number of its video."""


def run(config: Compare) -> Path:
    """Writes index.html and results.json to `config.out` and prints the numbers.

    Features come from the user's cache where it has them, so that one generator more is the only one looked at.
    """
    require_apart(config.models)
    folder = RunFolder(config.out, config)
    both = {name: both_sides(config, spec) for name, spec in zip(labels(config.models), config.models, strict=True)}
    require_alike(both)
    found = measured(config, both)
    stored = {name: [asdict(row) for row in rows] for name, rows in found.items()}
    known = json.loads(json.dumps(stored), parse_constant=lambda _: None)  # JSON has no nan
    write_text(folder.path / "results.json", json.dumps(known, indent=2, allow_nan=False))
    page = write_page(config, both, found, folder.path)
    print(text(found))
    print(f"{page}: open it in a browser")
    return page


def both_sides(config: Compare, spec: str) -> Sides:
    """Real clips and those of one generator, as `lvdm evaluate generation` has them."""
    asked = ("videos", "per_video", "holdout", "batch", "frames", "size", "stride", "fps", "count", "features")
    keys = {key: getattr(config, key) for key in (*asked, "weights")}
    evaluation = EvaluateGeneration(samples=spec, **keys, **({"metrics": config.metrics} if config.metrics else {}))
    return sides_of(evaluation, preset(config.protocol or "univae"), None)


def require_apart(specs: Sequence[str]) -> None:
    """Refuses a folder that is there twice."""
    seen: dict[Path, str] = {}
    for spec in specs:
        folder = Path(spec).resolve()
        if folder in seen:
            raise UserError(f"{spec}: is there twice, as {seen[folder]} is the same folder; compare different ones")
        seen[folder] = spec


def require_alike(both: dict[str, Sides]) -> None:
    """Refuses sets whose distances say different things: of other counts, other clips, or other losses in their files.

    Distances at different counts are biased differently, and compression alone moves a distance.
    """
    for key, unit in ALIKE.items():
        values = {name: getattr(side.fake, key) for name, side in both.items()}
        if len(set(values.values())) > 1:
            there = ", ".join(f"{name} has {value}" for name, value in values.items())
            least = min(values.values())
            raise UserError(f"{there} {unit}: their distances cannot be compared; set {key}={least}")
    kept = {name: side.fake.note or "without loss" for name, side in both.items()}
    if len(set(kept.values())) > 1:
        there = ", ".join(f"{name} is kept as {how}" for name, how in kept.items())
        raise UserError(f"{there}: what files lose moves a distance; keep all samples in one way")


def measured(config: Compare, both: dict[str, Sides]) -> dict[str, list[Row]]:
    """The numbers of every generator; a UserError, before anything is computed, where their protocols differ."""
    network, metrics = networks(config.weights), config.metrics or ["fvd", "kvd"]
    for metric in metrics:
        require_same(
            protocol_of(metric, s.real, s.fake, s.preset, network(OWN_FEATURES.get(metric, s.preset.features)), 0)
            for s in both.values()
        )
    return {
        name: measure(s.real, s.fake, s.preset, metrics, network, config.batch, beyond=s.beyond)
        for name, s in both.items()
    }


def text(found: dict[str, list[Row]]) -> str:
    """For the terminal."""
    lines = []
    for name, row in ((name, row) for name, rows in found.items() for row in rows):
        value, low, high, floor, _, counts, *_ = cells(row)
        line = f"{row.protocol.metric} {name}: {value:.4g}" + ("" if low is None else f" [{low:.4g}, {high:.4g}]")
        lines.append(line + ("" if floor is None else f", {header(row.protocol.metric)[3]} {floor:.4g} (N {counts})"))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The page


def write_page(config: Compare, both: dict[str, Sides], found: dict[str, list[Row]], out: Path) -> Path:
    """index.html, and the mp4 files it shows."""
    names, real = list(both), next(iter(both.values())).real
    page = Page(" and ".join([", ".join(names[:-1]), names[-1]]), f"{len(names)} generators in one protocol.")
    page.facts(
        {
            "real clips": f"{real.count} of {real.name}",
            "generated": f"{next(iter(both.values())).fake.count} of each",
            "versions": versions(),
            "command": command("compare", config),
        }
    )
    page.section(
        "Numbers",
        "With its 95 % interval, a jackknife over videos. The floor is the same metric of real clips against other real"
        " clips, as many as its N says. Where intervals overlap, the order is not known.",
    )
    add_tables(page, found)
    shutil.rmtree(out / "clips", ignore_errors=True)  # those shown before
    page.section("Side by side", "Space plays and pauses, the arrow keys go frame by frame.")
    for number, (title, of) in enumerate(matched(config, both).items()):
        players = []
        for name, index in of.items():
            path = out / "clips" / f"{number:03d}-{len(players)}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            fake = both[name].fake
            write_mp4(path, clip_of(both[name], index).permute(1, 2, 3, 0), fake.paces[index] or 25)
            players.append(Player(name, path))
        page.players(players, title=title, anchor=f"clip-{number}")
    return page.write(out / "index.html")


def add_tables(page: Page, found: dict[str, list[Row]]) -> None:
    """A table a metric; the best is set in bold only where its interval is apart from all others."""
    for rows in zip(*found.values(), strict=True):
        first = rows[0].protocol
        lines = [[name, *cells(row)] for name, row in zip(found, rows, strict=True)]
        best = best_of([first.metric]) if has_winner(rows) else {}
        page.table(["", *header(first.metric)], lines, "", first.describe(), rows[0].warning, best=best)


def has_winner(rows: Sequence[Row]) -> bool:
    """Whether the interval of the best value overlaps no other."""
    upwards = good_end(rows[0].metric.upper()) == "max"
    first, *others = sorted(rows, key=lambda row: row.value, reverse=upwards)
    return all(row.high < first.low or row.low > first.high for row in others)


def clip_of(both: Sides, number: int) -> Tensor:
    """A generated clip, uint8 (3, T, H, W)."""
    return both.fake.read(both.fake.windows[number])


def matched(config: Compare, both: dict[str, Sides]) -> Titles:
    """What stands side by side: videos of one class where all generators say the class of each, else of one number."""
    classes = {name: classes_of(spec) for name, spec in zip(both, config.models, strict=True)}
    if all(classes.values()):
        found: dict[tuple[int, str], dict[str, int]] = defaultdict(dict)
        for name, labels_of in classes.items():
            seen: dict[str, int] = defaultdict(int)
            for number, label in enumerate(labels_of[: both[name].fake.count]):
                found[seen[label], label][name] = number
                seen[label] += 1
        whole = [(rank, label) for rank, label in sorted(found) if len(found[rank, label]) == len(both)]
        return {f"{label}, no. {rank + 1}": found[rank, label] for rank, label in whole[: config.show]}
    count = min(config.show, *(side.fake.count for side in both.values()))
    return {f"no. {number + 1}": dict.fromkeys(both, number) for number in range(count)}


def classes_of(spec: str) -> list[str]:
    """The class of each video, in the order of the files; empty where nobody says."""
    samples = sorted(noted(Path(spec)), key=lambda sample: sample["id"])
    return [sample["class"] for sample in samples] if all(sample["class"] for sample in samples) else []
