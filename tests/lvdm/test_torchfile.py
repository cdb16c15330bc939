"""Weight files of other code: what is read, what is refused, and what is found inside."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lvdm.errors import UserError
from lvdm.torchfile import differences, read_tree, state_dict, weight_file

WEIGHTS = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}


def test_a_weight_file_is_told_from_folders_and_names(tmp_path):
    file = tmp_path / "x.pt"
    torch.save(WEIGHTS, file)
    assert weight_file(str(file)) == file
    assert weight_file(str(tmp_path)) is None
    assert weight_file("owner/model") is None
    with pytest.raises(UserError, match=r"gone\.ckpt: no such file"):
        weight_file(str(tmp_path / "gone.ckpt"))
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"notes\.txt: expected a weight file \(\.safetensors, "):
        weight_file(str(tmp_path / "notes.txt"))


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_are_read_and_objects_are_not(tmp_path, zipped):
    file = tmp_path / "x.pt"
    torch.save({"model": WEIGHTS, "step": 3}, file, _use_new_zipfile_serialization=zipped)
    tree = read_tree(file)
    assert tree["step"] == 3 and torch.equal(tree["model"]["b"], WEIGHTS["b"])
    torch.save({"model": WEIGHTS, "args": Namespace()}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"x\.pt: holds Python objects other than tensors"):
        read_tree(file)


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_damaged_files_are_user_errors(tmp_path, name):
    file = tmp_path / name
    (save_file if name.endswith("safetensors") else torch.save)(WEIGHTS, file)
    for data in (b"", b"not weights", file.read_bytes()[:-200]):
        file.write_bytes(data)
        with pytest.raises(UserError, match=r"damaged, or no checkpoint|holds Python objects"):
            read_tree(file)


def test_averaged_weights_come_first_and_wrappers_are_taken_off():
    file, others = Path("x.pt"), {"c": torch.zeros(1)}
    how = {"averaged": "ema", "wrappers": ("model", "state_dict")}
    assert state_dict({"model": others, "ema": WEIGHTS}, file, **how) == (WEIGHTS, "EMA weights, ")
    assert state_dict({"model": WEIGHTS, "ema": None}, file, **how) == (WEIGHTS, "")
    assert state_dict({"model": {"state_dict": WEIGHTS}}, file, **how) == (WEIGHTS, "")
    assert state_dict(WEIGHTS | {"step": 3}, file, **how) == (WEIGHTS, "")
    with pytest.raises(UserError, match=r"x\.pt: expected a state dict, found a list"):
        state_dict({"model": [1]}, file, **how)


def test_differences_are_counted_and_named():
    expected = {"a": (3,), "b": (2, 2)}
    assert differences({"a": [3], "b": torch.Size([2, 2])}, expected) == ""
    assert differences({"b": (2, 3), "c": ()}, expected) == (
        "1 missing (a), 1 unexpected (c), 1 of another shape (b: (2, 3), expected (2, 2))"
    )
    assert differences({}, {str(i): () for i in range(7)}) == "7 missing (0; 1; 2; 3; 4; ...)"
