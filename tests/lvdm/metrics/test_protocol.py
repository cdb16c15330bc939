import json
from dataclasses import FrozenInstanceError, fields, replace

import pytest

from lvdm.errors import UserError
from lvdm.metrics.protocol import PRESETS, Preset, Protocol, preset, require_same

FVD = Protocol(
    metric="fvd",
    features="i3d",
    weights_sha256="af5c50f0df57cc48",
    frames=16,
    stride_real=3,
    stride_fake=1,
    resize="bilinear 224x224",
    count_real=2048,
    count_fake=2048,
    split="ucf101 train",
    seed=0,
    estimator="Fréchet",
)


def test_describe_is_one_line_that_names_everything():
    assert FVD.describe() == (
        "fvd, i3d (weights af5c50f0), 16 frames, stride 3 real / 1 fake, bilinear 224x224, "
        "2048 real / 2048 fake clips, ucf101 train, seed 0, Fréchet"
    )
    assert replace(FVD, metric="psnr", features=None, weights_sha256=None).describe().startswith("psnr, 16 frames")


def test_every_field_shows_in_the_description():
    for field in fields(Protocol):
        value = getattr(FVD, field.name)
        changed = 12.5 if value is None else value + 1 if isinstance(value, int) else "z" + value
        other = replace(FVD, **{field.name: changed})
        assert other.describe() != FVD.describe(), field.name


def test_json_round_trip():
    assert Protocol(**json.loads(json.dumps(FVD.to_dict()))) == FVD
    with pytest.raises(FrozenInstanceError):
        FVD.frames = 17


def test_require_same_names_the_field():
    require_same([])
    require_same([FVD, replace(FVD), FVD])
    with pytest.raises(UserError, match="differ in stride_real: 3 and 1"):
        require_same([FVD, FVD, replace(FVD, stride_real=1)])
    with pytest.raises(UserError, match="differ in weights_sha256: 'af5c50f0df57cc48' and None"):
        require_same([FVD, replace(FVD, weights_sha256=None)])


def test_few_clips_are_warned_of():
    few = [replace(FVD, count_fake=2047), replace(FVD, count_real=2047)]
    few += [replace(one, metric=metric) for one in few for metric in ("FID", "IS")]
    assert FVD.warning() is None and all("N = 2047" in one.warning() for one in few)
    assert ["downwards" in one.warning() for one in few] == [one.metric == "IS" for one in few]
    simulated = [
        replace(few[0], metric="FVD", features=name).warning() for name in ("i3d", "i3d-torchscript", "videomae")
    ]
    assert ["400 dimensions" in warning for warning in simulated] == [True, True, False]  # I3D's are 400
    for metric in ("psnr", "KVD"):
        assert replace(FVD, metric=metric, count_real=8, count_fake=8).warning() is None


def test_what_an_earlier_version_wrote_reads():
    new = {"preset", "draw", "covariance", "inputs", "fps", "subset", "holdout", "per_video", "short", "dataset"}
    new |= {"across_cuts"}
    assert Protocol(**{key: value for key, value in FVD.to_dict().items() if key not in new}) == FVD


def test_a_preset_is_printed_and_not_mixed():
    latte = replace(FVD, preset="latte", draw="random", covariance="N", inputs="fakes are mp4")
    assert latte.describe() == FVD.describe() + ", fakes are mp4, clips by random, covariance 1/N, preset latte"
    assert ", covariance 1/(N-1), preset" in replace(latte, covariance="N-1").describe()
    others = {"subset": "test01", "dataset": "0a1b2c3d", "holdout": 0.2, "per_video": 2, "short": "loop"}
    for field in ({name: value} for name, value in {**others, "across_cuts": True}.items()):
        with pytest.raises(UserError, match=f"differ in {next(iter(field))}"):
            require_same([latte, replace(latte, **field)])
    with pytest.raises(UserError, match="differ in preset: 'latte' and 'latte, changed: count'"):
        require_same([latte, replace(latte, preset="latte, changed: count")])


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_found_by_their_name_and_say_what_they_copy(name):
    assert preset(name) is PRESETS[name] or preset(name) == PRESETS[name]
    assert preset(name).name == name and len(preset(name).says) > 40
    assert len({replace(p, name="", says="") for p in PRESETS.values()}) == len(PRESETS)  # no two are the same


def test_what_sets_the_presets_apart():
    assert (preset("latte").stride_real, preset("fvd2048_16f").stride_real) == (3, 1)
    assert [p.name for p in PRESETS.values() if p.covariance == "N-1"] == ["tats", "small_batch_legacy(8)"]
    assert [p.name for p in PRESETS.values() if p.rate == 2] == ["univae-2x"]
    assert [p.name for p in PRESETS.values() if p.against == "originals"] == ["rfvd"]
    assert preset("odvae_81f").frames == 81
    assert {p.name: p.split for p in PRESETS.values() if p.split} == {"fvd2048_16f": "all", "tats": "train"}
    assert {p.count for p in PRESETS.values()} == {2048} and Preset("mine", "ours").features == "i3d"


def test_the_small_batch_takes_its_size_and_warns_at_any_count():
    assert preset("small_batch_legacy(2)").batch == 2
    small = replace(FVD, metric="FVD", preset="small_batch_legacy(2)")
    assert small.biased and "not for comparison" in small.warning()
    assert replace(small, metric="KVD").warning() is None  # it is of all clips
    for wrong in ("small_batch_legacy", "small_batch_legacy(1)", "latt"):
        with pytest.raises(UserError, match=r"unknown preset .* known: fvd2048_16f, latte, tats, univae"):
            preset(wrong)
