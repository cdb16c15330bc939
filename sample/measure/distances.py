"""Sets of videos as features of a network, and the numbers that compare them, each with its interval and its floor."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from lvdm.accelerator import is_main, share, spread
from lvdm.errors import UserError
from lvdm.metrics.cache import load_features, save_features
from lvdm.metrics.features import FeatureExtractor
from lvdm.metrics.protocol import SMALL_BATCH, Preset, Protocol
from lvdm.metrics.sets import (
    FeatureSet,
    Floor,
    Metric,
    batchwise_frechet,
    floor,
    frechet,
    inception_score,
    interval,
    kernel_distance,
)
from lvdm.progress import Bar, bar
from sample.measure.configs import OWN_FEATURES
from sample.measure.figures import finite
from sample.measure.sets import FIT, VideoSet, batched

SPLITS = 10
"""Of an inception score."""
PART = 64
"""Clips whose features are one file of the cache: what a killed run loses at most, a process takes at a time."""


def features_of(videos: VideoSet, network: FeatureExtractor, batch: int, workers: int, progress: Bar) -> FeatureSet:
    """The features of all clips, from the cache where it has them. UserError for clips too short for the network."""
    if videos.frames < network.min_frames:
        raise UserError(f"frames={videos.frames}: {network.name} needs at least {network.min_frames}")
    made = {"network": network.name, "weights": network.weights_sha256, "resize": network.resize}
    made |= {"libraries": videos.libraries}
    parts = [range(videos.count)[i : i + PART] for i in range(0, videos.count, PART)]
    keys = {part: {**made, "videos": videos.key(part)} for part in share(parts)}
    known = {part: load_features(key) for part, key in keys.items()}
    missing = [part for part, features in known.items() if features is None]
    fresh = extract(videos, missing, network, batch, workers, progress) if missing else iter(())

    def work(part: range) -> FeatureSet:
        if known[part] is None:
            save_features(keys[part], features := next(fresh))
            return features
        progress.advance(len(part))
        return known[part]

    return FeatureSet.join(spread(parts, work))


def extract(
    videos: VideoSet, parts: Sequence[range], network: FeatureExtractor, batch: int, workers: int, progress: Bar
) -> Iterator[FeatureSet]:
    """The features of the clips of each part in turn; reading runs on from one to the next."""
    groups = {part: list(batched(part, batch)) for part in parts}
    clips = videos.grouped([group for part in parts for group in groups[part]], workers)
    for part in parts:
        rows = []
        for group in groups[part]:
            rows.append(network(next(clips)).float().cpu())
            progress.advance(len(group))
        rows = torch.cat(rows)
        numbers = torch.arange(len(part)).repeat_interleave(len(rows) // len(part))
        yield FeatureSet(rows, numbers, [videos.sources[number] for number in part])


@dataclass(frozen=True)
class Row:
    """A number with its 95 % interval (nan where there are too few videos), its floor, and how it was made.

    Of IS the interval is one standard deviation over splits to both sides, and the floor the score of the real clips.
    """

    metric: str
    value: float
    low: float
    high: float
    floor: Floor | None
    protocol: Protocol
    warning: str


METRICS = {"fvd": "FVD", "kvd": "KVD", "is": "IS", "fid": "FID"}
INCEPTION = "inception score, mean over 10 splits after a shuffle by seed 42"
JACKKNIFE = 48
"""How often a distance is taken for its value, interval and floor, at most."""
INTERVAL = ["95 % from", "to", "floor", "floor's draws", "floor N real / fake"]
DEVIATION = ["- one standard deviation", "+ one", "of real clips", "- to + one", "of N"]


def header(metric: str) -> list[str]:
    """What the `cells` of a row are, of a metric as protocols call it: FVD, KVD, FID, IS."""
    return [metric, *(DEVIATION if metric == "IS" else INTERVAL), "N real", "N fake"]


def cells(row: Row) -> list[float | str | None]:
    """A number with its interval, its floor and the counts of both; None where there is none."""
    p, bottom, known = row.protocol, row.floor, [None] * 3
    if bottom and math.isfinite(bottom.mean):
        counts = f"{bottom.real} / {bottom.fake}" if bottom.fake else f"{bottom.real}"
        known = [bottom.mean, f"{bottom.low:.4g} to {bottom.high:.4g}", counts]
    return [row.value, finite(row.low), finite(row.high), *known, p.count_real, p.count_fake]


def measure(
    real: VideoSet,
    fake: VideoSet,
    preset: Preset,
    metrics: Sequence[str],
    network: Callable[[str], FeatureExtractor],
    batch: int = 4,
    workers: int = 2,
    seed: int = 0,
    beyond: VideoSet | None = None,
    floor: bool = True,
) -> list[Row]:
    """The metrics (fvd, kvd, is, fid) of two sets under a preset; `network` makes a feature extractor of its name.

    `beyond` are more real clips, for the `floor`, which reconstructions have none of. UserError for what `require`
    refuses. Features come from the cache where it has them; under a launcher every process takes a share of the clips,
    and all return the same.
    """
    require(real, fake, preset, metrics, network)
    sides, rows = [real, fake, *([beyond] if beyond else [])], []
    names = features_for(metrics, preset)
    with bar("features", len({*names.values()}) * sum(side.count for side in sides), show=is_main()) as progress:
        found = {
            name: [features_of(side, network(name), batch, workers, progress) for side in sides]
            for name in dict.fromkeys(names.values())
        }
    for metric, name in names.items():
        of_real, of_fake, *more = found[name]
        protocol = protocol_of(metric, real, fake, preset, network(name), seed)
        if metric == "is":
            number = inception(of_real, of_fake)
        else:
            reals = FeatureSet.join([of_real, *more]) if floor and preset.against == "reals" else None
            number = distance(metric, of_real, of_fake, preset, reals)
        rows.append(Row(metric, *number, protocol, protocol.warning() or ""))
    return rows


def features_for(metrics: Sequence[str], preset: Preset) -> dict[str, str]:
    """The features that each metric is of."""
    return {metric: OWN_FEATURES.get(metric, preset.features) for metric in metrics}


def require(
    real: VideoSet,
    fake: VideoSet,
    preset: Preset,
    metrics: Sequence[str],
    network: Callable[[str], FeatureExtractor],
) -> None:
    """Refuses, before any clip is read, sets that are too small for a metric, and clips too short for its features."""
    there = f"{real.count} real and {fake.count} samples"
    least = min(real.count, fake.count)
    if least < 2:
        raise UserError(f"a set metric needs at least 2 videos a side, got {there}")
    if least < preset.batch and {"fvd", "fid"} & {*metrics}:
        raise UserError(f"{SMALL_BATCH}: batches of {preset.batch} clips, and there are {there}")
    if least < SPLITS and "is" in metrics:
        raise UserError(f"metrics=is: {SPLITS} splits need as many videos a side, got {there}")
    for name in features_for(metrics, preset).values():
        if real.frames < network(name).min_frames:
            raise UserError(f"frames={real.frames}: {name} needs at least {network(name).min_frames}")


def estimator(metric: str, preset: Preset) -> tuple[Callable[[FeatureSet, FeatureSet], float], str]:
    """FVD, KVD or FID as the preset has it, and in words."""
    if metric == "kvd":
        return kernel_distance, "kernel distance, ((x.y) / d + 1)^3 over pairs of different clips, unbiased, fp64"
    if preset.batch:
        words = f"Fréchet, mean over batches of {preset.batch} clips (biased), fp64"
        return partial(batchwise_frechet, batch=preset.batch), words
    return partial(frechet, covariance=preset.covariance), "Fréchet, fp64"


def distance(
    metric: str, real: FeatureSet, fake: FeatureSet, preset: Preset, reals: FeatureSet | None
) -> tuple[float, float, float, Floor | None]:
    """FVD, KVD or FID: value, interval and, where there are `reals`, the floor among them."""
    of, _ = estimator(metric, preset)
    many = len(real.features) + len(fake.features) > 1000  # each distance may take seconds
    with bar(f"interval of {METRICS[metric]}", JACKKNIFE, show=many and is_main()) as progress:

        def counted(a: FeatureSet, b: FeatureSet) -> float:
            progress.advance()
            return of(a, b)

        bounds = bounds_of(metric, counted, real, fake, preset)
        return counted(real, fake), *bounds, reals and floor(counted, reals, real.count, fake.count)


def bounds_of(metric: str, of: Metric, real: FeatureSet, fake: FeatureSet, preset: Preset) -> tuple[float, float]:
    """The 95 % interval of a distance; no Fréchet distance is below 0."""
    low, high = interval(of, real, fake, paired=preset.against == "originals")
    return low if metric == "kvd" else max(low, 0.0), high


def inception(real: FeatureSet, fake: FeatureSet) -> tuple[float, float, float, Floor]:
    """IS: the mean over splits, one standard deviation around it, and as floor that of the real clips."""
    mean, std = inception_score(fake.features, SPLITS)
    of_real, real_std = inception_score(real.features, SPLITS)
    return mean, mean - std, mean + std, Floor(of_real, of_real - real_std, of_real + real_std, real.count, 0)


def protocol_of(
    metric: str, real: VideoSet, fake: VideoSet, preset: Preset, network: FeatureExtractor, seed: int
) -> Protocol:
    """How a number was made."""
    lossy = [f"{side} clips kept as {videos.note}" for side, videos in (("real", real), ("fake", fake)) if videos.note]
    fit = FIT[getattr(real, "fit", "crop")].format(real.size)
    return Protocol(
        metric=METRICS[metric],
        features=network.name,
        weights_sha256=network.weights_sha256,
        frames=real.frames,
        stride_real=real.stride,
        stride_fake=None if real.fps else fake.stride,
        resize=f"{fit} (real); {network.resize}",
        count_real=real.count,
        count_fake=fake.count,
        split=real.name,
        seed=seed,
        estimator=INCEPTION if metric == "is" else estimator(metric, preset)[1],
        fps=real.fps,
        preset=preset.name,
        draw=preset.draw,
        covariance=preset.covariance if metric in ("fvd", "fid") else "",
        inputs=", ".join(lossy),
        **getattr(real, "origin", {}),
    )
