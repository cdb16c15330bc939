"""Imports run one way: train, sample -> vae, dit -> lvdm; only the command line names what is above it, and as text."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from lvdm.cli import VERBS
from lvdm.config import usage

ROOT = Path(__file__).parents[1]
BELOW = {
    "lvdm": set(),
    "vae": {"lvdm"},
    "dit": {"lvdm"},
    "train": {"lvdm", "vae", "dit"},
    "sample": {"lvdm", "vae", "dit", "train"},  # of train, the keys of programs that read videos
}
FILES = [path for package in BELOW for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def of_ours(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] in BELOW}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards(path):
    package = path.relative_to(ROOT).parts[0]
    packages = {name.split(".")[0] for name in of_ours(imports(path))}
    assert packages <= BELOW[package] | {package}


def test_files_are_found():
    assert len(FILES) > 45 and {path.relative_to(ROOT).parts[0] for path in FILES} == set(BELOW)
    assert of_ours(imports(ROOT / "sample" / "demo.py")) >= {"lvdm.report", "vae"}  # those inside functions too


def test_sample_takes_nothing_but_keys_from_train():
    taken = {name for path in (ROOT / "sample").rglob("*.py") for name in imports(path) if name.startswith("train")}
    assert taken and all(name.startswith("train.configs") for name in taken)


def test_only_the_command_line_names_programs_as_text():
    name = re.compile(r"(vae|dit|train|sample)\.[\w.]+(:\w+)?")
    for path in (ROOT / "lvdm").rglob("*.py"):
        strings = [n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
        named = [text for text in strings if isinstance(text, str) and name.fullmatch(text)]
        assert not named or path.name == "cli.py", (path, named)


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_name_programs_that_are_there_and_take_their_config(verb, capsys):
    module, _, name = VERBS[verb].program.partition(":")
    program = importlib.import_module(module)
    assert getattr(program, name or "main")(["--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        (f"usage: lvdm {verb} ", f"usage: lvdm {verb}\n")
    )  # which `program` finds by the config that it was given
    module, _, config = VERBS[verb].config.partition(":")
    config = getattr(importlib.import_module(module), config)
    assert printed.strip() == usage(config, f"lvdm {verb}").strip()
    if not name:  # a module of one program
        assert program.run.__annotations__["config"] is config
