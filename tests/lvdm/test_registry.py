"""From a name to a model, from a folder to a trained one, and one clear line where there is none."""

import json
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import nn

from lvdm.errors import UserError
from lvdm.registry import Registry


class Toy(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, width: int = 4, depth: int = 1):
        super().__init__()
        if width < 1:
            raise UserError(f"width={width}: expected at least 1")
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))


class Other(Toy):
    pass


@pytest.fixture
def registry() -> Registry:
    toys = Registry("toy")
    toys.add("toy-s", f"{__name__}:Toy", tiny={"width": 2})
    toys.add("toy-l", f"{__name__}:Toy", tiny={"width": 2}, defaults={"width": 8, "depth": 3})
    return toys


@pytest.fixture
def export(tmp_path) -> Path:
    torch.manual_seed(0)
    Toy(depth=2).save_pretrained(tmp_path / "run" / "export")
    return tmp_path / "run" / "export"


def refusal(registry: Registry, spec) -> str:
    with pytest.raises(UserError) as caught:
        registry.load(str(spec))
    message = str(caught.value)
    assert "\n" not in message and str(spec) in message
    return message


# ---------------------------------------------------------------------------------------------------------------------
# Names


def test_names_build_their_class_with_their_defaults(registry):
    assert registry.names() == ["toy-l", "toy-s"]
    assert len(registry.build("toy-l").layers) == 3 and registry.build("toy-l").config.width == 8
    assert registry.build("toy-l", width=6).config.width == 6
    assert registry.build("toy-s", **registry.entry("toy-s").tiny).config.width == 2
    with torch.device("meta"):
        assert registry.build("toy-s").layers[0].weight.is_meta


def test_a_class_is_imported_when_it_is_asked_for():
    registry = Registry("toy")
    registry.add("later", "colorsys:rgb_to_hsv", tiny={})
    sys.modules.pop("colorsys", None)
    assert registry.names() == ["later"]
    assert "colorsys" not in sys.modules
    assert registry.entry("later").resolve()(0, 0, 0) == (0, 0, 0)


def test_a_name_is_given_once(registry):
    with pytest.raises(ValueError, match="'toy-s' is registered twice"):
        registry.add("toy-s", "x:Y", tiny={})


def test_unknown_names_and_options(registry):
    with pytest.raises(UserError, match=r"unknown toy 'toy-x' \(did you mean 'toy-[sl]'\?\); known: toy-l, toy-s"):
        registry.build("toy-x")
    with pytest.raises(UserError, match="toy 'toy-s' has no option 'widht'"):
        registry.build("toy-s", widht=3)
    with pytest.raises(UserError, match="width=0: expected at least 1"):
        registry.build("toy-s", width=0)
    with pytest.raises(TypeError, match="NoneType"):  # a bug is not dressed up as an unknown option
        registry.build("toy-s", width=None)


# ---------------------------------------------------------------------------------------------------------------------
# Models of other libraries and formats


def stranger(kind: str, width: int = 1) -> Toy:
    if kind != "Stranger":
        raise UserError(f"kind: no {kind}")
    return Other(width=width)


def read_text(spec: str) -> Toy | None:
    return Other(width=int(Path(spec).read_text())) if spec.endswith(".toy") else None


def test_a_prefix_names_the_classes_of_a_library(registry):
    registry.add_library("strange", f"{__name__}:stranger")
    assert type(registry.build("strange:Stranger", width=3)) is Other
    with pytest.raises(UserError, match="kind: no Other"):
        registry.build("strange:Other")
    with pytest.raises(UserError, match="toy 'strange:Stranger' has no option 'widht'"):
        registry.build("strange:Stranger", widht=3)
    for name in ("strange", "strange:", "stranger:Stranger"):
        with pytest.raises(UserError, match=f"unknown toy '{name}'.*; known: toy-l, toy-s, strange:CLASS"):
            registry.build(name)
    assert registry.names() == ["toy-l", "toy-s"]


def test_a_reader_is_asked_before_our_own_folders(registry, export, tmp_path):
    registry.add_reader(f"{__name__}:read_text")
    (tmp_path / "six.toy").write_text("6")
    model = registry.load(str(tmp_path / "six.toy"))
    assert type(model) is Other and model.config.width == 6 and not model.training
    assert type(registry.load(str(export))) is Toy  # none of the reader's


def test_readers_and_libraries_are_imported_when_they_are_asked():
    registry = Registry("toy")
    registry.add_reader("colorsys:rgb_to_hsv")
    registry.add_library("colour", "colorsys:rgb_to_hsv")
    sys.modules.pop("colorsys", None)
    assert registry.names() == [] and registry.entry("colour:x").defaults == {"kind": "x"}
    assert "colorsys" not in sys.modules


def test_an_entry_may_name_its_paper(registry):
    registry.add("toy-m", f"{__name__}:Toy", tiny={}, paper="Toys (Smith, 2024)")
    assert registry.entry("toy-m").paper == "Toys (Smith, 2024)" and registry.entry("toy-s").paper == ""


# ---------------------------------------------------------------------------------------------------------------------
# Trained models


def test_run_and_export_folders_give_the_weights_in_eval_mode(registry, export):
    stored = load_file(export / "diffusion_pytorch_model.safetensors")
    for spec in (export, export.parent):
        model = registry.load(str(spec))
        assert type(model) is Toy and not model.training and len(model.layers) == 2
        assert set(model.state_dict()) == set(stored)
        assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())


def test_a_run_without_an_export_says_how_to_finish_it(registry, tmp_path):
    (tmp_path / "config.yaml").touch()
    assert "no export/" in refusal(registry, tmp_path)
    assert "the run has not finished: run its command again" in refusal(registry, tmp_path)
    (tmp_path / "photos").mkdir()
    message = refusal(registry, tmp_path / "photos")
    assert "no trained toy" in message and "finished" not in message


def test_names_and_folders_that_hold_no_model(registry, tmp_path):
    assert "has no published weights: train one" in refusal(registry, "toy-s")
    for spec in (tmp_path / "nowhere", "./a/b", "nowhere", "a/b/c"):
        assert "no such folder; expected a run folder, an export folder or a hub id" in refusal(registry, spec)
    with pytest.raises(UserError, match="no toy given"):
        registry.load("")


def test_a_model_of_another_kind_is_named(registry, tmp_path):
    Other().save_pretrained(tmp_path)
    assert "holds a Other, not a toy of ours (Toy)" in refusal(registry, tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", "3"])
def test_a_config_that_is_none(registry, export, text):
    (export / "config.json").write_text(text)
    assert "config.json: expected a diffusers config.json with a _class_name" in refusal(registry, export)


def without(state):
    state.pop("layers.1.bias")


def with_more(state):
    state["layers.2.bias"] = torch.zeros(4)


def with_other_shape(state):
    state["layers.0.weight"] = torch.zeros(4, 5)


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (without, "another architecture than its config.json, e.g. ['layers.1.bias']"),
        (with_more, "another architecture than its config.json, e.g. ['layers.2.bias']"),
        (with_other_shape, "cannot load Toy: Cannot load because layers.0.weight expected shape"),
    ],
)
def test_weights_of_another_architecture(registry, export, tamper, message):
    path = export / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    tamper(state)
    save_file(state, path, metadata={"format": "pt"})
    assert message in refusal(registry, export)


def test_weights_that_do_not_fit_a_changed_config(registry, export):
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps({**config, "depth": 3}))
    assert "another architecture" in refusal(registry, export)


def test_no_weights_damaged_weights_and_pickles(registry, export):
    path = export / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    path.write_bytes(path.read_bytes()[:50])
    assert "cannot load Toy" in refusal(registry, export)
    path.unlink()
    assert "cannot load Toy" in refusal(registry, export)
    torch.save(state, export / "diffusion_pytorch_model.bin")
    assert "cannot load Toy" in refusal(registry, export)  # never unpickled


@pytest.mark.parametrize("spec", ["someone/model", "a b/c"])
def test_a_hub_id_without_a_network_or_of_no_form(registry, spec, monkeypatch):
    def offline(repo: str, name: str):
        huggingface_hub.utils.validate_repo_id(repo)
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    assert "not a folder here, and the hub did not give it" in refusal(registry, spec)
