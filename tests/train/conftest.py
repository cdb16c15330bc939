"""Tiny videos, a finished run of each training program on them, and the way to launch more, all on one thread."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lvdm.cli import main
from lvdm.config import configs_root
from lvdm.media import write_mp4
from lvdm.run import read_log

CLIP = {"batch": 2, "lr": 1e-3, "size": 16}
TIMES = ("seconds", "samples_per_s", "tflops", "waiting")
COMMON = {"workers": 0, "precision": "fp32", "threads": 1}
LOSSES = {"lpips_weight": 0, "adversarial_weight": 0, "discriminator_width": 8}
TINY = {
    "train vae": {
        **{"model_args": {"width": 16, "blocks": 1}, **COMMON, **LOSSES},
        "phases": [{"samples": 4, "frames": 5, **CLIP}],
    },
    "train refine": {**COMMON, **LOSSES, "phases": [{"samples": 4, "frames": 9, **CLIP}]},
    "train latents": {
        "precision": "fp32",
        "threads": 1,
        "frames": 9,
        "size": 16,
        "stride": 2,
        "per_video": 2,
        "shard_size": 4,
    },
    "train dit": {
        **{"model": "latte-s/2", "model_args": {"depth": 2, "width": 32, "heads": 2}, **COMMON},
        "phases": [{"samples": 16, "batch": 4, "lr": 1e-3}],
    },
}


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """Where the programs keep their index of the videos."""
    return tmp_path_factory.mktemp("cache")


@contextmanager
def alone(cache: Path) -> Iterator[None]:
    """One thread of the CPU, where results repeat bitwise, and no trace in the user's cache."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LVDM_CACHE", str(cache))
        patch.setenv("ACCELERATE_USE_CPU", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _alone(cache):
    with alone(cache):
        yield


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> Path:
    """Three videos of 48 frames of 48x48, moving waves, in the class folders `left` and `right`."""
    folder = tmp_path_factory.mktemp("videos")
    y, x, t = np.mgrid[:48, :48, :48]
    for number, (name, speed) in enumerate((("left/a", 1), ("left/b", 2), ("right/c", -1))):
        waves = [np.sin((x + speed * t) / (5 + k + number)) * np.cos(y / (6 + 2 * k)) for k in range(3)]
        (folder / name).parent.mkdir(exist_ok=True)
        frames = np.stack(waves, axis=-1).transpose(2, 0, 1, 3)
        write_mp4(folder / f"{name}.mp4", (127.5 * (frames + 1)).astype(np.uint8), 24)
    return folder


@pytest.fixture(scope="session")
def command(videos) -> Callable[..., list[str]]:
    """`command("train vae", out=..., **keys)`: the arguments of `lvdm` for a tiny run with these keys."""

    def words(verb: str, **keys: Any) -> list[str]:
        data = {} if verb == "train dit" else {"videos": str(videos)}
        keys = {**data, **TINY[verb], **keys}
        return [*verb.split(), *(f"{k}={v if isinstance(v, str | Path) else json.dumps(v)}" for k, v in keys.items())]

    return words


@pytest.fixture(scope="session")
def launch(command, cache) -> Callable[..., int]:
    """`launch("train vae", out=..., **keys)`: runs it in this process and returns its exit code."""

    def run(verb: str, *flags: str, **keys: Any) -> int:
        with alone(cache):
            return main([*command(verb, **keys), *flags])

    return run


@pytest.fixture(scope="session")
def steps() -> Callable[[Path], dict[int, dict[str, float]]]:
    """The records of a run's steps by samples seen, but for the time they took; each step once, in order."""

    def read(run: Path) -> dict[int, dict[str, float]]:
        records = [record for record in read_log(run) if "event" not in record]
        samples = [record["samples"] for record in records]
        assert samples == sorted(set(samples))
        timeless = ({k: v for k, v in record.items() if k not in ("samples", *TIMES)} for record in records)
        return dict(zip(samples, timeless, strict=True))

    return read


@pytest.fixture(scope="session")
def weights() -> Callable[[Path], dict[str, torch.Tensor]]:
    """The exported weights of a run."""
    return lambda run: load_file(run / "export" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="session")
def vae_run(launch, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "vae"
    assert launch("train vae", out=out) == 0
    return out


@pytest.fixture(scope="session")
def refine_run(launch, vae_run) -> Path:
    out = vae_run.with_name("refine")
    assert launch("train refine", out=out, vae=vae_run) == 0
    return out


@pytest.fixture(scope="session")
def store(launch, vae_run) -> Path:
    """12 latents: two clips of each video, both ways, of the classes `left` and `right`."""
    out = vae_run.with_name("latents")
    assert launch("train latents", out=out, vae=vae_run) == 0
    return out


@pytest.fixture(scope="session")
def dit_run(launch, store) -> Path:
    out = store.with_name("dit")
    assert launch("train dit", out=out, latents=store) == 0
    return out


@pytest.fixture(scope="session")
def accelerated(command, cache, tmp_path_factory) -> Callable[..., subprocess.Popen]:
    """`accelerated("zero2", "train dit", out=..., **keys)`: starts a shipped config of accelerate on two processes."""
    on_cpu = tmp_path_factory.mktemp("accelerate") / "ddp.yaml"
    shipped = configs_root() / "accelerate"
    on_cpu.write_text((shipped / "ddp.yaml").read_text().replace("use_cpu: false", "use_cpu: true"))
    files = {"ddp": on_cpu, "zero2": shipped / "zero2.yaml"}

    def start(engine: str, verb: str = "train dit", **keys: Any) -> subprocess.Popen:
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(files[engine])]
        launcher += ["--num_processes", "2", "--main_process_port", "0"]
        environment = {**os.environ, "LVDM_CACHE": str(cache), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        environment.pop("ACCELERATE_USE_CPU", None)  # which would make each process a world of its own
        program = [*launcher, "-m", verb.replace(" ", "."), *command(verb, **keys)[2:]]
        return subprocess.Popen(program, env=environment, stderr=subprocess.PIPE)

    return start


@pytest.fixture(scope="session")
def trained(accelerated) -> Callable[..., Path]:
    """The same, to its end; returns the run."""

    def run(engine: str, verb: str = "train dit", **keys: Any) -> Path:
        process = accelerated(engine, verb, **keys)
        errors = process.communicate(timeout=240)[1]
        assert process.returncode == 0, errors.decode()[-3000:]
        return keys["out"]

    return run


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a folder, with its bytes."""
    return lambda folder: {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
