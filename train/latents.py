"""Encode a folder of videos once (`lvdm train latents`, `accelerate launch -m train.latents`), or one video."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import vae
from lvdm import accelerator as accelerators
from lvdm.cli import program
from lvdm.data.clips import Clip, ClipPolicy, Clips, Window, crop
from lvdm.data.index import Index
from lvdm.data.reader import probe
from lvdm.data.stream import pad_to, read_pieces
from lvdm.errors import UserError
from lvdm.files import require_space
from lvdm.latents import LatentStore, LatentWriter, Manifest, Record, save_latent
from lvdm.media import to_float
from lvdm.progress import bar
from lvdm.run import RunFolder
from train.configs import Latents
from train.data import index_of
from vae.base import VideoVAE


def run(config: Latents) -> Path:
    """Writes, completes or finds complete the store at `config.out`; every process writes its share of the shards."""
    if config.one_file:
        return encode_file(config)
    accelerator = accelerators.make_accelerator(config.precision)
    model = encoder(config).to(accelerator.device)
    model.spec.check_square(config.size, "size")
    with accelerator.main_process_first():
        folder = RunFolder(config.out, config, accelerator.is_main_process)
    accelerators.threads(config.threads)
    with accelerator.main_process_first():  # which fills the cache of indexes
        index = index_of(config)
    folder.bind(videos=index.hash())
    if folder.finished and (store := there(folder.path)):
        store.require(vae_sha256=model.latent_sha256())  # its run may have been trained anew
        accelerators.close(accelerator)
        return folder.path
    clips, windows = choose(config, index)
    if (note := model.approximation(config.frames)) and accelerator.is_main_process:
        print(note)
    writer = LatentWriter(config.out, manifest(config, model, clips, windows))
    missing = writer.missing()
    if accelerator.is_main_process:
        print(summary(config, clips, windows, writer.manifest.shape))
        left = sum(len(writer.manifest.items(shard)) for shard in missing)
        require_space(folder.path, config.bytes_of(writer.manifest.shape, left), "for the latents")
    accelerator.wait_for_everyone()

    with bar("latents", len(missing), show=accelerator.is_main_process) as progress:
        for shard in missing[accelerator.process_index :: accelerator.num_processes]:
            records: list[Record] = []
            items = writer.manifest.items(shard)
            for first in range(items.start, items.stop, config.batch):
                batch = [clips.read(windows[i]) for i in range(first, min(first + config.batch, items.stop))]
                with accelerator.autocast():
                    records += encode_batch(model, batch, config, clips)
            writer.write(shard, records)
            progress.advance(accelerator.num_processes)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        writer.finish()
        folder.finish(items=len(windows))
    accelerators.close(accelerator)
    return folder.path


def there(folder: Path) -> LatentStore | None:
    """The store of a finished run; None where a shard is gone or damaged since, and has to be written again."""
    try:
        return LatentStore(folder)
    except UserError:
        return None


def encoder(config: Latents) -> VideoVAE:
    """The VAE, with the config's tiles; a UserError for one whose latents cannot be kept."""
    model = vae.load(config.vae)
    model.require_posterior(f"vae={config.vae}")
    model.enable_tiling(config.tile, frames=config.tile_frames)
    return model


@torch.no_grad()
def encode_file(config: Latents) -> Path:
    """One video of any length and size to one latent file, piece by piece where the model streams exactly."""
    if not Path(config.videos).is_file():
        raise UserError(f"videos={config.videos}: out={config.out} names one latent file, so expected one video file")
    accelerator = accelerators.make_accelerator(config.precision)
    accelerators.threads(config.threads)
    model = encoder(config).to(accelerator.device)
    info, stride = probe(config.videos), config.stride or 1
    source = min(info.frames, config.frames * stride) if config.frames else info.frames
    count, size = -(-source // stride), None
    latents: list[torch.Tensor] = []
    if note := model.approximation(count):
        print(note)

    def pieces() -> Iterator[torch.Tensor]:
        nonlocal size
        with bar("encode", count) as progress:
            for piece in read_pieces(config.videos, source, config.size or 0, stride):
                piece = crop(piece, config.size) if config.size else piece
                size = tuple(piece.shape[-2:])
                yield pad_to(piece.to(model.device), model.spec.space_factor)
                progress.advance(piece.shape[2])

    with accelerator.autocast():
        if model.spec.exact_streaming or (model.streams and 0 < config.tile_frames < count):
            latents += [posterior.mean.float().cpu() for posterior in model.stream_encode(pieces())]
        else:
            latents.append(model.encode(torch.cat(list(pieces()), 2)).latent_dist.mean.float().cpu())
    path = Path(config.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    latent = torch.cat(latents, 2)[0]
    save_latent(path, latent, count, info.fps / stride, model.latent_sha256(), size=size)
    accelerators.close(accelerator)
    print(f"{path}: {count} frames of {size[0]}x{size[1]}, latent {tuple(latent.shape)}")
    return path


def choose(config: Latents, index: Index) -> tuple[Clips, list[Window]]:
    """The clips of the store: evenly spaced in each video, each also mirrored when `flip` is set."""
    more = {"fps": config.fps, "short": config.short, "across_cuts": config.across_cuts}
    policy = ClipPolicy(
        config.frames, config.stride, config.size, "center", False, config.split, config.holdout, **more
    )
    clips = Clips(index, policy, seed=0, cache_gib=config.cache_gib).say_skipped()
    windows = clips.grid(config.per_video)
    return clips, [w._replace(flip=flip) for w in windows for flip in ((False, True) if config.flip else (False,))]


def manifest(config: Latents, model: VideoVAE, clips: Clips, windows: list[Window]) -> Manifest:
    """What the store will say of itself."""
    index = clips.index
    return Manifest(
        vae={"class": type(model).__name__, "config": dict(model.options)},
        vae_sha256=model.latent_sha256(),
        num_frames=config.frames,
        stride=config.stride,
        size=(config.size, config.size),
        crop="center",
        shape=model.spec.latent_shape(config.frames, config.size, config.size),
        dtype=config.dtype,
        count=len(windows),
        shard_size=config.shard_size,
        sources=[row.path for row in index.rows],
        classes=index.classes,
        data={
            "index": index.hash(),
            "per_video": config.per_video,
            "flip": config.flip,
            "split": config.split,
            "fps": config.fps,
            "short": config.short,
            "across_cuts": config.across_cuts,
            "holdout": config.holdout,
            "precision": config.precision,
            "tile": config.tile,
            "tile_frames": config.tile_frames,
        },
    )


@torch.no_grad()
def encode_batch(model: VideoVAE, batch: list[Clip], config: Latents, clips: Clips) -> list[Record]:
    """Posteriors of up to `config.batch` clips, in a batch padded to that size so that neighbours cannot matter."""
    video = torch.stack([clip.video for clip in batch])
    padding = video[-1:].expand(config.batch - len(batch), *video.shape[1:])
    posterior = model.encode(to_float(torch.cat([video, padding]).to(model.device))).latent_dist
    return [
        Record(
            mean=mean.float().cpu(),
            logvar=logvar.float().cpu(),
            label=max(clip.label, 0),
            source=clip.row,
            start=clip.start,
            flip=clip.flip,
            num_frames=config.frames,
            fps=clip.fps,
        )
        for clip, mean, logvar in zip(batch, posterior.mean, posterior.logvar, strict=False)
    ]


def describe(config: Latents) -> str:
    """Clips, shape and size on disk, for `--dry-run`."""
    if config.one_file:
        info = probe(config.videos)
        return f"one video: {info.frames} frames of {info.height}x{info.width} at {info.fps:g} fps"
    model = encoder(config)
    clips, windows = choose(config, index_of(config))
    return summary(config, clips, windows, model.spec.latent_shape(config.frames, config.size, config.size))


def summary(config: Latents, clips: Clips, windows: list[Window], shape: Sequence[int]) -> str:
    """What the store will hold, and its size on disk."""
    size = config.bytes_of(shape, len(windows)) / 2**20
    return f"{len(windows)} clips of {len(clips)} videos, latents {tuple(shape)}, {size:.1f} MiB on disk"


def main(argv: list[str] | None = None) -> int:
    """`lvdm train latents`."""
    return program(Latents, argv, run, describe)


if __name__ == "__main__":
    accelerators.leave(main())
