"""Files from the network, whole or not at all, and archives that never write outside the folder they are meant for."""

import hashlib
import os
import re
import shutil
import ssl
import stat
import subprocess
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.parse import quote

from lvdm.errors import UserError
from lvdm.files import gigabytes, require_space
from lvdm.progress import bar

CHUNK = 2**20
TIMEOUT = 60.0  # seconds without a byte
TRIES = 5  # in a row that bring nothing
_7Z = ["l", "-ba", "-slt", "-p-", "{archive}"], ["x", "-y", "-bb1", "-bd", "-p-", "{archive}", "-o{folder}"]
# Programs that read rar, the best first: how they list the members, and how they extract with a line for each.
RAR_TOOLS: dict[str, tuple[list[str], list[str]]] = {
    "unrar": (["lb", "-p-", "{archive}"], ["x", "-idp", "-o+", "-p-", "{archive}", "{folder}/"]),
    "bsdtar": (["-tf", "{archive}"], ["-xvf", "{archive}", "-C", "{folder}"]),
    "7z": _7Z,
    "7zz": _7Z,
}


@dataclass(frozen=True)
class Remote:
    """A file on the network; `size` in bytes and `sha256` where they are known (0 and "" where not)."""

    url: str
    size: int = 0
    sha256: str = ""

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2].partition("?")[0]


class Unreachable(UserError):
    """The network or its far end does not give the file; the message says how to put it there by hand."""


# ---------------------------------------------------------------------------------------------------------------------
# Download


def fetch(remote: Remote, path: str | Path) -> None:
    """Downloads to `path`, unless it is there. What has come lies in `path`.part, and the next call goes on from there.

    Raises `Unreachable`, and UserError for a full disk or for a file of another size or hash than the published one.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    if path.exists():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _download(remote, path, part)
        _check(remote, part)
        os.replace(part, path)
    except OSError as error:  # of the disk; those of the network are told by _download
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); the same command goes on") from None


def _download(remote: Remote, path: Path, part: Path) -> None:
    """Fills `part`, in as many requests as it takes."""
    have, came, failures = _size(part), False, 0
    if remote.size and have > remote.size:
        part.unlink()
        have = 0
    if remote.size:
        require_space(path.parent, remote.size - have, f"to download {remote.name}")
    while not (remote.size and have == remote.size):
        try:
            if _request(remote, part, have):
                return
            reason = "the connection ended early"
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise _unreachable(remote, path, f"{error.code} {error.reason}") from None
            reason = f"{error.code} {error.reason}"
        except (urllib.error.URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            reason = str(getattr(error, "reason", None) or error) or type(error).__name__
            if isinstance(error, urllib.error.URLError) and not came:
                raise _unreachable(remote, path, reason) from None  # no network: there is nothing to wait for
        failures = 0 if _size(part) > have else failures + 1
        have, came = _size(part), came or _size(part) > have
        if failures == TRIES:
            raise _unreachable(remote, path, reason)
        time.sleep(min(2.0**failures, 30.0))


def _request(remote: Remote, part: Path, have: int) -> bool:
    """One request for what is behind the first `have` bytes; whether all has come."""
    headers = {"User-Agent": "lvdm", **({"Range": f"bytes={have}-"} if have else {})}
    request = urllib.request.Request(remote.url, headers=headers)
    context = ssl.create_default_context()
    if remote.sha256:  # which says more than the server's certificate, and that of www.crcv.ucf.edu is known to fail
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT, context=context)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return True  # there is nothing behind
        part.unlink()  # not a part of what is there now
        return False
    with response:
        if response.status == 200:
            have = 0  # the server gives it from the start
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else 0
        if remote.size and total and total != remote.size:
            raise UserError(f"{remote.url}: has {total:,} bytes, expected {remote.size:,}: not the published file")
        require_space(part.parent, total - have, f"to download {remote.name}")
        with open(part, "r+b" if have else "wb") as file, bar(remote.name, total, have) as progress:
            file.seek(have)
            while chunk := response.read(CHUNK):
                file.write(chunk)
                have += len(chunk)
                progress.advance(len(chunk), f"{gigabytes(have)} of {gigabytes(total)}" if total else gigabytes(have))
    return have == total or not total


def _check(remote: Remote, part: Path) -> None:
    """Refuses, and takes away, a file that is not the published one."""
    problem, size = "", _size(part)
    if remote.size and size != remote.size:
        problem = f"has {size:,} bytes, expected {remote.size:,}"
    elif remote.sha256 and (found := sha256_of(part)) != remote.sha256:
        problem = f"has sha256 {found}, expected {remote.sha256}"
    if problem:
        part.unlink()
        raise UserError(f"{remote.url}: what came {problem}; it is deleted, the same command tries again")


def _unreachable(remote: Remote, path: Path, reason: str) -> Unreachable:
    facts = [f"{remote.size:,} bytes"] if remote.size else []
    facts += [f"sha256 {remote.sha256}"] if remote.sha256 else []
    known = f" ({', '.join(facts)})" if facts else ""
    return Unreachable(
        f"cannot download {remote.url}: {reason}; the same command goes on from what has come, or put that file{known} "
        f"at {path} yourself"
    )


def hub_file(repo: str, suffix: str = ".zip") -> Remote:
    """The largest file with this suffix in a dataset repository of the Hugging Face hub, with its size and sha256."""
    from huggingface_hub import HfApi, constants

    hub = constants.ENDPOINT
    try:
        siblings = HfApi(hub, token=False).dataset_info(repo, files_metadata=True, timeout=TIMEOUT).siblings or []
    except Exception as error:  # its own family, and that of its HTTP library
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Unreachable(f"cannot ask the hub for the dataset {repo}: {reason}") from None
    found = [file for file in siblings if file.rfilename.endswith(suffix)]
    if not found:
        there = ", ".join(file.rfilename for file in siblings[:5]) or "nothing"
        raise UserError(f"{hub}/datasets/{repo}: expected a {suffix} in it, there is {there}")
    best = max(found, key=lambda file: file.size or 0)
    url = f"{hub}/datasets/{repo}/resolve/main/{quote(best.rfilename)}"
    return Remote(url, best.size or 0, best.lfs.sha256 if best.lfs else "")


def sha256_of(path: Path) -> str:
    """Hex digest of a file of any size."""
    digest = hashlib.sha256()
    with open(path, "rb") as file, bar(f"check {path.name}", _size(path)) as progress:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            progress.advance(len(chunk))
    return digest.hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


# ---------------------------------------------------------------------------------------------------------------------
# Archives


def unpack(archive: str | Path, root: str | Path, place: Callable[[Path, Path], None]) -> None:
    """Extracts a .zip or .rar into a temporary folder in `root`, whose files `place(folder, root)` moves to theirs.

    Raises UserError where a member would lie outside of the folder or is a link, where the archive is damaged, without
    a program for rar, and for a full disk. `root` is then as it was.
    """
    archive, root = Path(archive), Path(root)
    scratch = root / f".{archive.name}.unpacked"  # one name, so that what a kill leaves behind is cleared here
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        (_unzip if archive.suffix.lower() == ".zip" else _unrar)(archive, scratch)
        _refuse_links(archive, scratch)
        place(scratch, root)
    except OSError as error:
        raise UserError(f"{archive}: cannot be unpacked into {root}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def move_into(source: Path, target: Path) -> None:
    """Moves a file or folder; into a folder that is there its contents, in the place of files of another size."""
    if source.is_dir() and target.is_dir():
        for child in source.iterdir():
            move_into(child, target / child.name)
    elif not target.exists() or _size(source) != _size(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)


def rar_tool(archive: str | Path) -> str:
    """The program that will unpack a rar; raises UserError where none is installed."""
    for name in RAR_TOOLS:
        if shutil.which(name):
            return name
    raise UserError(
        f"{archive}: no program to unpack rar: install one of {', '.join(RAR_TOOLS)}, or give a zip instead"
    )


def _unzip(archive: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as file:
            members = file.infolist()
            _refuse_outside(archive, (member.filename for member in members))
            for member in members:
                kind = stat.S_IFMT(member.external_attr >> 16)
                if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise UserError(f"{archive}: refused, {member.filename!r} in it is a link or a device")
            total = sum(member.file_size for member in members)
            require_space(folder, total, f"to unpack {archive.name}")
            with bar(f"unpack {archive.name}", total) as progress:
                for member in members:
                    file.extract(member, folder)
                    progress.advance(member.file_size)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise UserError(
            f"{archive}: a damaged zip, or one that cannot be read ({error}); delete it and fetch it again"
        ) from None


def _unrar(archive: Path, folder: Path) -> None:
    tool = rar_tool(archive)
    listing, extraction = (
        [tool, *(part.format(archive=archive.resolve(), folder=folder.resolve()) for part in parts)]
        for parts in RAR_TOOLS[tool]
    )
    plain = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "text": True, "errors": "replace"}
    listed = subprocess.run(listing, stderr=subprocess.PIPE, **plain)
    names = re.findall(r"^Path = (.*)$", listed.stdout, re.M) if "-slt" in listing else listed.stdout.splitlines()
    if listed.returncode or not names:
        said = (listed.stderr or listed.stdout).strip().splitlines() or ["no message"]
        raise UserError(f"{archive}: not an archive that {tool} can read ({said[-1]})")
    _refuse_outside(archive, names)
    require_space(folder, _size(archive), f"to unpack {archive.name}")  # videos and pictures do not pack
    with (
        subprocess.Popen(extraction, stderr=subprocess.STDOUT, **plain) as run,
        bar(f"unpack {archive.name}", len(names)) as progress,
    ):
        last = ""
        for count, line in enumerate(run.stdout):
            last = line.strip() or last
            progress.advance(count < len(names))  # some say a little more
    if run.returncode:
        raise UserError(f"{archive}: {tool} gives up ({last or f'exit code {run.returncode}'})")


def _refuse_outside(archive: Path, names: Iterable[str]) -> None:
    """Raises UserError for a name that leads out of the folder, on any system."""
    for name in names:
        parts = re.split(r"[\\/]", name)
        if ".." in parts or parts[0] == "" or re.match(r"[A-Za-z]:", name) or "\0" in name:
            raise UserError(f"{archive}: refused, {name!r} in it leads out of the folder")


def _refuse_links(archive: Path, folder: Path) -> None:
    """Raises UserError for anything below `folder` but plain files of one name and folders."""
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            found = os.lstat(os.path.join(parent, name))
            if not (stat.S_ISDIR(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_nlink == 1)):
                raise UserError(f"{archive}: refused, {name!r} in it is a link or a device")
