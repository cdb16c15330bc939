"""A latent store to look at: `lvdm latents stats`, `verify` and `show`."""

from pathlib import Path

import torch

import vae
from lvdm.accelerator import device
from lvdm.cli import program
from lvdm.errors import Unsound, UserError
from lvdm.latents import LatentStore
from lvdm.media import contact_sheet, to_uint8, write_mp4
from lvdm.progress import bar
from sample.configs import ShowItem, StoreStats, VerifyStore
from sample.render import frames


def stats(config: StoreStats) -> None:
    """Prints what the store holds."""
    store = LatentStore(config.store)
    m, sizes = store.manifest, store.shard_bytes()
    source = f"{m.vae.get('class', 'a VAE')} ({m.vae_sha256[:12]})"
    print(
        f"{config.store}: {m.count} items of {len(m.sources)} videos, shards: {m.shards}, {sum(sizes) / 2**20:.1f} MiB"
    )
    print(f"latents  {tuple(m.shape)}, {m.dtype}, of {source}")
    print(f"clips    {m.num_frames} frames of {m.size[0]}x{m.size[1]}, stride {m.stride}, {m.crop} crop")
    print(
        f"classes  {len(m.classes)}"
        + (f": {', '.join(m.classes[:8])}{', ...' if len(m.classes) > 8 else ''}" * bool(m.classes))
    )
    for channel, (mean, std) in enumerate(zip(m.mean, m.std, strict=True)):
        print(f"channel {channel:<3} mean {mean:+.4f}  std {std:.4f}")


def verify(config: VerifyStore) -> None:
    """Reads all of it; raises `Unsound`, exit code 1, where a shard is not what was written."""
    store, found = LatentStore(config.store), []
    with bar("verify", store.manifest.shards) as progress:
        for shard in range(store.manifest.shards):
            found += [text] if (text := store.damage(shard)) else []
            progress.advance()
    if found:
        raise Unsound("\n".join(found))
    print(f"{config.store}: every shard is as it was written")


@torch.no_grad()
def show(config: ShowItem) -> Path:
    """Writes the item as a video, or an image as a picture, and prints where it is from."""
    store = LatentStore(config.store)
    if config.item >= len(store):
        raise UserError(f"item={config.item}: {config.store} has items 0 to {len(store) - 1}")
    model = vae.load(config.vae).to(device())
    store.require(vae_sha256=model.latent_sha256())
    record = store[config.item]
    pieces = frames(model, record["mean"][None], record["num_frames"])
    video = torch.cat([to_uint8(piece[0].cpu()).permute(1, 2, 3, 0) for piece in pieces])
    suffix = ".mp4" if len(video) > 1 else ".png"
    path = Path(config.out or f"{Path(config.store).name}-{config.item}{suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        contact_sheet([video], path)
    else:
        write_mp4(path, video, record["fps"])
    source, classes = store.manifest.sources[record["source"]], store.manifest.classes
    label = f", {classes[record['label']]}" if classes else ""
    mirrored = ", mirrored" if record["flip"] else ""
    print(f"{path}: {source}, frame {record['start']} on{label}{mirrored}")
    return path


def stats_main(argv: list[str] | None = None) -> int:
    """`lvdm latents stats`."""
    return program(StoreStats, argv, stats)


def verify_main(argv: list[str] | None = None) -> int:
    """`lvdm latents verify`."""
    return program(VerifyStore, argv, verify)


def show_main(argv: list[str] | None = None) -> int:
    """`lvdm latents show`."""
    return program(ShowItem, argv, show)
