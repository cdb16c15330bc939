"""What the pages of VAEs show alike: a clip beside its reconstructions and their errors, and what a model is."""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lvdm.accelerator import device
from lvdm.config import defaults, to_dict
from lvdm.cost import parameters
from lvdm.files import write_text
from lvdm.media import to_uint8, write_mp4
from lvdm.metrics.features import FeatureExtractor
from lvdm.metrics.protocol import Protocol, preset
from lvdm.report import Page, Player
from sample.measure import distances, scores
from sample.measure.evaluate import Table, set_tables
from sample.measure.scores import Scores
from sample.measure.sets import Files, Reconstructed
from sample.zoo import by, factors, paper
from vae.base import VideoVAE

AMPLIFY = 5
"""How many times larger than they are errors are shown."""
UNITS = {"PSNR": "dB", "flicker": "levels of 255"}


def difference(x: Tensor, y: Tensor) -> Tensor:
    """The error of y, `AMPLIFY` times, both in [-1, 1]: grey where they are equal."""
    return ((y - x) * AMPLIFY).clamp(-1, 1)


def show_clip(
    page: Page,
    folder: Path,
    anchor: str,
    title: str,
    x: Tensor,
    renderings: Mapping[str, Tensor],
    captions: Mapping[str, str],
    fps: float,
    note: str = "",
) -> None:
    """Players of a clip (3, T, H, W) in [-1, 1], of its renderings and their errors; the mp4 files go to `folder`."""
    errors = {f"{name}, error ×{AMPLIFY}": difference(x, y) for name, y in renderings.items()}
    players = []
    for number, (name, video) in enumerate({"original": x, **renderings, **errors}.items()):
        path = folder / f"{anchor}-{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_mp4(path, to_uint8(video).permute(1, 2, 3, 0).cpu(), fps)
        players.append(Player(name, path, captions.get(name, "")))
    page.players(players, note, title, anchor)


def model_row(model: VideoVAE, frames: int, size: int) -> dict[str, str]:
    """What a model is, and what it makes of a clip."""
    spec = model.spec
    z, *latents = spec.latent_shape(frames, size, size)
    numbers = torch.Size(latents).numel() * (1 if spec.discrete else z)
    return {
        "family": paper(model) or model.title,
        "parameters": f"{parameters(model):,}",
        "compression": factors(spec),
        "frames it takes": spec.frame_rule,
        f"latents of {by((frames, size, size))}": f"{by(latents)} codes" if spec.discrete else by((z, *latents)),
        "video values to a latent value": f"{3 * frames * size * size / numbers:.4g}",
        "streams exactly": "yes" if spec.exact_streaming and not spec.discrete else "no",
    }


def usual_metrics(frames: int) -> tuple[str, ...]:
    """What is measured of clips of this length where nobody says: a single frame does not flicker."""
    return scores.DEFAULT if frames > 1 else scores.DEFAULT[:-1]


def scored(model: VideoVAE, videos: Files, metrics: Sequence[str], batch: int, path: Path) -> Scores:
    """The scores of every clip and frame; those in `path` where they are there."""
    if not path.is_file():
        found = scores.measure(model.to(device()), videos, [videos.frames], metrics=metrics, batch=batch)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asdict(found[videos.frames]), allow_nan=False))
    return Scores(**json.loads(path.read_text()))


def rfvd(name: str, model: VideoVAE, videos: Files, network: FeatureExtractor, batch: int) -> Table:
    """FVD of reconstructions against their own originals, with its interval, in a row called `name`."""
    protocol = preset("rfvd")
    if network.name != protocol.features:
        protocol = replace(protocol, features=network.name, name=f"{protocol.name}, changed: features")
    both = videos, Reconstructed(videos, model.to(device()))
    return set_tables(distances.measure(*both, protocol, ["fvd"], lambda _: network, batch), name)[0]


def lacking(videos: Files, network: FeatureExtractor) -> str:
    """What these clips lack for a distance of sets; "" where they lack nothing."""
    if videos.frames < network.min_frames:
        return f"frames={videos.frames}: {network.name} needs at least {network.min_frames}"
    return "" if videos.count > 1 else "a distance of sets needs at least 2 clips, here is 1; see per_video"


def show_table(page: Page, table: Table) -> None:
    """On the page; columns that nothing is known of (a floor of reconstructions) are left out."""
    known = [i for i, cells in enumerate(zip(*table.rows, strict=True)) if any(cell is not None for cell in cells)]
    header, *rows = ([line[i] for i in known] for line in (table.header, *table.rows))
    page.table(header, rows, table.title, Protocol(**table.protocol).describe(), table.note)


def mean_by_frame(found: Scores, metric: str) -> list[tuple[float, float]]:
    """(frame, mean over clips)."""
    return list(enumerate(torch.tensor(found.values["model"][metric], dtype=torch.float64).mean(0).tolist()))


def padding_note(models: Mapping[str, VideoVAE], frames: int) -> str:
    """Which models see a longer clip than was asked for, by their frame rules; "" where none does."""
    padded = [(name, m.spec) for name, m in models.items() if m.spec.valid_frames(frames) != frames]
    return " ".join(
        f"{name} takes {spec.frame_rule} frames: each clip of {frames} goes in as {spec.valid_frames(frames)}, its last"
        " frame repeated, and is cut back."
        for name, spec in padded
    )


def command(verb: str, config: Any) -> str:
    """The command line that gives a config."""
    asked, usual = to_dict(config), defaults(type(config))
    words = [word for name in config.positionals for word in _several(asked[name])]
    keys = {key: value for key, value in asked.items() if value != usual[key] and key not in config.positionals}
    texts = {key: ",".join(map(str, _several(value))) for key, value in keys.items()}
    return shlex.join(["lvdm", *verb.split(), *words, *(f"{key}={text}" for key, text in texts.items())])


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def labels(specs: Iterable[str]) -> list[str]:
    """Short names of models: the shortest ends of their paths that tell all of them apart."""
    paths = [[part for part in Path(spec).parts if part not in ("export", "/")] or [spec] for spec in specs]
    for length in range(1, max(map(len, paths), default=0) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return list(specs)
