"""Folders of frames and single images: order, pixels, and what is refused."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from lvdm.data import frames
from lvdm.data.frames import FPS, VideoInfo
from lvdm.data.reader import Unreadable, iter_frames, probe, read_frames


def _noise(*shape, seed=0, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def _folder(path, count=4, shape=(20, 30, 3)):
    """PNG files whose order by name is not that by number."""
    path.mkdir()
    pictures = [_noise(*shape, seed=i) for i in range(count)]
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(path / f"take2_{i + 8}.png")
    return np.stack(pictures)


def test_sky_frame_exact(real_data):
    for split in ("sky_train", "sky_test"):
        folder = sorted((real_data / "sky_mini" / split).glob("*/*"))[0]
        files = sorted(folder.iterdir())  # their numbers have leading zeros
        full = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
        assert probe(folder) == VideoInfo(32, FPS, 128, 128, False)
        assert np.array_equal(np.stack(list(iter_frames(folder))), full)
        for indices in (range(32), range(2, 30, 3), [31, 0, 16, 0]):
            found = read_frames(str(folder), indices)
            assert found.dtype == torch.uint8 and torch.equal(found, torch.from_numpy(full[list(indices)]))
        assert torch.equal(read_frames(files[3], [0, 0]), torch.from_numpy(full[[3, 3]]))
        assert probe(files[3]).frames == 1
        # small ones by the short cut of JPEG are those of the whole picture, within rounding
        small = np.stack(list(iter_frames(folder, (32, 16))))
        exact = full.reshape(32, 16, 8, 32, 4, 3).mean((2, 4))
        assert small.shape == (32, 16, 32, 3) and abs(small - exact).mean() < 2


def test_order():
    def ordered(*names):
        return sorted(reversed(names), key=frames._order) == list(names)

    assert ordered("sky_9.jpg", "sky_10.jpg", "sky_011.jpg")
    assert ordered("7_b_1.jpg", "5_a_2.jpg")  # after the last underscore
    assert ordered("8k_frame9.jpg", "4k_frame10.jpg", "2k_frame11_small.jpg")  # the last number
    assert ordered("a_1.jpg", "b_1.jpg", "z2.jpg", "one.jpg", "two.jpg")
    assert ordered("x_1.5_2.jpg", "x_0.7_3.jpg")


def test_only_pictures_of_the_folder_count(tmp_path):
    folder = tmp_path / "a.mp4"  # whatever its name
    full = _folder(folder)
    (folder / "Thumbs.db").write_text("no picture")
    (folder / "._take2_8.png").write_text("no picture")
    (folder / "deeper.png").mkdir()
    assert probe(folder).frames == 4
    assert torch.equal(read_frames(folder, [3, 0]), torch.from_numpy(full[[3, 0]]))
    Image.fromarray(full[0]).save(folder / "take2_1.PNG")  # the list follows the folder
    os.utime(folder, ns=(0, 0))
    assert probe(folder).frames == 5
    assert torch.equal(read_frames(folder, [0, 1]), torch.from_numpy(full[[0, 0]]))


@pytest.mark.parametrize("suffix", frames.SUFFIXES)
def test_kinds(tmp_path, suffix):
    picture = np.linspace(0, 255, 24 * 32 * 3).astype(np.uint8).reshape(24, 32, 3)
    path = tmp_path / f"a{suffix}"
    Image.fromarray(picture).save(path)
    assert probe(path) == VideoInfo(1, FPS, 32, 24, False)
    found = read_frames(path, [0])
    assert torch.equal(found, torch.from_numpy(next(iter_frames(path)))[None])
    loss = abs(found[0].numpy().astype(int) - picture).max()
    assert loss == 0 or suffix in (".jpg", ".jpeg", ".webp")


def test_modes(tmp_path):
    colour, grey, deep = _noise(6, 8, 4), _noise(6, 8), _noise(6, 8, dtype=np.uint16)
    asked = {
        "rgba.png": (colour, colour[..., :3]),  # alpha is dropped, not blended
        "la.png": (np.stack([grey, grey[::-1]], -1), grey[..., None]),
        "grey.png": (grey, grey[..., None]),
        "deep.png": (deep, (deep >> 8)[..., None]),
        "deep.tif": (deep, (deep >> 8)[..., None]),
    }
    for name, (picture, expected) in asked.items():
        Image.fromarray(picture).save(tmp_path / name)
        found = read_frames(tmp_path / name, [0])[0]
        assert torch.equal(found, torch.from_numpy(np.broadcast_to(expected, (6, 8, 3)).astype(np.uint8))), name
    Image.fromarray(colour[..., :3]).quantize(16).save(tmp_path / "palette.png", transparency=0)
    assert read_frames(tmp_path / "palette.png", [0]).shape == (1, 6, 8, 3)
    Image.fromarray(np.zeros((6, 8), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(Unreadable, match=r"float\.tif: its 32-bit channels .* save it with 8 or 16 bits"):
        probe(tmp_path / "float.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    picture = np.zeros((24, 32, 3), np.uint8)
    picture[:12, :16], picture[:12, 16:], picture[12:, :16] = 240, 160, 80  # four corners apart
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.jpg"
    Image.fromarray(picture).save(path, exif=exif)
    turns = {1: 0, 2: 0, 3: 2, 4: 2, 5: 3, 6: 3, 7: 1, 8: 1}[orientation]
    expected = np.rot90(picture, turns)
    if orientation in (2, 4, 5, 7):
        expected = expected[:, ::-1]
    info = probe(path)
    assert (info.height, info.width) == expected.shape[:2]
    assert abs(read_frames(path, [0])[0].numpy().astype(int) - expected).max() < 12
    assert next(iter_frames(path, (12, 16))).shape == (16, 12, 3)


def test_damage_is_named(tmp_path):
    folder = tmp_path / "clip"
    full = _folder(folder)
    Image.fromarray(full[2][:, :20]).save(folder / "take2_10.png")
    with pytest.raises(Unreadable, match=r"clip: take2_10\.png: is 20x20, the first frame is 30x20"):
        read_frames(folder, range(4))
    assert torch.equal(read_frames(folder, [0, 1, 3]), torch.from_numpy(full[[0, 1, 3]]))
    for size in (None, (8, 8)):
        pictures = iter_frames(folder, size)
        assert len([next(pictures), next(pictures)]) == 2
        with pytest.raises(Unreadable, match=r"take2_10\.png"):
            next(pictures)
    whole = (folder / "take2_9.png").read_bytes()
    for data in (b"", b"text", whole[: len(whole) // 2], b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"):
        (folder / "take2_9.png").write_bytes(data)
        with pytest.raises(Unreadable, match=r"clip: take2_9\.png: ") as caught:
            read_frames(folder, [1])
        assert caught.value.reason and "\n" not in str(caught.value)
    (folder / "take2_8.png").unlink()
    (folder / "take2_8.png").symlink_to("nowhere")  # a missing frame is damage, and does not shift the others
    with pytest.raises(Unreadable, match=r"take2_8\.png: No such file"):
        probe(folder)
    (folder / "take2_8.png").unlink()
    os.mkfifo(folder / "take2_8.png")
    with pytest.raises(Unreadable, match=r"take2_8\.png: not a regular file"):
        probe(folder)


def test_wrong_asks(tmp_path, monkeypatch):
    folder = tmp_path / "clip"
    full = _folder(folder)
    with pytest.raises(Unreadable, match="asked of a video of 4 frames"):
        read_frames(folder, [4])
    with pytest.raises(Unreadable, match="No such file"):
        probe(tmp_path / "missing.jpg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(Unreadable, match=r"empty: no frames in this folder \(looked for .*\.jpg"):
        probe(tmp_path / "empty")
    monkeypatch.setattr(frames, "MAX_PIXELS", full[0][..., 0].size - 1)
    shutil.copy(folder / "take2_8.png", tmp_path / "large.png")
    with pytest.raises(Unreadable, match="promises frames of 30x20"):
        probe(tmp_path / "large.png")
