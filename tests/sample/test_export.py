"""`lvdm export` writes the folder that the pipeline loads, whole, and refuses parts that do not fit together."""

import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

import dit
import vae
from lvdm import LVDMPipeline
from lvdm.rng import generator
from lvdm.samplers import DDPM, make_scheduler
from sample import export


def frames(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe("right", num_inference_steps=2, generator=[generator(0, "sample", 0)]).frames


def test_the_folder_holds_the_transformer_the_vae_and_the_scheduler(lvdm, transformer, refiner, tmp_path, capsys):
    out = tmp_path / "deep" / "pipe"
    assert lvdm("export", transformer, vae=refiner, out=out) == 0
    assert f'LVDMPipeline.from_pretrained("{out}")' in capsys.readouterr().out
    pipe = LVDMPipeline.from_pretrained(out)
    assert type(pipe.scheduler) is DDPM and pipe.space.classes == ["left", "right"]
    assert np.array_equal(
        frames(pipe), frames(LVDMPipeline(vae.load(refiner), dit.load(transformer), make_scheduler("noise")))
    )
    assert [path.name for path in out.parent.iterdir()] == ["pipe"]


def test_the_scheduler_is_that_of_the_objective_or_the_asked_one(lvdm, dit_of, transformer, refiner, tmp_path):
    flow = dit_of(objective="flow", learn_sigma=False)
    assert lvdm("export", flow, vae=refiner, out=tmp_path / "flow") == 0
    assert type(LVDMPipeline.from_pretrained(tmp_path / "flow").scheduler) is FlowMatchEulerDiscreteScheduler
    assert lvdm("export", transformer, vae=refiner, out=tmp_path / "fast", sampler="dpm++") == 0
    config = json.loads((tmp_path / "fast" / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == "DPMSolverMultistepScheduler" and config["solver_order"] == 2


def test_a_pipeline_is_replaced_as_a_whole_and_nothing_else_is(lvdm, transformer, refiner, vae_of, tmp_path, capsys):
    out, plain = tmp_path / "pipe", vae_of()
    assert lvdm("export", transformer, vae=refiner, out=out) == 0
    (out / "left over").touch()
    assert lvdm("export", transformer, vae=plain, out=out) == 0
    assert not LVDMPipeline.from_pretrained(out).vae.spec.refines and not (out / "left over").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert lvdm("export", transformer, vae=plain, out=tmp_path / "mine") == 2
    assert "there is something else already; choose another out" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.tex").exists()


class Killed(BaseException):
    """What no handler sees, as a kill."""


@pytest.mark.parametrize("moment", ["write", "old aside", "new in place", "old gone"])
def test_a_kill_at_any_moment_leaves_a_whole_pipeline_and_nothing_in_the_way(
    moment, lvdm, transformer, refiner, vae_of, tmp_path, monkeypatch
):
    out, plain = tmp_path / "pipe", vae_of()
    assert lvdm("export", transformer, vae=refiner, out=out) == 0
    renames, rename, rmtree = [], Path.rename, export.shutil.rmtree

    def killed(*_, **__):
        raise Killed

    def counted(self, target):
        renames.append(target)
        if len(renames) == {"old aside": 1, "new in place": 2}.get(moment):
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", counted)
        if moment == "write":
            patch.setattr(LVDMPipeline, "save_pretrained", lambda self, to: (Path(to).mkdir(), killed()))
        if moment == "old gone":  # the last removal of all: the first two are of leftovers
            patch.setattr(export.shutil, "rmtree", lambda path, **keys: killed() if renames else rmtree(path, **keys))
        lvdm("export", transformer, vae=plain, out=out)
    there = [path for path in tmp_path.iterdir() if (path / "model_index.json").is_file()]
    assert out in there or len(there) == 2
    with monkeypatch.context() as patch, pytest.raises(Killed):  # and another, while it writes
        patch.setattr(LVDMPipeline, "save_pretrained", killed)
        lvdm("export", transformer, vae=plain, out=out)
    assert LVDMPipeline.from_pretrained(out).vae.spec.refines == (moment != "old gone")
    assert lvdm("export", transformer, vae=plain, out=out) == 0
    assert not LVDMPipeline.from_pretrained(out).vae.spec.refines
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"vae": 1}, "not the VAE whose latents dit="),
        ({"sampler": "euler"}, "sampler=euler: not for a model with objective=noise"),
        ({"out": ""}, "out: expected the folder to write"),
    ],
)
def test_refused_in_one_line(keys, message, lvdm, transformer, refiner, vae_of, tmp_path, capsys):
    keys = {"vae": refiner, "out": tmp_path / "pipe", **keys}
    keys["vae"] = vae_of(seed=1) if keys["vae"] == 1 else keys["vae"]
    assert lvdm("export", transformer, **keys) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "pipe").exists()
