"""How fast things are here (`lvdm bench data`, `lvdm bench latents`): ratios in one run, alternating, medians."""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lvdm.cli import program
from lvdm.data.clips import ClipPolicy, Clips, Window, crop, resize
from lvdm.data.index import open_index
from lvdm.files import write_text
from lvdm.latents import LatentStore, sample_posterior
from lvdm.progress import bar
from lvdm.rng import generator, item_at
from sample.configs import BenchData, BenchLatents


class Items(Dataset):
    """`get(i)` for i below `count`."""

    def __init__(self, get: Callable[[int], Any], count: int):
        self.get, self.count = get, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Any:
        return self.get(i)


def alternate(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run in every round; all runs once a round, in turn, so that a busy machine meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with bar("bench", rounds * len(runs)) as progress:
        for _ in range(rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
                progress.advance(note=name)
    return seconds


def report(title: str, rows: dict[str, list[float]], unit: str, per: float, out: str) -> None:
    """Prints median and spread of each row as `per` / seconds, and writes all that was measured."""
    print(title)
    for name, seconds in rows.items():
        rates = sorted(per / s for s in seconds)
        print(f"  {name:<34} {statistics.median(rates):9.2f} {unit}  ({rates[0]:.2f} to {rates[-1]:.2f})")
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps({"title": title, "unit": unit, "per": per, "seconds": rows}, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Videos


def data(config: BenchData) -> None:
    """Clips a second: ours, decord's own get_batch with the same resize, and two workers against one."""
    index = open_index(config.videos)
    policy = ClipPolicy(config.frames, config.stride, config.size, split="all", holdout=0.0)
    clips = Clips(index, policy, seed=0, cache_gib=0)
    windows = [clips.grid(0)[i] for i in torch.randperm(len(clips.grid(0)), generator=generator(0, "bench"))]
    windows = (windows * config.clips)[: config.clips]

    def ours() -> None:
        for window in windows:
            clips.read(window)

    def decord_alone() -> None:
        for window in windows:
            plain(clips, window)

    def workers(count: int) -> Callable[[], None]:
        def run() -> None:
            many = Items(lambda i: clips.read(windows[i % len(windows)]).video, 2 * len(windows))
            for _ in DataLoader(many, batch_size=1, num_workers=count):
                pass

        return run

    runs = {"this loader": ours, "decord get_batch + resize": decord_alone}
    seconds = alternate(runs, config.rounds)
    what = f"{config.frames}x{config.size}x{config.size}, stride {config.stride}, of {config.videos}"
    report(f"one process, {what}", seconds, "clips/s", len(windows), config.out)
    print(f"  this loader is {ratio(seconds, 'decord get_batch + resize', 'this loader'):.2f} times as fast")
    seconds = alternate({"1 worker": workers(1), "2 workers": workers(2)}, config.rounds)
    report(f"workers, {what}", seconds, "clips/s", 2 * len(windows), "")
    print(f"  two workers are {ratio(seconds, '1 worker', '2 workers'):.2f} times as fast as one")


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    """The median over the rounds of how much longer `slow` takes."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


def plain(clips: Clips, window: Window) -> torch.Tensor:
    """What one would write without this library: decord's frames (right or not), resized and cropped alike."""
    import decord

    row, size = clips.rows[window.row_index], clips.policy.size
    reader = decord.VideoReader(str(clips.index.root / row.path), num_threads=1)
    frames = torch.from_numpy(reader.get_batch(clips.policy.places(row, window.start)).asnumpy())
    return crop(resize(frames, size), size).transpose(0, 1).contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# Latents


def latents(config: BenchLatents) -> None:
    """The share of a training step that waits for latents, with steps of a given length."""
    store = LatentStore(config.store)

    def draw(sample: int) -> torch.Tensor:
        record = store[item_at(0, sample, len(store))]
        g = generator(0, "bench", sample)
        return store.scale.normalise(sample_posterior(record["mean"], record["logvar"], g))

    def steps() -> Iterator[float]:
        loader = DataLoader(
            Items(draw, config.steps * config.batch),
            batch_size=config.batch,
            num_workers=config.workers,
            prefetch_factor=4 if config.workers else None,
        )
        batches = iter(loader)
        next(batches)  # the workers' start is no part of a step
        for _ in range(config.steps - 1):
            start = time.perf_counter()
            next(batches)
            yield time.perf_counter() - start
            time.sleep(config.step_ms / 1000)

    waited = list(steps())
    share = sum(waited) / (sum(waited) + len(waited) * config.step_ms / 1000)
    shape = "x".join(map(str, store.manifest.shape))
    print(f"batches of {config.batch} latents {shape} from {config.store}, {config.workers} workers")
    print(f"  waiting for data: {100 * share:.2f} % of steps of {config.step_ms:g} ms ({len(waited)} steps)")
    if config.out:
        write_text(config.out, json.dumps({"share": share, "waited": waited}, indent=2) + "\n")


def data_main(argv: list[str] | None = None) -> int:
    """`lvdm bench data`."""
    return program(BenchData, argv, data)


def latents_main(argv: list[str] | None = None) -> int:
    """`lvdm bench latents`."""
    return program(BenchLatents, argv, latents)
