"""Sinusoids against their formulas, entry by entry."""

import math

import torch

from dit.embeddings import TimestepEmbedding, grid_table, position_table, timestep_sinusoid


def test_positions_are_sines_then_cosines():
    table = position_table(torch.tensor([0, 3]), 8)
    for row, position in enumerate((0, 3)):
        for i in range(4):
            angle = position / 10000 ** (i / 4)
            assert math.isclose(table[row, i], math.sin(angle), abs_tol=1e-12)
            assert math.isclose(table[row, 4 + i], math.cos(angle), abs_tol=1e-12)


def test_a_grid_tells_columns_in_the_first_half_and_rows_in_the_second():
    rows, columns, width = 2, 3, 8
    table = grid_table(rows, columns, width).view(rows, columns, width)
    for r in range(rows):
        for c in range(columns):
            expected = torch.cat([position_table(torch.tensor([p]), 4)[0] for p in (c, r)])
            assert torch.equal(table[r, c], expected)


def test_timesteps_are_cosines_then_sines_in_fp32():
    sinusoid = timestep_sinusoid(torch.tensor([999, 0]))
    assert sinusoid.shape == (2, 256) and sinusoid.dtype == torch.float32
    assert torch.equal(sinusoid[1], torch.cat([torch.ones(128), torch.zeros(128)]))
    expected = [math.cos(999 * 1e4 ** (-i / 128)) for i in range(128)]
    expected += [math.sin(999 * 1e4 ** (-i / 128)) for i in range(128)]
    torch.testing.assert_close(sinusoid[0], torch.tensor(expected), atol=2e-4, rtol=0)


def test_int_and_float_timesteps_are_the_same():
    assert torch.equal(timestep_sinusoid(torch.tensor([7])), timestep_sinusoid(torch.tensor([7.0])))


def test_a_bf16_module_still_tells_neighbouring_timesteps_apart():
    module = TimestepEmbedding(16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        inside = timestep_sinusoid(torch.tensor([998, 999]))
    assert inside.dtype == torch.float32 and (inside[0] - inside[1]).abs().max() > 0.5
    a, b = module(torch.tensor([998, 999]))
    assert a.dtype == torch.bfloat16 and not torch.equal(a, b)
