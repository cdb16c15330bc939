"""The named transformers: their exact sizes, and names that cost no import of torch."""

import subprocess
import sys

import pytest
import torch

import dit
from lvdm.errors import UserError

COUNTS = {  # unconditional, 101 classes
    "latte-s/2": (32_480_672, 32_519_840),
    "latte-s/4": (32_536_064, 32_575_232),
    "latte-s/8": (32_757_632, 32_796_800),
    "latte-b/2": (129_547_040, 129_625_376),
    "latte-b/4": (129_657_728, 129_736_064),
    "latte-b/8": (130_100_480, 130_178_816),
    "latte-l/2": (456_815_648, 456_920_096),
    "latte-l/4": (456_963_200, 457_067_648),
    "latte-l/8": (457_553_408, 457_657_856),
    "latte-xl/2": (673_681_568, 673_799_072),
    "latte-xl/4": (673_847_552, 673_965_056),
    "latte-xl/8": (674_511_488, 674_628_992),
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
    assert dit.names() == sorted(COUNTS)
    with pytest.raises(UserError, match="latte-xl/2"):
        dit.build("latte-xl/3")
    with pytest.raises(UserError, match="widht"):
        dit.build("latte-s/2", widht=32)


def test_names_import_no_torch():
    code = "import sys, dit; dit.names(); sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
