"""What wandb and TensorBoard are told of a run beside its numbers: the config, pictures and videos."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lvdm.config import to_dict


def start(accelerator: Any, folder: Path, config: Any) -> None:
    """Begins the tracker that the accelerator was made with, if any, in the run folder, and tells it the config.

    TensorBoard's table of hyperparameters holds scalars only: there a list or dict is JSON text.
    """
    values = to_dict(config)
    if config.tracker == "tensorboard":
        values = {k: v if isinstance(v, str | int | float) else json.dumps(v) for k, v in values.items()}
    accelerator.init_trackers("lvdm", values, {"wandb": {"dir": str(folder), "name": folder.name}})


def log_media(
    trackers: Sequence[Any], samples: int, pictures: Mapping[str, Tensor], videos: Mapping[str, Path]
) -> None:
    """Shows pictures, uint8 (H, W, 3), and MP4 files, each by its name, at so many samples seen.

    Videos go to wandb alone: TensorBoard shows GIFs, and needs moviepy to write them.
    """
    images = {name: picture.numpy()[None] for name, picture in pictures.items()}
    for tracker in trackers:
        if tracker.name == "tensorboard":
            tracker.log_images(images, step=samples, dataformats="NHWC")
        else:
            from wandb import Video  # an extra

            tracker.log_images(images, step=samples)
            tracker.log({name: Video(path) for name, path in videos.items()}, step=samples)
