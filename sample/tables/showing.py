"""The same clips through every model of a table, side by side (`lvdm reproduce`)."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from lvdm.accelerator import device
from lvdm.media import to_float, to_uint8, write_mp4
from lvdm.report import Player
from sample.measure.scores import Measure, clips_of, load, renderings
from sample.tables.blocks import Clips
from sample.tables.reproduce import Model

SHOWN = 2
"""Clips of a page."""


def side_by_side(out: str, measured: list[tuple[Model, Measure]]) -> Iterator[Clips]:
    """Players of fixed clips, the first and one from the middle of all that were measured: original and every model of
    the first seed. The files stay in `out`/clips."""
    clips = clips_of(measured[0][1])
    windows = clips.grid(measured[0][1].per_video)
    for place in sorted({0, len(windows) // 2})[:SHOWN]:
        window = windows[place]
        row, folder = clips.rows[window.row_index], Path(out) / "clips"
        x, what, fps = to_float(clips.read(window).video), measured[0][1].what, row.fps / measured[0][1].stride
        players = [shown(folder / f"{place}-original.mp4", "original", fps, lambda x=x: x)]
        if what == "refinement":
            seen = folder / f"{place}-seen.mp4"
            players.append(shown(seen, "what the encoder sees", fps / 2, lambda x=x: x[:, ::2]))
        for model, measure in measured:
            if model.seed == 0:
                path = folder / f"{place}-{model.arm.folder}.mp4"
                players.append(shown(path, model.arm.name, fps, lambda x=x, m=measure: rendered(m, x)))
        yield Clips(f"{Path(row.path).name}, from frame {window.start}", players)


def shown(path: Path, title: str, fps: float, make: Callable[[], Tensor]) -> Player:
    """A player of the file, which `make` gives the frames of, (3, T, H, W) in [-1, 1], where it is not there yet."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_mp4(path, to_uint8(make()).permute(1, 2, 3, 0).cpu(), fps)
    return Player(title, path)


@torch.no_grad()
def rendered(measure: Measure, x: Tensor) -> Tensor:
    """What the model makes of a clip."""
    model = load(measure)
    return dict(renderings(model, x[None].to(device()), measure.what))["model"][0].float().cpu()
