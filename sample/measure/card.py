"""One VAE on one page (`lvdm vae card`): what it is, how good at which frame, its latents, rFVD, speed, looks."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import vae
from lvdm.accelerator import device
from lvdm.cli import program
from lvdm.cost import parameters
from lvdm.data.clips import Cut
from lvdm.data.index import Index, IndexRow
from lvdm.data.reader import iter_frames
from lvdm.files import write_text
from lvdm.media import to_float
from lvdm.metrics.features import FeatureExtractor
from lvdm.metrics.frames import by_group_position, psnr
from lvdm.metrics.protocol import Protocol
from lvdm.progress import bar
from lvdm.report import Page
from lvdm.run import RunFolder
from sample.bench import vae as bench_vae
from sample.measure import scores
from sample.measure.configs import Card, require_clips
from sample.measure.evaluate import networks
from sample.measure.figures import around, versions
from sample.measure.latent_stats import CodeStats, LatentStats, draw_latents, latent_stats, normal_curve
from sample.measure.scores import REFERENCES, Measure, Scores, interval, of_clips
from sample.measure.sets import Files, digest
from sample.measure.views import (
    UNITS,
    command,
    labels,
    lacking,
    mean_by_frame,
    model_row,
    rfvd,
    scored,
    show_clip,
    show_table,
    usual_metrics,
)
from sample.reconstruct import reconstruct
from sample.zoo import parts
from vae.base import VideoVAE

LONGEST = 24
"""Videos, those with the longest shots, whose PSNR by position is measured."""
RUN = 33
"""Frames at a time of long videos, for models that do not stream exactly."""
BANDS = ((0, 1), (1, 17), (17, 65), (65, 257), (257, 1001))
"""Positions, in frames from the first of a shot; the second is what the others are held against."""
Shots = dict[str, list[float]]
"""PSNR of every frame of one shot of each video."""


def run(config: Card) -> Path:
    """Writes index.html and results.json to `config.out`; a finished card is left alone."""
    model = vae.load(config.vae).to(device())
    model.spec.check_square(config.size, "size")
    if config.videos:
        require_clips(config.frames, config.size, usual_metrics(config.frames))
    model.spec.check_square(config.speed_size, "speed_size")
    folder, videos = RunFolder(config.out, config), videos_of(config)
    folder.bind(vae=model.identity(), **({"videos": f"{videos.clips.index.hash()} {digest(videos)}"} if videos else {}))
    index = folder.path / "index.html"
    if not folder.finished:
        network = networks(config.weights)(config.features or "i3d") if videos else None
        page = Page(f"{labels([config.vae])[0]}: model card", f"{model.title}, measured on real videos.")
        stored = {"model": describe(page, config, model)}
        if videos:
            stored |= on_videos(page, config, model, videos, network, folder.path)
        else:
            page.note("No videos were given (videos=FOLDER): nothing here is of quality or of latents.")
        stored["speed"] = speed(page, config, model)
        write_text(folder.path / "results.json", json.dumps(stored, indent=2, allow_nan=False))
        page.write(index)
        folder.finish(page=str(index))
    print(f"{index}: open it in a browser")
    return index


def videos_of(config: Card) -> Files | None:
    """The clips that the card is measured on, if any."""
    if not config.videos:
        return None
    clips = scores.clips_of(Measure(videos=config.videos, frames=[config.frames], size=config.size))
    return Files(clips, clips.grid(config.per_video), per_video=config.per_video)


def on_videos(
    page: Page, config: Card, model: VideoVAE, videos: Files, network: FeatureExtractor, out: Path
) -> dict[str, Any]:
    """The sections that need clips."""
    found = quality(page, config, model, videos, out)
    return {
        "quality": asdict(found),
        "positions": positions(page, config, model, videos.clips.index),
        "latents": latents(page, config, model, videos, out),
        "rfvd": sets_section(page, config, model, videos, network),
        "shown": players(page, config, model, videos, found, out),
    }


# ---------------------------------------------------------------------------------------------------------------------
# What it is


def describe(page: Page, config: Card, model: VideoVAE) -> dict[str, Any]:
    """Facts and the parameters of each part."""
    facts = model_row(model, config.frames, config.size)
    about = {"versions": versions(), "command": command("vae card", config)}
    page.facts(facts | about)
    page.section("Parameters")
    counted = {name: count for name, count in parts(model)}
    page.table(["part", "parameters"], [*counted.items(), ("all", parameters(model))])
    return facts | {"parts": counted, "weights_sha256": model.latent_sha256()}


# ---------------------------------------------------------------------------------------------------------------------
# Frames


def quality(page: Page, config: Card, model: VideoVAE, videos: Files, out: Path) -> Scores:
    """PSNR, SSIM, LPIPS and flicker of clips, by frame, and by position in the group that makes one latent."""
    found = scored(model, videos, usual_metrics(config.frames), config.batch, out / "scores.json")
    page.section("Clips", "± is half of the 95 % interval over videos (bootstrap).")
    metrics = list(found.values["model"])
    rows = []
    for label, rendering in (("reconstruction", "model"), (REFERENCES["reconstruction"],) * 2):
        means = [of_clips([found], rendering, metric)[0] for metric in metrics]
        rows.append([label, *(around(v.mean().item(), *interval(v, found.sources)) for v in means)])
    header = ["", *(f"{m} ({UNITS[m]})" if m in UNITS else m for m in metrics)]
    page.table(header, rows, protocol=Protocol(**found.protocol).describe())
    for metric in [metric for metric in ("PSNR", "flicker") if metric in metrics]:
        page.chart(f"{metric} by frame of the clip", {metric: mean_by_frame(found, metric)}, "frame", UNITS[metric])
    group = model.spec.time_factor
    if group > 1 and model.spec.first_frames == 1 and config.frames > group and config.frames % group == 1:
        add_group(page, found, group)
    return found


def add_group(page: Page, found: Scores, group: int) -> None:
    """PSNR and SSIM by position in the group of frames that makes one latent."""
    rows = []
    for metric, digits in (("PSNR", 2), ("SSIM", 4)):
        values = torch.tensor(found.values["model"][metric], dtype=torch.float64)
        by_place = by_group_position(values, group).mean(0).tolist()
        cells = [values[:, 0].mean().item(), *by_place, max(by_place) - min(by_place)]
        rows.append([metric, *(f"{cell:.{digits}f}" for cell in cells)])
    places = [f"frame {i + 1} of {group}" for i in range(group)]
    caption = f"By position in the group of {group} frames that makes one latent"
    page.table(["", "first frame", *places, "largest minus smallest"], rows, caption)


def positions(page: Page, config: Card, model: VideoVAE, index: Index) -> Shots:
    """PSNR by distance from the first frame of a shot, as far as the shots of the videos go."""
    shots = psnr_by_position(model, index, config.long, config.size)
    longest = max(map(len, shots.values()))
    how = "streamed, which is exact" if model.streams else f"in runs of {RUN} frames, an approximation"
    page.section(
        "Long videos",
        f"The longest shot of each of {len(shots)} videos (of more than {LONGEST}, of those with the longest), {how};"
        f" the longest has {longest:,} frames. Along a shot what"
        " is seen changes too, so a fall is not the model's alone.",
    )
    page.chart(
        "PSNR by position", nested(shots), "frame of the shot", "dB", note="Each line is of the same videos throughout."
    )
    page.table(["frames", "videos", "PSNR (dB)", "minus that of frames 1 to 16"], bands(shots), "By position")
    return shots


@torch.no_grad()
def psnr_by_position(model: VideoVAE, index: Index, most: int, size: int) -> Shots:
    """PSNR of each frame of the longest shot of a video, `most` at most, of the videos that have the longest."""
    model.enable_tiling(0, frames=RUN)
    longest = {row.path: max(row.shots(), key=lambda shot: shot[1] - shot[0]) for row in index.ok}
    rows = sorted(index.ok, key=lambda row: longest[row.path][0] - longest[row.path][1])[:LONGEST]
    counts = {row.path: min(most, longest[row.path][1] - longest[row.path][0]) for row in rows}
    found = {}
    with bar("long videos", sum(counts.values())) as progress:
        for row in rows:
            values = []
            pieces = shot_pieces(index, row, longest[row.path][0], counts[row.path], size)
            for x, y in reconstruct(model, pieces, counts[row.path], False, RUN):
                values += psnr(x, y)[0].tolist()
                progress.advance(x.shape[2])
            found[row.path] = values
    model.disable_tiling()
    return found


def shot_pieces(index: Index, row: IndexRow, start: int, count: int, size: int, length: int = 8) -> Iterator[Tensor]:
    """`count` frames of a video from `start` on, (1, 3, `length`, `size`, `size`) in [-1, 1] at a time."""
    pictures = islice(iter_frames(index.root / row.path), start, start + count)
    cut = Cut(size, 0.5, 0.5, False)
    while piece := list(islice(pictures, length)):
        yield to_float(cut.of(torch.stack([torch.as_tensor(picture) for picture in piece]))[None])


def nested(shots: Shots) -> dict[str, list[tuple[float, float]]]:
    """The mean by position of all videos as far as the shortest goes, of the longer half as far as its shortest goes,
    of the longest eighth and of the longest."""
    by_length, reached = sorted(shots.values(), key=len, reverse=True), 0
    lines = {}
    for count in sorted({len(by_length), -(-len(by_length) // 2), -(-len(by_length) // 8), 1}, reverse=True):
        end = len(by_length[count - 1])
        if end == reached:  # a line of fewer videos goes no farther
            continue
        reached = end
        means = torch.tensor([values[:end] for values in by_length[:count]], dtype=torch.float64).mean(0)
        lines[f"{count} video{'s' if count > 1 else ''}, {end} frames"] = list(enumerate(means.tolist()))
    return lines


def bands(shots: Shots) -> list[list[Any]]:
    """A row a band of positions: of the videos that reach it, their mean there and how it differs from their start."""
    rows = []
    for start, end in BANDS:
        reached = [values for values in shots.values() if len(values) > max(start, BANDS[1][0])]
        if reached:
            here = [mean(values[start:end]) for values in reached]
            before = [mean(values[slice(*BANDS[1])]) for values in reached]
            name = f"{start} to {end - 1}" if end - start > 1 else f"{start}"
            rows.append([name, len(reached), mean(here), mean(here) - mean(before)])
    return rows


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# ---------------------------------------------------------------------------------------------------------------------
# Latents


def latents(page: Page, config: Card, model: VideoVAE, videos: Files, out: Path) -> dict[str, Any]:
    """Statistics of the clips' latents, or codes, and a picture of some."""
    stats = latent_stats(model, videos.batches(range(videos.count), config.batch, 0))
    page.section("Latents", f"Of {videos.count} clips of {config.frames} frames of {config.size}×{config.size}.")
    if isinstance(stats, CodeStats):
        page.facts(
            {
                "codebook": f"{stats.codes:,} codes",
                "in use": f"{stats.used:,}",
                "perplexity": f"{stats.perplexity:,.1f}",
            }
        )
        page.note("A discrete model has codes and no posterior: there are no moments of channels.")
        return asdict(stats)
    show_latents(page, stats)
    path = out / "latents.png"
    draw_latents(model, next(videos.batches([0], 1, 0)), path)
    page.images({"Posterior means of the first clip, a row a channel, from the first latent frame on": path})
    return asdict(stats)


def show_latents(page: Page, stats: LatentStats) -> None:
    """The moments of each channel, correlations, and the histogram."""
    page.facts({"KL to N(0, 1)": "infinite" if stats.kl is None else f"{stats.kl:.4g} nats a latent value"})
    columns = {
        "mean": stats.mean,
        "standard deviation": stats.std,
        "of the first latent frame": stats.first_std,
        "of later ones": stats.later_std,
        "excess kurtosis": stats.excess_kurtosis,
        "posterior's standard deviation": stats.posterior_std,
    }
    rows = [[str(i), *values] for i, values in enumerate(zip(*columns.values(), strict=True))]
    page.table(["channel", *columns], rows, "Posterior means", note="Excess kurtosis is 0 for a normal distribution.")
    names = [str(i) for i in range(len(stats.mean))]
    rows = [[name, *(f"{value:.2f}" for value in row)] for name, row in zip(names, stats.correlation, strict=True)]
    page.table(["channel", *names], rows, "Correlation of channels at the same place")
    lines = {"latents": stats.histogram, "normal": normal_curve(stats.histogram)}
    page.chart("Values, each channel shifted and scaled", lines, "standard deviations", "density")


# ---------------------------------------------------------------------------------------------------------------------
# Sets, speed, looks


def sets_section(
    page: Page, config: Card, model: VideoVAE, videos: Files, network: FeatureExtractor
) -> dict[str, Any] | None:
    """FVD of the reconstructions against their originals."""
    page.section("rFVD", "The distance of the set of reconstructions from that of their originals.")
    if reason := lacking(videos, network):
        page.note(f"Not measured: {reason}")
        return None
    table = rfvd("reconstruction", model, videos, network, config.batch)
    show_table(page, table)
    return asdict(table)


def speed(page: Page, config: Card, model: VideoVAE) -> list[dict[str, Any]]:
    """Seconds and memory by length, of whole clips and, where the model streams, piece by piece."""
    works = ["reconstruct"] if model.spec.discrete else ["encode", "decode", *["refine"] * model.spec.refines]
    lengths = sorted({model.spec.valid_frames(frames) for frames in config.speed})
    size = config.speed_size
    rows = []
    for frames in lengths:
        for stream in (False, True) if model.streams else (False,):
            found = bench_vae.measure({"": model}, works, (1, frames, size, size), stream=stream)[""]
            way = ", streamed" if stream else ""
            rows += [{"work": f"{w}{way}", "length": frames, **asdict(row)} for w, row in found.items()]
    if not rows:
        return []
    place = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    page.section("Speed and memory", f"One clip of {size}×{size} in {model.dtype}, medians of 3 rounds, on: {place}.")
    for key, title, unit in (("seconds", "Time", "seconds"), ("peak_gib", "Memory at the peak", "GiB")):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            value = median(row[key]) if key == "seconds" and row[key] else row[key]
            if value:
                lines.setdefault(row["work"], []).append((row["length"], value))
        if lines:
            page.chart(title, lines, "frames", unit)
    header = ["work", "frames of the clip", "seconds", "frames a second", "GiB at the peak", "TFLOP"]
    page.table(header, [speed_row(row) for row in rows])
    return rows


def speed_row(row: dict[str, Any]) -> list[Any]:
    if not row["seconds"]:
        return [row["work"], row["length"], row["error"], None, row["peak_gib"], None]
    seconds = median(row["seconds"])
    return [
        *(row["work"], row["length"], seconds, row["frames"] / seconds, row["peak_gib"]),
        row["flops"] and row["flops"] / 1e12,
    ]


@torch.no_grad()
def players(page: Page, config: Card, model: VideoVAE, videos: Files, found: Scores, out: Path) -> list[str]:
    """Originals, reconstructions and errors, from the worst clip by PSNR to the best."""
    values = of_clips([found], "model", "PSNR")[0]
    ranks = torch.linspace(0, videos.count - 1, min(config.show, videos.count)).round().long()
    page.section("Side by side", "From the worst clip by PSNR to the best. Errors are grey where there are none.")
    names = []
    for clip in values.argsort()[ranks].tolist():
        read = videos.clips.read(videos.windows[clip])
        x = to_float(read.video)
        y = model.reconstruct(x[None].to(device()))[0].clamp(-1, 1).cpu()
        title, caption = f"{read.source}, frame {read.start}", {"reconstruction": f"{values[clip]:.2f} dB"}
        show_clip(page, out / "clips", f"clip-{clip}", title, x, {"reconstruction": y}, caption, read.fps)
        names.append(title)
    return names


def main(argv: list[str] | None = None) -> int:
    """`lvdm vae card`."""
    return program(Card, argv, run)


if __name__ == "__main__":
    sys.exit(main())
