"""What an installed copy holds: every package and every recipe."""

import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = ("lvdm", "vae", "dit", "train", "sample")


def backend_is_here() -> bool:
    """Whether this environment has the setuptools that pyproject.toml asks for; pip fetches it otherwise."""
    needed = int(PROJECT["build-system"]["requires"][0].partition(">=")[2])
    installed = {d.name: d.version for d in importlib.metadata.distributions()}.get("setuptools", "0")
    return int(installed.split(".")[0]) >= needed


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel of a copy of the sources, so that building leaves nothing in the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*PACKAGES, "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out), str(source)]
    if backend_is_here():
        command.insert(4, "--no-build-isolation")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_every_module_is_in_the_wheel(wheel):
    modules = {str(path.relative_to(ROOT)) for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    assert modules == {name for name in wheel.namelist() if name.endswith(".py")}


def test_every_recipe_is_in_the_wheel_where_the_installed_package_looks(wheel):
    recipes = {f"lvdm/configs/{path.relative_to(ROOT / 'configs')}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert "lvdm/configs/demo/vae.yaml" in recipes
    assert recipes == {name for name in wheel.namelist() if name.endswith(".yaml")}


def test_the_command_its_version_and_its_licence(wheel):
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert "lvdm = lvdm.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert f"Version: {PROJECT['project']['version']}\n" in metadata
    assert f"{info}/licenses/LICENSE" in wheel.namelist()


def test_an_unpacked_wheel_finds_its_recipes(wheel, tmp_path):
    wheel.extractall(tmp_path)
    code = "from lvdm.config import find_recipe; print(find_recipe('demo/vae.yaml'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == tmp_path / "lvdm" / "configs" / "demo" / "vae.yaml"


def test_the_version_is_said_once_and_the_same():
    import lvdm

    assert lvdm.__version__ == PROJECT["project"]["version"]
