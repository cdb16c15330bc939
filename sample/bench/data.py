"""How fast clips and latents are read here (`lvdm bench data`, `index`, `latents`)."""

import multiprocessing
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lvdm.bench import alternate, keep, ratio
from lvdm.cli import program
from lvdm.data.clips import ClipPolicy, Clips, Window, crop, resize
from lvdm.data.datasets import open_dataset
from lvdm.data.index import files_of, look, open_index
from lvdm.errors import UserError
from lvdm.latents import LatentStore, sample_posterior
from lvdm.rng import generator, item_at
from sample.bench.configs import BenchData, BenchIndex, BenchLatents

DECORD = "decord get_batch + resize"


class Items(Dataset):
    """`get(i)` for i below `count`."""

    def __init__(self, get: Callable[[int], Any], count: int):
        self.get, self.count = get, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Any:
        return self.get(i)


def report(title: str, rows: dict[str, list[float]], unit: str, per: float) -> None:
    """Prints median and spread of each row as `per` / seconds."""
    print(title)
    for name, seconds in rows.items():
        rates = sorted(per / s for s in seconds)
        print(f"  {name:<34} {statistics.median(rates):9.2f} {unit}  ({rates[0]:.2f} to {rates[-1]:.2f})")


# ---------------------------------------------------------------------------------------------------------------------
# Videos


def data(config: BenchData) -> None:
    """Clips a second: ours beside decord's own get_batch with the same resize, then two workers beside one."""
    policy = ClipPolicy(config.frames, config.stride, config.size, split="all", holdout=0.0)
    clips = Clips(open_index(config.videos), policy, seed=0, cache_gib=0)
    grid = clips.grid(0)
    windows = [grid[i] for i in torch.randperm(len(grid), generator=generator(0, "bench"))]
    windows = (windows * config.clips)[: config.clips]
    what = f"{config.frames}x{config.size}x{config.size}, stride {config.stride}, of {config.videos}"

    ours = {"this loader": "auto", "this loader, LVDM_DECODER=pyav": "pyav"}
    runs = {name: partial(decoded_by, decoder, clips.read, windows) for name, decoder in ours.items()}
    alone = alternate({**runs, DECORD: partial(drain, partial(plain, clips), windows)}, config.rounds)
    report(f"one process, {what}", alone, "clips/s", len(windows))
    for name in ours:
        print(f"  {name} is {ratio(alone, DECORD, name):.2f} times as fast as {DECORD}")

    runs = in_workers("clips", lambda i: clips.read(windows[i % len(windows)]).video, 2 * len(windows))
    runs |= in_workers("sums", arithmetic, 2 * len(windows))
    workers = alternate(runs, config.rounds)
    report(f"workers, {what}", workers, "a second", 2 * len(windows))
    of_sums = ratio(workers, "sums by 1", "sums by 2")
    print(f"  two workers are {ratio(workers, 'clips by 1', 'clips by 2'):.2f} times as fast as one")
    print(f"  two processes of plain arithmetic are {of_sums:.2f} times as fast as one here")
    keep(config.out, {**alone, **workers})


def drain(read: Callable[[Any], Any], windows: list[Window]) -> None:
    """Reads one after the other and keeps none."""
    for window in windows:
        read(window)


def decoded_by(decoder: str, read: Callable[[Any], Any], windows: list[Window]) -> None:
    """`drain` with that decoder for the files that both read exactly."""
    before = os.environ.get("LVDM_DECODER")
    os.environ["LVDM_DECODER"] = decoder
    try:
        drain(read, windows)
    finally:
        os.environ.pop("LVDM_DECODER")
        os.environ |= {"LVDM_DECODER": before} if before else {}


def in_workers(name: str, get: Callable[[int], Any], count: int) -> dict[str, Callable[[], None]]:
    """Two runs: `get(0)` to `get(count - 1)`, in batches, by one process and by two, which stay from round to round."""

    def run(loader: DataLoader) -> None:
        for _ in loader:
            pass

    items = Items(get, count)
    loaders = {n: DataLoader(items, batch_size=4, num_workers=n, persistent_workers=True) for n in (1, 2)}
    return {f"{name} by {n}": partial(run, loader) for n, loader in loaders.items()}


def arithmetic(i: int) -> int:
    """Some ten milliseconds that need no memory: what a second process can gain here at most."""
    return sum(k * k for k in range(i, i + 150_000))


def plain(clips: Clips, window: Window) -> torch.Tensor:
    """What one would write without this library: decord's frames (right or not), resized and cropped alike."""
    try:
        import decord
    except ImportError:
        raise UserError("lvdm bench data compares with decord, which is not installed: pip install decord") from None
    row, size = clips.rows[window.row_index], clips.policy.size
    reader = decord.VideoReader(str(clips.index.root / row.path), num_threads=1)
    frames = torch.from_numpy(reader.get_batch(clips.policy.places(row, window.start)).asnumpy())
    return crop(resize(frames, size), size).transpose(0, 1).contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# Index


def index(config: BenchIndex) -> None:
    """Seconds to index so many files, beside as many processes that look at the same files and do nothing else."""
    dataset = open_dataset(config.videos)
    files = files_of(dataset)
    with TemporaryDirectory() as scratch:
        root = Path(scratch) / "videos"
        root.mkdir()
        names = []
        for i in range(config.files):
            file = (dataset.root / files[i % len(files)]).resolve()
            names.append(f"{i:06}{file.suffix}")
            (root / names[-1]).symlink_to(file)

        def whole() -> None:
            open_index(root, "none", cache=Path(scratch) / "cache", again=True, workers=config.workers)

        def bare() -> None:
            fork = multiprocessing.get_context("fork")
            shares = [names[k :: config.workers] for k in range(config.workers)]
            crew = [fork.Process(target=look_at, args=(root, share)) for share in shares]
            for process in crew:
                process.start()
            for process in crew:
                process.join()

        seconds = alternate({"this index": whole, "bare probes": bare}, config.rounds)
    report(f"{config.files} files of {config.videos}, {config.workers} processes", seconds, "files/s", config.files)
    print(f"  the index takes {ratio(seconds, 'this index', 'bare probes'):.2f} times as long as the bare probes")
    keep(config.out, seconds)


def look_at(root: Path, names: list[str]) -> None:
    """What a process does that only looks at files."""
    torch.set_num_threads(1)
    for name in names:
        look(root, name)


# ---------------------------------------------------------------------------------------------------------------------
# Latents


def latents(config: BenchLatents) -> None:
    """The share of a training step that waits for latents, with steps of a given length."""
    store = LatentStore(config.store)

    def draw(sample: int) -> torch.Tensor:
        record = store[item_at(0, sample, len(store))]
        g = generator(0, "bench", sample)
        return store.scale.normalise(sample_posterior(record["mean"], record["logvar"], g))

    loader = DataLoader(
        Items(draw, config.steps * config.batch),
        batch_size=config.batch,
        num_workers=config.workers,
        prefetch_factor=4 if config.workers else None,
    )
    batches, waited = ahead(iter(loader)), []
    next(batches)  # the workers' start is no part of a step
    for _ in range(config.steps - 1):
        start = time.perf_counter()
        next(batches)
        waited.append(time.perf_counter() - start)
        time.sleep(config.step_ms / 1000)

    share = sum(waited) / (sum(waited) + len(waited) * config.step_ms / 1000)
    shape = "x".join(map(str, store.manifest.shape))
    print(f"batches of {config.batch} latents {shape} from {config.store}, {config.workers} workers")
    print(f"  waiting for data: {100 * share:.2f} % of steps of {config.step_ms:g} ms ({len(waited)} steps)")
    keep(config.out, {"share": share, "waited": waited})


def ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches, fetched from the workers by a thread, as training on a GPU does it to pin them."""
    with ThreadPoolExecutor(1) as thread:
        coming = deque(thread.submit(next, batches, None) for _ in range(2))
        while (batch := coming.popleft().result()) is not None:
            coming.append(thread.submit(next, batches, None))
            yield batch


def data_main(argv: list[str] | None = None) -> int:
    """`lvdm bench data`."""
    return program(BenchData, argv, data)


def index_main(argv: list[str] | None = None) -> int:
    """`lvdm bench index`."""
    return program(BenchIndex, argv, index)


def latents_main(argv: list[str] | None = None) -> int:
    """`lvdm bench latents`."""
    return program(BenchLatents, argv, latents)
