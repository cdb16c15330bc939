"""The configuration grammar: recipes, overrides, help, and one clear line for whatever is wrong."""

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
from omegaconf import OmegaConf

from lvdm import config as configs
from lvdm.cli import VERBS
from lvdm.config import at_least, choice, find_recipe, load, parse, read_yaml, to_dict, to_yaml, usage
from lvdm.errors import UserError


@dataclass
class Stage:
    """One stretch of a job."""

    lr: float = 0.1
    """Learning rate."""
    steps: int = 10
    """Steps."""

    def __post_init__(self) -> None:
        at_least(self, lr=0.0, steps=1)


@dataclass
class Base:
    """Keys of every job."""

    out: str = ""
    """Folder to write to."""
    seed: int = 0
    """Of every draw."""


@dataclass
class Job(Base):
    """Do a thing, and
    do it well."""

    positionals: ClassVar[tuple[str, ...]] = ("source",)

    source: str = ""
    """What to work on,
    wherever it is."""
    mode: str = "slow"
    """slow or fast."""
    refine: bool = False
    """Whether to go over it again."""
    rate: float = 1.0
    """A factor."""
    names: list[str] = field(default_factory=list)
    """Names."""
    options: dict[str, Any] = field(default_factory=dict)
    """Anything."""
    phases: list[Stage] = field(default_factory=lambda: [Stage()])
    """Stages in order."""

    def __post_init__(self) -> None:
        choice(self, "mode", ("slow", "fast"))
        at_least(self, rate=0)


def job(*words: str) -> Job:
    return parse(Job, list(words))[0]


def program(verb: str) -> type:
    module, _, name = VERBS[verb].config.partition(":")
    return getattr(importlib.import_module(module), name)


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


# ---------------------------------------------------------------------------------------------------------------------
# Precedence


def test_defaults_then_recipe_then_command_line_and_the_last_word_wins(recipe):
    path = recipe("seed: 1\nrate: 2\nmode: fast\n")
    config = job("--config", path, "rate=3", "seed=7", "rate=4")
    assert (config.mode, config.seed, config.rate, config.out) == ("fast", 7, 4.0, "")
    assert job("rate=3", "--config", path).rate == 3.0  # wherever the recipe stands
    assert job(f"--config={path}").seed == 1


def test_the_last_word_wins_over_a_whole_given_in_between():
    config = job("phases.0.lr=1", "phases=[{lr: 2, steps: 3}]", "phases.0.lr=4")
    assert to_dict(config)["phases"] == [{"lr": 4.0, "steps": 3}]
    assert job("phases.0.lr=1", "phases=[{lr: 2}]").phases[0].lr == 2.0


def test_overrides_reach_into_lists_of_the_recipe(recipe):
    path = recipe("phases:\n- {lr: 1, steps: 2}\n- {lr: 3}\n")
    config = job("--config", path, "phases.1.lr=5", "phases[0].steps=6")
    assert to_dict(config)["phases"] == [{"lr": 1.0, "steps": 6}, {"lr": 5.0, "steps": 10}]


# ---------------------------------------------------------------------------------------------------------------------
# Spelling


def test_three_spellings_of_a_key():
    assert job("seed=3") == job("--seed=3") == job("--seed", "3") == Job(seed=3)


def test_a_bare_flag_is_true_and_takes_no_other_word():
    assert job("--refine", "clip.mp4") == Job(refine=True, source="clip.mp4")
    assert job("--refine", "seed=1") == Job(refine=True, seed=1)
    assert job("--refine") == job("--refine", "true") == job("refine=true") == Job(refine=True)
    assert job("--refine", "false") == job("--refine=false") == Job()


def test_text_stays_text():
    for text in ("3", "null", "true", "[a, b]", "{a: 1}", "a: b", "1e-3", "0123", "", "a=b", "#"):
        assert job(f"out={text}").out == text


def test_numbers_lists_and_mappings_are_read_as_yaml():
    assert job("rate=1e-3").rate == 1e-3
    assert job("names=[a b, 'c, d']").names == ["a b", "c, d"]
    assert job("names=[]").names == job("names=").names == []
    assert job("names=one,two").names == ["one", "two"] and job("names=one").names == ["one"]
    assert job("phases={lr: 3}").phases == [Stage(3.0)]
    config = job("options={width: 16, kernels: [3, 5]}", "options.norm=frame", "options.width=32")
    assert config.options == {"width": 32, "kernels": [3, 5], "norm": "frame"}
    assert type(job("options.width=16").options["width"]) is int


def test_positionals_fill_their_names_and_no_more():
    assert job("clip.mp4", "seed=1") == job("seed=1", "clip.mp4") == Job(source="clip.mp4", seed=1)
    with pytest.raises(UserError, match=r"unexpected argument 'b': this command takes SOURCE"):
        job("a", "b")
    with pytest.raises(UserError, match="no positional arguments"):
        parse(Base, ["a"])


@dataclass
class Contest(Base):
    """Several things in turn."""

    positionals: ClassVar[tuple[str, ...]] = ("judge", "entries")

    judge: str = ""
    """Who looks at them."""
    entries: list[str] = field(default_factory=list)
    """What is looked at."""


def test_a_last_positional_that_is_a_list_takes_the_rest():
    def contest(*words: str) -> Contest:
        return parse(Contest, list(words))[0]

    assert contest("me", "a", "seed=1", "b, c") == Contest(judge="me", entries=["a", "b, c"], seed=1)
    assert contest("me") == Contest(judge="me") and contest() == Contest()
    assert contest("me", "entries=a,b").entries == ["a", "b"]
    assert usage(Contest, "lvdm contest").startswith("usage: lvdm contest JUDGE ENTRIES ... [--config FILE]")


def test_flags_are_apart_from_keys():
    config, flags = parse(Job, ["--dry-run", "seed=1", "--plan"])
    assert config == Job(seed=1) and flags == configs.Flags(dry_run=True, plan=True)
    assert parse(Job, ["nonsense=1", "-h"]) == (None, configs.Flags(help=True))


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sead=1"], r"command line: unknown key 'sead' \(did you mean 'seed'\?\); known: .*source"),
        (["--sead", "1"], r"unknown key 'sead' \(did you mean 'seed'\?\)"),
        (["--refne"], r"unknown key 'refne' \(did you mean 'refine'\?\)"),
        (["phases.0.step=1"], r"unknown key 'phases.0.step' \(did you mean 'steps'\?\); known: lr, steps"),
        (["phases.lr=1"], r"unknown key 'phases.lr'"),
        (["--seed"], "--seed: expected a value"),
        (["--config"], "--config: expected a value"),
        (["seed=many"], "command line: key 'seed'.*'many'"),
        (["seed=1.5"], "key 'seed'.*1.5"),
        (["seed="], "key 'seed'"),
        (["refine=perhaps"], "key 'refine'.*perhaps"),
        (["phases=3"], r"key 'phases\[0\]'"),
        (["phases=[3]"], r"key 'phases\[0\]'"),
        (["phases.0.lr=fast"], "lr'.*fast"),
        (["phases.5.lr=1"], r"key 'phases\[5\]'"),
        (["options=[1]"], "key 'options'"),
        (["seed={"], "key 'seed': '{' is not valid YAML"),
        (["out=${nowhere}"], "key 'out'.*nowhere"),
        (["mode=fats"], r"mode='fats': expected one of slow, fast \(did you mean 'fast'\?\)"),
        (["rate=-1"], "rate=-1.0: expected at least 0"),
        (["rate=nan"], "rate=nan: expected at least 0"),
        (["phases=[{steps: 0}]"], "steps=0: expected at least 1"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line_that_names_the_key(words, message):
    with pytest.raises(UserError, match=message) as caught:
        job(*words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sead: 1", r"recipe.yaml: unknown key 'sead' \(did you mean 'seed'\?\)"),
        ("phases: [{lr: 1}, {step: 1}]", r"recipe.yaml: unknown key 'phases\[1\].step' \(did you mean 'steps'\?\)"),
        ("seed: many", "recipe.yaml: key 'seed'.*'many'"),
        ("seed: [1]", "recipe.yaml: key 'seed'"),
        ("seed: {a: 1}", "recipe.yaml: key 'seed'"),
        ("seed: null", "recipe.yaml: key 'seed'"),
        ("phases: 3", "recipe.yaml: key 'phases': expected a list"),
        ("phases: {lr: 1}", "recipe.yaml: key 'phases': expected a list"),
        ("phases: null", "recipe.yaml: key 'phases': expected a list"),
        ("phases: [3]", r"recipe.yaml: key 'phases\[0\]'"),
        ("options: [1]", "recipe.yaml: key 'options': expected a mapping"),
        ("options: 1", "recipe.yaml: key 'options'"),
        ("- seed", "recipe.yaml: expected a mapping"),
        ("3", "recipe.yaml: not valid YAML"),
        ("seed: [", "recipe.yaml: not valid YAML"),
        ("seed: 1\nseed: 2", "recipe.yaml: not valid YAML.*duplicate key seed"),
        ("mode: fats", "mode='fats'"),
    ],
)
def test_mistakes_in_a_recipe_are_one_line_that_names_file_and_key(recipe, text, message):
    with pytest.raises(UserError, match=message) as caught:
        load(Job, recipe(text))
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_names_the_nearest_shipped_one():
    with pytest.raises(UserError, match=r"no config 'demo/vea.yaml' \(did you mean 'demo/vae.yaml'\?\); shipped: "):
        load(Job, "demo/vea.yaml")


# ---------------------------------------------------------------------------------------------------------------------
# Showing


def test_yaml_gives_the_config_back(recipe):
    config = job("clip.mp4", "rate=1e-6", "names=[on, '1']", "options={a: [1, {b: null}]}", "phases=[{lr: 3}]")
    assert load(Job, recipe(to_yaml(config))) == config
    assert to_dict(config)["phases"] == [{"lr": 3.0, "steps": 10}]


def test_help_explains_every_key_with_its_type_default_and_docstring():
    text = usage(Job, "lvdm job")
    assert text.splitlines()[0] == "usage: lvdm job SOURCE [--config FILE] [key=value ...] [--dry-run]"
    assert "Do a thing, and\ndo it well." in text
    for line in (
        "  source=  (str)\n      What to work on, wherever it is.",
        "  refine=false  (bool)\n      Whether to go over it again.",
        "  rate=1.0  (float)\n      A factor.",
        "  options={}  (dict[str, Any])\n      Anything.",
        "  names=[]  (list[str])\n      Names.",
        "  phases=[...]  (list)\n      Stages in order.\n  phases[i].lr=0.1  (float)\n      Learning rate.",
        "  seed=0  (int)\n      Of every draw.",
    ):
        assert line in text
    assert text.index("source=") < text.index("out=")  # a program's own keys come first


@pytest.mark.parametrize("verb", VERBS)
def test_every_key_of_every_program_is_documented(verb):
    cls = program(verb)
    rows = configs._fields(cls)
    assert (rows or verb == "vae list") and not [key for key, _, _, doc in rows if not doc]
    assert load(cls) == cls()  # the defaults are valid


# ---------------------------------------------------------------------------------------------------------------------
# Shipped recipes

PROGRAMS = {
    "vae": "train vae",
    "refine": "train refine",
    "latents": "train latents",
    "dit": "train dit",
    "sample": "sample",
}


def of_a_program(path: Path) -> bool:
    """Launcher settings and plans, which have a list of steps, are no program's recipes."""
    return path.parent.name != "accelerate" and not OmegaConf.is_list(read_yaml(path).get("steps"))


RECIPES = [path for path in sorted(configs.configs_root().rglob("*.yaml")) if of_a_program(path)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_recipe_loads_as_the_program_that_its_name_or_folder_tells(path):
    verb = next(PROGRAMS[name] for name in (path.stem.split("_")[0], path.parent.name) if name in PROGRAMS)
    cls = program(verb)
    assert load(cls, path) != cls()


def test_a_recipe_begins_with_its_base(tmp_path):
    (tmp_path / "low.yaml").write_text("seed: 1\nmodel_args: {width: 8, norm: clip}\nema: 0.5\n")
    (tmp_path / "mid.yaml").write_text(f"base: {tmp_path}/low.yaml\nmodel_args: {{norm: frame}}\nseed: 2\n")
    (tmp_path / "top.yaml").write_text(f"base: {tmp_path}/mid.yaml\nseed: 3\n")
    values = read_yaml(tmp_path / "top.yaml")
    assert values == {"seed": 3, "ema": 0.5, "model_args": {"width": 8, "norm": "frame"}}


def test_bases_that_are_not_there_or_go_round_are_user_errors(tmp_path):
    (tmp_path / "lost.yaml").write_text("base: vae/univea.yaml\n")
    with pytest.raises(UserError, match=r"no config 'vae/univea.yaml'.*did you mean"):
        read_yaml(tmp_path / "lost.yaml")
    (tmp_path / "a.yaml").write_text(f"base: {tmp_path}/b.yaml\n")
    (tmp_path / "b.yaml").write_text(f"base: {tmp_path}/a.yaml\n")
    with pytest.raises(UserError, match="base goes round in a circle"):
        read_yaml(tmp_path / "a.yaml")


def test_recipes_are_found_by_path_and_by_shipped_name():
    shipped = configs.configs_root() / "demo" / "vae.yaml"
    assert shipped in RECIPES
    assert find_recipe(shipped) == find_recipe("demo/vae.yaml") == find_recipe("demo/vae") == shipped
    assert find_recipe("configs/demo/vae.yaml").samefile(shipped)
