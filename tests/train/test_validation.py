"""Validation while a VAE trains: the same clips each time, honest numbers, pictures, and the best checkpoint kept."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

import vae
from lvdm.accelerator import make_accelerator
from lvdm.config import load
from lvdm.data.index import open_index
from lvdm.errors import UserError
from lvdm.media import read_video, to_float
from lvdm.metrics import lpips as lpips_module
from lvdm.metrics.frames import PSNR_CAP, psnr, ssim
from lvdm.run import RunFolder
from train import validation as validations
from train.configs import TrainRefine, TrainVAE
from train.validation import Validation, is_better, latent_picture

KEYS = {"validate_every": 4, "holdout": 0.4, "validate_clips": 3, "precision": "fp32"}
BATCHES = {"samples": 8, "batch": 2}
PHASES = {
    TrainVAE: [{**BATCHES, "frames": 1, "size": 16}, {**BATCHES, "frames": 5, "size": 32}],
    TrainRefine: [{**BATCHES, "frames": 9, "size": 32}],
}


@pytest.fixture(autouse=True)
def _random_lpips(monkeypatch):
    monkeypatch.setattr(validations, "LPIPS", partial(lpips_module.LPIPS, pretrained=False))
    monkeypatch.setattr(validations.rife, "available", lambda: False)


@pytest.fixture(scope="module")
def model():
    """Trained or not does not matter: with D2, whose kernels are drawn, too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return vae.build("univae", width=16, blocks=1, refine=True)


@pytest.fixture
def make(videos, tmp_path, model):
    """`make(cls, **keys)`: a Validation of a run in `tmp_path / "run"`."""

    def validation(cls=TrainVAE, model=model, accelerator=None, **keys) -> Validation:
        keys = {"videos": str(videos), "out": str(tmp_path / "run"), "phases": PHASES[cls], "lpips_weight": 0.0, **keys}
        config = load(cls, overrides={**KEYS, "adversarial_weight": 0.0, **keys})
        index, folder = open_index(config.videos, "none"), RunFolder(config.out, config)
        rate = 2 if cls is TrainRefine else 1
        return Validation(config, index, model, rate, folder, accelerator or make_accelerator("fp32"))

    return validation


def log(validation: Validation) -> dict[int, dict[str, float]]:
    records = validation.folder.records()
    assert all(record["event"] == "validation" for record in records)
    return {record["samples"]: {k: v for k, v in record.items() if k.startswith("val_")} for record in records}


# ---------------------------------------------------------------------------------------------------------------------
# Which clips, and when


def test_it_is_due_every_so_many_samples_and_at_the_end(make):
    validation = make(validate_every=6)
    assert [seen for seen in range(2, 18, 2) if validation.due(seen, 2)] == [6, 12, 16]


def test_clips_are_of_the_last_phase_of_the_held_out_part_and_evenly_spaced_over_the_videos(make):
    clips = make().clips
    assert [(clip.source, tuple(clip.video.shape)) for clip in clips] == [
        (f"{name}.mp4", (3, 5, 32, 32)) for name in ("left/a", "left/b", "right/c")
    ]
    assert all(48 - 19 <= clip.start <= 48 - 5 and not clip.flip for clip in clips)  # the last 19 frames are held out
    two = make(validate_clips=2).clips
    assert [(clip.source, clip.start) for clip in two] == [(clips[i].source, clips[i].start) for i in (0, 1)]
    seven = make(validate_clips=7).clips
    assert len({(clip.source, clip.start) for clip in seven}) == 7
    assert {clip.source for clip in seven} == {clip.source for clip in clips}
    assert [torch.equal(a.video, b.video) for a, b in zip(clips, make(seed=5, crop="random").clips, strict=True)] == [
        *(True, True, True)
    ]  # whatever the seed and the crops of training


def test_a_mix_is_measured_by_its_longest_kind_at_its_smallest_stride(make):
    mix = [
        {"share": 0.5, "frames": 1, "size": 64},
        {"share": 0.5, "frames": 5, "size": 32, "strides": [3, 2]},
    ]
    validation = make(phases=[{"samples": 16, "batch": 2, "mix": mix}])
    assert validation.clips[0].video.shape == (3, 5, 32, 32) and validation.clips[0].fps == 12.0


def test_another_folder_is_taken_whole_and_wins_over_the_held_out_part(make, videos):
    clips = make(validate_videos=str(videos / "left"), validate_clips=2).clips
    assert [clip.source for clip in clips] == ["a.mp4", "b.mp4"]
    assert all(clip.start == 22 for clip in clips)  # the middle of 44 places


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"holdout": 0.0}, "validate_every: nothing to validate on: set holdout=0.1, or validate_videos=FOLDER"),
        ({"holdout": 0.05}, "5 frames at stride 1 need 5 consecutive frames in the val split, the longest shot there"),
        ({"phases": PHASES[TrainVAE][:1]}, "the last phase has size=16, and LPIPS (Alex) needs at least 32"),
        ({"validate_videos": "/nowhere"}, "validate_videos: videos=/nowhere: expected a folder of videos"),
        ({"best": "fvd"}, "best='fvd': expected one of psnr, ssim, lpips"),
        ({"validate_clips": 0}, "validate_clips=0: expected at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line(make, keys, message):
    with pytest.raises(UserError) as error:
        make(**keys)
    assert message in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def test_values_are_means_over_frames_and_then_clips_of_the_reconstruction(make, model):
    validation = make()
    validation.run(4)
    rows = []
    for clip in validation.clips:
        x = to_float(clip.video[None])
        with torch.no_grad():
            y = model.eval().reconstruct(x).clamp(-1, 1)
            rows.append([metric(x, y).double().mean().item() for metric in (psnr, ssim, validation.lpips.video)])
    record = json.loads((validation.folder.path / "validation" / "000000004.json").read_text())
    for i, metric in enumerate(("psnr", "ssim", "lpips")):
        assert [clip[metric] for clip in record["clips"]] == pytest.approx([row[i] for row in rows], rel=1e-9)
        assert log(validation)[4][f"val_{metric}"] == record["mean"][metric]
        assert record["mean"][metric] == pytest.approx(sum(row[i] for row in rows) / 3, rel=1e-9)
    assert [(clip["source"], clip["start"]) for clip in record["clips"]] == [
        (clip.source, clip.start) for clip in validation.clips
    ]
    assert record["samples"] == 4 and record["protocol"]["frames"] == 5 and record["protocol"]["count_real"] == 3


def test_the_same_weights_score_the_same_at_any_time_and_after_a_restart(make):
    first = make()
    first.run(4)
    first.run(8)
    again = make()
    again.run(12)
    assert len({tuple(values.items()) for values in log(again).values()}) == 1 and sorted(log(again)) == [4, 8, 12]


class Copies(nn.Module):
    """Stands in for a VAE of stage 2: its latents are the even frames; D1 gives them back darker, D2 as they are, with
    the middle ones black."""

    def encode(self, x):
        assert not self.training and not torch.is_grad_enabled()
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: x))

    def decode(self, z, num_frames):
        return SimpleNamespace(sample=z[:, :, :num_frames] - 0.25)

    def refine(self, z, num_frames):
        video = torch.full((1, 3, num_frames, *z.shape[3:]), -1.0)
        video[:, :, ::2] = z
        return SimpleNamespace(sample=video)

    def save_pretrained(self, folder, safe_serialization):
        folder.mkdir()


@pytest.fixture
def copied(make):
    """A validation of stage 2 on frames whose values leave room to darken them, and its clips as (1, 3, 9, 32, 32)."""
    validation = make(TrainRefine, Copies())
    for clip in validation.clips:
        clip.video = clip.video // 2 + 64
    return validation, [to_float(clip.video[None]) for clip in validation.clips]


def test_stage_2_tells_even_and_middle_frames_apart_beside_the_blend(copied):
    validation, clips = copied
    validation.run(4)
    values = log(validation)[4]
    black = [torch.full_like(x[:, :, 1::2], -1.0) for x in clips]
    blend = [(x[:, :, 2::2] + x[:, :, :-1:2]) / 2 - 0.25 for x in clips]
    middle = [x[:, :, 1::2] for x in clips]

    def mean(metric, videos):
        pairs = zip(middle, videos, strict=True)
        return pytest.approx(sum(metric(x, y).mean().item() for x, y in pairs) / len(clips), rel=1e-6)

    assert values["val_psnr_even"] == PSNR_CAP and values["val_ssim_even"] == pytest.approx(1)
    assert values["val_lpips_even"] == 0
    for name, metric in {"psnr": psnr, "ssim": ssim, "lpips": validation.lpips.video}.items():
        assert values[f"val_{name}_middle"] == mean(metric, black)
        assert values[f"val_{name}_blend"] == mean(metric, blend)
        parts = 5 * values[f"val_{name}_even"] + 4 * values[f"val_{name}_middle"]
        assert values[f"val_{name}"] == pytest.approx(parts / 9)
    assert len(values) == 12


def test_rife_stands_beside_it_where_it_is_installed(copied, monkeypatch):
    validation, clips = copied
    monkeypatch.setattr(validations.rife, "available", lambda: True)
    monkeypatch.setattr(validations.rife, "middle_frames", lambda d1: d1[:, :, 1:] + 0.25)  # the next frame
    validation.run(4)
    expected = sum(psnr(x[:, :, 1::2], x[:, :, 2::2]).mean().item() for x in clips) / len(clips)
    assert log(validation)[4]["val_psnr_rife"] == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Training does not notice


def test_training_with_and_without_it_is_bit_equal(make):
    def trained(validated: bool) -> tuple[list[float], dict[str, torch.Tensor], torch.Tensor]:
        torch.manual_seed(0)
        model = vae.build("univae", width=16, blocks=1, refine=True)
        model.eval().requires_grad_(False)
        model.refiner.train().requires_grad_(True)
        validation = make(TrainRefine, model, validate_clips=1) if validated else None
        optimizer, losses = torch.optim.AdamW(model.refiner.parameters(), lr=1e-3), []
        for step in range(2):
            loss = (model.refine(torch.randn(1, 4, 2, 4, 4)).sample - torch.randn(1)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if validation:
                validation.run(step)
        assert model.refiner.training and not model.training and not model.decoder.training
        assert all(module.training for module in model.refiner.modules())
        return losses, model.state_dict(), torch.get_rng_state()

    (losses, weights, state), (plain_losses, plain_weights, plain_state) = trained(True), trained(False)
    assert losses == plain_losses and torch.equal(state, plain_state)
    assert all(torch.equal(weights[name], tensor) for name, tensor in plain_weights.items())


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


class Tracker:
    """Remembers what it is shown."""

    name = "tensorboard"

    def __init__(self):
        self.images, self.values = {}, {}

    def log_images(self, images, step, dataformats):
        assert dataformats == "NHWC"
        self.images[step] = images

    def log(self, values, step):
        self.values[step] = values


class WithTracker(SimpleNamespace):
    """As much of an Accelerator as a validation needs."""

    def __init__(self):
        super().__init__(is_main_process=True, device=torch.device("cpu"), trackers=[Tracker()])

    def log(self, values, step):
        self.trackers[0].log(values, step)


@pytest.mark.parametrize("cls, frames, renderings, latents", [(TrainVAE, 5, 1, 2), (TrainRefine, 9, 2, 2)])
def test_pictures_show_originals_beside_renderings_and_every_latent_channel(make, cls, frames, renderings, latents):
    accelerator = WithTracker()
    validation = make(cls, accelerator=accelerator)
    validation.run(4)
    folder = validation.folder.path / "validation"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"000000004{end}" for end in ("-latents.png", ".json", ".mp4")
    ]
    video = read_video(folder / "000000004.mp4")
    assert video.shape == (frames, 3 * 32, (1 + renderings) * 32, 3)  # a row a clip
    original = torch.cat([clip.video for clip in validation.clips], dim=2).permute(1, 2, 3, 0)
    assert (video[:, :, :32].float() - original).abs().mean() < 10  # H.264 halves the colours
    with Image.open(folder / "000000004-latents.png") as picture:
        assert picture.size == (3 * latents * 4, 4 * 4)
    shown = accelerator.trackers[0].images[4]
    assert shown["validation"].shape == (1, 3 * 32, (1 + renderings) * 32, 3)
    middle = original[frames // 2 - (1 if cls is TrainRefine else 0)]
    assert (shown["validation"][0, :, :32] == middle.numpy()).all()
    assert shown["latents"].shape == (1, 16, 3 * latents * 4, 3)
    assert accelerator.trackers[0].values[4] == log(validation)[4]


def test_latent_channels_are_grey_from_their_least_to_their_greatest_value():
    first = torch.tensor([[0.0, 1.0], [2.0, 4.0]]).view(1, 2, 1, 2)  # one channel, two frames of 1x2
    other = torch.full((1, 2, 1, 2), 4.0)
    picture = latent_picture([torch.cat([first, -10 * first]), torch.cat([other, other * 0])])
    assert picture.shape == (2, 8, 3) and (picture == picture[..., :1]).all()
    assert picture[..., 0].tolist() == [[0, 64, 128, 255, *[255] * 4], [255, 191, 128, 0, *[255] * 4]]
    assert latent_picture([torch.ones(1, 1, 2, 2)]).unique().numel() == 1  # a constant channel divides by nothing


# ---------------------------------------------------------------------------------------------------------------------
# The best


def test_lpips_falls_and_the_others_rise():
    def better(metric: str, new: float, old: float) -> bool:
        return is_better({"metric": metric, "value": new, "clips": "a"}, {"metric": metric, "value": old, "clips": "a"})

    assert better("psnr", 2, 1) and not better("psnr", 1, 1) and not better("ssim", float("nan"), 0.1)
    assert better("lpips", 1, 2) and not better("lpips", 2, 1)
    new = {"metric": "psnr", "value": 1.0, "clips": "a"}
    assert is_better(new, None) and is_better(new, {**new, "value": 9.0, "clips": "b"})
    assert is_better(new, {**new, "value": 9.0, "metric": "ssim"})
    assert not is_better({**new, "value": float("nan")}, None)


def test_the_best_weights_are_exported_and_their_checkpoint_kept_over_a_restart(make, model, tmp_path):
    grown = vae.build("univae", width=16, blocks=1)

    def saved(validation: Validation, samples: int, bias: float) -> bool:
        """Validates weights that are worse the larger `bias` is, and saves."""
        with torch.no_grad():
            grown.last_layer.zero_()
            dict(grown.named_parameters())["decoder.conv_out.bias"].fill_(bias)
        best = validation.run(samples)
        validation.folder.save(samples, lambda path: None, 1, lambda: None, best)
        return best is not None

    def kept() -> list[str]:
        return sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())

    validation = make(model=grown)
    assert saved(validation, 4, 0.9) and saved(validation, 8, 0.0) and kept() == ["000000008"]
    assert not saved(validation, 12, 0.5) and kept() == ["000000008", "000000012"]
    assert not saved(make(model=grown), 16, 0.8) and kept() == ["000000008", "000000016"]  # after a restart
    assert validation.folder.resume(lambda path: None) == 16
    best = validation.folder.best()
    assert best["samples"] == 8 and best["metric"] == "psnr" and best["value"] == log(validation)[8]["val_psnr"]
    exported = vae.load(str(tmp_path / "run" / "export-best"))
    assert dict(exported.named_parameters())["decoder.conv_out.bias"].tolist() == [0.0] * 3
    assert saved(make(model=grown, validate_clips=2), 20, 0.8) and kept() == ["000000020"]  # other clips begin anew
