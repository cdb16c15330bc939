"""Both sides of a comparison of sets, as a config and a preset ask for them; what does not fit together is refused."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median_high
from typing import Any

import torch

from lvdm.data.clips import FPS_TOLERANCE, ClipPolicy, Clips, Window
from lvdm.data.index import Index, open_index
from lvdm.errors import UserError
from lvdm.latents import LatentFile, LatentStore
from lvdm.metrics.protocol import Preset
from lvdm.rng import generator, item_at
from sample.measure.configs import SetEvaluation
from sample.measure.sets import Files, Reconstructed, Rendered, VideoSet, require_length
from sample.render import latent_files, load_all, require_refiner
from vae.base import VideoVAE

SAME, MIXED = 0.05, 0.25
"""How far the rate of the usual real clip, and of any clip, may be from that of the usual sample: UCF101 is of 25 and
29.97."""


@dataclass(frozen=True)
class Sides:
    """What a config and a preset say together: both sides, the preset as changed, and its name with those changes.

    `beyond` are more real clips, so that real clips can be compared with others at the same count.
    """

    real: VideoSet
    fake: VideoSet
    preset: Preset
    beyond: VideoSet | None = None


def changed(config: SetEvaluation, preset: Preset) -> Preset:
    """The preset with the keys of the config that are not null; its name says which of its own were replaced."""
    keys = {"frames": "frames", "stride": "stride_real", "stride_fake": "stride_fake", "count": "count"}
    keys |= {"features": "features"}
    asked = {field: getattr(config, key) for key, field in keys.items() if getattr(config, key) is not None}
    if config.fps:
        asked["stride_real"] = None
    other = [field for field, value in asked.items() if getattr(preset, field) not in (None, value)]
    other += ["resize"] if config.resize not in (None, "crop") else []
    other += ["subset"] if not config.subset.startswith(preset.split) else []
    if preset.draw == "random":  # whole videos, a clip of each
        other += [key for key, usual in (("split", "all"), ("per_video", 1)) if getattr(config, key) != usual]
    name = f"{preset.name}, changed: {', '.join(other)}" if other else preset.name
    return replace(preset, **asked, name=name)


def sides_of(config: SetEvaluation, preset: Preset, model: VideoVAE | None, any_rate: bool = False) -> Sides:
    """Both sides of a comparison; refuses what does not fit together, sides of two rates among it unless `any_rate`."""
    if preset.draw == "random" and not config.per_video:
        raise UserError(f"per_video=0: {preset.name} draws clips at random, so many a video: give 1 or more")
    preset = changed(config, preset)
    if preset.against == "originals":
        if model is None:
            raise UserError("vae: protocol rfvd compares a VAE's reconstructions with their originals: name it")
        stride = 1 if config.fps else preset.stride_real or 1
        real = real_side(config, preset, config.size or 256, preset.frames or 17, stride, config.fps)
        return Sides(real, Reconstructed(real, model), preset)
    fake = fake_side(config, preset, model)
    stride, fps = pace_of(config, preset, fake)
    real = real_side(config, preset, fake.size, fake.frames, stride, fps)
    if not any_rate:
        require_same_rate(config, preset, real, fake)
    return Sides(real, fake, preset, others(config, preset, real, fake) if config.floor else None)


def fake_side(config: SetEvaluation, preset: Preset, model: VideoVAE | None) -> VideoSet:
    """The samples of a config: latents rendered where there are a VAE and latents, else files."""
    if not config.samples or not Path(config.samples).exists():
        raise UserError(f"samples={config.samples}: expected the folder that lvdm sample wrote, or another of videos")
    folder, refine = Path(config.samples), preset.rate == 2
    stride, count = preset.stride_fake, preset.count
    if of_latents(folder, model):
        if model is None:
            raise UserError(f"vae: {folder} is a latent store; name the VAE that renders it")
        require_refiner(model, refine, config.vae)
        latents, sources = latents_in(folder, model, config.vae, count)
        videos = Rendered(latents, sources, model, refine, stride, preset.frames)
        if config.size not in (None, videos.size):
            raise UserError(f"size={config.size}: the latents in {folder} are rendered at {videos.size}")
        return videos
    if refine and not (folder / "d2").is_dir():
        raise UserError(
            f"protocol {preset.name} is of what D2 renders from latents at twice their rate, and {folder} has neither"
            " latents/ (with vae=) nor d2/; videos of any rate are for univae"
        )
    own = folder / ("d2" if refine else "d1")
    return sample_files(config, preset, own if own.is_dir() else folder, rate_in(folder, preset.rate))


def of_latents(folder: Path, model: VideoVAE | None) -> bool:
    """Whether samples are latents to be rendered: a store, or what lvdm sample kept where there is a VAE for it."""
    return (folder / "manifest.json").is_file() or (model is not None and (folder / "latents").is_dir())


def latents_in(folder: Path, model: VideoVAE, spec: str, count: int) -> tuple[list[LatentFile], list[str]]:
    """The first `count` latents of a latent store, or of what lvdm sample wrote, and their names."""
    if not (folder / "manifest.json").is_file():
        files = latent_files(str(folder / "latents"))[:count]
        return load_all(model, files, spec), [str(file) for file in files]
    store = LatentStore(folder)
    store.require(vae_sha256=model.latent_sha256())
    items = [store[i] for i in range(min(count, len(store)))]
    names = [f"{store.manifest.sources[item['source']]}, item {i}" for i, item in enumerate(items)]
    sha256 = store.manifest.vae_sha256
    return [LatentFile(item["mean"], item["num_frames"], item["fps"], sha256, {}) for item in items], names


def rate_in(folder: Path, times: int) -> float | None:
    """`times` the rate that lvdm sample has noted, where it wrote this folder."""
    notes = noted(folder)
    return times * notes[0]["fps"] if notes else None


def noted(folder: Path) -> list[dict[str, Any]]:
    """What lvdm sample has noted of each video it wrote to this folder; empty where it wrote none."""
    path = folder / "samples.jsonl"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            note = json.loads(line)
            if not (math.isfinite(note["fps"]) and note["fps"] > 0):
                raise ValueError
            found.append({"id": note["id"], "class": note["class"], "fps": float(note["fps"])})
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{path}, line {number}: expected what lvdm sample writes, "
                '{"id": 0, "class": null, "fps": 12.0, ...}; repair it, or remove the file'
            ) from None
    return found


def sample_files(config: SetEvaluation, preset: Preset, folder: Path, rate: float | None) -> Files:
    """The first frames of each video in a folder; every file must be readable, long enough and of one size."""
    index = open_index(folder, "none")
    for row in index.rows:
        if row.state == "broken" or row.reason:
            raise UserError(f"{folder / row.path}: {row.reason}; a set with a hole is another set: repair or remove it")
    rows, stride = index.rows[: preset.count], preset.stride_fake
    lengths = {row.length for row in rows}
    if preset.frames is None and len(lengths) > 1:
        raise UserError(f"samples={folder}: videos of {min(lengths)} to {max(lengths)} frames; set frames")
    frames = preset.frames or -(-lengths.pop() // stride)
    for row in rows:
        require_length(str(folder / row.path), row.length, frames, stride)
    sizes = {(row.height, row.width) for row in rows}
    if config.size is None and (len(sizes) > 1 or len(set(next(iter(sizes)))) > 1):
        found = ", ".join(f"{width}x{height}" for height, width in sorted(sizes)[:3])
        raise UserError(f"samples={folder}: videos of {found}; set size, to which both sides are then cut")
    policy = ClipPolicy(frames, stride, config.size or rows[0].height, split="all", holdout=0.0, across_cuts=True)
    fit = config.resize or "crop"
    clips = Clips(Index(index.root, index.labels, rows), policy, 0, 0.0, uncut=fit != "crop")
    return Files(clips, [Window(i, row.start) for i, row in enumerate(rows)], fit, rate, f"samples, {folder.name}")


def real_side(config: SetEvaluation, preset: Preset, size: int, frames: int, stride: int, fps: float) -> Files:
    """Clips of the real videos, as many as the preset asks for and there are."""
    policy = ClipPolicy(
        frames=frames,
        stride=stride,
        size=size,
        split=config.split,
        holdout=config.holdout,
        fps=fps,
        short=config.short,
        across_cuts=config.across_cuts,
    )
    fit = config.resize or "crop"
    index = open_index(config.videos, config.labels, config.subset)
    clips = Clips(index, policy, config.seed, config.cache_gib if fit == "crop" else 0.0, uncut=fit != "crop")
    return real_files(config, clips, draw(clips, preset, config, range(preset.count)))


def others(config: SetEvaluation, preset: Preset, real: Files, fake: VideoSet) -> Files | None:
    """As many more clips of the real videos as there are samples, as far as they go; None where there are no more."""
    more = draw(real.clips, preset, config, range(preset.count, preset.count + fake.count))
    return real_files(config, real.clips, more) if more else None


def real_files(config: SetEvaluation, clips: Clips, windows: list[Window]) -> Files:
    """These windows of the real videos."""
    return Files(clips, windows, config.resize or "crop", subset=config.subset, per_video=config.per_video)


def draw(clips: Clips, preset: Preset, config: SetEvaluation, places: range) -> list[Window]:
    """The clips at these places of the draw, as far as it goes: of evenly spaced ones (grid), shuffled by seed, or of
    random ones of each video in turn."""
    if preset.draw == "random":
        count, seed = len(clips) * config.per_video, config.seed
        return [random_window(clips, item_at(seed, i, len(clips)), seed, i) for i in places if i < count]
    windows = clips.grid(config.per_video)
    order = torch.randperm(len(windows), generator=generator(config.seed, "clips"))
    return [windows[i] for i in order[places.start : places.stop].sort().values.tolist()]


def random_window(clips: Clips, row_index: int, seed: int, number: int) -> Window:
    """A clip of a row, its first frame a function of (seed, number)."""
    starts = torch.cat(clips.policy.starts(clips.rows[row_index]))
    chosen = torch.randint(len(starts), (), generator=generator(seed, "start", number))
    return Window(row_index, int(starts[chosen]))


def pace_of(config: SetEvaluation, preset: Preset, fake: VideoSet) -> tuple[int, float]:
    """The stride of real clips and the rate asked for in its place (0: none). Where the protocol and the config leave
    the stride open it is that at which real clips play as the samples do."""
    if config.fps:
        return 1, config.fps * preset.rate
    stride = preset.stride_real
    if stride is None:
        rates = [row.fps for row in open_index(config.videos, config.labels, config.subset).ok]
        ratio = median_high(rates) * preset.rate / fake.usual_rate if fake.usual_rate else preset.rate
        stride = max(preset.rate, round(ratio))
    if stride % preset.rate:
        raise UserError(
            f"stride={stride}: {preset.name} takes real clips at half of it, twice the rate: give an even one"
        )
    return stride // preset.rate, 0.0


def require_same_rate(config: SetEvaluation, preset: Preset, real: VideoSet, fake: VideoSet) -> None:
    """Refuses real clips that play at another rate than the samples, and sides whose clips play at too many.

    By stride the usual real clip may be off by a twentieth, unless the rates of both sides overlap; a single clip of
    either, which is named, by a quarter.
    """
    if not (real.rates and fake.rates):
        return
    rate, usual, (slowest, fastest) = fake.usual_rate, real.usual_rate, real.rates
    tolerance = FPS_TOLERANCE if real.fps else MIXED
    if odd := first_off(fake, rate, tolerance):
        raise UserError(
            f"samples: {odd[0]} plays at {odd[1]:.4g} fps, others at {rate:.4g}: a set plays at one rate, or nearly so"
        )
    odd = first_off(real, rate, tolerance)
    overlap = max(slowest, fake.rates[0]) <= min(fastest, fake.rates[1])
    if not odd and (abs(usual / rate - 1) <= SAME or overlap):
        return
    source, pace = odd or first_off(real, rate, SAME)
    play = f"real clips play at {usual:.4g} fps" if slowest == fastest else f"{source} plays at {pace:.4g} fps"
    stride = preset.rate * (real.stride or 1)
    better = max(1, round((real.stride or 1) * usual / rate)) * preset.rate
    if config.fps:
        raise UserError(f"fps={config.fps:g}: {play} then, samples at {rate:.4g}")
    if abs(usual / rate - 1) <= SAME:
        advice = "leave it out, or set fps to take all at one rate"
    elif better == stride:
        advice = "no whole stride comes nearer; fps takes each video at a stride of its own, where one is exact"
    else:
        advice = f"give the stride of the latent store, about {better}"
    raise UserError(f"stride={stride}: {play} then, samples at {rate:.4g}; {advice}")


def first_off(videos: VideoSet, rate: float, tolerance: float) -> tuple[str, float] | None:
    """The first clip that does not play at `rate`, and its own."""
    paces = zip(videos.sources, videos.paces, strict=True)
    return next(((name, pace) for name, pace in paces if pace and abs(pace / rate - 1) > tolerance), None)
