"""The curriculum: which kind, stride and clip a sample shows is a function of (seed, sample), in the given shares."""

from collections import Counter
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lvdm.config import load
from lvdm.data.clips import ClipPolicy, Clips
from lvdm.data.index import Index, IndexRow
from lvdm.errors import UserError
from lvdm.run import RunFolder
from train.configs import Kind, TrainVAE
from train.data import collate, curriculum, indexes_of
from train.loop import micro_batches

CVVAE = [
    {"share": 0.4, "frames": 1, "size": 32},
    {"share": 0.1, "frames": 1, "size": 64},
    {"share": 0.25, "frames": 9, "size": 32},
    {"share": 0.25, "frames": 17, "size": 24, "strides": [1, 2, 3]},
]
TWO = [{"share": 0.5, "frames": 1, "size": 24}, {"share": 0.5, "frames": 5, "size": 16, "strides": [1, 2]}]


def config(*phases: dict, **keys) -> TrainVAE:
    return load(TrainVAE, overrides={"phases": list(phases), **keys})


def index(*frames: int) -> Index:
    """Videos of 48x64 of these lengths, which nobody can open."""
    return Index(Path("nowhere"), "none", [IndexRow(f"{n}.mp4", None, n, 25.0, 64, 48) for n in frames])


@pytest.fixture
def numbered(monkeypatch):
    """Instead of pictures, the numbers of the frames that would be read."""

    def numbers(self, row_index, indices):
        size = self.policy.size
        return torch.tensor(indices, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, size, size, 3)

    monkeypatch.setattr(Clips, "_frames", numbers)


def mixtures(*phases: dict, frames=(200, 100, 80), **keys):
    return curriculum(config(*phases, **keys), {"videos": index(*frames)})


def kind_of(clip) -> tuple[int, int]:
    return clip.video.shape[1], clip.video.shape[2]


def stride_of(clip) -> int:
    """The stride of a numbered clip, the same all along it."""
    (stride,) = set(clip.video[0, :, 0, 0].int().diff().tolist())
    return stride


# ---------------------------------------------------------------------------------------------------------------------
# Kinds


@pytest.mark.parametrize("seed", [0, 1])
def test_steps_show_the_kinds_in_their_shares(seed):
    steps, batch = 4000, 4
    (mixture,) = mixtures({"samples": steps * batch, "batch": batch, "mix": CVVAE}, seed=seed)
    counts = Counter(mixture.number(step * batch) for step in range(steps))
    for number, kind in enumerate(CVVAE):
        p = kind["share"]
        assert abs(counts[number] - p * steps) < 4 * (p * (1 - p) * steps) ** 0.5


def test_every_step_shows_one_kind_whatever_came_before(numbered):
    before, mixed = {"samples": 10, "batch": 5, "frames": 5, "size": 16}, {"samples": 60, "batch": 6, "mix": CVVAE}
    first, second = mixtures(before, mixed)
    assert {kind_of(first.at(sample)) for sample in range(10)} == {(5, 16)}
    shapes = [{kind_of(second.at(sample)) for sample in range(step, step + 6)} for step in range(10, 70, 6)]
    assert all(len(shape) == 1 for shape in shapes) and len(set.union(*shapes)) > 2
    kinds = second.phase.kinds
    assert [(kinds[n].frames, kinds[n].size) for n in map(second.number, range(10, 70, 6))] == [s.pop() for s in shapes]


@pytest.mark.parametrize("world, accumulate", [(1, 1), (2, 1), (2, 2), (1, 4)])
def test_processes_micro_batches_and_restarts_change_nothing(world, accumulate, numbered):
    keys = {"accumulate": accumulate, "workers": 0}
    phases = {"samples": 5, "batch": 5, "frames": 5, "size": 16}, {"samples": 48, "batch": 8, "mix": CVVAE}
    whole, again = (mixtures(*phases)[1] for _ in range(2))
    shown = {}
    for rank, start in product(range(world), (5, 29)):  # 29: goes on inside the phase
        accelerator = SimpleNamespace(process_index=rank, num_processes=world, device=torch.device("cpu"))
        for batch in micro_batches(again.at, collate, start, 53, 8, config(phases[1], **keys), accelerator):
            assert len({video.shape for video in batch.videos}) == 1
            for sample, name, video in zip(batch.samples, batch.names, batch.videos, strict=True):
                assert sample not in shown or torch.equal(shown[sample][1], video)
                shown[sample] = name, video
    assert sorted(shown) == list(range(5, 53))
    for sample, (name, video) in shown.items():
        clip = whole.at(sample)
        assert f"{clip.source}@{clip.start}" == name and torch.equal(clip.video, video)


def test_another_seed_draws_other_kinds_and_strides(numbered):
    phase = {"samples": 240, "batch": 4, "mix": CVVAE}
    one, two = (mixtures(phase, seed=seed)[0] for seed in (0, 1))
    assert [one.number(s) for s in range(0, 240, 4)] != [two.number(s) for s in range(0, 240, 4)]


def test_one_kind_is_what_the_phase_says_and_shows_every_video_once_an_epoch(numbered):
    plain = {"frames": 5, "size": 16, "stride": 2}
    (phase,) = mixtures({"samples": 24, "batch": 4, **plain})
    (mixed,) = mixtures({"samples": 24, "batch": 4, "mix": [{"share": 1.0, **plain}]})
    policy = ClipPolicy(**plain, crop="random", flip=True, holdout=0.0)
    clips = Clips(index(200, 100, 80), policy, seed=0)
    for sample in range(24):
        here, there, direct = (source.at(sample) for source in (phase, mixed, clips))
        assert torch.equal(here.video, direct.video) and torch.equal(there.video, direct.video)
    for epoch in range(8):
        assert {phase.at(3 * epoch + i).source for i in range(3)} == {"200.mp4", "100.mp4", "80.mp4"}


def test_a_video_comes_at_most_once_in_as_many_samples_as_its_list_has_videos(numbered):
    (mixture,) = mixtures({"samples": 900, "batch": 1, "mix": CVVAE}, frames=range(50, 80))
    shown = Counter()
    for first in range(0, 900, 30):
        clips = [mixture.at(sample) for sample in range(first, first + 30)]
        assert all(n == 1 for n in Counter((kind_of(clip), clip.source) for clip in clips).values())
        shown.update(clip.source for clip in clips)
    assert len(shown) == 30 and max(shown.values()) <= 30


# ---------------------------------------------------------------------------------------------------------------------
# Strides


def test_strides_are_drawn_evenly_and_kept_exactly(numbered):
    (mixture,) = mixtures({"samples": 1200, "batch": 4, "frames": 9, "size": 8, "strides": [1, 2, 3]}, lpips_weight=0)
    strides = Counter(stride_of(mixture.at(sample)) for sample in range(1200))
    assert strides.keys() == {1, 2, 3}
    assert all(abs(count - 400) < 4 * (1200 * 2 / 9) ** 0.5 for count in strides.values())
    of_a_step = {len({stride_of(mixture.at(sample)) for sample in range(step, step + 4)}) for step in range(0, 80, 4)}
    assert of_a_step > {1}  # a stride a sample, not a step


def test_videos_too_short_for_a_stride_leave_that_strides_list_alone(numbered):
    phase = {"samples": 600, "batch": 4, "frames": 9, "size": 16, "strides": [1, 2, 3]}
    (mixture,) = mixtures(phase, frames=(9, 17, 25, 40))
    assert [[row.frames for row in clips.rows] for clips in mixture.clips[0]] == [
        [9, 17, 25, 40],
        [17, 25, 40],
        [25, 40],
    ]
    for clip in map(mixture.at, range(600)):
        last = clip.video[0, -1, 0, 0].item()
        assert last == clip.start + 8 * stride_of(clip) < int(clip.source.removesuffix(".mp4"))


def test_a_batch_of_more_clips_than_there_are_is_refused():
    phase = {"samples": 240, "batch": 120, "frames": 9, "size": 16}
    mixtures(phase, frames=(68, 68))  # 60 places each
    mixtures({**phase, "strides": [1, 2]}, frames=(68, 16))  # 60 + 8 and 52
    for lengths, places in (((68, 67), 119), ((9,), 1)):
        with pytest.raises(UserError) as error:
            mixtures(phase, frames=lengths)
        assert f"phases[0].batch=120: nowhere has {places} clips of 9 frames to train on" in str(error.value)
    mixed = {"samples": 240, "batch": 240, "mix": [{**TWO[0]}, {"share": 0.5, "frames": 33, "size": 16}]}
    with pytest.raises(UserError, match=r"phases\[1\].batch=240: nowhere has 236 clips of 33 frames"):
        mixtures(phase, mixed, frames=(150, 150))  # of one frame there are 300


def test_a_stride_that_no_shot_is_long_enough_for_is_refused():
    with pytest.raises(UserError, match="9 frames at stride 3 need 25 consecutive frames"):
        mixtures({"samples": 8, "frames": 9, "size": 16, "strides": [1, 3]}, frames=(20,))


# ---------------------------------------------------------------------------------------------------------------------
# Memory and images


def test_decoded_videos_are_kept_once_for_all_strides_and_kinds_of_a_size(videos):
    same = [{"share": 0.5, "frames": 1, "size": 16}, {"share": 0.5, "frames": 5, "size": 16, "strides": [1, 2, 3]}]
    one = 3 * 48 * 3 * 16 * 16 / 2**30  # three videos of 48 frames
    made = config({"samples": 64, "batch": 4, "mix": same}, videos=str(videos), cache_gib=1.01 * one)
    indexes = indexes_of(made)
    (mixture,) = curriculum(made, indexes)
    plain = [clips for of_kind in mixture.clips for clips in of_kind]
    assert len({id(clips._cache) for clips in plain}) == 1
    drawn = [mixture.at(sample) for sample in range(64)]
    assert len(plain[0]._cache) == 3 and sum(video.nbytes for video in plain[0]._cache.values()) == one * 2**30

    made.cache_gib = 0
    (decoded,) = curriculum(made, indexes)
    assert all(torch.equal(decoded.at(sample).video, clip.video) for sample, clip in enumerate(drawn))

    # Another size finds no room beside the first, and is decoded each time
    made = config({"samples": 64, "batch": 4, "mix": TWO}, videos=str(videos), cache_gib=24**2 / 16**2 * one * 1.01)
    large, *small = [clips._cache for of_kind in curriculum(made, indexes)[0].clips for clips in of_kind]
    assert large == {} and small == [None, None]


@pytest.fixture
def images(tmp_path) -> Path:
    """Six pictures of 40x56, each of one grey."""
    (tmp_path / "images").mkdir()
    for number in range(6):
        Image.fromarray(np.full((40, 56, 3), 40 * number, np.uint8)).save(tmp_path / "images" / f"{number}.png")
    return tmp_path / "images"


def test_clips_of_one_frame_come_from_the_images(videos, images):
    phase = {"samples": 120, "batch": 2, "mix": [{**TWO[0], "fps": 24.0}, TWO[1]]}  # the rate of the videos
    made = config(phase, videos=str(videos), images=str(images), holdout=0.6)
    indexes = indexes_of(made)
    assert indexes.keys() == {"videos", "images"}
    (mixture,) = curriculum(made, indexes)
    for clip in map(mixture.at, range(120)):
        if kind_of(clip) == (1, 24):
            assert (clip.video == 40 * int(clip.source.removesuffix(".png"))).all()
        else:
            assert kind_of(clip) == (5, 16) and clip.source.endswith(".mp4")
    (frames,) = curriculum(config(phase, videos=str(videos)), {"videos": indexes["videos"]})
    assert {frames.at(sample).source[-4:] for sample in range(20)} == {".mp4"}


def test_images_that_no_phase_shows_are_refused(videos, images):
    made = config({"samples": 8, "frames": 5, "size": 16}, videos=str(videos), images=str(images))
    with pytest.raises(UserError, match="no phase shows clips of one frame"):
        indexes_of(made)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_a_run_stopped_inside_a_mixed_phase_goes_on_bitwise(launch, steps, weights, tmp_path, monkeypatch):
    keys = {"phases": [{"samples": 20, "batch": 2, "lr": 1e-3, "mix": TWO}], "save_every": 6, "clip": 1.0}
    save, saved = RunFolder.save, []

    def once(self, *args):
        if saved:
            raise KeyboardInterrupt
        saved.append(save(self, *args))

    assert launch("train vae", out=tmp_path / "whole", **keys) == 0
    monkeypatch.setattr(RunFolder, "save", once)
    assert launch("train vae", out=tmp_path / "broken", **keys) == 130
    monkeypatch.undo()
    assert launch("train vae", out=tmp_path / "broken", **keys) == 0
    assert steps(tmp_path / "broken") == steps(tmp_path / "whole")
    whole = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(tmp_path / "broken").items())


def test_a_run_whose_images_changed_is_refused(launch, images, tmp_path, capsys):
    keys = {"out": tmp_path / "run", "phases": [{"samples": 2, "batch": 2, "mix": TWO}], "images": images}
    assert launch("train vae", **keys) == 0
    (tmp_path / "run" / "finished.json").unlink()
    (images / "5.png").unlink()
    assert launch("train vae", **keys) == 2
    assert "its images changed since this run began" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# The keys


def test_kinds_are_the_mix_or_the_phase_itself():
    plain, mixed = config({"frames": 5, "size": 64, "strides": [1, 2]}, {"mix": CVVAE}).phases
    assert plain.kinds == [Kind(frames=5, size=64, strides=[1, 2], share=1.0)]
    assert mixed.kinds == [Kind(**kind) for kind in CVVAE]


HALF = {"share": 0.5}
BAD = {
    "shares": ({"mix": [HALF, {"share": 0.4}]}, "mix: its shares add up to 0.5 + 0.4 = 0.9, expected 1"),
    "no share": ({"mix": [HALF, HALF, {"share": 0.0}]}, "share=0: expected a part above 0, up to 1"),
    "negative share": ({"mix": [{"share": -1.0}]}, "share=-1: expected a part above 0"),
    "share above one": ({"mix": [{"share": 40.0}]}, "share=40: expected a part above 0, up to 1"),
    "share nan": ({"mix": [{"share": float("nan")}]}, "share=nan: expected a part"),
    "frames": ({"mix": [{"frames": 0}]}, "frames=0: expected at least 1"),
    "stride 0": ({"strides": [1, 0]}, "strides=[1, 0]: expected numbers of at least 1"),
    "fps and strides": ({"fps": 8.0, "strides": [1, 2]}, "strides=[1, 2] and fps=8: each says which frames"),
    "stride and strides": ({"stride": 3, "strides": [1, 2]}, "strides=[1, 2] and stride=3: each says"),
    "in a kind": ({"mix": [{"fps": 8.0, "strides": [1]}]}, "strides=[1] and fps=8"),
    "frames beside mix": ({"frames": 9, "mix": [{}]}, "frames=9 beside mix"),
    "strides beside mix": ({"strides": [2], "mix": [{}]}, "strides=[2] beside mix"),
    "unknown key": ({"mix": [{"shares": 1.0}]}, "shares"),
}


@pytest.mark.parametrize("phase, message", BAD.values(), ids=BAD)
def test_what_makes_no_sense_is_refused(phase, message):
    with pytest.raises(UserError) as error:
        config(phase)
    assert message in str(error.value)


def test_a_size_that_8_does_not_divide_is_refused():
    with pytest.raises(UserError, match="size: 20 is not divisible by 8"):
        mixtures({"samples": 8, "mix": [{"frames": 5, "size": 20}]})
