"""The documents are true: their commands parse and run, their Python runs, links lead somewhere, counts are right."""

import importlib
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from diffusers import AutoencoderKL
from omegaconf import OmegaConf

import dit
import vae
from lvdm import cli, weights
from lvdm import config as configs
from lvdm.data.reader import probe
from lvdm.media import write_mp4
from sample import zoo
from sample.measure import evaluate
from sample.measure.evaluate import read_results
from vae.checkpoints import official

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = DOCUMENTS[0].read_text()


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def commands(text: str, program: str) -> list[list[str]]:
    """The words after `program` in every line that a shell block, fenced or indented, begins with it."""
    fenced = "\n".join(blocks(text, "sh"))
    indented = "\n".join(
        line.strip() for line in re.findall(r"^    .*", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    )
    lines = [shlex.split(line, comments=True) for line in f"{fenced}\n{indented}".splitlines()]
    return [words[1:] for words in lines if words[:1] == [program]]


def inline(text: str) -> list[list[str]]:
    """The words after `lvdm` in prose, where a verb of ours follows; dots stand for more keys."""
    found = [code.split() for code in re.findall(r"`lvdm ([^`]+)`", text)]
    verbs = {verb.split()[0] for verb in cli.VERBS}
    return [[word for word in words if word != "..."] for words in found if words[0] in verbs]


ALL = [
    (path.name, words) for path in DOCUMENTS for words in commands(path.read_text(), "lvdm") + inline(path.read_text())
]


def parse(words: list[str]):
    """The config that a command line gives."""
    for length in (2, 1):
        if (verb := " ".join(words[:length])) in cli.VERBS:
            module, _, name = cli.VERBS[verb].config.partition(":")
            return configs.parse(getattr(importlib.import_module(module), name), words[length:])
    raise AssertionError(f"no verb in {words}")


@pytest.mark.parametrize("document, words", ALL, ids=[f"{name}: {' '.join(words)}" for name, words in ALL])
def test_command_parses(document, words):
    parse(words)


def test_commands_are_found_and_name_every_verb():
    verbs = {verb for verb in cli.VERBS if any(" ".join(words).startswith(verb) for _, words in ALL)}
    assert verbs == set(cli.VERBS) and len(ALL) > 12


def test_make_targets_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    asked = [words[0] for path in DOCUMENTS for words in commands(path.read_text(), "make")]
    assert set(asked) >= {"demo", "test", "lint"} and set(asked) <= set(targets)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_pictures_exist(path):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", path.read_text()) if not re.match(r"https?:|#", link)]
    missing = [link for link in links if not (path.parent / link.split("#")[0]).exists()]
    assert not missing and (links or path.name != "README.md")


# ---------------------------------------------------------------------------------------------------------------------
# Recipes and counts


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def built(recipe: str) -> torch.nn.Module:
    """The model of a shipped recipe, without its numbers."""
    values = configs.read_yaml(recipe)
    with torch.device("meta"):
        if recipe.startswith("dit/"):
            classes = {"none": 0, "class": 101}[values.condition]
            return dit.build(values.model, condition=values.condition, num_classes=classes)
        if "refine" in recipe:  # of the stage 1 that it is to be trained on
            stage_1 = configs.read_yaml("vae/univae-tiny.yaml" if "tiny" in recipe else "vae/univae.yaml")
            options = OmegaConf.to_container(stage_1).get("model_args", {})
            return vae.build("univae", refine=True, inject=values.get("inject", "add"), **options)
        return vae.build(values.model, **OmegaConf.to_container(values).get("model_args", {}))


def test_recipe_table_names_every_recipe_and_counts_right():
    shipped = {str(path.relative_to(configs.configs_root())) for path in configs.configs_root().rglob("*.yaml")}
    rows = re.findall(r"^\| (`.*?) \| .*? \| (.*?) \|$", README, re.M)
    named = [(re.findall(r"`([^`]+)`", cell), size) for cell, size in rows]
    patterns = [recipe for recipes, _ in named for recipe in recipes]
    assert all(any(fnmatch(recipe, pattern) for pattern in patterns) for recipe in shipped)
    assert all(any(fnmatch(recipe, pattern) for recipe in shipped) for pattern in patterns)
    exact = 0
    for recipes, size in named:
        numbers = re.findall(r"\d[\d,.]*(?: M)?", size)
        for recipe, number in zip(recipes, numbers, strict=False):
            parameters = count(built(recipe))
            shown = f"{parameters / 1e6:.1f} M" if number.endswith(" M") else f"{parameters:,}"
            assert number == shown, recipe
            exact += 1
    assert exact == 18


def test_the_table_of_vaes_is_what_the_command_prints():
    assert f"```\n{zoo.table()}\n```" in README


def test_size_of_the_demo_is_right():
    text = " ".join((ROOT / "docs" / "demo.md").read_text().split())
    (shown,) = re.findall(r"([\d.]+) M parameters", text)
    assert shown == f"{count(built('demo/vae.yaml')) / 1e6:.1f}"


# ---------------------------------------------------------------------------------------------------------------------
# What runs


@pytest.mark.parametrize("code", blocks(README, "python"))
def test_python_of_the_readme_runs(code):
    exec(compile(code, "README.md", "exec"), {})


def test_help_and_dry_run_answer(tmp_path, monkeypatch, capsys):
    assert "`--dry-run` prints the" in README and "`lvdm VERB --help` explains each key" in README
    monkeypatch.chdir(tmp_path)
    assert cli.main([*commands(README, "lvdm")[0], "--dry-run"]) == 0
    assert "234,766,311 of 234,766,311 parameters trained" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert cli.main(["train", "vae", "--help"]) == 0 and "model_args" in capsys.readouterr().out


LAUNCHES = [(path.name, words) for path in DOCUMENTS for words in commands(path.read_text(), "accelerate")]


@pytest.mark.parametrize("document, words", LAUNCHES, ids=[f"{name}: {' '.join(words)}" for name, words in LAUNCHES])
def test_launches_parse(document, words):
    """The launcher's options are accelerate's, its config is ours, and the program takes the keys."""
    parser = launch_command_parser()
    launch = parser.parse_args(words[1:])
    assert launch.module and (launch.config_file is None or (ROOT / launch.config_file).exists())
    keys = launch.training_script_args
    if "--config" in keys:  # relative to the project here, to the shipped recipes elsewhere
        keys[keys.index("--config") + 1] = str(ROOT / keys[keys.index("--config") + 1])
    verb = next(verb for verb in cli.VERBS.values() if verb.program == launch.training_script)
    module, _, name = verb.config.partition(":")
    configs.parse(getattr(importlib.import_module(module), name), keys)
    assert '__name__ == "__main__"' in Path(importlib.import_module(launch.training_script).__file__).read_text()


def test_launchers_named_in_prose_exist():
    named = set(re.findall(r"accelerate/\w+\.yaml", README))
    assert "accelerate/zero2.yaml" in named and all((configs.configs_root() / name).exists() for name in named)
    assert {"train.vae", "train.refine", "train.latents", "train.dit", "sample.generate"} <= set(
        re.findall(r"(?:train|sample)\.[a-z]+", README)
    )


# What makes each command of "On your own data" small. Everything else is as the README has it.
VAE = ["model_args={width: 16, blocks: 1}"]
LOOP = ["workers=0", "precision=fp32", "threads=1"]
TINY = {
    "train vae": [*VAE, *LOOP, "phases=[{samples: 4, batch: 2, frames: 9, size: 32}]"],
    "train refine": [*LOOP, "phases=[{samples: 2, batch: 2, frames: 9, size: 32}]"],
    "train latents": ["size=32"],
    "train dit": ["model_args={depth: 2, width: 32, heads: 2}", *LOOP, "phases=[{samples: 4, batch: 2}]"],
    "sample": ["count=3", "steps=2", "batch=3"],
    "render": [],
    "reconstruct": ["max_frames=9"],
    "evaluate": ["size=32"],
    "fvd doctor": ["features=pixels", "knobs=[count,covariance]"],
    "vae card": ["size=32", "frames=9", "long=17", "speed=[]"],
}


class Brightness:
    """In the place of I3D, which takes a second a clip."""

    name, weights_sha256, resize, dim, min_frames = "brightness", "0" * 64, "as it is", 1, 1

    def __call__(self, video):
        return video.mean((1, 2, 3, 4))[:, None]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty working folder, and the README's /data and my.mp4 in it: 40 frames of 48x64 at 24 fps."""
    t, y, x = np.mgrid[:40, :48, :64]
    for number, name in enumerate(
        ("data/UCF-101/Biking/a", "data/UCF-101/Fencing/b", "data/clips/c", "data/val/d", "my")
    ):
        waves = [np.sin((x + t + number) / (5 + k)) * np.cos(y / (6 + k)) for k in range(3)]
        (path := tmp_path / f"{name}.mp4").parent.mkdir(parents=True, exist_ok=True)
        write_mp4(path, (127.5 + 87 * np.stack(waves, -1)).astype(np.uint8), 24)
    cache = weights.cache_dir() / "weights"
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "weights").symlink_to(cache)
    monkeypatch.setenv("LVDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(evaluate, "make_extractor", lambda name, device, weights: Brightness())
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_commands_for_own_data_run_in_their_order(data):
    section = README.split("## On your own data")[1].split("\n## ")[0]
    lines = [[word.replace("/data/", f"{data}/data/") for word in words] for words in commands(section, "lvdm")]
    assert len(lines) == 12
    for words in lines:
        (verb,) = (verb for verb in TINY if " ".join(words).startswith(verb))
        assert cli.main([*words, *TINY[verb]]) == 0, words
        assert Path(parse(words)[0].out or "my-reconstructed.mp4").exists()

    samples = (data / "samples" / "samples.jsonl").read_text()
    assert re.findall(r'"class": "(\w+)"', samples) == ["Biking", "Fencing", "Biking"]
    d1, d2, again = (probe(f"samples/{name}/000001.mp4") for name in ("d1", "d2", "again"))
    assert (d1.frames, d1.fps) == (17, 12) and (d2.frames, d2.fps) == (again.frames, again.fps) == (33, 24)
    assert probe("my-reconstructed.mp4").frames == 9
    tables = {name: read_results(data / "metrics" / name) for name in ("reconstruction", "refinement", "fvd")}
    assert [len(table) for table in tables.values()] == [1, 2, 2]
    assert all((data / "metrics" / name / "index.html").is_file() for name in ("doctor", "card"))


def test_commands_for_other_vaes_run_in_their_order(data, capsys):
    """With tiny models where the section names an image VAE, an official checkpoint and a trained run."""
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8,) * 4, "norm_num_groups": 2, "layers_per_block": 1}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    AutoencoderKL(**sizes, **kinds).save_pretrained("sd-vae-ft-mse")
    torch.save(official(vae.build("odvae", width=8, blocks=1)), "checkpoint.ckpt")
    vae.build("univae", width=8, blocks=1, refine=True).save_pretrained("runs/univae-2x/export")

    section = README.split("## Any other VAE")[1].split("\n## ")[0]
    lines = [[word.replace("/data/", f"{data}/data/") for word in words] for words in commands(section, "lvdm")]
    assert len(lines) == 6
    for words in lines:
        assert cli.main(words) == 0, words
    printed = capsys.readouterr()
    assert "107,798,550" in printed.out and "so images go through as before" in printed.out
    assert "checkpoint.ckpt: odvae (Open-Sora-Plan v1.2, variant 4)" in printed.err
    source, rendered = probe("my.mp4"), probe("rendered/my.mp4")
    assert (rendered.frames, rendered.fps) == (2 * source.frames - 1, 2 * source.fps)
    assert (rendered.width, rendered.height) == (source.width, source.height)
