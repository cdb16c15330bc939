"""What damage does to the reader: nothing but `Unreadable`, in bounded time and memory.

The work is done by this file run as a program, so that a crash or a hang of native code fails a test and names its
seed; `python test_mutations.py mutations FOLDER SCRATCH 117 118` repeats one.
"""

import ctypes
import faulthandler
import os
import random
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import av
import numpy as np

from lvdm.data import reader
from lvdm.data.index import look
from lvdm.data.reader import Unreadable, iter_frames, probe, read_frames
from lvdm.media import write_mp4

MUTATIONS = 200
SECONDS = 30  # for one file; the slowest takes less than two on an idle machine
GROWTH = 4  # MiB over 500 opens; one frame kept of each would be 4.4 to 200
KINDS = ("cut", "bits", "head", "tail", "zeros")


def test_mutations_are_read_or_named(real_data, tmp_path):
    done = _run("mutations", real_data, tmp_path, 0, MUTATIONS)
    seeds, read, damaged, unreadable = map(int, done.split())
    assert seeds == MUTATIONS and read + damaged + unreadable == MUTATIONS
    assert min(read, damaged, unreadable) > MUTATIONS // 20  # the mutations are neither too weak nor too strong


def test_500_opens_keep_nothing(real_data, tmp_path):
    """Of each kind of source, those that fail too."""
    held = dict(pair.split("=") for pair in _run("opens", real_data, tmp_path).split())
    assert held.keys() == {"mp4", "avi", "folder", "damaged", "unreadable"}
    for values in held.values():
        growth, files = map(float, values.split(","))
        assert growth < GROWTH and files == 0, held


def _run(*arguments) -> str:
    """The last line of the program's output."""
    command = [sys.executable, "-X", "faulthandler", __file__, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    last = (done.stdout.splitlines() or ["nothing"])[-1]
    assert done.returncode == 0, f"exit code {done.returncode} after {last!r}:\n{done.stderr[-2000:]}"
    return last


def _mutate(data: bytes, kind: str, draw: random.Random) -> bytes:
    """Cut off, with up to 256 bits flipped (anywhere, or where containers keep their tables), or with a hole."""
    new, size = bytearray(data), len(data)
    if kind == "cut":
        del new[draw.randrange(size) :]
    elif kind == "zeros":
        start, length = draw.randrange(size), draw.randrange(1, size // 4)
        new[start : start + length] = bytes(len(new[start : start + length]))
    else:
        low, high = {"bits": (0, size), "head": (0, 2048), "tail": (size - 4096, size)}[kind]
        for _ in range(2 ** draw.randrange(9)):
            new[draw.randrange(max(0, low), min(high, size))] ^= 1 << draw.randrange(8)
    return bytes(new)


def _sources(data: Path, scratch: Path) -> list[Path]:
    """Real videos in every container: as they are, with the packets of one of them in others, and coded anew."""
    smallest = sorted((data / "train").glob("*.mp4"), key=lambda path: path.stat().st_size)[0]
    sources = [smallest]
    for suffix in ("mov", "mkv", "ts"):
        sources.append(scratch / f"packets.{suffix}")
        with av.open(str(smallest)) as source, av.open(str(sources[-1]), "w") as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    target.mux(packet)
    pictures = [av.VideoFrame.from_ndarray(picture, format="rgb24") for picture in islice(iter_frames(smallest), 24)]
    for suffix, codec in (("webm", "libvpx"), ("avi", "mpeg4")):
        sources.append(scratch / f"coded.{suffix}")
        with av.open(str(sources[-1]), "w") as target:
            stream = target.add_stream(codec, rate=25)
            stream.width, stream.height = pictures[0].width, pictures[0].height
            for picture in [*pictures, None]:
                target.mux(stream.encode(picture))
    avi = sorted((data / "ucf101_mini").rglob("*.avi"), key=lambda path: path.stat().st_size)
    return [*sources, avi[0], *sorted((data / "sky_mini" / "sky_test").glob("*/*"))[:2]]


def _mutations(data: Path, scratch: Path, first: int, last: int) -> None:
    sources, outcomes = _sources(data, scratch), []
    for seed in range(first, last):
        draw = random.Random(seed)
        source, kind = sources[seed % len(sources)], draw.choice(KINDS)
        path = scratch / f"{seed}{source.suffix}"
        print(f"seed {seed}: {source.name}, {kind}", flush=True)
        if source.is_dir():
            shutil.copytree(source, path)
            file = draw.choice(sorted(path.iterdir()))
            file.write_bytes(_mutate(file.read_bytes(), kind, draw))
        else:
            path.write_bytes(_mutate(source.read_bytes(), kind, draw))
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        outcomes.append(_outcome(path))
        faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(path) if source.is_dir() else path.unlink()
    print(len(outcomes), *(outcomes.count(outcome) for outcome in ("read", "damaged", "unreadable")))


def _outcome(path: Path) -> str:
    """Reads as an index and a clip do; both get the same, and what is reached from key frames is the same too."""
    head, outcome = [], "read"
    try:
        info = probe(path)
        assert info.frames > 0 and info.width > 0 and info.height > 0 and 0 <= info.fps < np.inf
        pictures = iter_frames(path)
        head.extend(islice(pictures, min(40, info.frames)))
        again = read_frames(path, range(len(head)))
        assert np.array_equal(again, head)
        if not path.is_dir() and look(path.parent, path.name, full=True).whole:
            full = list(iter_frames(path))
            for start in (len(full) // 3, len(full) // 2, len(full) - 2):
                assert np.array_equal(read_frames(path, [start, start + 1], whole=True), full[start : start + 2])
        assert read_frames(path, [info.frames - 1, 0]).shape == (2, info.height, info.width, 3)
        head.extend(islice(pictures, 20))
    except Unreadable as error:
        assert str(path) in str(error) and error.reason and "\n" not in str(error)
        outcome = "damaged" if head else "unreadable"
    return outcome


def _opens(data: Path, scratch: Path) -> None:
    """Prints by how many MiB and open files this process grows over 500 reads of each kind, after the first."""
    small = sorted((data / "train").glob("*.mp4"), key=lambda path: path.stat().st_size)[0]
    hole = scratch / "hole.mp4"
    write_mp4(hole, list(islice(iter_frames(small, (64, 48)), 30)), 25)
    with open(hole, "r+b") as file:
        file.seek(file.seek(0, os.SEEK_END) * 2 // 3)
        file.write(bytes(800))
    sources = {
        "mp4": (small, [0, 3]),
        "avi": (sorted((data / "ucf101_mini").rglob("*.avi"), key=lambda path: path.stat().st_size)[0], [0, 3]),
        "folder": (sorted((data / "sky_mini" / "sky_test").glob("*/*"))[0], [0, 3]),
        "damaged": (hole, [0, 29]),
        "unreadable": (data / "broken" / "not_a_video.mp4", [0]),
    }
    print(*(f"{kind}={_growth(path, indices)}" for kind, (path, indices) in sources.items()))


def _growth(path: Path, indices: list[int]) -> str:
    """The least that is held in the last 100 reads against the least in the first: allocators go up and down by MiB."""
    held = []
    for opened in range(600):
        if opened % 10 == 0:
            held.append(_held())
        reader._scan_version.cache_clear()
        try:
            read_frames(path, indices)
            assert path.name not in ("hole.mp4", "not_a_video.mp4")
        except Unreadable:
            assert path.name in ("hole.mp4", "not_a_video.mp4")
    before, after = (map(min, zip(*part, strict=True)) for part in (held[1:11], held[-10:]))
    return ",".join(str(last - first) for first, last in zip(before, after, strict=True))


def _held() -> tuple[float, int]:
    """MiB of memory that is in use, without what the allocator holds ready, and open files."""
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd"))


if __name__ == "__main__":
    if sys.argv[1] == "mutations":
        _mutations(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
    else:
        _opens(Path(sys.argv[2]), Path(sys.argv[3]))
