"""What can be set in each program that measures and compares. Importing this imports no torch."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from lvdm.config import at_least, choice
from lvdm.errors import UserError, nearest
from train.configs import Videos

FITS = ("crop", "crop_first", "whole")

OWN_FEATURES = {"is": "c3d", "fid": "inception"}
"""Metrics that are of other features than the protocol's."""
FILES = ("i3d-torchscript", "videomae", "inception", "c3d", "timm:NAME")
"""Features that take the user's weights."""
SMALLEST = {"ssim": 11, "group": 11, "lpips": 31, "lpips-spatial": 31, "lpips-vgg": 16}
"""Height and width below which a metric is not defined."""
KNOBS = ("stride", "frames", "resize", "split", "draw", "count", "codec", "covariance", "batches")


@dataclass
class Evaluation(Videos):
    """Keys of every program that measures on real clips."""

    operational: ClassVar[tuple[str, ...]] = ("cache_gib", "threads", "batch", "workers")

    out: str = ""
    """Folder for results.json."""
    vae: str = ""
    """The VAE: a run, export, official checkpoint or hub id."""
    split: str = "auto"
    """train, val, all, or auto: val with holdout > 0, else all."""
    per_video: int = 1
    """Clips a video, evenly spaced; 0 takes every window without overlap."""
    fps: float = 0.0
    """Frames a second of a clip, in the place of stride; refused where it takes no whole stride. 0 goes by stride."""
    batch: int = 4
    """Clips at a time."""
    workers: int = 2
    """Threads that read clips ahead; 0 reads them in turn."""
    threads: int = 0
    """CPU threads; 0 leaves torch's default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, "split", ("auto", "train", "val", "all"))
        if self.split == "auto":
            self.split = "val" if self.holdout else "all"
        at_least(self, per_video=0, fps=0.0, batch=1, workers=0, threads=0)


@dataclass
class EvaluateFrames(Evaluation):
    """Keys of measuring a VAE frame by frame."""

    known: ClassVar[tuple[str, ...]] = ()

    metrics: list[str] = field(default_factory=lambda: ["psnr", "ssim", "lpips", "flicker"])
    """What is measured."""
    frames: int = 17
    """Frames a clip."""
    size: int = 256
    """Height and width."""
    stride: int = 1
    """Every how many frames of the video a frame is taken."""
    weights: dict[str, str] = field(default_factory=dict)
    """Files of metrics that are not fetched by themselves: weights.raft=raft_small.pth, of torchvision, for warping."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, frames=1, stride=1, size=1)
        _among("metrics", self.metrics, self.known, empty=False)
        require_clips(self.frames, self.size, self.metrics)
        for name in {*self.weights} - ({"raft"} if "warping" in self.metrics else set()):
            raise UserError(f"weights.{name}: nothing here takes it; expected weights.raft, for metrics=warping")
        if "warping" in self.metrics and not self.weights.get("raft"):
            raise UserError(
                "metrics=warping: set weights.raft to torchvision's raft_small_*.pth or raft_large_*.pth, whose"
                " name ends in the beginning of its sha256"
            )


@dataclass
class EvaluateReconstruction(EvaluateFrames):
    """How well a VAE's D1 reconstructs real clips, beside an upscaled 1/8 thumbnail, with intervals and protocol.

    metrics: psnr (mean of each frame's), pooled_psnr (of each clip's squared error), ssim, lpips (alex), lpips-vgg,
    lpips-spatial, flicker, warping (along RAFT's optical flow), ip (information preservation), group (SSIM by position
    in the group of 4 frames), rfvd (FVD of the reconstructions against their own originals). Several GPUs: accelerate
    launch -m sample.measure.evaluate.
    """

    known: ClassVar[tuple[str, ...]] = (
        *("psnr", "pooled_psnr", "ssim", "lpips", "lpips-vgg", "lpips-spatial", "flicker", "warping", "ip", "group"),
        "rfvd",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if "group" in self.metrics and (self.frames < 5 or self.frames % 4 != 1):
            n = max(4, self.frames // 4 * 4) + 1
            raise UserError(f"frames={self.frames}: group needs 4n+1, e.g. {n} or {n + 4}")
        if "rfvd" in self.metrics and self.frames < 9:
            raise UserError(f"frames={self.frames}: rfvd needs at least 9, which I3D takes")


@dataclass
class EvaluateRefinement(EvaluateFrames):
    """How well D2 draws frames that the encoder never saw, beside a linear blend of D1's frames, and those it saw.

    A clip has 8n+1 frames, of which the encoder sees every second. metrics: psnr, ssim, lpips (alex), lpips-vgg,
    lpips-spatial, flicker, warping. Several GPUs: accelerate launch -m sample.measure.evaluate.
    """

    known: ClassVar[tuple[str, ...]] = ("psnr", "ssim", "lpips", "lpips-vgg", "lpips-spatial", "flicker", "warping")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frames < 9 or self.frames % 8 != 1:
            n = max(8, self.frames // 8 * 8) + 1
            raise UserError(f"frames={self.frames}: refinement needs 8n+1, e.g. {n} or {n + 8}")


@dataclass
class SetEvaluation(Evaluation):
    """Keys of measuring a set of generated videos against real ones. What is null is the protocol's."""

    samples: str = ""
    """What lvdm sample wrote (with vae= its latents are rendered, else its videos taken), any folder of videos (mp4,
    avi, npy, frames, UCF101 ...), or a latent store with vae=."""
    frames: int | None = None
    """Frames a clip."""
    stride: int | None = None
    """Every how many frames of a real video one is taken; where the protocol leaves it open, as the samples play."""
    stride_fake: int | None = None
    """Every how many frames of a sample one is taken."""
    count: int | None = None
    """Clips a side at most."""
    seed: int = 0
    """Of the draw of real clips."""
    floor: bool = True
    """Compare real clips with other real ones, too, at the same counts: that takes the features of as many more real
    clips as there are samples, where there are so many."""
    size: int | None = None
    """Height and width of all clips; null takes that of the samples, where they are square."""
    resize: str | None = None
    """How other frames come to that size: crop (short side, then the centre; null), crop_first (the other way round)
    or whole (the whole frame, its aspect not kept)."""
    features: str | None = None
    """What looks at the clips: i3d, i3d-torchscript, videomae, inception, c3d, timm:NAME, or pixels (to try out)."""
    weights: dict[str, str] = field(default_factory=dict)
    """Files of features that are not fetched by themselves, e.g. weights.c3d=c3d_ucf101.pt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, least in (("frames", 1), ("stride", 1), ("stride_fake", 1), ("count", 2), ("size", 8)):
            if getattr(self, key) is not None:
                at_least(self, **{key: least})
        if self.resize is not None:
            choice(self, "resize", FITS)


@dataclass
class EvaluateGeneration(SetEvaluation):
    """The distance of generated videos from real ones: FVD, KVD, IS, FID, each with its interval, floor and protocol.

    The interval is a jackknife's over videos; the floor is the same metric of real clips against real clips at the same
    counts. Below 2048 clips numbers are biased, and say so. Several GPUs: accelerate launch -m sample.measure.evaluate.
    """

    protocol: list[str] = field(default_factory=list)
    """Published ways to measure: fvd2048_16f, latte, tats, univae, univae-2x, rfvd, odvae_81f, small_batch_legacy(8).
    Empty: univae and, where D2 renders at twice the rate and real clips have it, univae-2x."""
    metrics: list[str] = field(default_factory=lambda: ["fvd"])
    """fvd, kvd (both of the features), is (of c3d, needs weights.c3d=FILE), fid (of inception, frame by frame)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _among("metrics", self.metrics, ("fvd", "kvd", "is", "fid"), empty=False)
        _once("protocol", self.protocol)
        _taken(self.weights, self.features, *(own for key, own in OWN_FEATURES.items() if key in self.metrics))


@dataclass
class Doctor(SetEvaluation):
    """Why an FVD is what it is: one set of samples, one knob of the protocol turned at a time, sorted by effect.

    Prints the table and writes results.json and index.html. Features stay in the cache, so that knobs that leave clips
    alone (N, covariance, batches) and a second run cost nothing.
    """

    protocol: str = "univae"
    """Where the knobs stand at first."""
    knobs: list[str] = field(default_factory=list)
    """Those to turn, of stride, frames, resize, split, draw, count, codec, covariance, batches; empty turns all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _among("knobs", self.knobs, KNOBS)
        _taken(self.weights, self.features)


def require_clips(frames: int, size: int, metrics: Iterable[str]) -> None:
    """Refuses clips that are too short or too small for a metric."""
    for metric in metrics:
        if metric in ("flicker", "warping") and frames < 2:
            raise UserError(f"frames={frames}: {metric} is of neighbours, so at least 2; or leave it out")
        if size < SMALLEST.get(metric, 1):
            raise UserError(
                f"size={size}: {metric} needs at least {SMALLEST[metric]}; enlarge it, or leave {metric} out"
            )


def by_features(weights: dict[str, str]) -> dict[str, str]:
    """The keys of `weights` as features are called: the command line knows no hyphens in a key, timm's names none."""
    return {name if name.startswith("timm:") else name.replace("_", "-"): file for name, file in weights.items()}


def _taken(weights: dict[str, str], features: str | None, *others: str) -> None:
    """Refuses weights of features that are not looked with."""
    used = (features or "i3d", *others)
    for name in by_features(weights):
        if name not in used:
            raise UserError(
                f"weights.{name}: nobody takes it, features are {', '.join(used)}; files are for {', '.join(FILES)}"
            )


def _among(key: str, values: list[str], known: tuple[str, ...], empty: bool = True) -> None:
    """Refuses values that are not known or are there twice, and no value where that is not a choice."""
    for value in values:
        if value not in known:
            raise UserError(f"{key}={value}: expected some of {', '.join(known)}{nearest(value, known)}")
    if not (values or empty):
        raise UserError(f"{key}=[]: expected some of {', '.join(known)}")
    _once(key, values)


def _once(key: str, values: list[str]) -> None:
    for value in values:
        if values.count(value) > 1:
            raise UserError(f"{key}={','.join(values)}: {value} is there twice")


@dataclass
class Compare:
    """VAEs, or generators, side by side on the same clips: a page of numbers, differences and synchronised players.

    VAEs are runs, exports, official checkpoints or hub ids; generators are folders that lvdm sample wrote, or of
    videos. The first is the one that the others are compared with. The same command with one more measures that one
    only. VAEs: PSNR, SSIM, LPIPS and flicker, paired clip by clip. Generators: FVD and KVD in one protocol, see lvdm
    evaluate generation, whose keys protocol, features, weights, stride, fps and count are.
    """

    positionals: ClassVar[tuple[str, ...]] = ("models",)
    operational: ClassVar[tuple[str, ...]] = ("models", "show", "batch")
    of_generators: ClassVar[tuple[str, ...]] = ("protocol", "features", "weights", "stride", "fps", "count")

    models: list[str] = field(default_factory=list)
    """Two or more, all VAEs or all generators."""
    videos: str = ""
    """Folder of the real videos."""
    out: str = ""
    """Folder for index.html, results.json, clips/ and what was measured of each model."""
    metrics: list[str] = field(default_factory=list)
    """As those of lvdm evaluate reconstruction or generation; empty takes psnr, ssim, lpips, flicker or fvd, kvd."""
    frames: int | None = None
    """Frames a clip; null is 17 for VAEs, and the protocol's for generators."""
    size: int | None = None
    """Height and width; null is 256 for VAEs, and that of the samples for generators."""
    per_video: int = 1
    """Clips a video, evenly spaced."""
    holdout: float = 0.0
    """Clips are from the last part of each shot (0.2 = the last fifth); 0 takes all of it."""
    batch: int = 4
    """Clips at a time."""
    show: int = 8
    """At most so many clips are on the page."""
    protocol: str | None = None
    """Generators: how to measure; null is univae."""
    features: str | None = None
    """Generators: what looks at the clips; null is the protocol's."""
    weights: dict[str, str] = field(default_factory=dict)
    """Generators: files of features that are not fetched by themselves."""
    stride: int | None = None
    """Generators: every how many frames of a real video one is taken; null is the protocol's."""
    fps: float = 0.0
    """Generators: frames a second of real clips, in the place of stride; 0 goes by stride."""
    count: int | None = None
    """Generators: clips a side at most; null is the protocol's."""

    def __post_init__(self) -> None:
        at_least(self, per_video=1, holdout=0.0, batch=1, show=1, fps=0.0)
        for key in ("frames", "size"):
            if getattr(self, key) is not None:
                at_least(self, **{key: 1})


@dataclass
class Card:
    """One VAE on one page: what it is, how good at which frame, its latents, its rFVD, its speed and memory, its looks.

    Without videos= the page has what needs none: facts, speed and memory.
    """

    positionals: ClassVar[tuple[str, ...]] = ("vae",)
    operational: ClassVar[tuple[str, ...]] = ("batch",)

    vae: str = ""
    """The VAE: a run, export, official checkpoint or hub id, or the name of one that comes with the package."""
    videos: str = ""
    """Folder of real videos."""
    out: str = ""
    """Folder for index.html and results.json."""
    frames: int = 17
    """Frames of a clip: of the table, rFVD (at least 9), the latents and the players."""
    size: int = 256
    """Height and width of all clips."""
    long: int = 1001
    """Frames of a shot that PSNR by position looks at, as far as there are so many."""
    per_video: int = 1
    """Clips a video, evenly spaced."""
    batch: int = 4
    """Clips at a time."""
    show: int = 3
    """Clips on the page."""
    speed: list[int] = field(default_factory=lambda: [9, 17, 33])
    """Lengths at which speed and memory are measured; speed=[] leaves that out."""
    speed_size: int = 128
    """Height and width of those clips."""
    features: str | None = None
    """What rFVD looks with; null is i3d."""
    weights: dict[str, str] = field(default_factory=dict)
    """Files of features that are not fetched by themselves."""

    def __post_init__(self) -> None:
        at_least(self, frames=1, size=1, long=1, per_video=1, batch=1, show=1, speed_size=1)
        if short := [frames for frames in self.speed if frames < 1]:
            raise UserError(f"speed={short[0]}: expected lengths of at least 1, or [] to leave speed out")
        _taken(self.weights, self.features)
