"""VAEs on the same clips, side by side (`lvdm compare`): numbers, paired differences, players of the worst clips."""

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import vae
from lvdm.accelerator import device
from lvdm.errors import UserError
from lvdm.files import write_text
from lvdm.media import to_float
from lvdm.metrics.protocol import Protocol, require_same
from lvdm.progress import bar
from lvdm.report import Dot, Link, Page
from lvdm.run import RunFolder
from sample.measure import scores
from sample.measure.configs import Compare, EvaluateReconstruction, require_clips
from sample.measure.evaluate import Table, networks
from sample.measure.figures import ENOUGH_VIDEOS, around, best_of, between, good_end, versions
from sample.measure.scores import REFERENCES, Measure, Scores, interval, of_clips, weights_of
from sample.measure.sets import Files, digest
from sample.measure.views import (
    UNITS,
    command,
    labels,
    lacking,
    mean_by_frame,
    model_row,
    padding_note,
    rfvd,
    scored,
    show_clip,
    show_table,
    usual_metrics,
)
from vae.base import VideoVAE


@dataclass
class Result:
    """One metric of one model: its mean over clips, and how it differs from the first model's on the same clips."""

    model: str
    metric: str
    mean: float
    low: float | None
    """Of the 95 % interval; None of fewer than two videos, as `high` and those of the difference."""
    high: float | None
    difference: float
    difference_low: float | None
    difference_high: float | None
    better_on: int
    """Clips on which it is better than the first model."""
    clear: bool
    """Whether the interval of the difference leaves out 0, of enough videos to say so."""


@dataclass
class Contest:
    """VAEs and what was measured of them on the same clips."""

    models: dict[str, VideoVAE]
    scores: dict[str, Scores]
    videos: Files
    rfvd: list[Table]
    """A model each, or none."""

    @property
    def metrics(self) -> list[str]:
        return list(next(iter(self.scores.values())).values["model"])

    @property
    def sources(self) -> list[str]:
        return next(iter(self.scores.values())).sources

    def of(self, metric: str) -> Tensor:
        """The mean of each clip, (models, clips) in fp64."""
        return torch.cat([of_clips([s], "model", metric) for s in self.scores.values()])

    def name_of(self, clip: int) -> str:
        """The video of a clip and where in it the clip begins."""
        return f"{self.sources[clip]}, frame {self.videos.windows[clip].start}"


def run(config: Compare) -> Path:
    """Writes index.html and results.json to `config.out` and prints the numbers."""
    generators = [f"{key}={value}" for key in config.of_generators if (value := getattr(config, key))]
    if generators:
        raise UserError(f"{generators[0]}: is for generators, and these are VAEs")
    metrics = list(dict.fromkeys(["psnr", *(config.metrics or usual_metrics(config.frames or 17))]))
    config = replace(config, frames=config.frames or 17, size=config.size or 256, metrics=metrics)
    known = [metric for metric in EvaluateReconstruction.known if metric not in ("group", "warping")]
    if wrong := set(metrics) - set(known):
        raise UserError(f"metrics={wrong.pop()}: expected, of VAEs, some of {', '.join(known)}")
    require_clips(config.frames, config.size, metrics)
    models = load_all(config)
    folder = RunFolder(config.out, config)
    contest = measured(config, models, folder)
    found = results(contest)
    stored = {
        "protocol": next(iter(contest.scores.values())).protocol,
        "models": {name: model_row(model, config.frames, config.size) for name, model in contest.models.items()},
        "clips": [contest.name_of(clip) for clip in range(contest.videos.count)],
        "results": [asdict(result) for result in found],
        "rfvd": [asdict(table) for table in contest.rfvd],
        "values": {m: dict(zip(contest.models, contest.of(m).tolist(), strict=True)) for m in contest.metrics},
    }
    write_text(folder.path / "results.json", json.dumps(stored, indent=2, allow_nan=False))
    page = write_page(config, contest, found, folder.path)
    print(text(found, contest.rfvd))
    print(f"{page}: open it in a browser")
    return page


# ---------------------------------------------------------------------------------------------------------------------
# Models and numbers


def load_all(config: Compare) -> dict[str, VideoVAE]:
    """The VAEs by a short name, on the CPU; UserErrors for one that is there twice and for sizes that do not fit."""
    models: dict[str, VideoVAE] = {}
    seen: dict[str, str] = {}
    for name, spec in zip(labels(config.models), config.models, strict=True):
        model = vae.load(spec)
        same = seen.setdefault(drawn_by(model), spec)
        if same != spec or name in models:
            raise UserError(
                f"{spec}: encodes and decodes as {same} does, weight for weight; compare different ones (a D2 is"
                " measured by lvdm evaluate refinement)"
            )
        if config.size % model.spec.space_factor:
            raise UserError(f"size={config.size}: {spec} takes multiples of {model.spec.space_factor}")
        models[name] = model
    return models


def drawn_by(model: VideoVAE) -> str:
    """All that decides D1's frames: class, weights and options, those of a D2 left out."""
    options = {key: value for key, value in model.options.items() if key not in ("refine", "inject")}
    return json.dumps([type(model).__name__, options, model.latent_sha256()], sort_keys=True, default=str)


def measured(config: Compare, models: dict[str, VideoVAE], folder: RunFolder) -> Contest:
    """Scores of all models; those measured before, in this folder, are read."""
    keys = {"videos": config.videos, "holdout": config.holdout, "frames": [config.frames], "size": config.size}
    clips = scores.clips_of(Measure(**keys))
    videos = Files(clips, clips.grid(config.per_video), per_video=config.per_video)
    folder.bind(videos=digest(videos))
    metrics = [metric for metric in config.metrics if metric != "rfvd"]
    network = networks({})("i3d") if "rfvd" in config.metrics else None
    if network and (reason := lacking(videos, network)):
        raise UserError(f"metrics=rfvd: {reason}")
    found, sets_found = {}, []
    for name, model in models.items():
        path = folder.path / "scores" / f"{model.identity()[:16]}.json"
        print(f"{name}: {'measured before' if path.is_file() else 'measured now'}")
        found[name] = scored(model, videos, metrics, config.batch, path)
        if network:
            sets_found.append(rfvd(name, model, videos, network, config.batch))
        model.to("cpu")
    require_same(Protocol(**s.protocol) for s in found.values())
    return Contest(models, found, videos, sets_found)


def results(contest: Contest) -> list[Result]:
    """Every metric of every model, in that order of metrics."""
    found, videos = [], len(set(contest.sources))
    for metric in contest.metrics:
        values = contest.of(metric)
        sign, weights = 1 if good_end(metric) == "max" else -1, weights_of(next(iter(contest.scores.values())), metric)
        for name, own in zip(contest.models, values, strict=True):
            change = own - values[0]
            low, high = interval(change, contest.sources, weights)
            found.append(
                Result(
                    name,
                    metric,
                    *(own.mean().item(), *interval(own, contest.sources, weights)),
                    *(change.mean().item(), low, high),
                    int((sign * change > 0).sum()),
                    videos >= ENOUGH_VIDEOS and (low > 0 or high < 0),
                )
            )
    return found


def text(found: list[Result], rfvds: list[Table]) -> str:
    """For the terminal."""
    lines = []
    for result in found:
        line = f"{result.metric:8} {result.model}: {around(result.mean, result.low, result.high)}"
        if result.model != found[0].model:
            change = between(result.difference, result.difference_low, result.difference_high)
            line += f", {change} to {found[0].model}{'' if result.clear else ', not clear'}"
        lines.append(line)
    for name, value, low, high, *_ in (table.rows[0] for table in rfvds):
        lines.append(f"{'rFVD':8} {name}: {value:.4g}" + ("" if low is None else f" [{low:.4g}, {high:.4g}]"))
    return "\n".join(lines)


def chosen(values: Tensor, names: list[str], most: int) -> dict[int, list[str]]:
    """Which clips to show, at most `most`, and why: the worst of each model, and those on which the first and another
    differ most; `values` (models, clips), of which more is better."""
    rankings = {f"worst of {name}": own.argsort() for name, own in zip(names, values, strict=True)}
    for name, own in zip(names[1:], values[1:], strict=True):
        rankings[f"{names[0]} leads {name} most"] = (own - values[0]).argsort()
        rankings[f"{name} leads {names[0]} most"] = (values[0] - own).argsort()
    picked: dict[int, list[str]] = {}
    for rank in range(values.shape[1]):
        for why, order in rankings.items():
            clip = int(order[rank])
            if clip in picked or len(picked) < most:
                picked.setdefault(clip, []).append(why if rank == 0 else f"{why}, no. {rank + 1}")
        if len(picked) == most:
            break
    return picked


# ---------------------------------------------------------------------------------------------------------------------
# The page


def write_page(config: Compare, contest: Contest, found: list[Result], out: Path) -> Path:
    """index.html, and the mp4 files of the clips it shows."""
    names = list(contest.models)
    shown = chosen(contest.of("PSNR"), names, config.show)
    page = Page(" and ".join([", ".join(names[:-1]), names[-1]]), f"{len(names)} VAEs on the same clips.")
    page.facts(facts(config, contest))
    if note := padding_note(contest.models, config.frames):
        page.note(note)
    if len(set(contest.sources)) < ENOUGH_VIDEOS:
        page.note(f"{len(set(contest.sources))} videos: too few to call any difference clear.")
    page.section("Numbers", "± is half of the 95 % interval over videos (bootstrap).")
    add_tables(page, config, contest, found)
    page.section("Clip by clip", "A dot is a clip; above the dashed line the other model has the larger value.")
    add_clips(page, contest, set(shown))
    page.section("By frame", "Means over clips: where in a clip a model is good, and how it flickers.")
    for metric in [metric for metric in ("PSNR", "flicker") if metric in contest.metrics]:
        lines = {n: mean_by_frame(s, metric) for n, s in contest.scores.items()}
        page.chart(f"{metric} by frame", lines, "frame", UNITS[metric])
    page.section(
        "Side by side",
        f"{len(shown)} of {contest.videos.count} clips: the worst of each model by PSNR, and those on which two differ"
        " most. Space plays and pauses, the arrow keys go frame by frame. Errors are grey where there are none.",
    )
    add_players(page, contest, shown, out / "clips")
    return page.write(out / "index.html")


def add_tables(page: Page, config: Compare, contest: Contest, found: list[Result]) -> None:
    """Means, differences from the first model, and what the models are."""
    metrics, first = contest.metrics, next(iter(contest.models))
    header = ["", *(f"{m} ({UNITS[m]})" if m in UNITS else m for m in metrics)]
    rows = [[n, *(around(r.mean, r.low, r.high) for r in found if r.model == n)] for n in contest.models]
    reference, name = contest.scores[first], REFERENCES["reconstruction"]
    floor = {metric: of_clips([reference], name, metric)[0] for metric in metrics}
    bounds = {m: interval(values, reference.sources, weights_of(reference, m)) for m, values in floor.items()}
    rows.append([name, *(around(values.mean().item(), *bounds[metric]) for metric, values in floor.items())])
    protocol = Protocol(**reference.protocol).describe()
    page.table(header, rows, "Means", protocol, best=best_of(header[1:]))
    rows = [
        [
            *(r.model, r.metric, between(r.difference, r.difference_low, r.difference_high)),
            *(f"{r.better_on} of {contest.videos.count} clips", "yes" if r.clear else "no"),
        ]
        for r in found
        if r.model != first
    ]
    note = f"In brackets the 95 % interval; clear: it leaves out 0, and there are at least {ENOUGH_VIDEOS} videos."
    page.table(["", "metric", f"minus {first}", "better on", "clear"], rows, f"Against {first}", note=note)
    if contest.rfvd:
        show_table(page, replace(contest.rfvd[0], rows=[table.rows[0] for table in contest.rfvd]))
    described = [model_row(model, config.frames, config.size) for model in contest.models.values()]
    rows = [[fact, *(row[fact] for row in described)] for fact in described[0]]
    page.table(["", *contest.models], rows, "The models")


def add_clips(page: Page, contest: Contest, shown: set[int]) -> None:
    """The scatter of the first model against the others, and the table of all clips."""
    names = list(contest.models)
    anchors = {clip: f"clip-{clip}" for clip in shown}
    views = {}
    for metric in contest.metrics:
        first, *others = contest.of(metric).tolist()
        views[metric] = {
            name: [
                Dot(x, y, contest.name_of(clip), anchors.get(clip, ""))
                for clip, (x, y) in enumerate(zip(first, own, strict=True))
            ]
            for name, own in zip(names[1:], others, strict=True)
        }
    note = "The clips that are shown below are linked to their players, here and in the table."
    page.scatter(f"{names[0]} against {' and '.join(names[1:])}", views, names[0], " or ".join(names[1:]), note)
    psnr = contest.of("PSNR")
    rows = []
    for clip, values in enumerate(psnr.T.tolist()):
        name = shortened(contest.name_of(clip))
        ahead = [value - values[0] for value in values[1:]]
        rows.append([Link(name, anchors[clip]) if clip in anchors else name, *values, *ahead])
    header = ["clip", *(f"{name} (dB)" for name in names), *(f"{name} minus {names[0]}" for name in names[1:])]
    page.table(header, rows, "PSNR of every clip")


def shortened(name: str, most: int = 48) -> str:
    """A name that leaves room for other columns: its middle is left out where it is long."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-(most // 2) :]}"


@torch.no_grad()
def add_players(page: Page, contest: Contest, shown: dict[int, list[str]], folder: Path) -> None:
    """Original, reconstructions and errors of the shown clips, in the place of those shown before."""
    shutil.rmtree(folder, ignore_errors=True)
    psnr = contest.of("PSNR")
    clips = {clip: contest.videos.clips.read(contest.videos.windows[clip]) for clip in shown}
    rendered: dict[int, dict[str, Tensor]] = {clip: {} for clip in shown}
    with bar("clips", len(shown) * len(contest.models)) as progress:
        for name, model in contest.models.items():
            model.to(device())
            for clip, read in clips.items():
                y = model.reconstruct(to_float(read.video[None].to(device()))).clamp(-1, 1)
                rendered[clip][name] = y[0].cpu()
                progress.advance()
            model.to("cpu")
    for clip, why in shown.items():
        captions = {name: f"{psnr[i, clip]:.2f} dB" for i, name in enumerate(contest.models)}
        x, title = to_float(clips[clip].video), contest.name_of(clip)
        reasons = f"{'; '.join(why)}."
        show_clip(page, folder, f"clip-{clip}", title, x, rendered[clip], captions, clips[clip].fps, reasons)


def facts(config: Compare, contest: Contest) -> dict[str, object]:
    """Data, versions and command."""
    index = contest.videos.clips.index
    return {
        "clips": f"{contest.videos.count} of {len(set(contest.sources))} videos in {index.root.name}",
        "of each": f"{config.frames} frames of {config.size}×{config.size}",
        "versions": versions(),
        "command": command("compare", config),
    }
