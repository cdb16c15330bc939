"""What can be set in each program that looks at a dataset. Importing this imports no torch."""

from dataclasses import dataclass
from typing import ClassVar

from lvdm.config import at_least


@dataclass
class Source:
    """Keys of every program that looks at a dataset."""

    positionals: ClassVar[tuple[str, ...]] = ("videos",)

    videos: str = ""
    """Folder of videos, frame folders or images, UCF101, SkyTimelapse, or a .csv, .jsonl or .parquet list."""
    labels: str = "auto"
    """Class of a video: folder (its parent folder), file (its name), none, or auto (what the dataset has)."""
    subset: str = "all"
    """Split of UCF101 (train01 to test03) or SkyTimelapse (train, test); all takes everything."""


@dataclass
class IndexVideos(Source):
    """Look at every file of a dataset, keep what is seen in the cache folder, and sum it up.

    Files that are known and have not changed are not looked at again; a build that was killed goes on.
    """

    cache: str = ""
    """Folder to keep it in; empty is index/ in the cache folder (LVDM_CACHE), where every program looks for it."""
    again: bool = False
    """Look at all files again, e.g. when some could not be read because a disk was away."""
    workers: int = 0
    """Processes that decode; 0 is one a core."""
    out: str = ""
    """File to write the index to as well: JSON lines, one a video, with the reason where it is broken."""

    def __post_init__(self) -> None:
        at_least(self, workers=0)


@dataclass
class CheckVideos(Source):
    """Decode every frame of every file at full size and name each file that is broken or damaged.

    The exit code is 1 when there is one. Nothing is kept.
    """

    workers: int = 0
    """Processes that decode; 0 is one a core."""

    def __post_init__(self) -> None:
        at_least(self, workers=0)


@dataclass
class PreviewVideos(Source):
    """A picture of a dataset: a row a video, with its class and length; a red bar is where a new shot begins."""

    out: str = "preview.png"
    """PNG file to write."""
    count: int = 16
    """Videos: the first ones by path."""
    per_class: bool = False
    """Show the first video of each class instead, of so many classes."""
    columns: int = 8
    """Frames a video, evenly spaced from its first to its last."""
    size: int = 96
    """Pixels of their shorter side."""

    def __post_init__(self) -> None:
        at_least(self, count=1, columns=1, size=8)
