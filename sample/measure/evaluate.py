"""Measure a VAE or generated videos (`lvdm evaluate`). Every table carries the protocol of its numbers.

Several GPUs: accelerate launch -m sample.measure.evaluate generation samples=..., with the same keys and numbers.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch

import vae
from lvdm import accelerator as accelerators
from lvdm import cost
from lvdm.accelerator import device
from lvdm.cli import program
from lvdm.data.clips import ClipPolicy, Clips
from lvdm.data.index import open_index
from lvdm.errors import UserError
from lvdm.files import write_text
from lvdm.metrics.content import content_of
from lvdm.metrics.features import FeatureExtractor, make_extractor
from lvdm.metrics.frames import by_group_position
from lvdm.metrics.protocol import Protocol, preset
from lvdm.run import RunFolder
from lvdm.text import aligned
from sample.measure import distances, scores
from sample.measure.configs import (
    Doctor,
    EvaluateFrames,
    EvaluateGeneration,
    EvaluateReconstruction,
    EvaluateRefinement,
    Evaluation,
    SetEvaluation,
    by_features,
)
from sample.measure.distances import Row, cells, header
from sample.measure.figures import finite
from sample.measure.scores import BY_PAIR, REFERENCES, Scores, of_clips
from sample.measure.sets import Files, Reconstructed, VideoSet, digest
from sample.measure.sides import Sides, of_latents, sides_of
from sample.render import require_refiner
from vae.base import VideoVAE

MIDDLE, EVEN, ALL = slice(1, None, 2), slice(None, None, 2), slice(None)
BIASED = ": biased, not for comparison"
TITLES = {
    "FVD": "Fréchet video distance",
    "KVD": "Kernel video distance",
    "IS": "Inception score",
    "FID": "Fréchet distance of frames",
}


@dataclass
class Table:
    """Numbers of one protocol: what `results.json` holds a list of."""

    title: str
    header: list[str]
    rows: list[list[str | float | None]]
    protocol: dict
    note: str = ""

    def text(self) -> str:
        """For the terminal."""
        cells = [self.header, *[[_cell(cell) for cell in row] for row in self.rows]]
        described = f"[{Protocol(**self.protocol).describe()}]"
        return "\n".join([self.title, aligned(cells), described, *([self.note] if self.note else [])])


def _cell(value: str | float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def run(config: EvaluateReconstruction | EvaluateRefinement | EvaluateGeneration) -> Path:
    """Writes `results.json` to `config.out` and prints its tables."""
    accelerator = accelerators.make_accelerator("fp32")
    model = vae.load(config.vae).to(device()).eval() if config.vae else None
    measure = {
        EvaluateReconstruction: reconstruction,
        EvaluateRefinement: refinement,
        EvaluateGeneration: generation,
    }[type(config)]
    with accelerator.main_process_first():
        folder = RunFolder(config.out, config, accelerator.is_main_process)
        folder.bind(**inputs_of(config, model))  # or the numbers would be of something else
    finished = folder.finished
    accelerator.wait_for_everyone()
    if not finished:
        accelerators.threads(config.threads)
        tables = measure(config, model)
        if accelerator.is_main_process:
            write_text(
                folder.path / "results.json",
                json.dumps([asdict(table) for table in tables], indent=2, allow_nan=False),
            )
            folder.finish(tables=len(tables))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for table in read_results(folder.path):
            print(table.text() + "\n")
    accelerators.close(accelerator)
    return folder.path


def inputs_of(config: Evaluation, model: VideoVAE | None) -> dict[str, str]:
    """Hashes of what an evaluation looks at: the VAE, the user's weights, the content of the clips of both sides."""
    found = {f"weights.{name}": hash_of(file) for name, file in config.weights.items()}
    if model:
        found["vae"] = model.identity()
    if isinstance(config, EvaluateFrames):
        require_vae(config, model)
        return found | {"videos": digest(videos_of(config))}
    pairs, _ = pairs_of(config, model)
    return found | {
        "videos": " ".join(digest(p.real) for p in pairs),
        "samples": " ".join(digest(p.fake) for p in pairs),
    }


def hash_of(file: str) -> str:
    """The hash of a file of the user; of a hub id its name."""
    path = Path(file).expanduser()
    return content_of(path) if file and path.exists() else file


def read_results(folder: Path) -> list[Table]:
    """The tables that an evaluation wrote."""
    return [Table(**table) for table in json.loads((folder / "results.json").read_text())]


# ---------------------------------------------------------------------------------------------------------------------
# Frames against frames


def reconstruction(config: EvaluateReconstruction, model: VideoVAE | None) -> list[Table]:
    """D1's frames and an upscaled thumbnail, against the originals."""
    model = require_vae(config, model)
    videos = videos_of(config)
    if "rfvd" in config.metrics and videos.count < 2:
        raise UserError(f"metrics=rfvd: needs at least 2 clips, {config.videos} gives {videos.count}; see per_video")
    names = {"model": f"{model.title}, D1", REFERENCES["reconstruction"]: REFERENCES["reconstruction"]}
    metrics, tables = [metric for metric in config.metrics if metric not in ("group", "rfvd")], []
    by_frame = [*metrics, *(["ssim"] if "group" in config.metrics and "ssim" not in metrics else [])]
    if by_frame:
        found = scored(config, model, videos, "reconstruction", by_frame)
        if metrics:
            tables.append(frame_table("Reconstruction", found, metrics, names, ALL, "all frames"))
        if "group" in config.metrics:
            tables.append(group_table(found, names))
    if "rfvd" in config.metrics:
        rows = distances.measure(
            videos,
            Reconstructed(videos, model),
            preset("rfvd"),
            ["fvd"],
            networks({}),
            config.batch,
            config.workers,
        )
        tables += set_tables(rows, names["model"])
    return tables


def refinement(config: EvaluateRefinement, model: VideoVAE | None) -> list[Table]:
    """D2's middle frames, which the encoder never saw, and its even ones, each beside what needs no D2."""
    model = require_vae(config, model)
    require_refiner(model, True, config.vae)
    found = scored(config, model, videos_of(config), "refinement", config.metrics)
    blend = REFERENCES["refinement"]
    middle = {"model": "D2", blend: "linear blend of D1's neighbours"}
    pairs = [metric for metric in config.metrics if scores.label_of(metric) in BY_PAIR]
    frames = [metric for metric in config.metrics if metric not in pairs]
    return [
        frame_table(
            "Middle frames at twice the rate",
            found,
            config.metrics,
            middle,
            MIDDLE,
            "middle frames only" + (f"; {scores.named(pairs)} of all pairs of neighbours" if pairs else ""),
        ),
        *(
            [
                frame_table(
                    "The frames between them, which the encoder saw",
                    found,
                    frames,
                    {"model": "D2", blend: "D1"},
                    EVEN,
                    "even frames only",
                )
            ]
            if frames
            else []
        ),
    ]


def require_vae(config: EvaluateFrames, model: VideoVAE | None) -> VideoVAE:
    """The VAE, refused where there is none or where it does not take clips of this size."""
    if model is None:
        raise UserError("vae: expected the VAE to measure, e.g. vae=runs/univae")
    model.spec.check_square(config.size, "size")
    return model


def videos_of(config: EvaluateFrames) -> Files:
    """The clips to measure on."""
    policy = ClipPolicy(
        frames=config.frames,
        stride=1 if config.fps else config.stride,
        size=config.size,
        split=config.split,
        holdout=config.holdout,
        fps=config.fps,
        short=config.short,
        across_cuts=config.across_cuts,
    )
    index = open_index(config.videos, config.labels, config.subset)
    clips = Clips(index, policy, seed=0, cache_gib=config.cache_gib)
    return Files(clips, clips.grid(config.per_video), subset=config.subset, per_video=config.per_video)


def scored(config: EvaluateFrames, model: VideoVAE, videos: Files, what: str, metrics: Sequence[str]) -> Scores:
    """The metrics of every frame."""
    videos.clips.say_skipped()
    raft = config.weights.get("raft", "")
    found = scores.measure(model, videos, [config.frames], what, metrics, config.batch, config.workers, raft)
    return found[config.frames]


def frame_table(
    title: str, found: Scores, metrics: Sequence[str], names: dict[str, str], part: slice, which: str
) -> Table:
    """Means over frames and then clips, each with half of its 95 % interval over videos, where there are two."""
    labels = [scores.label_of(metric) for metric in metrics]
    rows = []
    for rendering, name in names.items():
        cells: list[str | float | None] = [name]
        for label in labels:
            values = of_clips([found], rendering, label, ALL if label in BY_PAIR else part)[0]
            low, high = scores.interval(values, found.sources, scores.weights_of(found, label))
            cells += [finite(values.mean().item()), None if low is None else finite((high - low) / 2)]
        rows.append(cells)
    header = [cell for label in labels for cell in (f"{label} (dB)" if "PSNR" in label else label, f"± {label}")]
    described = {"metric": scores.named(metrics), "estimator": f"{scores.estimator(metrics)}; {which}"}
    note = "± is half of the 95 % interval over videos (bootstrap)."
    return Table(title, ["", *header], rows, {**found.protocol, **described}, note)


def group_table(found: Scores, names: dict[str, str]) -> Table:
    """SSIM by position in the group of frames that become one latent."""
    rows = []
    for rendering, name in names.items():
        values = torch.tensor(found.values[rendering]["SSIM"], dtype=torch.float64)
        rows.append([name, *by_group_position(values).mean(0).tolist()])
    header = ["", *(f"frame {i + 1} of the group" for i in range(len(rows[0]) - 1))]
    estimator = "mean over groups of 4 frames, then over clips; the first frame left out; posterior mean"
    described = {"metric": "SSIM", "features": None, "weights_sha256": None, "estimator": estimator}
    return Table("SSIM by position in the group", header, rows, {**found.protocol, **described})


# ---------------------------------------------------------------------------------------------------------------------
# Sets against sets


def generation(config: EvaluateGeneration, model: VideoVAE | None) -> list[Table]:
    """The set metrics of the samples under every protocol."""
    (pairs, note), network, tables = pairs_of(config, model), networks(config.weights), []
    for pair in pairs:
        pair.real.clips.say_skipped()
        distances.require(pair.real, pair.fake, pair.preset, config.metrics, network)
    for pair in pairs:
        keys = {"batch": config.batch, "workers": config.workers, "seed": config.seed, "floor": config.floor}
        rows = distances.measure(pair.real, pair.fake, pair.preset, config.metrics, network, beyond=pair.beyond, **keys)
        tables += set_tables(rows, pair.fake.name, unknown_rate(pair.real, pair.fake))
    tables[0].note += note
    return tables


def pairs_of(config: EvaluateGeneration | Doctor, model: VideoVAE | None) -> tuple[list[Sides], str]:
    """Both sides under every protocol that was asked for, and what is to be said of one that was not."""
    asked = [config.protocol] if isinstance(config, Doctor) else config.protocol
    pairs = [sides_of(config, preset(name), model) for name in asked or ["univae"]]
    if config.samples and all(pair.preset.against == "originals" for pair in pairs):
        raise UserError(
            f"samples={config.samples}: protocol rfvd is of the VAE's own reconstructions; leave samples out"
        )
    if asked or not renders_twice(config, model):
        return pairs, ""
    real = pairs[0].real
    if has_double_rate(config, real):
        return [*pairs, sides_of(config, preset("univae-2x"), model)], ""
    by_rate = f"{2 * config.fps:g} fps: not every video has it exactly."
    by_stride = f"stride {real.stride} / 2: take an even stride."
    return pairs, f" D2's rate has no real counterpart at {by_rate if config.fps else by_stride}"


def networks(weights: dict[str, str]) -> Callable[[str], FeatureExtractor]:
    """Makes feature extractors by name, each once, from the user's `weights` where it takes any."""
    given = by_features(weights)
    return cache(lambda name: make_extractor(name, device(), given.get(name, "")))


def renders_twice(config: SetEvaluation, model: VideoVAE | None) -> bool:
    """Whether the samples are there at twice the rate, too."""
    if of_latents(Path(config.samples), model):
        return model is not None and model.spec.refines
    return Path(config.samples, "d2").is_dir()


def has_double_rate(config: SetEvaluation, real: VideoSet) -> bool:
    """Whether real clips can be had at twice the rate."""
    if not config.fps:
        return (real.stride or 1) % 2 == 0
    try:
        policy = replace(real.clips.policy, fps=2 * config.fps)
        return all(policy.stride_of(row) for row in real.clips.index.ok)
    except UserError:  # one of them takes no whole stride
        return False


def unknown_rate(real: VideoSet, fake: VideoSet) -> str:
    """What is to be said where the rates of both sides could not be compared."""
    sides = [name for name, videos in (("real clips", real), ("samples", fake)) if videos.rates is None]
    return f" The {' and the '.join(sides)} do not say their frame rate: equal rates were not checked." if sides else ""


def set_tables(rows: Sequence[Row], name: str, note: str = "") -> list[Table]:
    """A table a number: its interval, its floor (real clips against real clips), and both counts."""
    tables = []
    for row in rows:
        p = row.protocol
        title = f"{TITLES[p.metric]}, {p.frames} frames, {p.preset}{BIASED if p.biased else ''}"
        said = f"{row.warning}.{note}" if row.warning else note.strip()
        tables.append(Table(title, ["", *header(p.metric)], [[name, *cells(row)]], p.to_dict(), said))
    return tables


# ---------------------------------------------------------------------------------------------------------------------
# Programs


def describe(config: EvaluateFrames) -> str:
    """Parameters and FLOPs of encoding and decoding a clip, for `--dry-run`."""
    model = vae.load(config.vae).to("meta")
    x = torch.empty(1, 3, config.frames, config.size, config.size, device="meta")
    clip = f"a clip of {config.frames}x{config.size}x{config.size}, encoded and decoded"
    return cost.describe_forward(clip, cost.parameters(model), cost.forward_cost(lambda: model(x)))


def reconstruction_main(argv: list[str] | None = None) -> int:
    """`lvdm evaluate reconstruction`."""
    return program(EvaluateReconstruction, argv, run, describe)


def refinement_main(argv: list[str] | None = None) -> int:
    """`lvdm evaluate refinement`."""
    return program(EvaluateRefinement, argv, run, describe)


def generation_main(argv: list[str] | None = None) -> int:
    """`lvdm evaluate generation`."""
    return program(EvaluateGeneration, argv, run)


def main(argv: list[str] | None = None) -> int:
    """`python -m sample.measure.evaluate WHAT ...`, for launchers."""
    from lvdm.cli import main as lvdm

    return lvdm(["evaluate", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    accelerators.leave(main())
