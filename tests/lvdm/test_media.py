"""mp4 files come back as they went in, and sheets have the size they should."""

import av
import numpy as np
import pytest
import torch
from PIL import Image

from lvdm.data.reader import iter_frames, probe, read_frames
from lvdm.data.samples import sample_videos
from lvdm.errors import UserError
from lvdm.media import contact_sheet, read_video, to_float, to_uint8, write_mp4, write_video


@pytest.fixture(scope="module")
def frames():
    """24 frames of a real shot, uint8 (T, H, W, 3)."""
    return read_frames(sample_videos() / "bikes.mp4", range(24))


def _psnr(a, b):
    return float(10 * torch.log10(255**2 / (a.float() - b.float()).square().mean()))


@pytest.mark.parametrize("fps", [25, 30000 / 1001, 8, 12.5])
def test_mp4_round_trip(frames, fps, tmp_path):
    path = tmp_path / "video.mp4"
    write_mp4(path, frames, fps)
    info = probe(path)
    assert (info.frames, info.width, info.height, info.vfr) == (24, 640, 272, False)
    assert info.fps == fps
    assert _psnr(read_frames(path, range(24)), frames) > 41
    assert [p.name for p in tmp_path.iterdir()] == ["video.mp4"]
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # plays before it is loaded


def test_odd_sizes_are_padded(frames, tmp_path):
    odd = frames[:4, :201, :303]
    write_mp4(tmp_path / "odd.mp4", (frame.numpy() for frame in odd), 25)
    back = read_frames(tmp_path / "odd.mp4", range(4))
    assert back.shape == (4, 202, 304, 3)
    assert _psnr(back[:, :201, :303], odd) > 40


def test_long_videos_are_streamed(tmp_path):
    """A frame is written long before the last one is asked for."""

    def noise():
        for i in range(200):
            yield np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        assert next(tmp_path.glob(".long.mp4.*")).stat().st_size > 100_000

    write_mp4(tmp_path / "long.mp4", noise(), 25)
    assert sum(1 for _ in iter_frames(tmp_path / "long.mp4")) == 200


def test_a_failed_video_leaves_nothing(frames, tmp_path):
    def breaks():
        yield frames[0]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_mp4(tmp_path / "video.mp4", breaks(), 25)
    with pytest.raises(UserError, match="no frames"):
        write_mp4(tmp_path / "video.mp4", [], 25)
    with pytest.raises(UserError, match="not a frame rate"):
        write_mp4(tmp_path / "video.mp4", frames, 0)
    assert list(tmp_path.iterdir()) == []


def test_colours_are_tagged(frames, tmp_path):
    write_mp4(tmp_path / "video.mp4", frames[:2], 25)
    with av.open(str(tmp_path / "video.mp4")) as container:
        assert container.streams.video[0].codec_context.colorspace == 6  # SMPTE 170M


def test_bytes_and_floats():
    levels = torch.arange(256, dtype=torch.uint8)
    floats = to_float(levels)
    assert floats.dtype == torch.float32 and floats[0] == -1 and floats[-1] == 1
    assert torch.equal(to_uint8(floats), levels)
    assert to_uint8(torch.tensor([-3.0, 3.0, 0.0])).tolist() == [0, 255, 128]
    assert torch.equal(to_uint8(floats.to(torch.bfloat16))[[0, 255]], levels[[0, 255]])


def test_contact_sheet(frames, tmp_path):
    contact_sheet([frames, frames[:3, :100, :200]], tmp_path / "sheet.png", columns=4, labels=["long", "short"])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (272 + 100 + 2 * 16, 4 * 640, 3)
    assert np.array_equal(sheet[16 : 16 + 272, :640], frames[0]) and np.array_equal(sheet[16:288, 1920:], frames[23])
    assert np.array_equal(sheet[304:404, 400:600], frames[2, :100, :200])
    assert (sheet[:16] < 255).any() and (sheet[304:, 600:] == 255).all()
    contact_sheet([frames], tmp_path / "plain.png", columns=1)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "plain.png")), frames[0])


@pytest.mark.parametrize("suffix", [".npy", ".mkv"])
def test_formats_without_loss_give_every_bit_back(suffix, tmp_path):
    """Of noise, where any conversion of colours would round, at an odd size."""
    noise = torch.randint(256, (5, 33, 47, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_video(tmp_path / f"video{suffix}", (frame for frame in noise), 12.5)
    assert torch.equal(read_video(tmp_path / f"video{suffix}"), noise)
    if suffix == ".mkv":
        assert probe(tmp_path / "video.mkv").fps == 12.5
    else:
        assert np.load(tmp_path / "video.npy", mmap_mode="r").shape == (5, 33, 47, 3)
    assert len(list(tmp_path.iterdir())) == 1


def test_npy_of_many_frames_has_the_head_of_one(tmp_path):
    """The head is written before the frames are counted, and once more after."""
    frames = np.arange(12000, dtype=np.uint8).reshape(1000, 2, 2, 3)
    write_video(tmp_path / "a.npy", iter(frames), 1)
    assert np.array_equal(np.load(tmp_path / "a.npy"), frames)


def test_mp4_is_read_as_it_is_decoded(frames, tmp_path):
    write_video(tmp_path / "video.mp4", frames[:3], 25)
    assert torch.equal(read_video(tmp_path / "video.mp4"), read_frames(tmp_path / "video.mp4", range(3)))


@pytest.mark.parametrize("name, message", [("a.avi", "ends in .mp4, .mkv, .npy"), ("a.npy", "no frames")])
def test_what_cannot_be_written_leaves_nothing(name, message, tmp_path):
    with pytest.raises(UserError, match=message):
        write_video(tmp_path / name, [], 25)
    assert list(tmp_path.iterdir()) == []
