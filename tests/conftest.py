"""Fixtures for all tests: one thread (so that results repeat), the folder of real videos and a browser, where there is
one."""

import base64
import fcntl
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch starts its threads

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _threads():
    torch.set_num_threads(int(os.environ.get("LVDM_TEST_THREADS", "2")))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real test videos named by LVDM_TEST_DATA; the test is skipped without it."""
    folder = os.environ.get("LVDM_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("LVDM_TEST_DATA does not name a folder of real videos")
    return Path(folder)


class Browser:
    """A page in headless Chromium, driven by its own debugging protocol over a pair of pipes."""

    def __init__(self, program: str, profile: Path):
        ours, theirs = os.pipe(), os.pipe()
        high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in (theirs[0], ours[1])]  # apart from 3 and 4
        actions = [(os.POSIX_SPAWN_DUP2, end, number) for end, number in zip(high, (3, 4), strict=True)]
        actions += [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_WRONLY, 0) for number in (1, 2)]
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--remote-debugging-pipe",
        ]
        flags += [f"--user-data-dir={profile}", "--window-size=1200,900", "--autoplay-policy=no-user-gesture-required"]
        self.pid = os.posix_spawn(
            program, [program, *flags, "about:blank"], os.environ, file_actions=actions, setpgroup=0
        )
        for end in (*high, theirs[0], ours[1]):
            os.close(end)
        self._to, self._from, self._buffer, self._count = theirs[1], ours[0], b"", 0
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session: dict[str, str] = {}
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """What the protocol answers."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params, **getattr(self, "session", {})}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                chunk = os.read(self._from, 1 << 16)
                assert chunk, "the browser ended"
                self._buffer += chunk
            text, _, self._buffer = self._buffer.partition(b"\0")
            if (answer := json.loads(text)).get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, page: Path) -> None:
        """Shows a file and waits for its scripts."""
        self.call("Page.navigate", url=page.resolve().as_uri())
        self.run("new Promise(done => document.readyState === 'complete' ? done() : addEventListener('load', done))")

    def run(self, script: str) -> Any:
        """The value of an expression, awaited; a mistake in it, or in the page, fails the test."""
        answer = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """One key, as from a keyboard."""
        text = {"text": key} if len(key) == 1 else {}
        codes = {" ": 32, "ArrowLeft": 37, "ArrowRight": 39}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=codes[key], **text)

    def picture(self, path: Path) -> Path:
        """What is seen, as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
        return path

    def close(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@pytest.fixture(scope="session")
def browser(tmp_path_factory) -> Iterator[Browser]:
    """Chromium; the test is skipped without one."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not program:
        pytest.skip("no chromium on the PATH, which looks at pages")
    browser = Browser(program, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()
