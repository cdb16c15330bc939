"""docs/vae.md: every count is that of the model, the example runs."""

import ast
import re
from pathlib import Path

import pytest
import torch

import vae

TEXT = (Path(__file__).parents[2] / "docs" / "vae.md").read_text()
ROWS = re.findall(r"^\| `(\w+)` \| (?:`(.*?)`)? ?\| .*? \| ([\d,]{9,}) \|", TEXT, re.M)


def test_every_name_has_its_row():
    assert {name for name, _, _ in ROWS} == set(vae.names()) and len(ROWS) >= 24


@pytest.mark.parametrize(("name", "options", "counted"), ROWS, ids=lambda value: value or "-")
def test_counts(name, options, counted):
    call = ast.parse(f"f({options})", mode="eval").body
    keys = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    with torch.device("meta"):
        model = vae.build(name, **keys)
    assert f"{sum(p.numel() for p in model.parameters()):,}" == counted


def test_the_examples_run():
    names = {}
    for code in re.findall(r"```python\n(.*?)```", TEXT, re.S):
        exec(compile(code, "docs/vae.md", "exec"), names)
    model = vae.build("cvvae", width=8, blocks=1)
    whole, cut = names["whole_and_cut"](model, names["video"], size=0, frames=5)
    assert whole.shape == cut.shape == names["video"].shape and not torch.equal(whole, cut)


@pytest.mark.parametrize("name", ["sdvae", "cogvideox", "tats"])
def test_least_tiles(name):
    with torch.device("meta"):
        model = vae.build(name)
    (row,) = re.findall(rf"^\|.*`{name}`.*\| (\d+) \| (\d+) \|$", TEXT, re.M)
    assert row == (str(model.reach), str(model.least_tile))


def test_recipes_it_names_are_there():
    from lvdm.config import find_recipe

    named = re.findall(r"`(vae/\w+\.yaml)`", TEXT)
    assert len(named) > 10 and all(find_recipe(name) for name in named)
