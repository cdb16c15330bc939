"""What can be set in each benchmark. Importing this imports no torch."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from lvdm.config import PRECISIONS, at_least, choice
from lvdm.errors import UserError


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
