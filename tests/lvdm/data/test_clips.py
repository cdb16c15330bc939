"""Clips: properties of every policy on made-up indices, and the pixels on real ones."""

import itertools
import logging
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lvdm.data.clips import ClipPolicy, Clips, Window, resize
from lvdm.data.index import Index, IndexRow, build_index
from lvdm.data.reader import Unreadable, iter_frames, read_frames
from lvdm.data.samples import sample_videos
from lvdm.errors import UserError
from lvdm.media import write_mp4


@pytest.fixture(scope="module")
def index():
    return build_index(sample_videos())


@st.composite
def indices(draw):
    rows = []
    for number in range(draw(st.integers(1, 4))):
        frames = draw(st.integers(1, 120))
        cuts = sorted(draw(st.sets(st.integers(1, max(1, frames - 1)), max_size=4)) - {frames})
        rows.append(IndexRow(f"{number}.mp4", None, frames, 25.0, 64, 48, cuts=cuts))
    return Index(Path("nowhere"), "none", rows)


policies = st.builds(
    ClipPolicy,
    frames=st.integers(1, 20),
    stride=st.integers(1, 3),
    size=st.just(16),
    crop=st.sampled_from(["center", "random"]),
    flip=st.booleans(),
    split=st.sampled_from(["train", "val", "all"]),
    holdout=st.floats(0, 0.9),
)


class _Numbered(Clips):
    """Instead of pictures, the numbers of the frames that would be read: (T, 16, 16, 1)."""

    def _frames(self, row_index, indices):
        return torch.tensor(list(indices), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 16, 16, 1)


def _of(clip):
    return clip.video[0, :, 0, 0].tolist()


@settings(max_examples=150, deadline=None)
@given(indices(), policies, st.integers(0, 3), st.integers(0, 1000))
def test_clips_stay_in_their_shot_and_split(index, policy, seed, sample):
    try:
        clips = _Numbered(index, policy, seed)
    except UserError:
        lengths = [b - a for row in index.rows for a, b in policy.segments(row)]
        assert max(lengths) < policy.span(index.rows[0])
        return
    segments = {row.path: policy.segments(row) for row in index.rows}
    windows = [clips.read(w) for k in (0, 1, 3) for w in clips.grid(k)]
    for clip in [clips.at(sample), *windows]:
        numbers = _of(clip)
        assert numbers == [clip.start + policy.stride * i for i in range(policy.frames)]
        assert any(a <= numbers[0] and numbers[-1] < b for a, b in segments[clip.source])
        assert clip.video.shape == (1, policy.frames, 16, 16)
    again = _Numbered(index, policy, seed).at(sample)
    first = clips.at(sample)
    assert (first.source, first.start, first.flip) == (again.source, again.start, again.flip)


@settings(max_examples=60, deadline=None)
@given(indices(), st.floats(0, 0.9))
def test_splits_share_no_frame_and_miss_none(index, holdout):
    for row in index.rows:
        frames = Counter()
        for split in ("train", "val"):
            for start, end in ClipPolicy(1, 1, 16, split=split, holdout=holdout).segments(row):
                frames.update(range(start, end))
        assert frames == Counter(range(row.frames))


def test_windows_are_drawn_uniformly_and_videos_equally():
    rows = [IndexRow("a.mp4", None, 30, 25.0, 64, 48, cuts=[12]), IndexRow("b.mp4", None, 9, 25.0, 64, 48)]
    clips = _Numbered(Index(Path("nowhere"), "none", rows), ClipPolicy(9, 1, 16, flip=True, split="all"), seed=1)
    drawn = [clips.at(i) for i in range(4000)]
    assert Counter(clip.source for clip in drawn) == {"a.mp4": 2000, "b.mp4": 2000}
    starts = Counter(clip.start for clip in drawn if clip.source == "a.mp4")
    assert set(starts) == {*range(0, 4), *range(12, 22)}
    assert min(starts.values()) > 100 and max(starts.values()) < 190  # 143 expected, sigma 12
    assert 1850 < sum(clip.flip for clip in drawn) < 2150
    assert [w.start for w in clips.grid(0) if w.row_index == 0] == [0, 12, 21]
    assert [w.start for w in clips.grid(2) if w.row_index == 0] == [3, 18]  # valid starts 3 and 10 of 14
    assert len(clips.grid(5)) == 5 + 1


@settings(max_examples=150, deadline=None)
@given(indices(), policies, st.sampled_from(["loop", "reflect"]), st.integers(0, 1000))
def test_short_shots_are_stretched_inside_themselves(index, policy, short, sample):
    policy = replace(policy, short=short)
    try:
        clips = _Numbered(index, policy, 0)
    except UserError:
        assert not any(b > a for row in index.rows for a, b in policy.segments(row))
        return
    long = [clips.read(w) for k in (0, 1, 3) for w in clips.grid(k)]
    for clip in [clips.at(sample), *long]:
        row = next(row for row in index.rows if row.path == clip.source)
        a, b = next((a, b) for a, b in policy.segments(row) if a <= clip.start < b)
        numbers = _of(clip)
        assert numbers[0] == clip.start and all(a <= n < b for n in numbers)
        steps = {abs(y - x) for x, y in itertools.pairwise(numbers)}
        if clip.start + (policy.frames - 1) * policy.stride < b:
            assert steps <= {policy.stride}
        else:
            assert clip.start == a  # the whole shot, from its beginning
        if short == "reflect" and b - clip.start > policy.stride:
            assert max(steps, default=0) <= policy.stride  # it turns round, and jumps nowhere


def test_loop_and_reflect_by_hand():
    row = IndexRow("a.mp4", None, 4, 25.0, 64, 48)
    places = {short: ClipPolicy(9, 1, 16, split="all", short=short).places(row, 0) for short in ("loop", "reflect")}
    assert places == {"loop": [0, 1, 2, 3, 0, 1, 2, 3, 0], "reflect": [0, 1, 2, 3, 2, 1, 0, 1, 2]}
    assert ClipPolicy(3, 2, 16, split="all", short="reflect").places(replace(row, frames=1), 0) == [0, 0, 0]


def test_across_cuts_a_video_is_one_shot(capsys):
    row = IndexRow("a.mp4", None, 30, 25.0, 64, 48, cuts=[12])
    index = Index(Path("nowhere"), "none", [row])
    with pytest.raises(UserError, match=r"need 25 .* the longest shot there has 18; .* short=loop"):
        _Numbered(index, ClipPolicy(25, 1, 16, split="all"), 0)
    clips = _Numbered(index, ClipPolicy(25, 1, 16, split="all", across_cuts=True), 0)
    assert {clips.at(i).start for i in range(60)} == set(range(6)) and clips.skipped == (0, 0, 0)
    stretched = _Numbered(index, ClipPolicy(25, 1, 16, split="all", short="loop"), 0).say_skipped()
    assert stretched.skipped == (2, 0, 2) and "2 shots are too short" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rate", "fps", "stride"), [(30.0, 15.0, 2), (29.97, 15.0, 2), (24.0, 8.0, 3), (25.0, 25.0, 1), (59.94, 30.0, 2)]
)
def test_a_rate_is_an_exact_stride(rate, fps, stride):
    row = IndexRow("a.mp4", None, 90, rate, 64, 48)
    clips = _Numbered(Index(Path("nowhere"), "none", [row]), ClipPolicy(5, 1, 16, fps=fps, split="all"), 0)
    clip = clips.at(0)
    assert _of(clip) == [clip.start + stride * i for i in range(5)] and clip.fps == rate / stride


@pytest.mark.parametrize(("rate", "fps", "exact"), [(25.0, 10.0, "12.5 or 8.333"), (24.0, 30.0, "24 or 12")])
def test_a_rate_between_strides_is_refused_with_those_next_to_it(rate, fps, exact):
    row = IndexRow("a.mp4", None, 90, rate, 64, 48)
    with pytest.raises(UserError, match=rf"fps={fps:g}: a\.mp4 has {rate:g} .* exact are {exact}"):
        Clips(Index(Path("nowhere"), "none", [row]), ClipPolicy(5, 1, 16, fps=fps), 0)


def test_policy_says_what_is_wrong():
    with pytest.raises(UserError, match="nearest sizes are 96 and 104"):
        ClipPolicy(9, 1, 100)
    for wrong in (
        {"frames": 0},
        {"stride": 0},
        {"crop": "middle"},
        {"split": "test"},
        {"holdout": 1.0},
        {"short": "cut"},
        {"fps": -1},
    ):
        with pytest.raises(UserError, match=next(iter(wrong))):
            ClipPolicy(**{"frames": 9, "stride": 1, "size": 64, **wrong})


def test_too_short(index):
    clips = Clips(index, ClipPolicy(33, 3, 64), seed=0)
    assert len(clips) == 1 and clips.rows[0].path == "bigbuckbunny.mp4"
    assert clips.skipped == (7, 2, 0)
    with pytest.raises(UserError, match=r"need 193 consecutive frames in the train split, the longest .* has 106"):
        Clips(index, ClipPolicy(65, 3, 64), seed=0)


def test_cache_changes_nothing(index):
    policy = ClipPolicy(9, 2, 32, crop="random", flip=True)
    cached, direct = Clips(index, policy, seed=3), Clips(index, policy, seed=3, cache_gib=0)
    assert cached._cache == {} and direct._cache is None
    for a, b in zip(map(cached.at, range(6)), map(direct.at, range(6)), strict=True):
        assert torch.equal(a.video, b.video)
        assert (a.label, a.source, a.start, a.flip) == (b.label, b.source, b.start, b.flip)
    assert len(cached._cache) == 3


def test_cutting_later_changes_nothing(index):
    policy = ClipPolicy(9, 2, 32, crop="random", flip=True)
    now, later = Clips(index, policy, 3, cache_gib=0), Clips(index, policy, 3, cache_gib=0, uncut=True)
    for i in range(4):
        a, b = now.at(i), later.at(i)
        assert a.cut is None and b.video.shape[0] == 9 and b.video.shape[-1] == 3 and b.video.shape[1] > 32
        assert torch.equal(b.cut.of(b.video), a.video)
    assert Clips(index, policy, 3, uncut=True).at(0).cut is None  # what is in memory is resized already


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cutting_on_cuda_is_within_a_level(index):
    clips = Clips(index, ClipPolicy(9, 2, 64, crop="random", flip=True), 3, cache_gib=0, uncut=True)
    for clip in map(clips.at, range(4)):
        here, there = clip.cut.of(clip.video), clip.cut.of(clip.video.cuda()).cpu()
        assert (here.int() - there.int()).abs().max() <= 1


def test_cache_changes_nothing_in_avi(real_data):
    index = build_index(real_data / "ucf101_mini" / "UCF-101" / "Biking")
    policy = ClipPolicy(9, 2, 64, crop="random")
    cached, direct = Clips(index, policy, seed=3), Clips(index, policy, seed=3, cache_gib=0)
    for i in range(4):
        assert torch.equal(cached.at(i).video, direct.at(i).video)


def test_pixels_and_labels(index):
    clips = Clips(index, ClipPolicy(5, 3, 64), seed=0)
    window = Window([row.path for row in clips.rows].index("bikes.mp4"), 80)
    clip = clips.read(window)
    assert clip.video.shape == (3, 5, 64, 64) and clip.video.dtype == torch.uint8 and clip.video.is_contiguous()
    assert (clip.label, clip.source, clip.start, clip.flip) == (1, "bikes.mp4", 80, False)
    frames = read_frames(index.root / "bikes.mp4", [80, 83, 86, 89, 92])
    small = resize(frames, 64)
    assert small.shape == (5, 3, 64, 151)  # 640x272
    assert torch.equal(clip.video, small[..., 44 : 44 + 64].transpose(0, 1))
    exact = torch.nn.functional.interpolate(
        frames.permute(0, 3, 1, 2).float(), (64, 151), mode="bilinear", antialias=True
    )
    assert (small - exact).abs().max() < 1.5
    mirrored = clips.read(window._replace(flip=True))
    assert mirrored.flip and torch.equal(mirrored.video, clip.video.flip(-1))
    unlabelled = Index(index.root, "none", [replace(row, label=None) for row in index.rows])
    assert Clips(unlabelled, clips.policy, 0).read(window).label == -1


def test_random_crops_reach_both_sides():
    row = IndexRow("a.mp4", None, 9, 25.0, 64, 48)

    class Columns(Clips):
        def _frames(self, row_index, indices):
            return torch.arange(21, dtype=torch.uint8).view(1, 1, 21, 1).expand(len(indices), 16, 21, 1)

    index = Index(Path("nowhere"), "none", [row])
    lefts = Counter(int(Columns(index, ClipPolicy(1, 1, 16, "random"), 0).at(i).video[0, 0, 0, 0]) for i in range(120))
    assert set(lefts) == set(range(6))
    assert int(Columns(index, ClipPolicy(1, 1, 16), 0).at(0).video[0, 0, 0, 0]) == 3


def test_a_file_that_breaks_is_replaced_by_the_next(tmp_path, caplog):
    frames = list(iter_frames(sample_videos() / "carphone_pristine.mp4", (48, 32)))[:20]
    for name in ("a", "b", "c"):
        write_mp4(tmp_path / f"{name}.mp4", frames, 25)
    policy = ClipPolicy(5, 1, 16)
    index = build_index(tmp_path)
    before = [Clips(index, policy, 0, cache_gib=0).at(i) for i in range(9)]
    (tmp_path / "b.mp4").write_bytes(b"gone")
    for cache_gib in (0, 1):
        clips = Clips(index, policy, 0, cache_gib)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            after = [clips.at(i) for i in range(9)]
        assert len(caplog.records) == 1 and "b.mp4" in caplog.text
        for old, new in zip(before, after, strict=True):
            assert new.source == {"a.mp4": "a.mp4", "b.mp4": "c.mp4", "c.mp4": "c.mp4"}[old.source]
            assert new.start == old.start
        with pytest.raises(Unreadable, match=r"b\.mp4"):
            clips.read(Window(1, 0))
    shutil.copy(tmp_path / "b.mp4", tmp_path / "a.mp4")
    shutil.copy(tmp_path / "b.mp4", tmp_path / "c.mp4")
    with pytest.raises(UserError, match="none of the 3 videos can be read any more"):
        Clips(index, policy, 0).at(0)


def test_a_changed_file_is_not_read(tmp_path):
    frames = list(iter_frames(sample_videos() / "carphone_pristine.mp4", (48, 32)))[:20]
    write_mp4(tmp_path / "a.mp4", frames, 25)
    index = build_index(tmp_path)
    write_mp4(tmp_path / "a.mp4", frames[:8], 25)
    for cache_gib in (0, 1):
        clips = Clips(index, ClipPolicy(5, 1, 16, split="all"), 0, cache_gib)
        with pytest.raises(Unreadable):
            clips.read(Window(0, 12))
