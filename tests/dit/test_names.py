"""The named transformers: their exact sizes, and names that cost no import of torch."""

import subprocess
import sys

import pytest
import torch

import dit
from lvdm.errors import UserError

COUNTS = {  # unconditional, 101 classes
    "latte-s/2": (32_480_672, 32_519_840),
    "latte-b/2": (129_547_040, 129_625_376),
    "latte-l/2": (456_815_648, 456_920_096),
    "latte-xl/2": (673_681_568, 673_799_072),
}


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    with torch.device("meta"):
        unconditional = dit.build(name)
        classes = dit.build(name, condition="class", num_classes=101)
    assert (count(unconditional), count(classes)) == COUNTS[name]


@pytest.mark.parametrize("name", dit.names())
def test_every_name_builds_tiny_with_its_own_patch(name):
    model = dit.build(name, frames=2, size=(8, 8), **dit.registry.entry(name).tiny)
    assert model.config.patch == int(name.split("/")[1])
    x = torch.randn(1, 4, 2, 8, 8)
    assert model(x, torch.tensor([5])).shape == (1, 8, 2, 8, 8)


def test_names_are_complete_and_wrong_ones_are_user_errors():
    assert len(dit.names()) == 12
    with pytest.raises(UserError, match="latte-xl/2"):
        dit.build("latte-xl/3")
    with pytest.raises(UserError, match="widht"):
        dit.build("latte-s/2", widht=32)


def test_names_import_no_torch():
    code = "import sys, dit; dit.names(); sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
