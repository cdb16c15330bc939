"""What can be set in each training program. Importing this imports no torch, so that help and plans answer at once.

Every threshold is counted in samples (clips seen), so that a recipe means the same at any batch size.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lvdm.config import PRECISIONS, TRACKERS, at_least, choice
from lvdm.errors import UserError


@dataclass
class Phase:
    """One stretch of a curriculum."""

    samples: int = 1_000_000
    """Clips to see in this phase."""
    batch: int = 8
    """Clips an optimizer step, over all processes and accumulation steps."""
    lr: float = 1e-4
    """Learning rate."""

    def __post_init__(self) -> None:
        at_least(self, samples=1, batch=1, lr=0.0)


@dataclass
class ClipShape:
    """What a clip is."""

    frames: int = 17
    """Frames a clip, by the VAE's frame rule: 4n+1 in stage 1 (1 = images), 8n+1 in stage 2."""
    size: int = 256
    """Height and width of a clip, divisible by the VAE's spatial factor: 8."""
    stride: int = 1
    """Every how many frames of the video a frame is taken."""
    strides: list[int] = field(default_factory=list)
    """In the place of stride: each clip draws one of these."""
    fps: float = 0.0
    """Frames a second of a clip, in the place of stride; refused where it takes no whole stride. 0 goes by stride."""

    def __post_init__(self) -> None:
        at_least(self, frames=1, stride=1, fps=0.0)
        if any(stride < 1 for stride in self.strides):
            raise UserError(f"strides={self.strides}: expected numbers of at least 1")
        if self.strides and (self.fps or self.stride != 1):
            other = f"fps={self.fps:g}" if self.fps else f"stride={self.stride}"
            raise UserError(f"strides={self.strides} and {other}: each says which frames are taken; keep one of them")


@dataclass
class Kind(ClipShape):
    """One of the kinds of clip that a phase mixes."""

    share: float = 1.0
    """Part of the phase's optimizer steps that show this kind, above 0; those of a mix add up to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise UserError(f"share={self.share:g}: expected a part above 0, up to 1")


@dataclass
class ClipPhase(ClipShape, Phase):
    """One stretch of a curriculum on clips, of one kind or of several mixed."""

    mix: list[Kind] = field(default_factory=list)
    """In the place of one kind: each optimizer step draws one of these by its share, so a batch has one shape."""

    def __post_init__(self) -> None:
        Phase.__post_init__(self)
        ClipShape.__post_init__(self)
        if not self.mix:
            return
        for key, value in vars(ClipShape()).items():
            if getattr(self, key) != value:
                raise UserError(f"{key}={getattr(self, key)} beside mix: each kind of a mix has its own, give it there")
        total = sum(kind.share for kind in self.mix)
        if abs(total - 1) > 1e-6:
            shares = " + ".join(f"{kind.share:g}" for kind in self.mix)
            raise UserError(f"mix: its shares add up to {shares} = {total:g}, expected 1")

    @property
    def kinds(self) -> list[Kind]:
        """What the phase shows: the kinds of its mix, else its own shape."""
        return self.mix or [Kind(**{key: getattr(self, key) for key in vars(ClipShape())})]


@dataclass
class Training:
    """Keys of every training program."""

    # What may differ when a run goes on
    operational: ClassVar[tuple[str, ...]] = (
        "workers",
        "cache_gib",
        "log_every",
        "save_every",
        "keep",
        "tracker",
        "threads",
        "accumulate",
        "gradient_checkpointing",
    )

    out: str = ""
    """Run folder: config, log, checkpoints, export. The same command again resumes."""
    seed: int = 0
    """Order, crops, noise: every draw is a function of it and of the sample's number."""
    phases: list[Phase] = field(default_factory=lambda: [Phase()])
    """The curriculum; one phase is the normal case."""
    accumulate: int = 1
    """Micro-batches an optimizer step; the draws stay the same."""
    precision: str = "bf16"
    """fp32, bf16 or fp16: autocast; weights, statistics and losses stay fp32."""
    warmup: int = 0
    """Samples over which the learning rate rises linearly at the start."""
    schedule: str = "constant"
    """The learning rate after that: constant, or cosine, falling to final_lr at the end of all phases."""
    final_lr: float = 0.0
    """Where a cosine ends."""
    beta1: float = 0.9
    """Adam's first decay."""
    beta2: float = 0.999
    """Adam's second decay."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW); 0 is Adam."""
    clip: float = 0.0
    """Gradients of the model are clipped to this norm; 0 does not clip."""
    clip_start: int = 0
    """Samples after which clipping begins."""
    ema: float = 0.999
    """Decay an update of the averaged weights, which are the ones exported."""
    log_every: int = 1
    """Samples between records in log.jsonl and the tracker; 1 writes one a step."""
    save_every: int = 100_000
    """Samples between checkpoints."""
    keep: int = 2
    """Checkpoints kept."""
    non_finite: str = "stop"
    """What a loss or gradient that is not finite does: stop (naming sample, clips and last checkpoint), or skip (and
    count; twenty in a row stop it in any case). With fp16 a gradient stops it at a hundred in a row, either way."""
    gradient_checkpointing: bool = False
    """Trade time for memory: recompute blocks in the backward pass."""
    tf32: bool = False
    """Let a GPU round the factors of fp32 products to TF32: faster, three digits less."""
    tracker: str = "none"
    """none, wandb or tensorboard; log.jsonl is always written."""
    threads: int = 0
    """CPU threads; 0 takes torch's default, and on resume the count of the start: results repeat bitwise at an equal
    count."""
    deterministic: bool = False
    """Ask CUDA for repeatable kernels (the CPU's repeat anyway)."""

    def __post_init__(self) -> None:
        choice(self, "precision", PRECISIONS)
        choice(self, "tracker", TRACKERS)
        choice(self, "non_finite", ("stop", "skip"))
        choice(self, "schedule", ("constant", "cosine"))
        at_least(self, accumulate=1, warmup=0, clip=0.0, clip_start=0, log_every=1, save_every=1, keep=1, threads=0)
        at_least(self, final_lr=0.0, weight_decay=0.0, ema=0.0, beta1=0.0, beta2=0.0)
        for key in ("ema", "beta1", "beta2"):
            if getattr(self, key) >= 1:
                raise UserError(f"{key}={getattr(self, key)}: expected a decay from 0 to below 1")
        if not self.phases:
            raise UserError("phases: expected at least one phase")
        for i, phase in enumerate(self.phases):
            if phase.samples % phase.batch:
                fits = phase.samples // phase.batch * phase.batch + phase.batch
                raise UserError(f"phases[{i}].samples={phase.samples}: must be a multiple of its batch, e.g. {fits}")
            if phase.batch % self.accumulate:
                raise UserError(f"phases[{i}].batch={phase.batch}: must be divisible by accumulate={self.accumulate}")

    @property
    def total(self) -> int:
        """Samples of all phases."""
        return sum(phase.samples for phase in self.phases)


@dataclass
class Videos:
    """Keys of every program that reads videos."""

    videos: str = ""
    """Folder of videos, frame folders or images, UCF101, SkyTimelapse, or a .csv, .jsonl or .parquet list."""
    labels: str = "auto"
    """Class of a video: folder (its parent folder), file (its name), none, or auto (what the dataset has)."""
    subset: str = "all"
    """Split of UCF101 (train01 to test03) or SkyTimelapse (train, test); all takes everything."""
    short: str = "drop"
    """Shots too short for a clip: drop leaves them out, loop lets them begin again, reflect run back and forth."""
    across_cuts: bool = False
    """Let clips reach over cuts."""
    holdout: float = 0.0
    """Last part of each shot that training never sees (0.2 = the last fifth)."""
    cache_gib: float = 2.0
    """Decoded videos stay in memory, in each process, where all of them fit in so many GiB."""

    def __post_init__(self) -> None:
        choice(self, "labels", ("auto", "folder", "file", "none"))
        choice(self, "short", ("drop", "loop", "reflect"))
        at_least(self, holdout=0.0, cache_gib=0.0)
        if self.holdout >= 1.0:
            raise UserError(f"holdout={self.holdout}: expected a part between 0 and 1")


@dataclass
class Tiles:
    """Keys of every program that puts videos of any length and size through a VAE."""

    tile: int = 0
    """Cut frames that are larger than memory into tiles of so many pixels, blended over a quarter (an approximation:
    a tile sees its own pixels only, and fewer than a pixel sees are refused); 0 keeps frames whole."""
    tile_frames: int = 33
    """Frames at a time. VAEs that stream exactly give the same at any number; the others an approximation where the
    video is longer, its pieces sharing one frame (OD-VAE, CV-VAE). 0 takes whole videos."""

    def __post_init__(self) -> None:
        at_least(self, tile=0, tile_frames=0)


@dataclass
class Validating:
    """Keys of a training that measures itself, while it goes on, on clips that it never sees."""

    # What may differ when a run goes on
    operational: ClassVar[tuple[str, ...]] = (
        *Training.operational,
        *("validate_every", "validate_videos", "validate_clips", "best"),
    )

    validate_every: int = 0
    """Samples between validations, and one at the end: PSNR, SSIM and LPIPS (Alex) of the averaged weights, always on
    the same clips, with pictures, in validation/. 0 is none."""
    validate_videos: str = ""
    """Folder of the videos to validate on; empty takes the held-out part (holdout > 0) of those to train on."""
    validate_clips: int = 8
    """Clips to validate on, evenly spaced, cropped at the centre, shaped as those of the last phase (of a mix, its
    longest kind, at its smallest stride)."""
    best: str = "psnr"
    """The metric (psnr, ssim or lpips) by which the best checkpoint is kept besides the last ones, and its averaged
    weights in export-best/."""

    def __post_init__(self) -> None:
        choice(self, "best", ("psnr", "ssim", "lpips"))
        at_least(self, validate_every=0, validate_clips=1)
        if self.validate_every and not (self.holdout or self.validate_videos):
            raise UserError("validate_every: nothing to validate on: set holdout=0.1, or validate_videos=FOLDER")


@dataclass
class Rendering:
    """Keys of both VAE stages: the curriculum of clips, and the losses of rendered frames."""

    # What may differ when a run goes on
    operational: ClassVar[tuple[str, ...]] = (*Validating.operational, "lpips_chunk")

    phases: list[ClipPhase] = field(default_factory=lambda: [ClipPhase()])
    """The curriculum; one phase is the normal case."""
    compile: bool = False
    """Compile the residual blocks (torch.compile): minutes at the start for each shape of clip, faster steps on a
    GPU."""
    crop: str = "random"
    """Square crop: random or center."""
    flip: bool = True
    """Mirror half of the clips."""
    workers: int = 2
    """Processes that decode videos; 0 decodes in this one."""
    cut_on: str = "workers"
    """Where clips are resized, cropped and flipped: in the workers, or on the device after the transfer (which takes
    work from the workers, and may round to the next level of 255)."""
    images: str = ""
    """Folder of images, of which clips of one frame are made; empty takes single frames of the videos."""
    lpips_weight: float = 1.0
    """Weight of LPIPS (VGG)."""
    lpips_start: int = 0
    """Samples after which LPIPS begins."""
    lpips_frames: int = 0
    """Frames a clip that LPIPS looks at, drawn anew each time; 0 is all."""
    lpips_chunk: int = 16
    """Frames that LPIPS holds in memory at a time; of more it computes the activations twice."""
    adversarial_weight: float = 0.5
    """Weight of the adversarial term, times the adaptive weight; 0 trains without an adversary."""
    adversarial_start: int = 0
    """Samples after which the adversarial term begins."""
    update: str = "joint"
    """Who moves in a step once there is an adversary: joint, both on the same clips; or alternate, as in OD-VAE and
    CV-VAE, the model in even steps and the adversary in odd ones. Every step counts its samples, whoever moves, so each
    learns from half of them."""
    discriminator: str = "3d"
    """Patches of what the adversary judges: 3d, of space and time, or 2d, of each frame."""
    discriminator_width: int = 64
    """Channels of the discriminator's first layer."""
    discriminator_norm: str = "group"
    """group, or batch as published. Batch norm takes its statistics from the clips that a process sees at a time, so
    that no two splits of a step over processes and micro-batches train alike."""
    discriminator_lr: float = 0.0
    """Learning rate of the discriminator, with the same warm-up and schedule; 0 takes the phase's."""

    def __post_init__(self) -> None:
        Training.__post_init__(self)
        Videos.__post_init__(self)
        Validating.__post_init__(self)
        choice(self, "crop", ("random", "center"))
        choice(self, "cut_on", ("workers", "device"))
        choice(self, "update", ("joint", "alternate"))
        choice(self, "discriminator", ("3d", "2d"))
        choice(self, "discriminator_norm", ("group", "batch"))
        at_least(self, workers=0, lpips_weight=0.0, lpips_start=0, lpips_frames=0, lpips_chunk=1)
        at_least(self, adversarial_weight=0.0, adversarial_start=0, discriminator_width=1, discriminator_lr=0.0)
        for key, kind in self.kinds():
            if self.lpips_weight and kind.size < 16:
                raise UserError(f"{key}.size={kind.size}: LPIPS needs at least 16, or set lpips_weight=0")
            if self.adversarial_weight and self.discriminator == "2d" and kind.size < 24:
                raise UserError(f"{key}.size={kind.size}: discriminator=2d needs at least 24, or take 3d")

    def kinds(self) -> Iterator[tuple[str, Kind]]:
        """Every kind of clip in the curriculum, with its place in the config: phases[0], or phases[0].mix[1]."""
        for i, phase in enumerate(self.phases):
            for j, kind in enumerate(phase.kinds):
                yield f"phases[{i}].mix[{j}]" if phase.mix else f"phases[{i}]", kind


@dataclass
class TrainVAE(Rendering, Validating, Training, Videos):
    """Train a video VAE, stage 1: encoder and decoder reconstruct clips (L1 + LPIPS + KL + adversarial)."""

    title: ClassVar[str] = "VAE, stage 1"

    model: str = "univae"
    """Name in the registry: any continuous one of lvdm vae list, or diffusers:CLASS."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Options of the model, e.g. model_args.width=32."""
    init: str = ""
    """Start from the weights of this run, export or hub id instead of fresh ones; must be of the same architecture."""
    kl_weight: float = 1e-6
    """Weight of the KL, summed over the clip."""
    align_vae: str = ""
    """Keep the latents those of this frozen image VAE, as CV-VAE does: a run, export, official checkpoint or hub id."""
    align: str = "decoder"
    """What of it constrains: decoder (it renders our latents frame by frame), encoder (we render its latents), or
    both."""
    align_mapping: str = "random"
    """Which frame a latent is compared with: slice (the first of its group), average, random, or first (of the clip,
    the others left out)."""
    align_weight: float = 1.0
    """Weight of each such constraint, an L1."""
    identity_weight: float = 0.0
    """For model=osvae: weight of |z - z_2D|, which keeps the latents of images those of the image VAE inside."""

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, "align", ("decoder", "encoder", "both"))
        choice(self, "align_mapping", ("first", "slice", "average", "random"))
        at_least(self, kl_weight=0.0, align_weight=0.0, identity_weight=0.0)


@dataclass
class TrainRefine(Rendering, Validating, Training, Videos):
    """Train a video VAE, stage 2: the refinement decoder D2 renders twice the frames from the latents of every second
    one (L1 + LPIPS + adversarial); E and D1 stay frozen.

    A clip has 8n+1 frames at the high rate: `frames` and `stride` of a phase count those, E sees every second.
    """

    title: ClassVar[str] = "VAE, stage 2"

    vae: str = ""
    """The trained stage 1: a run, export or hub id."""
    init: str = "d1"
    """D2 starts from D1's weights (d1), from noise (fresh), or from the D2 of this run, export or hub id."""
    inject: str = "add"
    """How D1's features enter D2: add (the paper), gate, replace, blend, or none (the paper's UniVAE-V2)."""
    middle_weight: float = 1.0
    """Weight, in L1 and LPIPS, of the middle frames, which E does not see, against 1 of the others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, "inject", ("add", "gate", "replace", "blend", "none"))
        at_least(self, middle_weight=0.0)


@dataclass
class BenchTrainVAE:
    """Time and memory of a training step of a VAE: forward and backward pass, optimizer, average, on random clips."""

    positionals: ClassVar[tuple[str, ...]] = ("model",)

    model: str = "univae"
    """Name in the registry: any continuous one of lvdm vae list, or diffusers:CLASS."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Options of the model, e.g. model_args.width=32."""
    against: list[str] = field(default_factory=list)
    """Other models, each as in model, its options behind colons: against=odvae,odvae:variant=1:width=32."""
    losses: list[str] = field(default_factory=lambda: ["l1", "recipe"])
    """l1: L1 alone. recipe: L1, LPIPS, KL and the adversary, as lvdm train vae has them."""
    checkpointing: bool = True
    """Measure steps with gradient checkpointing, too."""
    batch: int = 1
    """Clips a step."""
    frames: int = 0
    """Frames a clip; 0 takes 25 on a GPU and 9 on a CPU."""
    size: int = 0
    """Height and width; 0 takes 256 on a GPU and 64 on a CPU."""
    precision: str = "auto"
    """Autocast: fp32, bf16, fp16, or auto, bf16 where the device computes in it and else fp32."""
    compile: bool = False
    """Compile the residual blocks."""
    rounds: int = 5
    """Rounds; all are measured in each, in turn."""
    out: str = ""
    """JSON file for all that was measured; a page goes beside it, NAME.html."""

    def __post_init__(self) -> None:
        choice(self, "precision", ("auto", *PRECISIONS))
        at_least(self, batch=1, frames=0, size=0, rounds=1)
        for losses in self.losses:
            if losses not in ("l1", "recipe"):
                raise UserError(f"losses={losses}: expected l1, recipe or both")
        if not self.losses:
            raise UserError("losses: expected l1, recipe or both")


OF_STORES = ("per_video", "split", "holdout", "flip", "dtype", "shard_size", "fps", "short", "across_cuts", "subset")


@dataclass
class Latents(Tiles, Videos):
    """Encode a folder of videos once: a store of posterior means and variances for training the DiT.

    With out=NAME.safetensors, one video (videos=FILE) of any length and size becomes one latent file of posterior
    means, which lvdm render decodes.
    """

    operational: ClassVar[tuple[str, ...]] = ("cache_gib", "threads", "batch")

    out: str = ""
    """Folder of the store (the same command again resumes), or the .safetensors file to write."""
    vae: str = ""
    """The trained VAE: a run, export, official checkpoint or hub id."""
    frames: int | None = None
    """Frames a clip; lengths off the VAE's frame rule are padded by it. null is 17; for one file, all of its frames."""
    size: int | None = None
    """Height and width after a centre crop, divisible by the VAE's factor. null is 256; for one file, its own size,
    padded and cropped back by lvdm render."""
    stride: int | None = None
    """Every how many frames of the video a frame is taken. null is 3; for one file, 1."""
    fps: float = 0.0
    """Frames a second of a clip, in the place of stride; refused where it takes no whole stride. 0 goes by stride."""
    per_video: int = 1
    """Clips a video, evenly spaced; 0 takes every window of `frames` frames without overlap."""
    split: str = "train"
    """With holdout > 0: train, val or all."""
    flip: bool = True
    """Keep each clip mirrored, too."""
    precision: str = "fp32"
    """fp32, bf16 or fp16: autocast of the encoder."""
    dtype: str = "float32"
    """How the store keeps numbers: float32 or bfloat16."""
    batch: int = 4
    """Clips encoded at a time (padded to this size, so that neighbours cannot matter)."""
    shard_size: int = 256
    """Items a shard file."""
    threads: int = 0
    """CPU threads; 0 leaves torch's default."""

    @property
    def one_file(self) -> bool:
        """Whether one video becomes one latent file."""
        return self.out.endswith(".safetensors")

    def bytes_of(self, shape: Sequence[int], count: int) -> int:
        """Of the means and variances of `count` items of that shape."""
        return 2 * count * math.prod(shape) * (4 if self.dtype == "float32" else 2)

    def __post_init__(self) -> None:
        Videos.__post_init__(self)
        Tiles.__post_init__(self)
        choice(self, "split", ("train", "val", "all"))
        choice(self, "precision", PRECISIONS)
        choice(self, "dtype", ("float32", "bfloat16"))
        if self.one_file:
            for field_ in dataclasses.fields(self):
                if field_.name in OF_STORES and getattr(self, field_.name) != field_.default:
                    raise UserError(f"{field_.name}: is of a store; out={self.out} names one file")
        else:
            self.frames, self.size, self.stride = self.frames or 17, self.size or 256, self.stride or 3
        at_least(self, per_video=0, batch=1, shard_size=1)
        for key in ("frames", "size", "stride"):
            if getattr(self, key) is not None:
                at_least(self, **{key: 1})


@dataclass
class TrainDiT(Training):
    """Train a Latte diffusion transformer on a latent store."""

    latents: str = ""
    """The latent store (lvdm train latents)."""
    model: str = "latte-xl/2"
    """Name in the registry: latte-{s,b,l,xl}/{2,4,8}."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Options of the model, e.g. model_args.depth=6."""
    init: str = ""
    """Start from the weights of this run, export or hub id instead of fresh ones; must be of the same architecture."""
    condition: str = "auto"
    """class, none, or auto: class when the store has classes."""
    label_dropout: float = 0.1
    """Share of samples trained without their class, for guidance."""
    objective: str = "noise"
    """What the model learns: noise (DDPM with a learned variance, as in the paper), or flow (rectified flow: velocity,
    logit-normal timesteps)."""
    images: str = ""
    """A second store, of single frames (lvdm train latents frames=1, same VAE and size), for joint image-video
    training."""
    images_per_video: int = 0
    """Images seen with each video, of that store; 0 is none."""
    attention: str = "sdpa"
    """Kernel of attention: sdpa, xformers or math (written out, in fp32)."""
    compile: bool = False
    """Compile each block (torch.compile): a minute at the start, faster steps on a GPU."""
    ema: float = 0.9999
    """Decay an update of the averaged weights, which are the ones exported."""
    workers: int = 2
    """Processes that read the store; 0 reads in this one."""
    preview_every: int = 0
    """Samples between previews: videos of the averaged weights, always from the same noise, in previews/. 0 is none."""
    preview_vae: str = ""
    """The VAE of the store, which renders previews: a run, export or hub id."""
    preview_count: int = 4
    """Videos of a preview."""
    preview_steps: int = 50
    """Denoising steps of a preview."""
    preview_guidance: float | None = None
    """Guidance scale of a preview; null is that of lvdm sample: 7, or 1 for unconditional models."""

    # What may differ when a run goes on
    operational: ClassVar[tuple[str, ...]] = (
        *Training.operational,
        *("preview_every", "preview_vae", "preview_count", "preview_steps", "preview_guidance"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, "condition", ("auto", "class", "none"))
        choice(self, "objective", ("noise", "flow"))
        choice(self, "attention", ("sdpa", "xformers", "math"))
        at_least(self, label_dropout=0.0, workers=0, images_per_video=0, preview_every=0, preview_count=1)
        at_least(self, preview_steps=1)
        for key, most in (("label_dropout", 1.0), ("preview_steps", 1000)):
            if not getattr(self, key) <= most:
                raise UserError(f"{key}={getattr(self, key)}: expected at most {most}")
        if self.preview_every and not self.preview_vae:
            raise UserError("preview_vae: expected the VAE of the store, to render what preview_every asks for")


@dataclass
class InitVAE:
    """A video VAE from an image VAE: its weights, with 2D kernels made 3D, in a folder for lvdm train vae init=FOLDER.

    Width, multipliers, blocks, latent channels and the scale of the latents are the image VAE's unless model_args say
    otherwise. Prints how far apart both are on an image, and why.
    """

    positionals: ClassVar[tuple[str, ...]] = ("model",)

    model: str = "univae"
    """Name in the registry: univae, odvae or cvvae."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Options of the model, e.g. model_args.kernels=[3]."""
    source: str = ""
    """The image VAE: a folder or official checkpoint of diffusers' AutoencoderKL, or a run of model=sdvae."""
    mode: str = "tail"
    """Where a 2D kernel goes in a temporal one: tail (the last tap), center, average (all taps), or random (nowhere:
    temporal kernels stay fresh)."""
    out: str = ""
    """Folder to write."""
    seed: int = 0
    """Of the weights that an image VAE does not have."""

    def __post_init__(self) -> None:
        choice(self, "mode", ("tail", "center", "average", "random"))
