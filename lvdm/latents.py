"""Latents on disk: the store a diffusion transformer trains on, and the files of single videos.

A store is a folder of `manifest.json` and `shard-00000.safetensors`, ... It keeps mean and log-variance of the VAE's
posterior rather than one sample, so that every epoch draws fresh latents, and the hash of the VAE's weights, so that
nothing decodes them with others. A shard is a fixed range of items and appears under its name only when it is whole:
a writer that was killed goes on from the missing shards, and several processes may write disjoint shards of one store.
"""

import hashlib
import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lvdm.errors import UserError
from lvdm.files import remove_parts, write_bytes

VERSION = 1
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LOGVAR_RANGE = (-30.0, 20.0)  # the clamp of diffusers' DiagonalGaussianDistribution
AGAIN = "run the same `lvdm train latents` command again, it writes what is missing"
KEY = "lvdm"  # one metadata entry holding JSON: safetensors writes several entries in random order


class Record(TypedDict):
    """One item: the posterior of a clip and where the clip came from."""

    mean: torch.Tensor
    """(C, t, h, w) float32 on the CPU, in the VAE's own scale."""
    logvar: torch.Tensor
    """(C, t, h, w) float32."""
    label: int
    """Index into the manifest's `classes`; 0 where there are none."""
    source: int
    """Index into the manifest's `sources`."""
    start: int
    """First frame of the clip in its source."""
    flip: bool
    """Whether the clip was mirrored left to right."""
    num_frames: int
    """Pixel frames behind the latent, which a latent alone does not tell."""
    fps: float
    """Frames a second of the clip, after the stride."""


COLUMNS = {
    "label": torch.int64,
    "source": torch.int64,
    "start": torch.int64,
    "flip": torch.bool,
    "num_frames": torch.int64,
    "fps": torch.float64,
}


@dataclass(frozen=True)
class LatentScale:
    """Per-channel mean and standard deviation of the latents: what normalises them for diffusion, and back.

    `std` is that of a posterior sample: std^2 = Var(posterior mean) + E(posterior variance).
    """

    mean: Sequence[float]
    std: Sequence[float]

    def normalise(self, z: torch.Tensor) -> torch.Tensor:
        """(..., C, t, h, w) in the VAE's scale -> float32 with mean 0 and standard deviation 1 in every channel."""
        return (z.float() - self._channels(self.mean, z)) / self._channels(self.std, z)

    def denormalise(self, z: torch.Tensor) -> torch.Tensor:
        """The inverse of `normalise`: (..., C, t, h, w) normalised -> float32 in the VAE's scale."""
        return z.float() * self._channels(self.std, z) + self._channels(self.mean, z)

    @staticmethod
    def _channels(values: Sequence[float], z: torch.Tensor) -> torch.Tensor:
        if z.shape[-4] != len(values):
            raise ValueError(f"expected (..., {len(values)}, t, h, w), got {tuple(z.shape)}")
        return torch.tensor(values, dtype=torch.float32, device=z.device).view(-1, 1, 1, 1)


@dataclass(frozen=True)
class Manifest:
    """What a store holds and how it was made. Values are plain JSON: tuples become lists."""

    vae: dict[str, Any]
    """Name or class and config of the VAE."""
    vae_sha256: str
    """`weights_hash` of its weights."""
    num_frames: int
    """Pixel frames of a full clip; a shorter clip says so in its own `num_frames`."""
    stride: int
    """Source frames from one frame of a clip to the next."""
    size: Sequence[int]
    """Height and width of a clip in pixels."""
    crop: str
    """How the frame was cut to `size`."""
    shape: Sequence[int]
    """(C, t, h, w) of an item."""
    dtype: str
    """What mean and logvar are stored as: "bfloat16" or "float32"."""
    count: int
    """Items in the store."""
    shard_size: int
    """Items in a shard; the last may have fewer."""
    sources: Sequence[str]
    """Videos, relative to the dataset's folder."""
    classes: Sequence[str]
    """Class names, or [] without labels."""
    data: dict[str, Any]
    """How items were chosen: the hash of the dataset's index, clips and flips a video, seed."""
    mean: Sequence[float] | None = None
    """Per-channel mean, see `LatentScale`; None until the store is complete."""
    std: Sequence[float] | None = None
    """Per-channel standard deviation, see `LatentScale`; None until the store is complete."""
    complete: bool = False
    version: int = VERSION
    """Version of the store's format."""

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise UserError(f"latent store: dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.count < 1 or self.shard_size < 1 or len(self.shape) != 4:
            raise ValueError(f"count {self.count}, shard_size {self.shard_size}, shape {self.shape} make no store")
        for name, value in json.loads(json.dumps(asdict(self))).items():
            object.__setattr__(self, name, value)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.count // self.shard_size)

    def items(self, shard: int) -> range:
        """The items in a shard."""
        return range(self.count)[shard * self.shard_size : (shard + 1) * self.shard_size]

    def hash(self) -> str:
        """Hex digest of all it says."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def save(self, folder: Path) -> None:
        write_bytes(folder / "manifest.json", (json.dumps(asdict(self), indent=2, sort_keys=True) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        path = folder / "manifest.json"
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            raise UserError(
                f"{folder} is no latent store (no manifest.json); make one with `lvdm train latents`"
            ) from None
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error}); make the store anew in an empty folder") from None
        if values.get("version") != VERSION:
            raise UserError(f"{path}: format version {values.get('version')}, this program reads {VERSION}")
        try:
            return cls(**values)
        except TypeError as error:
            raise UserError(f"{path} does not describe a latent store: {error}") from None


def weights_hash(state_dict: Mapping[str, torch.Tensor]) -> str:
    """sha256 of the names, dtypes, shapes and bytes of a model's weights, whatever their device and order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def sample_posterior(mean: torch.Tensor, logvar: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """mean + exp(logvar / 2) * eps, eps ~ N(0, 1): float32 on the CPU, any shape, a pure function of its arguments."""
    noise = torch.randn(mean.shape, generator=generator)
    return mean.float() + torch.exp(0.5 * logvar.float().clamp(*LOGVAR_RANGE)) * noise


# ---------------------------------------------------------------------------------------------------------------------
# Writing and reading a store


class LatentWriter:
    """Writes a store, or what is still missing of it.

    Every process makes its own writer with the same manifest and writes its share of `missing()`; when all are done,
    one calls `finish()`. Equal inputs give byte-identical stores, however often the work was interrupted or divided.
    """

    def __init__(self, folder: str | Path, manifest: Manifest):
        """Raises UserError where `folder` holds another store; nothing is overwritten."""
        self.folder, self.manifest = Path(folder), manifest
        self.folder.mkdir(parents=True, exist_ok=True)
        # Shards are looked for first: another process may put the manifest and a shard there in between.
        orphans = any(self.folder.glob("shard-*.safetensors"))
        if (self.folder / "manifest.json").exists():
            there = Manifest.load(self.folder)
            there = replace(there, mean=manifest.mean, std=manifest.std, complete=manifest.complete)
            differences = list(_differences(asdict(there), asdict(manifest)))
            if differences:
                raise UserError(f"{folder} holds another latent store ({'; '.join(differences)}); name another folder")
        elif orphans:
            raise UserError(f"{folder} holds shards of an unknown store (no manifest.json); name another folder")
        else:
            manifest.save(self.folder)

    def missing(self) -> list[int]:
        """The shards still to be written, damaged ones included."""
        return [shard for shard in range(self.manifest.shards) if not self._whole(shard)]

    def write(self, shard: int, records: Sequence[Record]) -> None:
        """Writes the records of `manifest.items(shard)`, in order. Raises UserError where a latent is not finite."""
        items = self.manifest.items(shard)
        if len(records) != len(items):
            raise ValueError(f"shard {shard} has {len(items)} items, got {len(records)}")
        for item, record in zip(items, records, strict=True):
            if not (torch.isfinite(record["mean"]).all() and torch.isfinite(record["logvar"]).all()):
                source = self.manifest.sources[record["source"]]
                raise UserError(f"item {item} ({source}): the VAE gave NaN or infinity; try it in float32")
        dtype = DTYPES[self.manifest.dtype]
        tensors = {name: torch.stack([record[name] for record in records]).to(dtype) for name in ("mean", "logvar")}
        if list(tensors["mean"].shape[1:]) != self.manifest.shape or tensors["logvar"].shape != tensors["mean"].shape:
            raise ValueError(
                f"expected latents of {self.manifest.shape}, got {[list(t.shape) for t in tensors.values()]}"
            )
        mean, var = _moments(tensors["mean"], tensors["logvar"])
        for name, column in COLUMNS.items():
            tensors[name] = torch.tensor([record[name] for record in records], dtype=column)
        moments = {"mean": mean.tolist(), "var": var.tolist()}
        path = _shard_path(self.folder, shard)
        try:
            _save(path, tensors, {**moments, "sha256": weights_hash(tensors)})
        except OSError as error:  # the disk is full, most of all
            raise UserError(f"{path}: cannot be written ({error.strerror}); make room, and {AGAIN}") from None

    def finish(self) -> Manifest:
        """Adds the statistics to the manifest and marks it complete. Raises UserError where shards are missing.

        To be called by one process, when no other is writing any more.
        """
        missing = self.missing()
        if missing:
            first = _shard_path(self.folder, missing[0]).name
            raise UserError(
                f"{self.folder}: {len(missing)} of {self.manifest.shards} shards missing ({first}); {AGAIN}"
            )
        remove_parts(self.folder)
        shards = range(self.manifest.shards)
        moments = [_metadata(_open_shard(self.folder, self.manifest, shard)) for shard in shards]
        means, variances = np.array([m["mean"] for m in moments]), np.array([m["var"] for m in moments])
        weights = [len(self.manifest.items(shard)) for shard in shards]
        mean = np.average(means, axis=0, weights=weights)
        # The variance of the whole = mean variance within shards + variance between them.
        var = np.average(variances + (means - mean) ** 2, axis=0, weights=weights)
        self.manifest = replace(self.manifest, mean=mean.tolist(), std=np.sqrt(var).tolist(), complete=True)
        self.manifest.save(self.folder)
        return self.manifest

    def _whole(self, shard: int) -> bool:
        try:
            _open_shard(self.folder, self.manifest, shard)
        except UserError:
            return False
        return True


class LatentStore(torch.utils.data.Dataset):
    """A complete store: `store[i]` is a `Record`, read from memory-mapped shards without reading its neighbours.

    Opening it checks every shard, and raises UserError where one is missing or damaged or the store is incomplete.
    A copy sent to another process opens the files itself.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = Manifest.load(self.folder)
        if not self.manifest.complete:
            raise UserError(f"{folder}: the latent store is incomplete; {AGAIN}")
        self.scale = LatentScale(self.manifest.mean, self.manifest.std)
        self._shards = [_open_shard(self.folder, self.manifest, shard) for shard in range(self.manifest.shards)]

    def __reduce__(self):
        return LatentStore, (self.folder,)

    def __len__(self) -> int:
        return self.manifest.count

    def __getitem__(self, i: int) -> Record:
        if not 0 <= i < len(self):
            raise IndexError(f"item {i} of {len(self)}")
        shard, row = divmod(i, self.manifest.shard_size)
        shard = self._shards[shard]
        # A slice shares the storage of its whole shard, which a worker process would send along: copy.
        record = {name: shard.get_slice(name)[row].to(torch.float32, copy=True) for name in ("mean", "logvar")}
        return record | {name: shard.get_slice(name)[row].item() for name in COLUMNS}

    def shard_bytes(self) -> list[int]:
        """Size of every shard file on disk."""
        return [_shard_path(self.folder, shard).stat().st_size for shard in range(self.manifest.shards)]

    def damage(self, shard: int) -> str:
        """Reads a whole shard; what is wrong with its content, or nothing."""
        file = self._shards[shard]
        expected = _metadata(file).get("sha256")
        found = weights_hash({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118, it is no dict
        if found == expected:
            return ""
        what = "its content is not what was written" if expected else "it was written without a checksum"
        return f"{_shard_path(self.folder, shard)}: {what}; delete it and {AGAIN}"

    def require(self, **asked: Any) -> None:
        """Raises UserError unless these fields of the manifest are as asked, e.g. `vae_sha256=..., num_frames=17`."""
        there = {name: getattr(self.manifest, name) for name in asked}
        differences = list(_differences(there, json.loads(json.dumps(asked))))
        if differences:
            raise UserError(
                f"{self.folder} does not fit ({'; '.join(differences)}): change the config, "
                "or make a fitting store with `lvdm train latents`"
            )


def _moments(mean: torch.Tensor, logvar: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(N, C, t, h, w) as stored -> mean and variance of posterior samples, (C,) float64: the law of total variance."""
    # numpy, because the order of torch's sums depends on its number of threads.
    mean, logvar = mean.double().numpy(), logvar.double().numpy()
    axes = (0, 2, 3, 4)
    return mean.mean(axes), mean.var(axes) + np.exp(logvar.clip(*LOGVAR_RANGE)).mean(axes)


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def _open_shard(folder: Path, manifest: Manifest, shard: int) -> safe_open:
    """Raises UserError where the file is missing, cut short or not the shard that the manifest describes."""
    path = _shard_path(folder, shard)
    expected = {name: [len(manifest.items(shard))] for name in COLUMNS}
    expected |= {name: [len(manifest.items(shard)), *manifest.shape] for name in ("mean", "logvar")}
    try:
        file = safe_open(path, "pt")
        found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118, it is no dict
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {AGAIN}") from None
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); {AGAIN}") from None
    if found != expected or not _metadata(file):
        raise UserError(f"{path} is not the shard that manifest.json describes; {AGAIN}")
    return file


def _differences(there: dict[str, Any], asked: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name in sorted(there.keys() | asked.keys()):
        ours, theirs = there.get(name), asked.get(name)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            yield from _differences(ours, theirs, f"{prefix}{name}.")
        elif ours != theirs:
            yield f"{prefix}{name}: store says {reprlib.repr(ours)}, asked {reprlib.repr(theirs)}"


# ---------------------------------------------------------------------------------------------------------------------
# What a trained transformer remembers of its latents


@dataclass(frozen=True)
class LatentSpace:
    """The latents a transformer was trained on, so that nothing samples in one scale and decodes in another."""

    vae_sha256: str
    """`weights_hash` of the VAE; "" where only its kind is known (official checkpoints)."""
    mean: Sequence[float]
    std: Sequence[float]
    """Per channel, see `LatentScale`."""
    num_frames: int
    """Pixel frames of a clip."""
    fps: float
    """Frames a second of a clip: the median over the first thousand items."""
    stride: int
    """Source frames from one frame of a clip to the next."""
    classes: Sequence[str]
    """Class names, or []."""

    @classmethod
    def of(cls, store: LatentStore) -> "LatentSpace":
        m = store.manifest
        fps = float(np.median([store[i]["fps"] for i in range(min(len(store), 1000))]))
        return cls(m.vae_sha256, m.mean, m.std, m.num_frames, fps, m.stride, m.classes)

    @property
    def scale(self) -> LatentScale:
        return LatentScale(self.mean, self.std)


# ---------------------------------------------------------------------------------------------------------------------
# Latents of single videos


@dataclass(frozen=True)
class LatentFile:
    """The latent of one video, with what its decoding needs."""

    latent: torch.Tensor
    """(C, t, h, w) float32 in the VAE's own scale, not normalised."""
    num_frames: int
    """Pixel frames to decode to."""
    fps: float
    """Frames a second of those."""
    vae_sha256: str
    """`weights_hash` of the VAE that the latent belongs to."""
    extra: dict[str, str]
    """Whatever else is worth keeping, e.g. the prompt or class and the seed."""
    size: Sequence[int] | None = None
    """Height and width of the video, where the latent covers more of them; decoders crop to it."""


def save_latent(
    path: str | Path,
    latent: torch.Tensor,
    num_frames: int,
    fps: float,
    vae_sha256: str,
    extra: dict[str, str] | None = None,
    size: Sequence[int] | None = None,
) -> None:
    """Writes a latent (C, t, h, w), not normalised, as a safetensors file; see `LatentFile`."""
    if latent.dim() != 4:
        raise ValueError(f"expected (C, t, h, w), got {tuple(latent.shape)}")
    values = {"num_frames": num_frames, "fps": fps, "vae_sha256": vae_sha256, "extra": extra or {}, "size": size}
    _save(Path(path), {"latent": latent.detach().cpu().float().contiguous()}, values)


def load_latent(path: str | Path) -> LatentFile:
    """Reads what `save_latent` wrote. Raises UserError where the file is missing, damaged or something else."""
    try:
        with safe_open(path, "pt") as file:
            latent, values = file.get_tensor("latent"), _metadata(file)
    except FileNotFoundError:
        raise UserError(f"{path}: no such latent file") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no latent file, or a damaged one: {error}") from None
    if not values:
        raise UserError(f"{path} holds a latent without its number of frames and VAE; write it with `save_latent`")
    return LatentFile(latent, **values)


# ---------------------------------------------------------------------------------------------------------------------
# Files that are there whole or not at all


def _save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    # Through bytes: safetensors' own save_file makes files that only their owner may read.
    write_bytes(path, save(tensors, {KEY: json.dumps(metadata)}))


def _metadata(file: safe_open) -> dict[str, Any]:
    return json.loads((file.metadata() or {}).get(KEY, "{}"))
