"""The keys of the training programs: what they refuse, what they say of themselves, and the shipped recipes."""

import dataclasses
import subprocess
import sys

import pytest

from lvdm.config import configs_root, field_docs, load, read_yaml
from lvdm.errors import UserError
from train.configs import Latents, Phase, TrainDiT, TrainRefine, TrainVAE

PROGRAMS = (TrainVAE, TrainRefine, Latents, TrainDiT)


@pytest.mark.parametrize("cls", [*PROGRAMS, Phase])
def test_every_key_is_documented(cls):
    assert {field.name for field in dataclasses.fields(cls)} == field_docs(cls).keys()
    assert all(field_docs(cls).values())


@pytest.mark.parametrize("cls", PROGRAMS)
def test_operational_keys_are_keys(cls):
    keys = {field.name for field in dataclasses.fields(cls)}
    assert {"threads"} <= set(cls.operational) <= keys | {"cache_gib"}
    assert {"phases", "seed", "out", "vae", "latents", "videos", "precision"}.isdisjoint(cls.operational)


BAD = [
    (TrainVAE, {"precision": "fp61"}, "precision='fp61': expected one of fp32, bf16, fp16 (did you mean 'fp16'?)"),
    (TrainVAE, {"tracker": "mlflow"}, "tracker='mlflow': expected one of none, wandb, tensorboard"),
    (TrainVAE, {"non_finite": "ignore"}, "non_finite='ignore': expected one of stop, skip"),
    (TrainVAE, {"phases": []}, "phases: expected at least one phase"),
    (TrainVAE, {"phases": [{"batch": 0}]}, "batch=0: expected at least 1"),
    (TrainVAE, {"phases": [{"lr": -1.0}]}, "lr=-1.0: expected at least 0.0"),
    (TrainVAE, {"phases": [{"lr": float("nan")}]}, "lr=nan: expected at least 0.0"),
    (
        TrainVAE,
        {"phases": [{"samples": 10, "batch": 4}]},
        "phases[0].samples=10: must be a multiple of its batch, e.g. 12",
    ),
    (TrainVAE, {"phases": [{"size": 8}]}, "phases[0].size=8: LPIPS needs at least 16, or set lpips_weight=0"),
    (TrainVAE, {"accumulate": 3}, "phases[0].batch=8: must be divisible by accumulate=3"),
    (TrainVAE, {"keep": 0}, "keep=0: expected at least 1"),
    (TrainVAE, {"holdout": 1.0}, "holdout=1.0: expected a part between 0 and 1"),
    (TrainVAE, {"crop": "centre"}, "crop='centre': expected one of random, center (did you mean 'center'?)"),
    (TrainVAE, {"discriminator_norm": "layer"}, "discriminator_norm='layer': expected one of group, batch"),
    *(
        (TrainVAE, {key: -1}, f"{key}=-1")
        for key in (
            *("lpips_start", "lpips_frames", "lpips_weight", "adversarial_start", "adversarial_weight", "clip_start"),
            *("discriminator_lr", "weight_decay", "align_weight", "identity_weight", "kl_weight", "final_lr", "clip"),
            *("threads", "warmup"),
        )
    ),
    (TrainVAE, {"weight_decay": float("nan")}, "weight_decay=nan: expected at least 0.0"),
    (TrainRefine, {"inject": "gated"}, "inject='gated': expected one of add, gate, replace, blend, none"),
    (Latents, {"dtype": "float16"}, "dtype='float16': expected one of float32, bfloat16"),
    (Latents, {"batch": 0}, "batch=0: expected at least 1"),
    (TrainDiT, {"label_dropout": -0.1}, "label_dropout=-0.1: expected at least 0.0"),
    (TrainDiT, {"label_dropout": 1.5}, "label_dropout=1.5: expected at most 1.0"),
    (TrainDiT, {"preview_steps": 2000}, "preview_steps=2000: expected at most 1000"),
    (TrainDiT, {"phases": [{"size": 64}]}, "size"),  # the store's
    (TrainDiT, {"videos": "data"}, "unknown key 'videos'"),
]


@pytest.mark.parametrize(
    "cls, keys, message", BAD, ids=[f"{cls.__name__}-{next(iter(keys))}-{i}" for i, (cls, keys, _) in enumerate(BAD)]
)
def test_what_makes_no_sense_is_refused(cls, keys, message):
    with pytest.raises(UserError) as error:
        load(cls, overrides=keys)
    assert message in str(error.value)


def test_total_is_the_sum_of_the_phases():
    config = load(TrainVAE, overrides={"phases": [{"samples": 16}, {"samples": 24}]})
    assert config.total == 40 and [phase.batch for phase in config.phases] == [8, 8]


@pytest.mark.parametrize(
    "path", sorted(configs_root().rglob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_shipped_recipes_are_valid(path):
    keys = read_yaml(path).keys()
    fits = [cls for cls in PROGRAMS if keys <= {field.name for field in dataclasses.fields(cls)}]
    if path.parent.name in ("vae", "dit"):
        assert fits
    for cls in fits[:1]:
        load(cls, path)


def test_keys_are_known_without_torch():
    """So that help and plans answer at once."""
    code = "import sys, train.configs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
