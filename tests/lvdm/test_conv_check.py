"""The look at bf16 Conv3d: right within rounding, wrong where it is wrong, and what programs do about it."""

import pytest
import torch
import torch.nn.functional as F

from lvdm import accelerator, conv_check
from lvdm.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def small(monkeypatch):
    """A tenth of the numbers."""
    drawn = conv_check._drawn
    shapes = {(2, 64, 11, 32, 32): (2, 16, 11, 8, 8)}
    monkeypatch.setattr(
        conv_check, "_drawn", lambda device, shape: drawn(device, shapes.get(shape, (16, 16, *shape[2:])))
    )


@pytest.mark.parametrize("case", conv_check.CASES)
def test_a_right_convolution_is_within_rounding(small, case):
    assert 5e-4 < conv_check.bf16_error(CPU, *conv_check.CASES[case]) < 5e-3


def test_a_wrong_convolution_is_found_in_either_layout(small, monkeypatch):
    right = F.conv3d
    for layout in (torch.contiguous_format, torch.channels_last_3d):

        def wrong(x, weight, *rest, layout=layout):
            hit = x.dtype == torch.bfloat16 and x.is_contiguous(memory_format=layout)
            return right(x, weight, *rest) * (1.1 if hit else 1)

        monkeypatch.setattr(conv_check.F, "conv3d", wrong)
        assert conv_check.bf16_error(CPU, *conv_check.CASES["3x3x3"]) > conv_check.TOLERANCE


@pytest.mark.parametrize(
    ("error", "slower", "version", "problem", "line"),
    [
        (0.003, 0.2, 91500, "", ""),
        (0.5, 0.2, 91500, "bf16 Conv3d is wrong on this device: 3x3x3 is off by 50.0%", ""),
        (float("nan"), 0.2, 91500, "bf16 Conv3d is wrong on this device", ""),
        (0.003, 4, 91500, "", "Conv3d takes 4.0 times as long in bf16 as in fp32"),
        (0.003, 0.2, 91002, "", "bf16 Conv3d is known to be wrong at some shapes with torch"),
    ],
)
def test_what_is_wrong_is_returned_and_what_is_slow_or_suspicious_is_told(
    error, slower, version, problem, line, monkeypatch, capsys
):
    monkeypatch.setattr(conv_check, "bf16_error", lambda *case: error)
    monkeypatch.setattr(conv_check, "seconds", lambda device, dtype: slower if dtype == torch.bfloat16 else 1.0)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    found = conv_check._problem.__wrapped__(0)
    assert found.startswith(problem) and bool(found) == bool(problem)
    told = capsys.readouterr().err
    assert told.startswith(line) and told.count("\n") == bool(line)


def test_a_device_is_looked_at_once_by_whatever_name(monkeypatch):
    looks = []
    monkeypatch.setattr(conv_check, "bf16_error", lambda device, *case: looks.append(device) or 0.003)
    monkeypatch.setattr(conv_check, "seconds", lambda device, dtype: 1.0)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91500)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    conv_check._problem.cache_clear()
    assert [conv_check.bf16_problem(torch.device(name)) for name in ("cuda", "cuda:1", "cuda")] == ["", "", ""]
    conv_check._problem.cache_clear()
    assert looks == [torch.device("cuda", 1)] * len(conv_check.CASES)


def test_nothing_is_looked_at_on_a_cpu(monkeypatch):
    monkeypatch.setattr(conv_check, "bf16_error", None)
    assert conv_check.bf16_problem(CPU) == ""


def test_programs_refuse_wrong_bf16_or_take_fp32(monkeypatch):
    monkeypatch.setattr(accelerator, "bf16_problem", lambda device: "bf16 Conv3d is wrong")
    with pytest.raises(UserError, match=r"precision=bf16: bf16 Conv3d is wrong; .* precision=fp32"):
        accelerator.make_accelerator("bf16")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert accelerator.native_precision(CUDA) == "fp32"
    monkeypatch.setattr(accelerator, "bf16_problem", lambda device: "")
    assert accelerator.native_precision(CUDA) == "bf16"
