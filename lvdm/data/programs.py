"""The datasets of the papers: `lvdm data ucf101` and `lvdm data sky` fetch, check and index them."""

import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lvdm.cli import program
from lvdm.config import choice
from lvdm.data import datasets
from lvdm.data.fetch import (
    RAR_TOOLS,
    Remote,
    Unreachable,
    fetch,
    hub_file,
    move_into,
    unpack,
)
from lvdm.errors import Unsound, UserError
from lvdm.files import gigabytes, require_space


@dataclass
class Published:
    """Keys of the programs for published datasets."""

    root: str = ""
    """Folder of the dataset, in its official layout."""
    download: bool = False
    """Fetch what is not there into root. Broken off, the same command goes on; archives put there by hand are used."""
    verify: bool = False
    """Exit with 1 unless everything published is there, and none of it broken."""


@dataclass
class UCF101(Published):
    """UCF101, 13,320 videos of 101 classes: fetch them and the official splits, say what is missing, index the rest.

    In root are UCF-101/<class>/v_*.avi and ucfTrainTestlist/*.txt. The download takes 7 GB and twice that on disk.
    """

    subset: str = "all"
    """all, or a split: train01, train02, train03, test01, test02 or test03."""

    def __post_init__(self) -> None:
        choice(self, "subset", datasets.SUBSETS["ucf101"])


@dataclass
class Sky(Published):
    """SkyTimelapse, folders of frames: fetch them, say what is missing or left out, index the rest.

    In root are sky_train/<video>/<video>_<clip>/*.jpg and sky_test likewise.
    """

    subset: str = "all"
    """all, train or test."""
    hub: str = "maxin-cn/SkyTimelapse"
    """Dataset on the Hugging Face hub whose zip is fetched."""

    def __post_init__(self) -> None:
        choice(self, "subset", datasets.SUBSETS["sky"])


# ---------------------------------------------------------------------------------------------------------------------
# UCF101

UCF101_SITE = "https://www.crcv.ucf.edu/data/UCF101"
UCF101_LISTS = Remote(
    f"{UCF101_SITE}/UCF101TrainTestSplits-RecognitionTask.zip",
    113_943,
    "5c0d1a53b8ed364a2ac830a73f405e51bece7d98ce1254fd19ed4a36b224bd27",
)
# The mirror of TensorFlow Datasets: the same files without folders, as a zip and with a known hash.
UCF101_ZIP = Remote(
    "https://storage.googleapis.com/thumos14_files/UCF101_videos.zip",
    6_960_400_115,
    "dabf56f573cd19c79e096563529fec8126a2a34e18e10c72eb621dd687532b0d",
)
UCF101_RAR = Remote(f"{UCF101_SITE}/UCF101.rar")
UCF101_VIDEOS = {
    "all": 13_320,
    **{"train01": 9_537, "train02": 9_586, "train03": 9_624},
    **{"test01": 3_783, "test02": 3_734, "test03": 3_696},
}
UCF101_CLASSES = 101
UCF101_FOLDERS = {"HandStandPushups": "HandstandPushups"}  # the class that is spelled otherwise in names of files


def run_ucf101(config: UCF101) -> None:
    """Raises `Unsound` where `verify` finds something missing or broken."""
    root = _root(config)
    if config.download:
        download_ucf101(root)
    dataset, missing = datasets.read_ucf101(root, subset=config.subset)
    there = len({entry.label for entry in dataset.entries})
    print(f"UCF101 in {root}, {config.subset}: {len(dataset.entries):,} videos of {there} classes")
    # a split that is not whole cannot be opened; what is there of it is among all
    _finish(config, check_ucf101(root, dataset, missing, config.subset), "all" if missing else config.subset)


def check_ucf101(root: Path, dataset: datasets.Dataset, missing: list[str], subset: str) -> list[str]:
    """What is not as published, a line each. `missing` are the names in the official lists that are not there."""
    problems, expected = [], UCF101_VIDEOS[subset]
    absent = max(expected - len(dataset.entries), len(missing))
    if absent:
        problems.append(f"{absent:,} of {expected:,} videos are missing{_such_as(missing)}")
    present = {entry.label for entry in dataset.entries}
    if len(present) < UCF101_CLASSES:
        known = [name for name in datasets.ucf101_classes(root) if name not in present]
        problems.append(f"{UCF101_CLASSES - len(present)} of {UCF101_CLASSES} classes have no video{_such_as(known)}")
    for split in datasets.SPLITS if subset == "all" else [subset]:
        path = datasets.split_list(root, split)
        count = len(datasets.split_names(root, split)) if path.is_file() else 0
        if count != UCF101_VIDEOS[split]:
            problems.append(f"{path.parent.name}/{path.name} names {count:,} videos, not {UCF101_VIDEOS[split]:,}")
    return problems


def download_ucf101(root: Path) -> None:
    """The lists and videos that are not there; raises UserError where they cannot be had."""
    lists = [datasets.split_list(root, split) for split in datasets.SPLITS]
    if not all(path.is_file() for path in (*lists, lists[0].with_name("classInd.txt"))):
        archive = root / UCF101_LISTS.name
        fetch(UCF101_LISTS, archive)
        unpack(archive, root, place_lists)
    if len({path.name for path in (root / "UCF-101").rglob("v_*.avi")}) < UCF101_VIDEOS["all"]:
        _unpack(_ucf101_archive(root), root, place_videos)


def _ucf101_archive(root: Path) -> Path:
    """What the user has put there, else the mirror's zip, else the rar of the authors where it can be unpacked."""
    for name in (UCF101_ZIP.name, UCF101_RAR.name, "UCF101.zip"):
        if (root / name).is_file():
            return root / name
    path = root / UCF101_ZIP.name
    try:
        _fetch_archive(UCF101_ZIP, path)
    except Unreachable:
        if path.with_name(f"{path.name}.part").exists() or not any(map(shutil.which, RAR_TOOLS)):
            raise
        path = root / UCF101_RAR.name
        _fetch_archive(UCF101_RAR, path)
    return path


def place_videos(folder: Path, root: Path) -> None:
    """v_<class>_g01_c01.avi, wherever it lies in `folder`, to UCF-101/<class> in `root`."""
    names = {path: re.fullmatch(r"v_(\w+)_g\d+_c\d+", path.stem) for path in sorted(folder.rglob("*.avi"))}
    if not any(names.values()):
        raise UserError(f"{root}: no v_<class>_g01_c01.avi in the archive; it is not that of UCF101")
    for path, name in names.items():
        if name:
            move_into(path, root / "UCF-101" / UCF101_FOLDERS.get(name[1], name[1]) / path.name)


def place_lists(folder: Path, root: Path) -> None:
    """classInd.txt and the lists of the splits, wherever they lie in `folder`, to ucfTrainTestlist in `root`."""
    for path in sorted(folder.rglob("*.txt")):
        move_into(path, root / "ucfTrainTestlist" / path.name)


# ---------------------------------------------------------------------------------------------------------------------
# SkyTimelapse

SKY_CLIPS = {"train": 35_392, "test": 2_815}
"""Clips of 32 frames that the authors cut, one after the other, out of the folders of each split."""


def run_sky(config: Sky) -> None:
    """Raises `Unsound` where `verify` finds something missing or broken."""
    root = _root(config)
    if config.download and check_sky(root, config.subset):
        download_sky(root, config.hub)
    dataset, left_out = datasets.read_sky(root, subset=config.subset)
    print(f"SkyTimelapse in {root}, {config.subset}: {len(dataset.entries):,} folders of frames")
    for line in left_out:
        print(f"left out: {line}")
    _finish(config, check_sky(root, config.subset), config.subset)


def check_sky(root: Path, subset: str) -> list[str]:
    """What is not as published, a line each. There is no official list, so that only frames can be counted."""
    problems = []
    for split in (name for name in SKY_CLIPS if subset in (name, "all")):
        clips, expected = datasets.sky_clips(root / f"sky_{split}"), SKY_CLIPS[split]
        if clips < expected:
            problems.append(f"sky_{split}: {expected - clips:,} of {expected:,} clips of 32 frames are missing")
    return problems


def download_sky(root: Path, hub: str) -> None:
    """The frames, from a zip in `root` that the user has put there or else from the hub."""
    archives = sorted(root.glob("*.zip"))
    if not archives:
        try:
            remote = hub_file(hub)
        except Unreachable as error:
            raise Unreachable(f"{error}; or put its zip into {root} yourself") from None
        archives = [root / remote.name]
        _fetch_archive(remote, archives[0])
    _unpack(archives[0], root, place_frames)


def place_frames(folder: Path, root: Path) -> None:
    """sky_train and sky_test, wherever they lie in `folder`, to `root`."""
    found = []
    for parent, folders, _ in os.walk(folder):
        found += [Path(parent, name) for name in folders if name in ("sky_train", "sky_test")]
        folders[:] = [name for name in folders if name not in ("sky_train", "sky_test")]
    if not found:
        raise UserError(f"{root}: neither sky_train nor sky_test in the archive; it is not that of SkyTimelapse")
    for path in found:
        move_into(path, root / path.name)


# ---------------------------------------------------------------------------------------------------------------------
# Both


def _root(config: Published) -> Path:
    if not config.root:
        raise UserError("root=: expected the folder of the dataset")
    root = Path(config.root)
    if config.download:
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"root={root}: cannot be made: {error.strerror}") from None
    if not root.is_dir():
        raise UserError(f"root={root}: no such folder; download=true makes it and fetches the dataset")
    return root


def _fetch_archive(remote: Remote, path: Path) -> None:
    """`fetch`, when there is room for the archive and for what is in it, which is about as large."""
    part = path.with_name(f"{path.name}.part")
    have = part.stat().st_size if part.exists() else 0
    require_space(path.parent, 2 * remote.size - have, f"for {remote.name} and what is in it")
    fetch(remote, path)


def _unpack(archive: Path, root: Path, place: Callable[[Path, Path], None]) -> None:
    unpack(archive, root, place)
    print(f"{archive} ({gigabytes(archive.stat().st_size)}) is unpacked and may be deleted", file=sys.stderr)


def _finish(config: UCF101 | Sky, problems: list[str], subset: str) -> None:
    """Tells the problems, indexes what is there, and exits with 1 where `verify` asks for it."""
    from lvdm.data.index import open_index  # here, because they import torch
    from lvdm.data.look import summary

    for line in problems:
        print(f"incomplete: {line}")
    index = open_index(config.root, subset=subset)
    print(f"indexed, {subset}:\n{summary(index)}")
    if config.verify and (problems or index.broken):
        raise Unsound("verify: not all of it is there and sound")
    if config.verify:
        print("complete")


def _such_as(names: list[str]) -> str:
    return f": {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else ""


def ucf101_main(argv: list[str] | None = None) -> int:
    """`lvdm data ucf101`."""
    return program(UCF101, argv, run_ucf101)


def sky_main(argv: list[str] | None = None) -> int:
    """`lvdm data sky`."""
    return program(Sky, argv, run_sky)
