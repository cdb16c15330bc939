"""A video through a VAE and back (`lvdm reconstruct`), as a stream: side by side, with PSNR, SSIM and LPIPS."""

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import vae
from lvdm.accelerator import device
from lvdm.cli import program
from lvdm.data.clips import resize
from lvdm.data.reader import iter_frames, probe
from lvdm.errors import UserError
from lvdm.media import to_float, to_uint8, write_mp4
from lvdm.metrics.features import full_precision
from lvdm.metrics.frames import psnr, ssim
from lvdm.metrics.lpips import LPIPS
from lvdm.progress import bar
from sample.configs import Reconstruct
from sample.render import require_refiner
from vae.base import VideoVAE


def run(config: Reconstruct) -> Path:
    """Writes the side-by-side mp4 and prints the means of the metrics over all frames."""
    if not Path(config.video).is_file():
        raise UserError(f"video={config.video}: no such file")
    info = probe(config.video)
    path = output(config)
    model = vae.load(config.vae).to(device())
    require_refiner(model, config.refine, config.vae)
    count = min(info.frames, config.max_frames or info.frames)
    scores: dict[str, list[Tensor]] = {"PSNR": [], "SSIM": [], "LPIPS": []}
    lpips = LPIPS("alex").to(model.device)

    def pairs() -> Iterator[Tensor]:
        with bar("reconstruct", count) as progress:
            for x, y in reconstruct(model, original(config, count), config.refine):
                scores["PSNR"].append(psnr(x, y))
                scores["SSIM"].append(ssim(x, y))
                with torch.no_grad(), full_precision(x.device):
                    scores["LPIPS"].append(lpips.video(x, y))
                progress.advance(x.shape[2])
                yield from to_uint8(torch.cat([x, y], -1)[0].cpu()).permute(1, 2, 3, 0)

    write_mp4(path, pairs(), info.fps)
    means = {name: torch.cat(values, 1).mean().item() for name, values in scores.items()}
    print(f"{path}: original | reconstruction, {count} frames")
    print(f"PSNR {means['PSNR']:.2f} dB, SSIM {means['SSIM']:.4f}, LPIPS (alex) {means['LPIPS']:.4f}")
    return path


def output(config: Reconstruct) -> Path:
    """The mp4 to write, never the video itself."""
    path = Path(config.out or f"{Path(config.video).stem}-reconstructed.mp4")
    if path.suffix != ".mp4" or path.is_dir() or (path.exists() and path.samefile(config.video)):
        raise UserError(f"out={path}: expected the name of an .mp4 file to write, other than the video's")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out={path}: cannot make its folder: {error.strerror}") from None
    return path


def original(config: Reconstruct, count: int) -> Iterator[Tensor]:
    """The video as (1, 3, 8, H, W) pieces in [-1, 1]."""
    pictures = islice(iter_frames(config.video), count)
    while piece := list(islice(pictures, 8)):
        video = torch.stack([torch.as_tensor(picture) for picture in piece])
        video = resize(video, config.short_side) if config.short_side else video.permute(0, 3, 1, 2)
        yield to_float(video.transpose(0, 1)[None])


def reconstruct(model: VideoVAE, video: Iterator[Tensor], refine: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """(original, reconstruction) in pieces of equal length, for a video in pieces; models that do not stream exactly
    see it whole. Sizes off the spatial factor are padded by replication and cropped back."""
    seen: list[Tensor] = []
    size: list[int] = []

    def padded() -> Iterator[Tensor]:
        f, position = model.spec.space_factor, 0
        for piece in video:
            piece = piece.to(model.device)
            seen.append(piece)
            size[:] = piece.shape[-2:]
            pad = (0, -size[1] % f, 0, -size[0] % f, 0, 0)
            whole = F.pad(piece, pad, mode="replicate")
            first = position % 2
            position += piece.shape[2]
            shown = whole[:, :, first::2] if refine else whole
            if shown.shape[2]:
                yield shown
        if refine and position % 2 == 0:  # D2 ends on a frame that the encoder saw: the last one again
            yield whole[:, :, -1:]

    if model.spec.exact_streaming:
        latents = (posterior.mean for posterior in model.stream_encode(padded()))
        rendered = model.stream_decode(latents, refine=refine)
    else:
        with torch.no_grad():
            z = model.encode(torch.cat(list(padded()), 2)).latent_dist.mean
            rendered = iter([(model.refine if refine else model.decode)(z).sample])
    for y in rendered:
        x = torch.cat(seen, 2)
        ready = min(x.shape[2], y.shape[2])
        yield x[:, :, :ready], y[:, :, :ready, : size[0], : size[1]].clamp(-1, 1)
        seen[:] = [x[:, :, ready:]]


def main(argv: list[str] | None = None) -> int:
    """`lvdm reconstruct`."""
    return program(Reconstruct, argv, run)


if __name__ == "__main__":
    sys.exit(main())
