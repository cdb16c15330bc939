"""Plans: printed without torch or data, every step a command; run in order, skipped when finished, resumed when not."""

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from lvdm import cli
from lvdm import config as configs
from lvdm.errors import UserError
from lvdm.run import RunFolder
from sample.plan import Plan, Step

SCALES = pytest.mark.parametrize("scale", ["full", "smoke"])
VERBS = [
    *("train vae", "train refine", "train latents", "train dit", "sample"),
    *("evaluate reconstruction", "evaluate refinement", "evaluate generation"),
]


def demo(scale: str) -> Plan:
    return Plan.load("demo/plan.yaml", scale, videos="my clips", out="here/demo", seed=3)


# ---------------------------------------------------------------------------------------------------------------------
# What a plan says


@SCALES
def test_printing_needs_neither_torch_nor_videos_and_writes_nothing(scale, tmp_path):
    heavy = {"torch", "numpy", "av", "diffusers", "accelerate"}
    words = ["demo", "--plan", "videos=my clips", "out=here/demo", "seed=3", f"scale={scale}"]
    code = f"import sys; from lvdm.cli import main; sys.exit(main({words}) or bool({heavy} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == demo(scale).describe() + "\n" and not list(tmp_path.iterdir())
    assert [line.split(". ")[1] for line in done.stdout.splitlines()[::2]] == [step.name for step in demo(scale).steps]


@SCALES
def test_each_printed_command_is_its_step(scale):
    plan = demo(scale)
    commands = [line.strip() for line in plan.describe().splitlines() if line.startswith("   lvdm ")]
    assert [step.verb for step in plan.steps] == VERBS and len(commands) == len(VERBS)
    for step, command in zip(plan.steps, commands, strict=True):
        words = shlex.split(command.removeprefix(f"lvdm {step.verb} "))
        parsed, _ = configs.parse(type(step.resolve()), words)
        assert parsed == step.resolve()


def test_values_reach_the_steps():
    by_name = {step.name: step.resolve() for step in demo("full").steps}
    assert by_name["VAE, stage 1"].videos == "my clips" and by_name["VAE, stage 1"].seed == 3
    assert by_name["samples"].vae == "here/demo/refine" == by_name["FVD"].vae
    assert by_name["DiT"].latents == by_name["latent store"].out == "here/demo/latents"
    assert all(config.out.startswith("here/demo/") for config in by_name.values())
    outs = [config.out for config in by_name.values()]
    assert len(set(outs)) == len(outs)


def test_smoke_overrides_the_recipe_and_the_step_and_nothing_else():
    pairs = [(a.resolve(), b.resolve()) for a, b in zip(demo("full").steps, demo("smoke").steps, strict=True)]
    full, smoke = pairs[0]
    assert full.total > 100 * smoke.total and smoke.phases[0].samples == 32
    assert (smoke.model_args, smoke.videos, smoke.phases[0].lr) == (full.model_args, "my clips", full.phases[0].lr)
    for step, (full, smoke) in zip(configs.read_yaml("demo/plan.yaml")["steps"], pairs, strict=True):
        full, smoke = configs.to_dict(full), configs.to_dict(smoke)
        changed = {key for key in full if full[key] != smoke[key]}
        assert changed and changed <= {key.split(".")[0] for key in step["scales"]["smoke"]}


def test_wrong_steps_are_refused():
    with pytest.raises(UserError, match=r"step 'one': unknown verb 'train vea' \(did you mean 'train vae'\?\)"):
        Step(name="one", verb="train vea")
    with pytest.raises(UserError, match=r"unknown key 'chips' \(did you mean 'clip'"):
        Step(name="one", verb="train vae", set={"chips": 1}).resolve()
    with pytest.raises(UserError, match=r"no config 'demo/vea.yaml' \(did you mean 'demo/vae.yaml'"):
        Step(name="one", verb="train vae", config="demo/vea.yaml").resolve()


# ---------------------------------------------------------------------------------------------------------------------
# What a plan does


@dataclass
class Count:
    """A program that counts to `to`."""

    out: str = ""
    """Its run folder."""
    to: int = 3
    """How far."""
    of: str = ""
    """The run that it goes on from."""


@pytest.fixture
def program(monkeypatch, tmp_path):
    """`lvdm count`: a step each number, `interrupt` in the middle of a number's work, `log` of all that was done."""
    program = SimpleNamespace(log=[], interrupt=None)

    def run(config: Count) -> None:
        folder = RunFolder(config.out, config)
        name, numbers = folder.path.name, folder.path / "numbers"
        done = len(numbers.read_text()) if numbers.exists() else 0
        for number in range(done, config.to):
            if program.interrupt == (name, number):
                raise KeyboardInterrupt
            program.log.append((name, number))
            numbers.write_text("x" * (number + 1))
        folder.finish(to=config.to)

    module = SimpleNamespace(Count=Count, run=run)
    monkeypatch.setitem(sys.modules, "counting", module)
    monkeypatch.setitem(cli.VERBS, "count", cli.Verb("counting", "counting:Count", "counts"))
    return program


@pytest.fixture
def plan(program, tmp_path):
    """`plan(**values)`: three counting steps; the last uses the first."""
    recipe = tmp_path / "plan.yaml"
    steps = [
        {
            "name": name,
            "verb": "count",
            "set": {"out": "${values.out}/" + name, "to": "${values.to}"},
            "scales": {"smoke": {"to": 1}},
        }
        for name in "abc"
    ]
    steps[2]["set"]["of"] = "${values.out}/a"
    recipe.write_text(json.dumps({"values": {"out": str(tmp_path / "runs"), "to": 2}, "steps": steps}))
    return lambda scale="", **values: Plan.load(str(recipe), scale, **values)


def test_steps_run_in_order_and_are_timed(plan, program, tmp_path):
    plan().run("counting")
    assert program.log == [(name, number) for name in "abc" for number in range(2)]
    assert plan().seconds() == json.loads((tmp_path / "runs" / "plan.json").read_text())
    assert list(plan().seconds()) == ["a", "b", "c"] and all(0 <= s < 5 for s in plan().seconds().values())


def test_finished_steps_are_skipped(plan, program, capsys):
    plan().run("counting")
    before, times = list(program.log), plan().seconds()
    capsys.readouterr()
    plan().run("counting")
    assert program.log == before and plan().seconds() == times
    assert capsys.readouterr().out.splitlines() == [f"{name}: finished before, skipped" for name in "abc"]


def test_a_killed_plan_goes_on_in_the_middle_of_a_step(plan, program, capsys):
    program.interrupt = ("b", 1)
    with pytest.raises(KeyboardInterrupt):
        plan().run("counting")
    assert program.log == [("a", 0), ("a", 1), ("b", 0)]
    program.interrupt = None
    plan().run("counting")
    assert program.log[3:] == [("b", 1), ("c", 0), ("c", 1)]
    assert capsys.readouterr().out == "a: finished before, skipped\n"


def test_a_finished_folder_of_another_config_is_refused_and_not_skipped(plan, program, tmp_path):
    plan("smoke").run("counting")
    before = list(program.log)
    with pytest.raises(UserError, match=rf"out={tmp_path}/runs/a: belongs to another config \(different: to\)"):
        plan().run("counting")
    with pytest.raises(UserError, match="different: to"):
        plan(to=5).run("counting")
    assert program.log == before


def test_a_model_that_is_there_is_not_made_again(tmp_path):
    """vae init keeps no run folder: its folder is there whole or not at all."""
    step = Step(name="init", verb="vae init", set={"out": str(tmp_path / "init"), "source": "image"})
    assert not step.finished()
    (tmp_path / "init").mkdir()
    assert not step.finished()
    (tmp_path / "init" / "config.json").write_text("{}")
    assert step.finished()


def test_another_folder_is_another_plan(plan, program, tmp_path):
    plan().run("counting")
    plan(out=str(tmp_path / "other")).run("counting")
    assert len(program.log) == 12 and Path(tmp_path / "other" / "c" / "finished.json").is_file()
