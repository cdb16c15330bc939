import json
from dataclasses import FrozenInstanceError, fields, replace

import pytest

from lvdm.errors import UserError
from lvdm.metrics.protocol import Protocol, require_same

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
    assert FVD.warning() is None
    for few in (replace(FVD, count_fake=2047), replace(FVD, count_real=2047)):
        assert "N = 2047" in few.warning() and "biased upwards" in few.warning()
    assert replace(FVD, metric="psnr", count_real=8, count_fake=8).warning() is None
    assert replace(FVD, metric="kvd", count_real=8, count_fake=8).warning() is None
