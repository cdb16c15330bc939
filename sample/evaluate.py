"""Measure a VAE or generated videos (`lvdm evaluate`). Every table carries the protocol of its numbers."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import vae
from lvdm import accelerator as accelerators
from lvdm import cost
from lvdm.accelerator import device
from lvdm.cli import program
from lvdm.data.clips import FPS_TOLERANCE, ClipPolicy, Clips
from lvdm.data.index import Index, open_index
from lvdm.errors import UserError
from lvdm.files import write_text
from lvdm.latents import LatentFile, weights_hash
from lvdm.media import to_float
from lvdm.metrics.features import I3DFeatures, full_precision
from lvdm.metrics.frames import psnr, ssim
from lvdm.metrics.frechet import ESTIMATOR, FeatureStats, frechet_distance
from lvdm.metrics.lpips import LPIPS
from lvdm.metrics.protocol import Protocol
from lvdm.progress import Bar, bar
from lvdm.run import RunFolder
from sample.configs import Evaluate
from sample.render import frames, latent_files, load_all, require_refiner
from vae.base import VideoVAE

THUMBNAIL = "upscaled 1/8 thumbnail"


@dataclass
class Table:
    """Numbers of one protocol: what `results.json` holds a list of."""

    title: str
    header: list[str]
    rows: list[list[str | float]]
    protocol: dict
    note: str = ""

    def text(self) -> str:
        """For the terminal."""
        cells = [self.header, *[[f"{c:.4g}" if isinstance(c, float) else c for c in row] for row in self.rows]]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.header))]
        lines = ["  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        return "\n".join(
            [self.title, *lines, f"[{Protocol(**self.protocol).describe()}]", *([self.note] if self.note else [])]
        )


def run(config: Evaluate) -> Path:
    """Writes `results.json` to `config.out` and prints its tables."""
    model = vae.load(config.vae).to(device())
    if config.what != "generation":
        model.spec.check_square(config.size, "size")
    folder = RunFolder(config.out, config)
    videos = index_of(config).hash()
    folder.bind(vae=weights_hash(model.state_dict()), videos=videos)  # or the numbers would be of something else
    if not folder.finished:
        accelerators.threads(config.threads)
        measure = {"reconstruction": reconstruction, "refinement": refinement, "generation": generation}[config.what]
        tables = measure(config, model)
        write_text(folder.path / "results.json", json.dumps([asdict(table) for table in tables], indent=2))
        folder.finish(tables=len(tables))
    for table in read_results(folder.path):
        print(table.text() + "\n")
    return folder.path


def read_results(folder: Path) -> list[Table]:
    """The tables that an evaluation wrote."""
    return [Table(**table) for table in json.loads((folder / "results.json").read_text())]


# ---------------------------------------------------------------------------------------------------------------------
# Frames against frames


def reconstruction(config: Evaluate, model: VideoVAE) -> list[Table]:
    """D1's frames and an upscaled thumbnail, against the originals."""
    name = f"{model.title}, D1"

    def views(x: Tensor) -> list[View]:
        return [View("Reconstruction", "all frames", x, {name: autoencode(model, x), THUMBNAIL: thumbnail(x)})]

    return compare(config, views)


def refinement(config: Evaluate, model: VideoVAE) -> list[Table]:
    """D2's middle frames, which the encoder never saw, and its even ones, each beside what needs no D2."""
    require_refiner(model, True, config.vae)

    def views(x: Tensor) -> list[View]:
        z = model.encode(x[:, :, ::2]).latent_dist.mean
        d1, d2 = model.decode(z).sample.clamp(-1, 1), model.refine(z).sample.clamp(-1, 1)
        middle = {"D2": d2[:, :, 1::2], "linear blend of D1's neighbours": (d1[:, :, 1:] + d1[:, :, :-1]) / 2}
        even = {"D2": d2[:, :, ::2], "D1": d1}
        return [
            View("Middle frames at twice the rate", "middle frames only", x[:, :, 1::2], middle),
            View("The frames between them, which the encoder saw", "even frames only", x[:, :, ::2], even),
        ]

    return compare(config, views)


@dataclass
class View:
    """Some frames of a batch, and what is compared with them: one table of a comparison."""

    title: str
    which: str
    target: Tensor
    renderings: dict[str, Tensor]


@torch.no_grad()
def compare(config: Evaluate, views: Callable[[Tensor], list[View]]) -> list[Table]:
    """PSNR, SSIM and LPIPS of each rendering in each view of the clips, means over frames and then clips."""
    clips, count = clips_of(config, config.frames)
    lpips = LPIPS("alex").to(device())
    scores: dict[tuple[str, str], dict[str, list[Tensor]]] = {}
    with bar("evaluate", count) as progress:
        for x in batches(clips, config):
            for view in views(x):
                table = scores.setdefault((view.title, view.which), {})
                for name, y in view.renderings.items():
                    with full_precision(x.device):  # each metric is (B, T): (B, T, 3)
                        values = [m(view.target, y).cpu().double() for m in (psnr, ssim, lpips.video)]
                    table.setdefault(name, []).append(torch.stack(values, -1).mean(1))
            progress.advance(len(x))
    tables = []
    for (title, which), table in scores.items():
        rows = [[name, *torch.cat(values).mean(0).tolist()] for name, values in table.items()]
        protocol = frame_protocol(config, clips, count, lpips, which)
        tables.append(Table(title, ["", "PSNR (dB)", "SSIM", "LPIPS"], rows, protocol.to_dict()))
    return tables


def frame_protocol(config: Evaluate, clips: Clips, count: int, lpips: LPIPS, which: str) -> Protocol:
    """How the frame metrics were made."""
    return Protocol(
        metric="PSNR, SSIM, LPIPS",
        features="lpips-alex",
        weights_sha256=lpips.weights_sha256,
        frames=config.frames,
        **pace_of(clips, clips.policy.stride),
        resize=f"short side to {config.size}, centre crop, uint8",
        count_real=count,
        count_fake=count,
        split=f"{clips.index.root.name}, {clips.policy.split}",
        seed=0,
        estimator=f"mean of per-frame values, then over clips; {which}",
    )


def autoencode(model: VideoVAE, x: Tensor) -> Tensor:
    """x -> posterior mean (or codes) -> D1, clamped to [-1, 1]."""
    return model.reconstruct(x).clamp(-1, 1)


def thumbnail(x: Tensor) -> Tensor:
    """Each frame shrunk to an eighth (antialiased) and enlarged again, bilinearly: what any f8 VAE must beat."""
    images = x.transpose(1, 2).flatten(0, 1)
    h, w = images.shape[-2:]
    small = F.interpolate(images, (h // 8, w // 8), mode="bilinear", antialias=True)
    large = F.interpolate(small, (h, w), mode="bilinear", align_corners=False)
    return large.unflatten(0, (len(x), -1)).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Sets against sets


@torch.no_grad()
def generation(config: Evaluate, model: VideoVAE) -> list[Table]:
    """FVD of generated latents against real clips, for D1 and, at twice the rate, for D2."""
    files = load_all(model, latent_files(f"{config.samples}/latents"), config.vae)
    config = replace(config, size=size_of(files, model, config))
    require_same_rate(config, files[0].fps)
    extractor = I3DFeatures(device())
    count = files[0].num_frames
    sides = {False: clips_of(config, count)}
    if model.spec.refines and has_double_rate(config):
        sides[True] = clips_of(config, 2 * count - 1, 2)
    with bar("FVD", sum(len(files) + count for _, count in sides.values())) as progress:
        tables = [distance(config, model, files, extractor, refine, *side, progress) for refine, side in sides.items()]
    if model.spec.refines and len(tables) == 1:
        by_rate = f"{2 * config.fps:g} fps: not every video has it exactly."
        by_stride = f"stride {config.stride} / 2: take an even stride."
        tables[0].note += f" D2's rate has no real counterpart at {by_rate if config.fps else by_stride}"
    return tables


def size_of(files: list[LatentFile], model: VideoVAE, config: Evaluate) -> int:
    """Height and width of the samples, to which the real clips are cut; refuses samples of several shapes or rates."""
    shapes = {(tuple(file.latent.shape), file.num_frames, file.fps) for file in files}
    height, width = files[0].latent.shape[-2:]
    if len(shapes) > 1 or height != width:
        raise UserError(f"samples={config.samples}: expected square videos of one size, length and rate, got {shapes}")
    return height * model.spec.space_factor


def require_same_rate(config: Evaluate, fps: float) -> None:
    """Refuses a rate or stride at which real clips play at other rates than the samples."""
    if config.fps:
        if abs(config.fps - fps) > FPS_TOLERANCE * fps:
            raise UserError(f"fps={config.fps:g}: real clips play at {config.fps:g} fps then, samples at {fps:.4g}")
        return
    rates = [row.fps for row in index_of(config).ok]
    slowest, fastest = min(rates) / config.stride, max(rates) / config.stride
    if not 0.95 * slowest <= fps <= 1.05 * fastest:
        play = f"{slowest:.4g}" if slowest == fastest else f"{slowest:.4g} to {fastest:.4g}"
        raise UserError(
            f"stride={config.stride}: real clips play at {play} fps then, samples at {fps:.4g};"
            f" give the stride of the latent store, about {max(1, round(max(rates) / fps))}"
        )


def has_double_rate(config: Evaluate) -> bool:
    """Whether real clips can be had at twice the rate."""
    if not config.fps:
        return config.stride % 2 == 0
    try:
        policy = policy_of(config, 1, 2)
        return all(policy.stride_of(row) for row in index_of(config).ok)
    except UserError:  # one of them takes no whole stride
        return False


def distance(
    config: Evaluate,
    model: VideoVAE,
    files: list[LatentFile],
    extractor: I3DFeatures,
    refine: bool,
    clips: Clips,
    count: int,
    progress: Bar,
) -> Table:
    """FVD of one decoder's renderings against `count` real clips."""
    fake, real = FeatureStats(extractor.dim), FeatureStats(extractor.dim)
    for file in files:
        video = torch.cat(list(frames(model, file.latent[None], file.num_frames, refine)), 2)
        fake.update(extractor(video.float().clamp(-1, 1)))
        progress.advance()
    for x in batches(clips, config):
        real.update(extractor(x))
        progress.advance(len(x))
    policy = clips.policy
    protocol = Protocol(
        metric="FVD",
        features=extractor.name,
        weights_sha256=extractor.weights_sha256,
        frames=policy.frames,
        **pace_of(clips, 1),
        resize=f"short side to {config.size}, centre crop, uint8 (real); {extractor.resize}",
        count_real=count,
        count_fake=len(files),
        split=f"{clips.index.root.name}, {clips.policy.split}",
        seed=0,
        estimator=ESTIMATOR,
    )
    name = "generated, D2 (twice the rate)" if refine else "generated, D1"
    title = f"Fréchet video distance, {policy.frames} frames"
    rows = [[name, frechet_distance(real, fake)]]
    return Table(title, ["", "FVD"], rows, protocol.to_dict(), protocol.warning() or "")


# ---------------------------------------------------------------------------------------------------------------------
# Clips


def index_of(config: Evaluate) -> Index:
    return open_index(config.videos, config.labels, config.subset)


def policy_of(config: Evaluate, count: int, speed: int) -> ClipPolicy:
    """Clips of `count` frames, at `speed` times the rate of the config."""
    return ClipPolicy(
        frames=count,
        stride=1 if config.fps else config.stride // speed,
        size=config.size,
        split=config.split,
        holdout=config.holdout,
        fps=config.fps * speed,
        short=config.short,
        across_cuts=config.across_cuts,
    )


def clips_of(config: Evaluate, count: int, speed: int = 1) -> tuple[Clips, int]:
    """The clips to measure on, see `policy_of`, and how many there are."""
    policy = policy_of(config, count, speed)
    clips = Clips(index_of(config), policy, seed=0, cache_gib=config.cache_gib).say_skipped()
    return clips, len(clips.grid(config.per_video))


def pace_of(clips: Clips, stride_fake: int) -> dict[str, float | None]:
    """The strides of a protocol, or the rate that was asked for in their place."""
    if clips.policy.fps:
        return {"stride_real": None, "stride_fake": None, "fps": clips.policy.fps}
    return {"stride_real": clips.policy.stride, "stride_fake": stride_fake}


def batches(clips: Clips, config: Evaluate) -> Iterator[Tensor]:
    """(B, 3, T, H, W) in [-1, 1] on the device."""
    windows = clips.grid(config.per_video)
    for i in range(0, len(windows), config.batch):
        video = torch.stack([clips.read(window).video for window in windows[i : i + config.batch]])
        yield to_float(video.to(device()))


def describe(config: Evaluate) -> str:
    """Parameters and FLOPs of encoding and decoding a clip, for `--dry-run`."""
    model = vae.load(config.vae).to("meta")
    x = torch.empty(1, 3, config.frames, config.size, config.size, device="meta")
    clip = f"a clip of {config.frames}x{config.size}x{config.size}, encoded and decoded"
    return cost.describe_forward(clip, cost.parameters(model), cost.forward_cost(lambda: model(x)))


def main(argv: list[str] | None = None) -> int:
    """`lvdm evaluate`."""
    return program(Evaluate, argv, run, describe)


if __name__ == "__main__":
    sys.exit(main())
