"""Downloads that break off, files that are not the published ones, archives that mean harm, and the programs above."""

import hashlib
import json
import os
import re
import shutil
import stat
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from lvdm.data import datasets, fetch, programs
from lvdm.data.fetch import Remote, Unreachable, hub_file, move_into, unpack
from lvdm.errors import UserError

DATA = bytes(range(256)) * 4096  # 1 MiB


class Handler(BaseHTTPRequestHandler):
    """Gives `server.files` by path; `server.plan` says what goes wrong with the next requests."""

    def do_GET(self) -> None:
        self.server.log.append(self.headers.get("Range"))
        plan = self.server.plan.pop(0) if self.server.plan else {}
        data = self.server.files.get(self.path.partition("?")[0])
        status = plan.get("status") or (404 if data is None else 200)
        if status != 200:
            self.send_error(status)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        start = 0 if plan.get("no_ranges") else start
        self.send_response(416 if start >= len(data) else 206 if start else 200)
        if start:
            place = f"*/{len(data)}" if start >= len(data) else f"{start}-{len(data) - 1}/{len(data)}"
            self.send_header("Content-Range", f"bytes {place}")
        if not plan.get("no_length"):
            self.send_header("Content-Length", str(len(data[start:])))
        self.end_headers()
        self.wfile.write(data[start : plan.get("stop")])

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, *args: object) -> None:
        """A client that goes away early is what some tests are about."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.files, server.plan, server.log = {"/a.bin": DATA}, [], []
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def waits(monkeypatch) -> list[float]:
    """Seconds that a download would have waited."""
    slept: list[float] = []
    monkeypatch.setattr(fetch.time, "sleep", slept.append)
    return slept


@pytest.fixture
def remote(server) -> Remote:
    return Remote(f"{server.url}/a.bin", len(DATA), hashlib.sha256(DATA).hexdigest())


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# ---------------------------------------------------------------------------------------------------------------------
# Download


def test_downloads_once(server, remote, tmp_path, capsys):
    fetch.fetch(remote, tmp_path / "new" / "a.bin")
    assert (tmp_path / "new" / "a.bin").read_bytes() == DATA and names(tmp_path / "new") == ["a.bin"]
    assert "a.bin: 100% 0.00 GB of 0.00 GB" in capsys.readouterr().err
    fetch.fetch(remote, tmp_path / "new" / "a.bin")
    assert server.log == [None]


def test_goes_on_where_another_process_stopped(server, remote, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(DATA[:1000])
    fetch.fetch(remote, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == DATA
    assert server.log == ["bytes=1000-"]


def test_goes_on_when_the_connection_ends_early(server, remote, tmp_path, waits):
    server.plan = [{"stop": 5000}, {"stop": 70_000}, {"status": 503}]
    fetch.fetch(remote, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == DATA
    assert server.log == [None, "bytes=5000-", "bytes=70000-", "bytes=70000-"]
    assert waits == [1.0, 1.0, 2.0]


@pytest.mark.parametrize("known", [True, False])
def test_what_is_whole_already_is_not_fetched_again(server, remote, tmp_path, known):
    """Killed between the last byte and the new name."""
    (tmp_path / "a.bin.part").write_bytes(DATA)
    fetch.fetch(remote if known else Remote(remote.url), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == DATA
    assert server.log == ([] if known else [f"bytes={len(DATA)}-"])


@pytest.mark.parametrize("known", [True, False])
def test_a_part_of_another_file_is_dropped(server, remote, tmp_path, known):
    (tmp_path / "a.bin.part").write_bytes(DATA + b"more")
    fetch.fetch(remote if known else Remote(remote.url), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == DATA
    assert server.log[-1] is None


@pytest.mark.parametrize("plan", [{"no_ranges": True}, {"no_ranges": True, "no_length": True}])
def test_servers_that_know_no_ranges_or_lengths(server, remote, tmp_path, plan):
    (tmp_path / "a.bin.part").write_bytes(b"x" * 1000)
    server.plan = [plan]
    fetch.fetch(remote, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == DATA


def test_another_size_is_refused_before_it_comes(server, remote, tmp_path):
    with pytest.raises(UserError, match=r"a\.bin: has 1,048,576 bytes, expected 7: not the published file"):
        fetch.fetch(Remote(remote.url, 7), tmp_path / "a.bin")
    assert names(tmp_path) == []


def test_another_hash_is_refused_and_deleted(server, remote, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(b"x" * 1000)  # left by something else
    with pytest.raises(UserError, match=f"has sha256 .*, expected {remote.sha256}; it is deleted"):
        fetch.fetch(remote, tmp_path / "a.bin")
    assert names(tmp_path) == []
    fetch.fetch(remote, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == DATA


def test_what_is_not_there_is_told_at_once(server, tmp_path, waits):
    with pytest.raises(Unreachable, match=rf"cannot download {server.url}/b\.zip: 404 Not Found; .* or put that file"):
        fetch.fetch(Remote(f"{server.url}/b.zip"), tmp_path / "b.zip")
    assert waits == [] and names(tmp_path) == []


def test_offline_is_one_line_at_once(remote, tmp_path, waits):
    with pytest.raises(Unreachable) as raised:
        fetch.fetch(Remote("http://127.0.0.1:9/a.bin", remote.size, remote.sha256), tmp_path / "a.bin")
    message = str(raised.value)
    assert "Connection refused" in message and "\n" not in message and waits == []
    assert f"put that file (1,048,576 bytes, sha256 {remote.sha256}) at {tmp_path / 'a.bin'} yourself" in message


def test_a_server_that_fails_for_good_keeps_what_has_come(server, remote, tmp_path, waits):
    server.plan = [{"stop": 5000}, *[{"status": 503}] * fetch.TRIES]
    with pytest.raises(Unreachable, match="503 Service Unavailable; the same command goes on"):
        fetch.fetch(remote, tmp_path / "a.bin")
    assert (tmp_path / "a.bin.part").read_bytes() == DATA[:5000]
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0]
    fetch.fetch(remote, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == DATA and server.log[-1] == "bytes=5000-"


@pytest.mark.parametrize("known", [True, False])
def test_too_small_a_disk_is_told_before(server, remote, tmp_path, monkeypatch, known):
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"0\.00 GB are needed to download a\.bin, only 0\.00 GB are free"):
        fetch.fetch(remote if known else Remote(remote.url), tmp_path / "a.bin")
    assert names(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_disk_that_fills_up_is_a_clean_stop(remote, tmp_path):
    (tmp_path / "a.bin.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"a\.bin: cannot be written \(No space left on device\); the same command"):
        fetch.fetch(remote, tmp_path / "a.bin")
    assert not (tmp_path / "a.bin").exists()


def test_the_largest_zip_of_a_repository_of_the_hub(server, remote, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    files = [
        {"rfilename": "README.md", "size": 5},
        {"rfilename": "few.zip", "size": 6},
        {
            "rfilename": "all.zip",
            "size": len(DATA),
            "lfs": {"sha256": remote.sha256, "size": len(DATA), "pointerSize": 9},
        },
    ]
    server.files["/api/datasets/a/sky"] = json.dumps({"id": "a/sky", "siblings": files}).encode()
    server.files["/datasets/a/sky/resolve/main/all.zip"] = DATA
    found = hub_file("a/sky")
    assert (found.name, found.size, found.sha256) == ("all.zip", len(DATA), remote.sha256)
    fetch.fetch(found, tmp_path / found.name)
    with pytest.raises(UserError, match=r"a/sky: expected a \.rar in it, there is README\.md, few\.zip, all\.zip"):
        hub_file("a/sky", ".rar")
    with pytest.raises(Unreachable, match="cannot ask the hub for the dataset a/none: "):
        hub_file("a/none")


# ---------------------------------------------------------------------------------------------------------------------
# Archives


def make_zip(path: Path, members: dict[str, bytes | str]) -> Path:
    """Members of text are links to it."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.filename = name  # as it stands, with backslashes and all
            info.external_attr = ((stat.S_IFLNK if isinstance(content, str) else stat.S_IFREG) | 0o644) << 16
            file.writestr(info, content)
    return path


def place_all(folder: Path, root: Path) -> None:
    for path in folder.iterdir():
        move_into(path, root / path.name)


def test_a_zip_is_moved_in_when_it_is_whole(tmp_path, capsys):
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "a" / "same.txt").write_text("1234")
    (root / "a" / "half.txt").write_text("12")
    (root / "a" / "own.txt").write_text("mine")
    stale = root / ".x.zip.unpacked" / "left" / "by a kill"
    stale.mkdir(parents=True)
    archive = make_zip(
        tmp_path / "x.zip", {"a/same.txt": b"abcd", "a/half.txt": b"abcd", "a/b/new.txt": b"", "a/c/": b""}
    )
    unpack(archive, root, place_all)
    assert names(root) == ["a", "a/b", "a/b/new.txt", "a/c", "a/half.txt", "a/own.txt", "a/same.txt"]
    assert (root / "a" / "same.txt").read_text() == "1234"  # of the same size: is there already
    assert (root / "a" / "half.txt").read_text() == "abcd"
    assert "unpack x.zip: 100%" in capsys.readouterr().err


HOSTILE = ["../evil", "a/../../evil", "/evil", "//evil", "C:evil", "C:\\evil", "..\\evil", "a\\..\\..\\evil", "\\evil"]


@pytest.mark.parametrize("name", HOSTILE)
def test_zips_whose_members_leave_the_folder_are_refused(tmp_path, name):
    root = tmp_path / "a" / "b" / "root"
    archive = make_zip(tmp_path / "x.zip", {"good": b"1", name: b"2"})
    before = set(Path("/").iterdir())
    with pytest.raises(UserError, match=r"x\.zip: refused, .* leads out of the folder"):
        unpack(archive, root, place_all)
    assert names(tmp_path) == ["a", "a/b", "a/b/root", "x.zip"] and set(Path("/").iterdir()) == before


@pytest.mark.parametrize("target", ["/etc", "..", "good"])
def test_links_in_zips_are_refused(tmp_path, target):
    archive = make_zip(tmp_path / "x.zip", {"good": b"1", "link": target, "link/evil": b"2"})
    with pytest.raises(UserError, match=r"refused, 'link' in it is a link or a device"):
        unpack(archive, tmp_path / "root", place_all)
    assert names(tmp_path) == ["root", "x.zip"]


def test_damaged_zips(tmp_path):
    good = make_zip(tmp_path / "x.zip", {"a": DATA, "b": b"x" * 100}).read_bytes()
    for bad in (good[:-30], good[: len(good) // 2], b"", b"text", good[:200] + bytes(200) + good[400:]):
        (tmp_path / "x.zip").write_bytes(bad)
        with pytest.raises(UserError, match=r"x\.zip: a damaged zip, or one that cannot be read") as raised:
            unpack(tmp_path / "x.zip", tmp_path / "root", place_all)
        assert "\n" not in str(raised.value) and names(tmp_path) == ["root", "x.zip"]


def test_zips_that_do_not_fit(tmp_path, monkeypatch):
    archive = make_zip(tmp_path / "x.zip", {"a": DATA, "b": DATA})
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2 * len(DATA) - 1))
    with pytest.raises(UserError, match=r"are needed to unpack x\.zip, only"):
        unpack(archive, tmp_path / "root", place_all)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2 * len(DATA)))
    unpack(archive, tmp_path / "root", place_all)
    assert names(tmp_path / "root") == ["a", "b"]


@pytest.fixture
def tools(tmp_path, monkeypatch) -> Path:
    """The only folder with programs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def fake(tools: Path, name: str, listing: str, extract: str) -> None:
    """A program that lists with lb, -tf or l, and otherwise runs `extract` in the folder of its last argument."""
    script = f"""#!/bin/sh
PATH=/usr/bin:/bin
case "$1" in
    lb|-tf|l) printf '{listing}' ;;
    *) for last; do :; done
       cd "${{last#-o}}" && {{ {extract}; }} ;;
esac
"""
    (tools / name).write_text(script)
    (tools / name).chmod(0o755)


@pytest.fixture
def rar(tmp_path) -> Path:
    (tmp_path / "my data.rar").write_bytes(b"Rar!")
    return tmp_path / "my data.rar"


GOOD = "mkdir -p d; echo Extracting d/a; echo 1 > d/a; echo Extracting d/b c; echo 2 > 'd/b c'"


@pytest.mark.parametrize(
    "tool, listing",
    [
        ("unrar", r"d/a\nd/b c\nd\n"),
        ("bsdtar", r"d/\nd/a\nd/b c\n"),
        ("7z", r"Path = d/a\nSize = 2\n\nPath = d/b c\n"),
        ("7zz", r"Path = d/a\nSize = 2\n\nPath = d/b c\n"),
    ],
)
def test_a_rar_is_unpacked_by_what_is_installed(tools, rar, tmp_path, tool, listing):
    fake(tools, tool, listing, GOOD)
    unpack(rar, tmp_path / "root", place_all)
    assert names(tmp_path / "root") == ["d", "d/a", "d/b c"]


def test_without_a_program_for_rar_they_are_named(tools, rar, tmp_path):
    with pytest.raises(
        UserError, match=r"my data\.rar: no program to unpack rar: install one of unrar, bsdtar, 7z, 7zz"
    ):
        unpack(rar, tmp_path / "root", place_all)
    assert names(tmp_path / "root") == []


@pytest.mark.parametrize("name", ["../evil", "d/../../evil", "/evil", r"..\\\\evil"])
@pytest.mark.parametrize("tool, prefix", [("unrar", ""), ("bsdtar", ""), ("7z", "Path = ")])
def test_rars_whose_members_leave_the_folder_are_never_extracted(tools, rar, tmp_path, tool, prefix, name):
    fake(tools, tool, rf"{prefix}good\n{prefix}{name}\n", f"touch {tmp_path}/ran")
    with pytest.raises(UserError, match=r"refused, .*evil' in it leads out of the folder"):
        unpack(rar, tmp_path / "root", place_all)
    assert names(tmp_path / "root") == [] and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("extract", ["ln -s /etc evil", "ln -s ../.. evil", "ln /bin/ls evil", "mkfifo evil"])
def test_links_that_come_out_of_a_rar_are_refused(tools, rar, tmp_path, extract):
    if extract.startswith("ln /"):
        (tmp_path / "secret").touch()
        extract = f"ln {tmp_path}/secret evil"
    fake(tools, "unrar", r"good\nevil\n", f"touch good; {extract}")
    with pytest.raises(UserError, match="refused, 'evil' in it is a link or a device"):
        unpack(rar, tmp_path / "root", place_all)
    assert names(tmp_path / "root") == []


def test_a_program_that_gives_up(tools, rar, tmp_path):
    fake(tools, "unrar", r"good\n", "touch good; echo; echo 'CRC failed in good'; echo; exit 3")
    with pytest.raises(UserError, match=r"my data\.rar: unrar gives up \(CRC failed in good\)"):
        unpack(rar, tmp_path / "root", place_all)
    assert names(tmp_path / "root") == []
    fake(tools, "unrar", "", "true")
    with pytest.raises(UserError, match=r"not an archive that unrar can read \(no message\)"):
        unpack(rar, tmp_path / "root", place_all)


# ---------------------------------------------------------------------------------------------------------------------
# The programs


@pytest.fixture
def published(server, real_data, tmp_path, monkeypatch) -> Path:
    """UCF101 as it is published, of 15 genuine videos; everything else of it is as large. The folder of the lists."""
    mini = real_data / "ucf101_mini"
    lists = tmp_path / "lists"
    shutil.copytree(mini / "ucfTrainTestlist", lists)
    for split in ("train02", "train03", "test02", "test03"):
        shutil.copy(lists / f"{split[:-2]}list01.txt", lists / f"{split[:-2]}list{split[-2:]}.txt")
    contents = {
        "/lists.zip": {f"ucfTrainTestlist/{path.name}": path.read_bytes() for path in lists.iterdir()},
        "/videos.zip": {f"UCF101/{path.name}": path.read_bytes() for path in mini.rglob("*.avi")},
    }
    for name, attribute in (("/lists.zip", "UCF101_LISTS"), ("/videos.zip", "UCF101_ZIP")):
        data = make_zip(tmp_path / "made.zip", contents[name]).read_bytes()
        server.files[name] = data
        known = Remote(f"{server.url}{name}", len(data), hashlib.sha256(data).hexdigest())
        monkeypatch.setattr(programs, attribute, known)
    monkeypatch.setattr(programs, "UCF101_RAR", Remote(f"{server.url}/UCF101.rar"))
    parts = {f"{part}{i:02}": count for part, count in (("train", 12), ("test", 3)) for i in (1, 2, 3)}
    monkeypatch.setattr(programs, "UCF101_VIDEOS", {"all": 15, **parts})
    monkeypatch.setattr(programs, "UCF101_CLASSES", 11)
    monkeypatch.setenv("LVDM_CACHE", str(tmp_path / "cache"))
    datasets._say.cache_clear()
    return lists


def test_ucf101_is_fetched_checked_and_indexed(published, server, real_data, tmp_path, capsys):
    root = tmp_path / "ucf"
    arguments = [f"root={root}", "download=true", "verify=true"]
    assert programs.ucf101_main(arguments) == 0
    printed = capsys.readouterr()
    assert f"UCF101 in {root}, all: 15 videos of 11 classes" in printed.out
    assert "indexed, all:\nvideos   15\n" in printed.out and printed.out.endswith("complete\n")
    assert f"{root / 'videos.zip'} (" in printed.err and "is unpacked and may be deleted" in printed.err
    mini = real_data / "ucf101_mini" / "UCF-101"
    assert names(root / "UCF-101") == names(mini)
    assert all(
        (root / "UCF-101" / name).read_bytes() == (mini / name).read_bytes() for name in names(mini) if "." in name
    )
    requests = len(server.log)
    assert programs.ucf101_main(arguments) == 0 and len(server.log) == requests == 2

    [lost, *_] = sorted((root / "UCF-101").rglob("v_HorseRiding*.avi"))
    lost.unlink()
    assert programs.ucf101_main([f"root={root}", "verify=true"]) == 1
    printed = capsys.readouterr().out
    assert f"incomplete: 1 of 15 videos are missing: HorseRiding/{lost.name}\n" in printed
    assert "incomplete: 1 of 11 classes have no video: HorseRiding\n" in printed and "complete\n" not in printed[-10:]
    assert "videos   14\n" in printed
    assert programs.ucf101_main([f"root={root}", "subset=train01"]) == 0  # what is there is indexed
    assert "incomplete: 1 of 12 videos are missing" in capsys.readouterr().out
    (root / "videos.zip").rename(root / "UCF101.zip")  # put there by the user
    assert programs.ucf101_main(arguments) == 0 and len(server.log) == requests


def test_ucf101_of_the_authors_where_the_mirror_is_gone(published, server, tools, tmp_path, capsys):
    del server.files["/videos.zip"]
    root = tmp_path / "ucf"
    assert programs.ucf101_main([f"root={root}", "download=true"]) == 2  # and nothing here reads rar
    assert "videos.zip: 404 Not Found" in capsys.readouterr().err
    server.files["/UCF101.rar"] = b"Rar!"
    path = "UCF-101/HandstandPushups/v_HandStandPushups_g01_c01.avi"
    fake(tools, "unrar", rf"{path}\n", f"mkdir -p {Path(path).parent}; echo x > {path}")
    programs.download_ucf101(root)
    assert names(root / "UCF-101") == ["HandstandPushups", "HandstandPushups/v_HandStandPushups_g01_c01.avi"]


def test_too_small_a_disk_for_the_archive_and_its_contents(published, server, tmp_path, monkeypatch, capsys):
    size = programs.UCF101_ZIP.size
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2 * size - 1))
    assert programs.ucf101_main([f"root={tmp_path / 'ucf'}", "download=true"]) == 2
    assert "are needed for videos.zip and what is in it" in capsys.readouterr().err
    assert not list((tmp_path / "ucf").glob("videos.zip*"))


def test_classes_come_from_names_where_there_are_no_folders(tmp_path):
    for name in ("v_HandStandPushups_g01_c01.avi", "deep/v_YoYo_g25_c04.avi", "deep/other.avi"):
        (tmp_path / "flat" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "flat" / name).touch()
    programs.place_videos(tmp_path / "flat", tmp_path)
    assert names(tmp_path / "UCF-101") == [
        "HandstandPushups",
        "HandstandPushups/v_HandStandPushups_g01_c01.avi",
        "YoYo",
        "YoYo/v_YoYo_g25_c04.avi",
    ]
    with pytest.raises(UserError, match="not that of UCF101"):
        programs.place_videos(tmp_path / "flat", tmp_path)


def test_sky_is_fetched_checked_and_indexed(server, real_data, tmp_path, monkeypatch, capsys):
    mini, root = real_data / "sky_mini", tmp_path / "sky"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setenv("LVDM_CACHE", str(tmp_path / "cache"))
    some = [path for name in ("sky_test/sky05", "sky_train/sky00") for path in sorted((mini / name).rglob("*.jpg"))]
    data = make_zip(
        tmp_path / "x.zip", {f"sky_timelapse/{path.relative_to(mini)}": path.read_bytes() for path in some}
    ).read_bytes()
    listed = {"rfilename": "sky_timelapse.zip", "size": len(data)}
    server.files["/api/datasets/a/sky"] = json.dumps({"id": "a/sky", "siblings": [listed]}).encode()
    server.files["/datasets/a/sky/resolve/main/sky_timelapse.zip"] = data
    monkeypatch.setattr(programs, "SKY_CLIPS", {"train": 1, "test": 1})
    arguments = [f"root={root}", "download=true", "verify=true", "hub=a/sky"]
    assert programs.sky_main(arguments) == 0
    assert "all: 2 folders of frames\nindexed, all:\nvideos   2\n" in capsys.readouterr().out
    requests = len(server.log)
    assert programs.sky_main(arguments) == 0 and len(server.log) == requests

    next((root / "sky_test").rglob("*.jpg")).unlink()
    (root / "sky_train" / "sky00" / "sky00_2").mkdir()
    capsys.readouterr()
    assert programs.sky_main([f"root={root}", "verify=true"]) == 1
    printed = capsys.readouterr().out
    assert "left out: sky_train/sky00/sky00_2: empty\n" in printed
    assert "incomplete: sky_test: 1 of 1 clips of 32 frames are missing\n" in printed
    assert programs.sky_main([f"root={root}", "subset=train", "verify=true"]) == 0


@pytest.mark.parametrize(
    "main, arguments, message",
    [
        (programs.ucf101_main, [], "root=: expected the folder of the dataset"),
        (programs.ucf101_main, ["root=ROOT/none"], "none: no such folder; download=true makes it"),
        (programs.ucf101_main, ["root=ROOT"], "no UCF101 in it, expected UCF-101/<class>/v_<class>_g01_c01.avi"),
        (programs.ucf101_main, ["root=ROOT", "subset=train"], "subset='train': expected one of all, train01"),
        (programs.ucf101_main, ["root=ROOT/file/x", "download=true"], "cannot be made: Not a directory"),
        (programs.sky_main, ["root=ROOT"], "no sky_train or sky_test in it, expected sky_train/<video>"),
        (programs.sky_main, ["root=ROOT", "subset=train01"], "subset='train01': expected one of all, train, test"),
    ],
)
def test_wrong_roots_say_what_was_expected(tmp_path, capsys, main, arguments, message):
    (tmp_path / "file").touch()
    assert main([word.replace("ROOT", str(tmp_path)) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == ["file"]
