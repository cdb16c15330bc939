"""Frame exactness against a full sequential decode, in every kind of file, and what a broken file does."""

import gc
import os
import sys
import threading
import time
import weakref
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from lvdm.data import frames, reader
from lvdm.data.index import look
from lvdm.data.reader import Unreadable, iter_frames, probe, read_frames
from lvdm.data.samples import sample_videos
from lvdm.errors import UserError
from lvdm.media import write_mp4


def _pictures(n, height=96, width=128):
    """n pictures that are easy to tell apart: noise that moves."""
    noise = torch.rand(1, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(0)) * 255
    base = torch.nn.functional.interpolate(noise, (height, width), mode="bilinear")[0].permute(1, 2, 0)
    return [np.ascontiguousarray(np.roll(base.to(torch.uint8).numpy(), 3 * i, 1)) for i in range(n)]


def _write(path, pictures, times=None, codec="libx264", rate=25, container_options=None, **options):
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, pix_fmt="yuv420p", options=options)
        stream.height, stream.width = pictures[0].shape[:2]
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times:
                stream.codec_context.time_base = frame.time_base = Fraction(1, 1000)
                frame.pts = times[i]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _check(path):
    """Windows, steps, disorder and repeats give the frames of the sequential decode."""
    full = np.stack(list(iter_frames(path)))
    info, n = probe(path), len(full)
    assert (info.frames, info.height, info.width) == full.shape[:3]
    ranges = [range(a, min(n, a + 12), step) for a in (0, n // 3, n // 2 + 1, n - 4) for step in (1, 3)]
    for indices in [*ranges, [n - 1, 0, n // 2, 0]]:
        for whole, decoder in ((False, "decord"), (True, "decord"), (True, "pyav")):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("LVDM_DECODER", decoder)
                frames = read_frames(path, indices, whole)
            assert frames.dtype == torch.uint8
            assert torch.equal(frames, torch.from_numpy(full[list(indices)])), (path, indices, whole, decoder)
    return info


@pytest.mark.parametrize("name", ["bikes.mp4", "carphone_pristine.mp4"])
def test_sample_videos_frame_exact(name):
    info = _check(sample_videos() / name)
    assert (
        info
        == {
            "bikes.mp4": reader.VideoInfo(250, 25.0, 640, 272, False),
            "carphone_pristine.mp4": reader.VideoInfo(120, 30000 / 1001, 176, 144, False),
        }[name]
    )


def test_ucf101_frame_exact(real_data, tmp_path):
    # h264 with B-frames in AVI (no presentation times), and XviD
    for name in ("SkateBoarding/v_SkateBoarding_g02_c01.avi", "Biking/v_Biking_g05_c02.avi"):
        path = real_data / "ucf101_mini" / "UCF-101" / name
        _check(path)
    # the same XviD stream in MP4: decoders differ by a level or two
    with av.open(str(path)) as source, av.open(str(tmp_path / "xvid.mp4"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    _check(tmp_path / "xvid.mp4")


def _by_seeking(path, indices):
    """What is reached from a key frame, as far as it goes."""
    return list(reader._from_key_frame(path, list(indices), reader._scan(path)))


def test_every_frame_of_a_xvid_file_after_a_seek(real_data):
    """Decoding begins at the key frame of every twelve, and no frame has to be looked for from the start."""
    path = real_data / "ucf101_mini" / "UCF-101" / "Biking" / "v_Biking_g05_c02.avi"
    full, scan = np.stack(list(iter_frames(path))), reader._scan(path)
    assert len(full) == 201 and scan.indexed and scan.keys[:, 0].tolist() == list(range(0, 201, 12))
    for start in range(len(full)):
        indices = list(range(start, min(len(full), start + 3)))
        assert np.array_equal(_by_seeking(path, indices), full[indices]), start


def test_a_seek_gives_the_frames_of_a_full_decode(real_data):
    """Real files of many writers: single frames, runs, and frames apart, between which not all are decoded."""
    read = 0
    for path in sorted([*(real_data / "train").glob("*.mp4"), *(real_data / "val").glob("*.mp4")])[::8]:
        n = probe(path).frames
        full = list(iter_frames(path))
        for indices in ([n - 1], range(n // 2, n // 2 + 5), range(n // 3, n // 3 + 9, 3), [0, n // 3]):
            found = _by_seeking(path, indices)
            read += len(found)
            assert np.array_equal(found, [full[i] for i in indices]), path
    assert read >= 8 * 11


# each of these misleads at least one way of seeking
KINDS = {
    "open_gop.mp4": dict(bf="3", g="12", **{"x264-params": "open-gop=1"}),
    "closed_gop.mp4": dict(bf="2", g="12"),
    "matroska.mkv": dict(bf="3", g="12", rate=Fraction(30000, 1001)),
    "transport.ts": dict(bf="3", g="12"),
    "b_frames.avi": dict(bf="3", g="12"),
    "fragments.mp4": dict(bf="3", g="12", container_options={"movflags": "frag_keyframe+empty_moov"}),
    "xvid.avi": dict(codec="mpeg4", bf="2", g="12"),
    "interlaced.mp4": dict(g="12", flags="+ildct+ilme"),
    "vp8.webm": dict(codec="libvpx", g="20", **{"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "4"}),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_files_frame_exact(name, tmp_path):
    assert not _check(_write(tmp_path / name, _pictures(50), **KINDS[name])).vfr


@pytest.mark.parametrize("name, seeks", [("usual.mp4", True), ("in_order.avi", True), ("b_frames.avi", False)])
def test_what_most_tools_write_is_reached_from_key_frames(name, seeks, tmp_path, monkeypatch):
    bf = "0" if name == "in_order.avi" else "2"
    options = dict(codec="mpeg4") if name.endswith("avi") else {}
    path = _write(tmp_path / name, _pictures(30), bf=bf, g="12", **options)
    full = list(iter_frames(path))
    monkeypatch.setenv("LVDM_DECODER", "pyav")
    monkeypatch.setattr(reader, "_from_start", lambda path, wanted, scan: iter(wanted))
    read = reader._pick(path, [14, 20], reader._scan(path), whole=True)
    assert np.array_equal(list(read), [full[14], full[20]] if seeks else [14, 20])
    assert list(reader._pick(path, [14], reader._scan(path), whole=False)) == [14]


def test_decord_reads_what_most_tools_write(tmp_path, monkeypatch):
    path = _write(tmp_path / "usual.mp4", _pictures(30), bf="2", g="12")
    full, _ = list(iter_frames(path)), reader._scan(path)
    monkeypatch.setattr(reader, "_decoder", None)  # PyAV, which looks at the packets before
    assert torch.equal(read_frames(path, [20, 3], whole=True), torch.from_numpy(np.stack([full[20], full[3]])))
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "decord", None)
    assert torch.equal(read_frames(path, [20], whole=True)[0], torch.from_numpy(full[20]))


@pytest.mark.parametrize("chosen, here, in_a_worker", [("auto", True, False), ("decord", True, True), ("pyav", 0, 0)])
def test_workers_share_their_cores_with_no_threads_of_decord(chosen, here, in_a_worker, monkeypatch):
    monkeypatch.setenv("LVDM_DECODER", chosen)
    assert reader._prefers_decord() == here
    monkeypatch.setattr(reader, "get_worker_info", lambda: SimpleNamespace(id=0))
    assert reader._prefers_decord() == in_a_worker


def test_an_unknown_decoder_is_named(tmp_path, monkeypatch):
    path = _write(tmp_path / "usual.mp4", _pictures(9))
    monkeypatch.setenv("LVDM_DECODER", "Decord")
    with pytest.raises(UserError, match="LVDM_DECODER=Decord: expected decord"):
        read_frames(path, [3], whole=True)


def test_where_decord_fails_on_the_way_pyav_goes_on(tmp_path, monkeypatch):
    path = _write(tmp_path / "usual.mp4", _pictures(30), bf="2", g="12")
    full = torch.from_numpy(np.stack(list(iter_frames(path))))
    given = reader._by_decord
    monkeypatch.setattr(reader, "_by_decord", lambda *arguments: islice(given(*arguments), 5))
    assert torch.equal(read_frames(path, range(4, 24), whole=True), full[4:24])


def test_decord_gives_the_same_pixels_wherever_it_is_trusted(real_data):
    """Real files of many writers: single frames after a seek and runs of them."""
    read = 0
    for path in sorted([*(real_data / "train").glob("*.mp4"), *(real_data / "val").glob("*.mp4")])[::8]:
        scan, n = reader._scan(path), probe(path).frames
        if scan.for_decord:
            read += 1
            indices = [0, n // 3, *range(n // 2, n // 2 + 5), n - 1]
            found = list(reader._by_decord(path, indices, scan))
            assert np.array_equal(found, list(reader._from_start(path, indices, scan))), path
    assert read >= 8


def test_an_avi_whose_index_leads_elsewhere_is_read_from_the_start(tmp_path):
    path = _write(tmp_path / "a.avi", _pictures(40), codec="mpeg4", bf="0", g="10")
    full, data = list(iter_frames(path)), path.read_bytes()
    entry = data.index(b"idx1") + 8 + 16 * 12  # of packet 12, which is no key frame
    path.write_bytes(data[:entry] + data[entry + 16 :] + data[entry : entry + 16])  # moved to the end
    again = list(iter_frames(path))
    for start in range(0, len(again) - 1, 3):
        found = _by_seeking(path, [start, start + 1])
        assert np.array_equal(found, again[start : start + len(found)])
        assert torch.equal(read_frames(path, [start], whole=True)[0], torch.from_numpy(again[start]))
    assert len(full) == 40


def test_each_is_applied_to_every_frame(tmp_path):
    path = _write(tmp_path / "a.mp4", _pictures(12), bf="0")
    shapes = []

    def red(frame):
        shapes.append(tuple(frame.shape))
        return frame[..., :1]

    found = read_frames(path, [3, 9, 3], each=red)
    assert shapes == [(1, 96, 128, 3)] * 2
    assert torch.equal(found, read_frames(path, [3, 9, 3])[..., :1])


def test_edit_list_hides_frames(tmp_path):
    times = [40 * (i - 20) for i in range(50)]
    path = _write(
        tmp_path / "edit.mp4", _pictures(50), times, g="50", container_options={"avoid_negative_ts": "disabled"}
    )
    assert _check(path).frames == 30


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_frame_rate(tmp_path, suffix):
    gaps = [20, 33, 40, 90, 33, 20, 120] * 8
    times = np.cumsum(gaps).tolist()
    info = _check(_write(tmp_path / f"vfr.{suffix}", _pictures(len(times)), times, bf="3", g="10"))
    assert info.vfr
    assert info.fps == pytest.approx((len(times) - 1) / (times[-1] - times[0]) * 1000, rel=1e-3)


def test_a_seek_that_lands_too_late_is_mended(tmp_path):
    path = _write(tmp_path / "late.mp4", _pictures(40), bf="0", g="8")
    scan = reader._scan(path)
    keys = scan.keys.copy()
    keys[:, 1] = np.roll(keys[:, 1], -1)
    late = replace(scan, keys=keys)
    assert not list(reader._from_key_frame(path, [9, 12], late))
    assert np.array_equal(list(reader._pick(path, [9, 12], late, True)), list(reader._pick(path, [9, 12], scan, False)))


def test_a_frame_that_damage_swallows_shifts_the_rest_both_ways(tmp_path):
    """Time stamps and counting disagree there: what `iter_frames` counts is what `read_frames` gives."""
    path = _write(tmp_path / "a.mp4", _pictures(24), bf="0", g="8")
    scan = reader._scan(path)
    full = np.stack(list(iter_frames(path)))
    lost = replace(scan, pts=np.insert(scan.pts, 11, (scan.pts[10] + scan.pts[11]) // 2))
    assert np.array_equal(list(reader._pick(path, [9, 10], lost, True)), full[[9, 10]])
    assert np.array_equal(list(reader._pick(path, [9, 11], lost, True)), full[[9, 11]])
    assert np.array_equal(list(reader._pick(path, [9, 12], lost, False)), full[[9, 12]])


def test_frames_are_told_that_are_mended_or_come_at_other_times(tmp_path, monkeypatch):
    path, odd = _write(tmp_path / "a.mp4", _pictures(24), bf="2", g="8"), []
    list(iter_frames(path, odd=lambda: odd.append(1)))
    assert not odd
    scan = reader._scan(path)
    pts = scan.pts.copy()
    pts[[5, 9]] += 1
    with monkeypatch.context() as patch:
        patch.setattr(reader, "_scan", lambda path: replace(scan, pts=pts))
        list(iter_frames(path, odd=lambda: odd.append(1)))
    assert len(odd) == 2
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.is_keyframe]
    data = bytearray(path.read_bytes())
    middle = packets[1][0] + packets[1][1] // 2
    data[middle : middle + 60] = bytes(60)
    path.write_bytes(data)
    assert len(list(iter_frames(path, odd=lambda: odd.append(1)))) == 24 and len(odd) > 2
    assert not look(tmp_path, "a.mp4").whole and look(sample_videos(), "bikes.mp4").whole


def test_rotated_and_narrow(tmp_path):
    path = tmp_path / "upright.mp4"
    write_mp4(path, _pictures(10, 64, 96), 25)
    data = bytearray(path.read_bytes())
    # the display matrix of the track header: a quarter turn
    at = data.index(b"tkhd") + 44
    data[at : at + 36] = np.array([0, 1 << 16, 0, -(1 << 16), 0, 0, 64 << 16, 0, 1 << 30], ">i4").tobytes()
    turned = tmp_path / "turned.mp4"
    turned.write_bytes(data)
    _check(turned)
    assert torch.equal(read_frames(turned, [4]), read_frames(path, [4]).rot90(-1, (1, 2)))
    narrow = tmp_path / "narrow.mp4"
    write_mp4(narrow, [picture[:32, :24] for picture in _pictures(10)], 25)
    _check(narrow)


def test_thumbnails_have_the_asked_size():
    frame = next(iter_frames(sample_videos() / "bikes.mp4", (32, 18)))
    assert frame.shape == (18, 32, 3)


def test_broken_files(real_data):
    read = {}
    for path in sorted((real_data / "broken").iterdir()):
        try:
            read[path.name] = read_frames(path, range(probe(path).frames)).shape[0]
        except Unreadable as error:
            assert path.name in str(error) and error.reason
            read[path.name] = None
    assert read == {
        "bitflips.mp4": None,
        "empty.mp4": None,
        "not_a_video.mp4": None,
        "truncated.mp4": None,
        "one_frame.mp4": 1,
        "three_frames.mp4": 3,
        "tiny_16x16.mp4": 32,
    }


def test_head_of_a_cut_off_file_is_readable(tmp_path):
    whole, cut = tmp_path / "whole.mp4", tmp_path / "cut.mp4"
    write_mp4(whole, _pictures(50), 25)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert torch.equal(read_frames(cut, range(5)), read_frames(whole, range(5)))
    frames = iter_frames(cut)
    with pytest.raises(Unreadable, match=r"cut\.mp4"):
        list(frames)


def test_wrong_asks(tmp_path):
    with pytest.raises(Unreadable, match="No such file"):
        probe(tmp_path / "missing.mp4")
    with pytest.raises(Unreadable, match="120 frames"):
        read_frames(sample_videos() / "carphone_pristine.mp4", [120])
    sound = Path(tmp_path / "sound.mp4")
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(Unreadable, match="no video stream"):
        probe(sound)


def _refused(path, match):
    """Both ways of reading name the file and say why, at once."""
    start = time.monotonic()
    for read in (probe, lambda path: read_frames(path, [0]), lambda path: list(iter_frames(path))):
        with pytest.raises(Unreadable, match=match) as caught:
            read(path)
        assert str(path) in str(caught.value)
    assert time.monotonic() - start < 5


def test_only_regular_files_are_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "zero.mp4").symlink_to("/dev/zero")
    for name in ("pipe.mp4", "zero.mp4"):
        _refused(tmp_path / name, "not a regular file")
    _refused("a\0.mp4", "null")
    # a name is no protocol of FFmpeg, nor does what is in a file lead to others
    write_mp4(tmp_path / "a.mp4", _pictures(3), 25)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")
    _refused(tmp_path / "list.mp4", "list")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipe:0.mp4").write_bytes((tmp_path / "a.mp4").read_bytes())
    assert read_frames("pipe:0.mp4", range(3)).shape[0] == len(list(iter_frames("pipe:0.mp4"))) == 3


def test_promises_are_bounded(tmp_path, monkeypatch):
    small = _write(tmp_path / "small.ts", _pictures(12, 64, 64), bf="0")
    large = _write(tmp_path / "large.ts", _pictures(4, 128, 128), bf="0")
    grows = tmp_path / "grows.ts"  # streams may change size
    grows.write_bytes(small.read_bytes() + large.read_bytes())
    assert [frame.shape for frame in iter_frames(grows)] == [(64, 64, 3)] * 16
    monkeypatch.setattr(frames, "MAX_PIXELS", 64 * 80)
    _refused(large, "promises frames of 128x128, more than 5120 pixels")
    pictures = iter_frames(grows)
    assert [next(pictures).shape for _ in range(10)] == [(64, 64, 3)] * 10
    with pytest.raises(Unreadable, match=r"grows\.ts"):
        list(pictures)
    monkeypatch.setattr(reader, "MAX_FRAMES", 11)
    reader._scan_version.cache_clear()
    with pytest.raises(Unreadable, match="more than 11 frames"):
        probe(small)


def test_tags_that_are_no_text(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "a title"
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 32
        for packet in [*stream.encode(av.VideoFrame(32, 32, "yuv420p")), *stream.encode()]:
            container.mux(packet)
    path.write_bytes(path.read_bytes().replace(b"a title", b"\xff\xfe\xfd\xfc\xfb\xfa\xf9"))
    assert read_frames(path, [0]).shape == (1, 32, 32, 3)


def test_a_clip_has_a_deadline(tmp_path, monkeypatch):
    path = _write(tmp_path / "a.mp4", _pictures(12), bf="0")
    stalled = time.monotonic() + 3
    monkeypatch.setattr(reader, "TIMEOUT", 0.2)
    with monkeypatch.context() as patch:
        for name in ("_from_start", "_scan"):  # a decoder that does not return, a file server that does not answer
            patch.setattr(reader, name, lambda *args: time.sleep(stalled - time.monotonic()))
            with pytest.raises(Unreadable, match=r"a\.mp4: not read within 0\.2 seconds"):
                read_frames(path, [0])
        with pytest.raises(Unreadable, match="not read within"):
            probe(path)
    assert time.monotonic() < stalled - 1
    assert read_frames(path, [3]).shape[0] == 1  # the next clip does not wait for those that were left behind

    scan = reader._scan(path)
    monkeypatch.setattr(reader, "TIMEOUT", 0.0)  # a long way from the start ends too, and with it its thread
    with pytest.raises(Unreadable, match=r"(not read|no data) within 0 seconds"):
        list(reader._from_start(path, [11], scan))
    monkeypatch.setattr(reader, "TIMEOUT", 0.05)  # is for one wait for data, not for who looks at the frames
    pictures = iter_frames(path)
    assert len([(next(pictures), time.sleep(0.07)) for _ in range(12)]) == 12


def test_a_clip_that_fails_frees_its_frames_at_once(monkeypatch):
    kept = []

    def fails(*args):
        frames = np.zeros((9, 9))
        kept.append(weakref.ref(frames))
        raise Unreadable("a.mp4", "damaged")

    monkeypatch.setattr(reader, "_read", fails)
    gc.disable()
    try:
        with pytest.raises(Unreadable):
            read_frames("a.mp4", [0])
        assert kept[0]() is None
    finally:
        gc.enable()


def test_one_thread_reads_all_clips_and_one_left_behind_ends(monkeypatch):
    monkeypatch.setattr(reader, "_idle", [])
    assert len({reader._in_time("a", threading.get_ident) for _ in range(5)}) == 1
    (late,) = reader._idle
    monkeypatch.setattr(reader, "TIMEOUT", 0.1)
    go_on = threading.Event()
    with pytest.raises(Unreadable, match="not read within"):
        reader._in_time("a", go_on.wait)
    assert reader._in_time("a", threading.get_ident) != late.ident  # the next clip has another thread
    go_on.set()
    late.join(5)
    assert not late.is_alive() and late not in reader._idle


def test_errors_without_words_have_a_reason():
    assert Unreadable("a.mp4", MemoryError()).reason == "MemoryError"
    assert Unreadable("a.mp4", OSError(5, "Input/output error", "a.mp4")).reason == "Input/output error"
