"""Training with the real trackers, offline: validations and previews reach them."""

from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from lvdm.metrics.lpips import LPIPS
from train import validation as validations

KINDS = ("wandb", "tensorboard")


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(validations, "LPIPS", partial(LPIPS, pretrained=False))


def shown(run: Path, kind: str) -> dict[str, list[tuple[int, int, int]]]:
    """(samples, width, height) of every picture by name."""
    if kind == "wandb":
        found = {}
        for path in run.glob("wandb/offline-run-*/files/media/images/*.png"):
            name, samples, _ = path.stem.rsplit("_", 2)
            found.setdefault(name, []).append((int(samples), *Image.open(path).size))
        return {name: sorted(images) for name, images in found.items()}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "lvdm")).Reload()
    images = {name: events.Images(name) for name in events.Tags()["images"]}
    return {name: [(image.step, image.width, image.height) for image in images[name]] for name in images}


@pytest.mark.parametrize("kind", KINDS)
def test_a_validation_is_shown(kind, launch, tmp_path):
    pytest.importorskip(kind, reason=f"needs pip install 'lvdm[{kind}]'")
    phases = [{"samples": 4, "batch": 2, "frames": 5, "size": 32}]
    keys = {"phases": phases, "holdout": 0.4, "validate_every": 4, "validate_clips": 2, "tracker": kind}
    assert launch("train vae", out=tmp_path / "run", **keys) == 0
    assert shown(tmp_path / "run", kind) == {
        "validation": [(4, 2 * 32, 2 * 32)],  # a row a clip, beside its rendering
        "latents": [(4, 2 * 2 * 4, 4 * 4)],
    }
    videos = [
        path.read_bytes()
        for path in (tmp_path / "run").glob("wandb/offline-run-*/files/media/videos/validation_video_4_*")
    ]
    written = (tmp_path / "run" / "validation" / "000000004.mp4").read_bytes()
    assert videos == ([written] if kind == "wandb" else [])


@pytest.mark.parametrize("kind", KINDS)
def test_previews_are_shown(kind, launch, store, vae_run, tmp_path):
    pytest.importorskip(kind, reason=f"needs pip install 'lvdm[{kind}]'")
    keys = {"preview_every": 8, "preview_vae": vae_run, "preview_count": 2, "preview_steps": 2, "tracker": kind}
    assert launch("train dit", out=tmp_path / "run", latents=store, **keys) == 0
    size = (9 * 16, 2 * 16)  # a row a video, all 9 frames
    assert shown(tmp_path / "run", kind) == {"preview": [(8, *size), (16, *size)]}
    videos = list((tmp_path / "run").glob("wandb/offline-run-*/files/media/videos/preview_video_*.mp4"))
    assert len(videos) == (2 if kind == "wandb" else 0)
