"""Tiny videos, untrained models and a latent store, for the programs that use models."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dit
import vae
from lvdm import weights
from lvdm.cli import main
from lvdm.latents import LatentSpace, LatentStore
from lvdm.media import write_mp4


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """The user's weights and clips, but another place for the index of the tests' videos."""
    own, users = tmp_path_factory.mktemp("cache"), weights.cache_dir()
    for name in ("weights", "videos"):
        (users / name).mkdir(parents=True, exist_ok=True)
        (own / name).symlink_to(users / name)
    return own


@contextmanager
def alone(cache: Path) -> Iterator[None]:
    """One thread of the CPU, where results repeat bitwise, and no trace in the user's cache."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LVDM_CACHE", str(cache))
        patch.setenv("ACCELERATE_USE_CPU", "1")
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _alone(cache):
    with alone(cache):
        yield


@pytest.fixture(scope="session")
def lvdm(cache) -> Callable[..., int]:
    """`lvdm("sample", dit=..., **keys)` runs the command in this process and returns its exit code."""

    def run(verb: str, *words: object, **keys: object) -> int:
        with alone(cache):
            return main([*verb.split(), *map(str, words), *(f"{key}={value}" for key, value in keys.items())])

    return run


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> Path:
    """Three videos of 40 frames at 24 fps, moving waves, in the class folders `left` and `right`."""
    folder = tmp_path_factory.mktemp("videos")
    for number, (name, speed) in enumerate((("left/a", 1), ("left/b", 2), ("right/c", -1))):
        (folder / name).parent.mkdir(exist_ok=True)
        write_mp4(folder / f"{name}.mp4", waves(40, 48, 64, speed, number), 24)
    return folder


def waves(frames: int, height: int, width: int, speed: float = 1.0, number: int = 0) -> np.ndarray:
    """uint8 (T, H, W, 3) of levels 40 to 215, so that small offsets stay in range."""
    t, y, x = np.mgrid[:frames, :height, :width]
    channels = [np.sin((x + speed * t) / (5 + k + number)) * np.cos(y / (6 + 2 * k)) for k in range(3)]
    return (127.5 + 87 * np.stack(channels, -1)).astype(np.uint8)


@pytest.fixture(scope="session")
def vae_of(tmp_path_factory) -> Callable[..., str]:
    """`vae_of(seed=1, norm="clip")`: the folder of an exported tiny VAE."""
    made: dict[str, str] = {}

    def export(seed: int = 0, **options: Any) -> str:
        key = repr((seed, sorted(options.items())))
        if key not in made:
            made[key] = str(tmp_path_factory.mktemp("vae"))
            torch.manual_seed(seed)
            vae.build("univae", width=16, blocks=1, **options).save_pretrained(made[key])
        return made[key]

    return export


@pytest.fixture(scope="session")
def refiner(vae_of) -> str:
    """The VAE of the store, with D2."""
    return vae_of(refine=True)


@pytest.fixture(scope="session")
def inexact(vae_of) -> str:
    """A VAE with D2 that does not stream exactly."""
    return vae_of(refine=True, norm="clip", upsample="trilinear")


@pytest.fixture(scope="session")
def store(lvdm, videos, refiner, tmp_path_factory) -> Path:
    """Six latents of 9 frames of 32x32 at 12 fps, of two classes."""
    out = tmp_path_factory.mktemp("store")
    keys = {"frames": 9, "size": 32, "stride": 2, "per_video": 2, "flip": "false"}
    assert lvdm("train latents", videos=videos, vae=refiner, out=out, **keys) == 0
    return out


@pytest.fixture(scope="session")
def dit_of(store, tmp_path_factory) -> Callable[..., str]:
    """`dit_of(label_dropout=0)`: the folder of an exported tiny Latte for the latents of `store`."""

    def export(**options: Any) -> str:
        torch.manual_seed(0)
        space = asdict(LatentSpace.of(LatentStore(store)))
        shape = {"in_channels": 4, "frames": 3, "size": (4, 4), "depth": 2, "width": 32, "heads": 2}
        classes = {"condition": "class", "num_classes": 2}
        model = dit.build("latte-s/2", **{**shape, **classes, "latents": space, **options})
        for parameter in model.parameters():  # a fresh Latte predicts zero, whatever its input
            torch.nn.init.normal_(parameter, std=0.2)
        folder = tmp_path_factory.mktemp("dit")
        model.save_pretrained(folder)
        return str(folder)

    return export


@pytest.fixture(scope="session")
def transformer(dit_of) -> str:
    """Class-conditional, with a null class."""
    return dit_of()


@pytest.fixture(scope="session")
def samples(lvdm, transformer, refiner, tmp_path_factory) -> Path:
    """Five videos drawn from `transformer`, rendered by D1 and D2."""
    out = tmp_path_factory.mktemp("samples")
    assert lvdm("sample", dit=transformer, vae=refiner, out=out, count=5, batch=4, steps=3, guidance=3) == 0
    return out
