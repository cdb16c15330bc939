"""How a number was made. A number without its protocol is never shown, and different protocols never share a column."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, Literal

from lvdm.errors import UserError, nearest

FVD_COUNT = 2048  # clips a side, customary since StyleGAN-V
SMALL_BATCH = "small_batch_legacy"
FRECHET = ("FVD", "FID")
SIMULATED = "two samples of one Gaussian in 400 dimensions scored 248 at N = 2048 and 1866 at N = 256"
"""How large that bias is of as many features as I3D has: docs/metrics.md, "How sure a number is"."""


@dataclass(frozen=True)
class Protocol:
    """Everything that moves a metric besides the model. None means that a field does not apply."""

    metric: str
    """e.g. "fvd", "kvd", "psnr"."""
    features: str | None
    """Name of the feature extractor or LPIPS trunk."""
    weights_sha256: str | None
    """Of the published weights of `features`."""
    frames: int
    """Frames a clip."""
    stride_real: int | None
    """Distance of neighbouring frames of a real clip, in frames of the source; None where `fps` decides."""
    stride_fake: int | None
    """The same of a generated or reconstructed clip."""
    resize: str
    """From the source to what is compared, in words."""
    count_real: int
    """Real clips."""
    count_fake: int
    """Generated or reconstructed clips."""
    split: str
    """The dataset the real clips are drawn from, and which part of each shot: train, val or all."""
    seed: int
    """Of the draw of clips."""
    estimator: str
    """From features or pixels to the number, in words."""
    fps: float | None = None
    """Frames a second of all clips, where that and no stride was asked for."""
    preset: str = ""
    """The `Preset` this follows, and which of its settings were changed."""
    draw: str = ""
    """"grid" (evenly spaced) or "random" clips of a video."""
    covariance: str = ""
    """What the sum of squares is divided by: "N" or "N-1"."""
    inputs: str = ""
    """What the files of both sides lost before they were read, in words."""
    subset: str = ""
    """The dataset's own split: train01, test ...; all takes everything."""
    holdout: float | None = None
    """The last part of each shot that is `val`."""
    per_video: int | None = None
    """Real clips a video; 0: every one without overlap."""
    short: str = ""
    """What becomes of shots that are too short for a clip: drop, loop or reflect."""
    dataset: str = ""
    """The first 8 digits of the hash of the real clips: of the content of their files, and the frames taken."""
    across_cuts: bool = False
    """Whether real clips may span cuts."""

    def describe(self) -> str:
        """One line for a reader, fields that do not apply left out."""
        features = f", {self.features}" if self.features else ""
        weights = f" (weights {self.weights_sha256[:8]})" if self.weights_sha256 else ""
        strides = f"stride {self.stride_real} real / {self.stride_fake} fake"
        pace = strides if self.fps is None else f"{self.fps:g} frames a second"
        line = (
            f"{self.metric}{features}{weights}, {self.frames} frames, {pace}, {self.resize}, "
            f"{self.count_real} real / {self.count_fake} fake clips, {self.split}, seed {self.seed}, {self.estimator}"
        )
        covariance = f"({self.covariance})" if "-" in self.covariance else self.covariance
        named = {
            "": self.inputs,
            "subset ": self.subset,
            "holdout ": "" if self.holdout is None else f"{self.holdout:g}",
            "clips a video ": "" if self.per_video is None else f"{self.per_video}",
            "short shots ": self.short,
            "across ": "cuts" if self.across_cuts else "",
            "digest ": self.dataset,
            "clips by ": self.draw,
            "covariance 1/": covariance,
            "preset ": self.preset,
        }
        return ", ".join([line, *(name + value for name, value in named.items() if value)])

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `Protocol(**d)` reads it back, also where an earlier version wrote fewer fields."""
        return asdict(self)

    @property
    def biased(self) -> bool:
        """Whether this is an average over small batches, which explains published numbers and ranks nothing."""
        return self.metric.upper() in FRECHET and self.preset.startswith(SMALL_BATCH)

    def warning(self) -> str | None:
        """What a reader must know before comparing this number with another one, or None."""
        metric, count = self.metric.upper(), min(self.count_real, self.count_fake)
        if self.biased:
            return f"{metric} averaged over small batches is biased upwards by its definition: not for comparison"
        if metric not in (*FRECHET, "IS") or count >= FVD_COUNT:
            return None
        way = "downwards" if metric == "IS" else "upwards"
        text = f"{metric} with N = {count} clips is biased {way}: compare it only with numbers of the same N"
        return text + (f"; {SIMULATED}" if metric == "FVD" and (self.features or "").startswith("i3d") else "")


def require_same(protocols: Iterable[Protocol]) -> None:
    """Raises UserError, naming the first field that differs, unless all `protocols` are equal."""
    for first, other in pairwise(protocols):
        for field in fields(Protocol):
            a, b = getattr(first, field.name), getattr(other, field.name)
            if a != b:
                raise UserError(
                    f"{first.metric}: these numbers cannot be compared, their protocols differ in {field.name}: "
                    f"{a!r} and {b!r}; evaluate them again with one protocol"
                )


@dataclass(frozen=True)
class Preset:
    """The settings of a set comparison that a paper or its code is known by. None: as the samples or the config."""

    name: str
    says: str
    """What it copies, and what it cannot."""
    features: str = "i3d"
    """Of `lvdm.metrics.features.make_extractor`."""
    frames: int | None = None
    """Frames a clip; None as sampled."""
    stride_real: int | None = None
    """Distance of neighbouring frames of a real clip; None as configured."""
    stride_fake: int = 1
    """The same of a generated clip."""
    rate: Literal[1, 2] = 1
    """1: D1's frames. 2: D2's, against reals at twice the rate."""
    count: int = FVD_COUNT
    """Clips a side."""
    draw: Literal["grid", "random"] = "grid"
    """How the clips of a real video are chosen: evenly spaced, or one at random."""
    covariance: Literal["N", "N-1"] = "N"
    """What the sum of squares is divided by."""
    batch: int = 0
    """Above 0: the mean of distances of batches of so many clips."""
    against: Literal["reals", "originals"] = "reals"
    """Originals: reconstructions and the very clips they are of."""
    split: Literal["", "all", "train"] = ""
    """The dataset's own split that real clips are from, where the preset says which."""


def _small_batch(batch: int) -> Preset:
    return Preset(
        f"{SMALL_BATCH}({batch})",
        f"the mean of FVDs of batches of {batch}, as in Open-Sora Plan's VAE evaluation (which also averages over all "
        "lengths from 10 frames on): biased upwards by thousands, to explain published numbers and never to rank",
        covariance="N-1",
        batch=batch,
    )


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "fvd2048_16f",
            "StyleGAN-V: 16 frames at stride 1 on both sides, one random clip a video; reals are train and test "
            "together. Which clips its seed draws, and the JPEGs it reads, cannot be had again",
            frames=16,
            stride_real=1,
            draw="random",
            split="all",
        ),
        Preset(
            "latte",
            "Latte: as StyleGAN-V, but reals at stride 3, of the videos trained on. Its 2048 videos are drawn without "
            "a seed, and both sides pass through JPEG of quality 75",
            frames=16,
            stride_real=3,
            draw="random",
        ),
        Preset(
            "tats",
            "TATS: 16 frames at stride 1, covariance 1/(N-1), reals of the train split. Its port of I3D has another "
            "epsilon in the norms, and its order of clips cannot be had again",
            frames=16,
            stride_real=1,
            draw="random",
            covariance="N-1",
            split="train",
        ),
        Preset(
            "univae",
            "UniVAE, D1: all frames that were sampled, reals at the stride trained on. The paper gives neither length "
            "nor count nor stride: this is ours",
        ),
        Preset(
            "univae-2x",
            "UniVAE, D2: 2T-1 frames against reals at twice the rate, so at half the stride trained on, which must be "
            "even. The paper does not say which rate its reals have: this is ours",
            rate=2,
        ),
        Preset(
            "rfvd",
            "reconstructions against their own originals, all frames: comparable between VAEs at equal clips only",
            against="originals",
        ),
        Preset(
            "odvae_81f",
            "OD-VAE: 81 frames at stride 1 (243 at Latte's stride 3 are longer than most videos of UCF101). The paper "
            "does not give its stride",
            frames=81,
            stride_real=1,
        ),
        _small_batch(8),
    )
}


def preset(name: str) -> Preset:
    """The preset called `name`; `small_batch_legacy(B)` takes any B >= 2. UserError, with all names, for others."""
    batch = re.fullmatch(rf"{SMALL_BATCH}\((\d+)\)", name)
    if batch and int(batch[1]) > 1:
        return _small_batch(int(batch[1]))
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}{nearest(name, PRESETS)}; known: {', '.join(PRESETS)}")
    return PRESETS[name]
