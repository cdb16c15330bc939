"""A video through a VAE and back (`lvdm reconstruct`), as a stream: side by side, with PSNR, SSIM and LPIPS."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import vae
from lvdm.accelerator import device
from lvdm.cli import program
from lvdm.data.reader import probe
from lvdm.data.stream import pad_to, read_pieces
from lvdm.errors import UserError
from lvdm.media import contact_sheet, to_uint8, write_mp4
from lvdm.metrics.features import full_precision
from lvdm.metrics.frames import psnr, ssim
from lvdm.metrics.lpips import LPIPS
from lvdm.progress import bar
from sample.configs import Reconstruct
from sample.render import require_refiner
from vae.base import VideoVAE

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def run(config: Reconstruct) -> Path:
    """Writes original and reconstruction side by side and prints the means of the metrics over all frames."""
    if not Path(config.video).is_file():
        raise UserError(f"video={config.video}: no such file")
    info, path = probe(config.video), output(config)
    model = vae.load(config.vae).to(device())
    require_refiner(model, config.refine, config.vae)
    model.enable_tiling(config.tile, frames=config.tile_frames)
    count = min(info.frames, config.max_frames or info.frames)
    if note := model.approximation(count):
        print(note)
    scores: dict[str, list[Tensor]] = {"PSNR": [], "SSIM": [], "LPIPS": []}
    lpips = LPIPS("alex").to(model.device)

    def pairs() -> Iterator[Tensor]:
        original = read_pieces(config.video, count, config.short_side)
        with bar("reconstruct", count) as progress:
            for x, y in reconstruct(model, original, count, config.refine, config.tile_frames):
                scores["PSNR"].append(psnr(x, y))
                scores["SSIM"].append(ssim(x, y))
                with torch.no_grad(), full_precision(x.device):
                    scores["LPIPS"].append(lpips.video(x, y))
                progress.advance(x.shape[2])
                yield from to_uint8(torch.cat([x, y], -1)[0].cpu()).permute(1, 2, 3, 0)

    if path.suffix == ".png":
        contact_sheet([torch.stack(list(pairs()))], path)
    else:
        write_mp4(path, pairs(), info.fps)
    means = {name: torch.cat(values, 1).mean().item() for name, values in scores.items()}
    print(f"{path}: original | reconstruction, {count} frames" if count > 1 else f"{path}: original | reconstruction")
    print(f"PSNR {means['PSNR']:.2f} dB, SSIM {means['SSIM']:.4f}, LPIPS (alex) {means['LPIPS']:.4f}")
    return path


def output(config: Reconstruct) -> Path:
    """The file to write, never the video itself."""
    video = Path(config.video)
    suffix = ".png" if video.suffix.lower() in IMAGES else ".mp4"
    path = Path(config.out or f"{video.stem}-reconstructed{suffix}")
    if path.suffix not in {suffix, ".mp4"} or path.is_dir() or (path.exists() and path.samefile(video)):
        raise UserError(f"out={path}: expected the name of a file ending in {suffix}, other than the video's")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out={path}: cannot make its folder: {error.strerror}") from None
    return path


@torch.no_grad()
def reconstruct(
    model: VideoVAE, video: Iterable[Tensor], count: int, refine: bool, at_a_time: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """(original, reconstruction) in pieces of equal length, for a video of `count` frames that comes in pieces.

    Models that stream exactly do; of the others, those whose runs of `at_a_time` frames are enabled see longer videos
    so, and else the whole; discrete ones see independent runs. Sizes are padded by replication and cropped back.
    """
    seen: list[Tensor] = []

    def shown() -> Iterator[Tensor]:
        """What the encoder sees."""
        position, last = 0, None
        for piece in video:
            piece = piece.to(model.device)
            seen.append(piece)
            piece = pad_to(piece, model.spec.space_factor)
            first = position % 2
            position += piece.shape[2]
            visible = piece[:, :, first::2] if refine else piece
            if visible.shape[2]:
                yield visible
            last = piece[:, :, -1:]
        if refine and position % 2 == 0:  # D2 ends on a frame that the encoder saw: the last one again
            yield last

    if model.spec.discrete:
        rendered = (model.reconstruct(part) for part in _runs(shown(), at_a_time))
    elif model.spec.exact_streaming or (model.streams and 0 < at_a_time < count):
        latents = (posterior.mode() for posterior in model.stream_encode(shown()))
        rendered = model.stream_decode(latents, refine=refine)
    else:
        rendered = (whole(model, part, refine) for part in _runs(shown(), 0))
    for y in rendered:
        x = torch.cat(seen, 2)
        ready = min(x.shape[2], y.shape[2])
        height, width = x.shape[-2:]
        yield x[:, :, :ready], y[:, :, :ready, :height, :width].clamp(-1, 1)
        seen[:] = [x[:, :, ready:]]


def whole(model: VideoVAE, x: Tensor, refine: bool) -> Tensor:
    """A clip through the model at once."""
    return model.refine(model.encode(x).latent_dist.mode()).sample if refine else model.reconstruct(x)


def _runs(pieces: Iterable[Tensor], length: int) -> Iterator[Tensor]:
    """The stream in runs of `length` frames, or all of it for 0."""
    buffer: list[Tensor] = []
    for piece in pieces:
        buffer.append(piece)
        while length and sum(part.shape[2] for part in buffer) >= length:
            run, rest = torch.cat(buffer, 2).tensor_split([length], 2)
            buffer = [rest]
            yield run
    if sum(part.shape[2] for part in buffer):
        yield torch.cat(buffer, 2)


def main(argv: list[str] | None = None) -> int:
    """`lvdm reconstruct`."""
    return program(Reconstruct, argv, run)


if __name__ == "__main__":
    sys.exit(main())
