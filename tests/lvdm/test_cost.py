"""Costs counted on the meta device against numbers worked out by hand."""

import pytest
import torch
from torch import nn

from lvdm.cost import describe_step, forward_cost, parameters


def test_parameters_leave_out_buffers():
    assert parameters(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))) == 3 * 5 + 5 + 2 * 5


def test_flops_are_two_a_multiplication():
    with torch.device("meta"):
        linear, conv = nn.Linear(64, 32), nn.Conv3d(4, 8, 3, padding=1, bias=False)
        x, video = torch.empty(10, 64), torch.empty(2, 4, 5, 6, 7)
    assert forward_cost(lambda: linear(x)).flops == 2 * 10 * 64 * 32
    assert forward_cost(lambda: conv(video)).flops == 2 * (2 * 5 * 6 * 7) * (8 * 4 * 27)


def test_activations_are_what_backward_keeps_and_no_weights():
    with torch.device("meta"):
        mlp = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 8), nn.Conv1d(3, 5, 1))
        x = torch.empty(3, 64)
    kept = forward_cost(lambda: mlp(x)).activation_bytes
    # the input of each linear map and of the SiLU, once each
    assert kept == 4 * 3 * (64 + 128 + 128 + 8)
    with torch.no_grad():
        assert forward_cost(lambda: mlp(x)).activation_bytes == 0


@pytest.mark.parametrize("frozen", [True, False])
def test_a_tensor_that_several_operations_keep_counts_once(frozen):
    with torch.device("meta"):
        first, second, x = nn.Linear(16, 16), nn.Linear(16, 16), torch.empty(5, 16)
    second.requires_grad_(not frozen)
    kept = forward_cost(lambda: (first(x), second(x))).activation_bytes
    assert kept == 4 * 5 * 16


def test_backward_counts_gradients_of_inputs_and_weights_that_learn():
    with torch.device("meta"):
        first, second, x = nn.Linear(64, 64, bias=False), nn.Linear(64, 32, bias=False), torch.empty(10, 64)
    one, two = 2 * 10 * 64 * 64, 2 * 10 * 64 * 32
    both = forward_cost(lambda: second(first(x)), backward=True)
    assert (both.flops, both.backward_flops) == (one + two, one + 2 * two)  # the data has no gradient
    assert (both.passes(), both.passes(backward=False)) == (2 * one + 3 * two, one + two)
    first.requires_grad_(False)
    frozen = forward_cost(lambda: second(first(x)), backward=True)
    assert (frozen.flops, frozen.backward_flops) == (one + two, two)
    assert forward_cost(lambda: second(x @ x.T @ x)).backward_flops == 0


def test_the_line_of_a_dry_run():
    trained, frozen = 2**30 // 20, 2**28
    text = describe_step("D2, 8 clips", trained, trained + frozen, 24 * 10**12, 8 * 2**30, judge_bytes=2**29)
    assert text.startswith("D2, 8 clips: 53,687,091 of 322,122,547 parameters trained, 24 TFLOP a step of the model, ")
    assert "about 10.50 GiB at the peak in fp32, 6.50 in bf16: 2.50 of weights, gradients and optimizer" in text
