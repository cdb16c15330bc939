"""The real trackers, offline: what they are given lies in the run folder."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from lvdm import trackers
from lvdm.accelerator import close, make_accelerator
from lvdm.media import write_mp4

VIDEO = torch.arange(2 * 16 * 32 * 3).view(2, 16, 32, 3).to(torch.uint8)


@dataclass
class Config:
    tracker: str
    lr: float = 1e-3
    compile: bool = False
    phases: list = field(default_factory=lambda: [{"samples": 4, "strides": [1, 2]}])


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(tracker)`: a run folder in which a value, a picture and a video were tracked, and the config it kept."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "run"

    def track(kind: str) -> tuple[Path, dict]:
        folder.mkdir()
        write_mp4(folder / "two.mp4", VIDEO, 8)
        accelerator = make_accelerator("fp32", tracker=kind, folder=str(folder))
        trackers.start(accelerator, folder, Config(kind))
        accelerator.log({"loss": 0.5}, step=4)
        trackers.log_media(accelerator.trackers, 4, {"still": VIDEO[1]}, {"clip": folder / "two.mp4"})
        kept = dict(accelerator.trackers[0].run.config) if kind == "wandb" else {}
        close(accelerator)
        return folder, kept

    return track


def test_wandb_gets_pictures_videos_and_the_nested_config_in_the_run_folder(run):
    pytest.importorskip("wandb", reason="needs wandb: pip install 'lvdm[wandb]'")
    folder, config = run("wandb")
    (place,) = folder.glob("wandb/offline-run-*/files/media")
    (picture,), (video,) = place.glob("images/still_4_*.png"), place.glob("videos/clip_4_*.mp4")
    with Image.open(picture) as image:
        assert image.size == (32, 16) and image.tobytes() == VIDEO[1].numpy().tobytes()
    assert video.read_bytes() == (folder / "two.mp4").read_bytes()
    assert config["phases"] == [{"samples": 4, "strides": [1, 2]}] and config["lr"] == 1e-3


def test_tensorboard_gets_pictures_and_a_config_of_scalars_in_the_run_folder(run):
    pytest.importorskip("tensorboard", reason="needs TensorBoard: pip install 'lvdm[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = run("tensorboard")
    events = EventAccumulator(str(folder / "lvdm")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(4, 0.5)]
    (image,) = events.Images("still")
    assert (image.step, image.width, image.height) == (4, 32, 16)
    (kept,) = folder.glob("lvdm/*/hparams.yml")
    phases = json.dumps([{"samples": 4, "strides": [1, 2]}])
    assert yaml.safe_load(kept.read_text()) == {
        "tracker": "tensorboard",
        "lr": 1e-3,
        "compile": False,
        "phases": phases,
    }
