"""The moving average against its closed form."""

import pytest
import torch
from torch import nn

from lvdm.ema import EMA


def model_of(value: float = 0.0, dtype=torch.float32) -> nn.Linear:
    model = nn.Linear(3, 2).to(dtype)
    set_to(model, value)
    return model


@torch.no_grad()
def set_to(model: nn.Module, value: float) -> None:
    for p in model.parameters():
        p.fill_(value)


@pytest.mark.parametrize("decay", [0.0, 0.2, 0.999])
def test_closed_form_with_warm_up(decay):
    torch.manual_seed(0)
    values = torch.randn(40, dtype=torch.float64).tolist()
    model = model_of(values[0])
    ema = EMA(model, decay)
    for value in values[1:]:
        set_to(model, value)
        ema.update()
    n = len(values) - 1
    decays = [min(decay, (1 + i) / (10 + i)) for i in range(n)]
    expected = values[0] * torch.tensor(decays, dtype=torch.float64).prod().item()
    for i, d in enumerate(decays):
        expected += (1 - d) * values[i + 1] * torch.tensor([1.0, *decays[i + 1 :]], dtype=torch.float64).prod().item()
    assert ema.updates == n
    for shadow in ema.shadow.values():
        torch.testing.assert_close(shadow, torch.full_like(shadow, expected))


def test_the_first_update_of_a_long_average_moves_nine_tenths():
    model = model_of(0.0)
    ema = EMA(model, 0.9999)
    set_to(model, 1.0)
    ema.update()
    assert ema.shadow["bias"].tolist() == pytest.approx([0.9, 0.9])


def test_it_is_kept_in_fp32_whatever_the_model():
    model = model_of(1.0, torch.bfloat16)
    ema = EMA(model, 0.999)
    ema.updates = 10**6  # warmed up
    set_to(model, 1.0078125)  # the next number of bf16
    ema.update()
    assert ema.shadow["weight"].dtype == torch.float32
    assert ema.shadow["weight"].flatten()[0].item() == pytest.approx(1 + 0.001 * 0.0078125, abs=1e-7)


def test_a_thousand_steps_of_a_long_average_of_bf16_weights():
    """The steps of 1e-4 are smaller than bf16 can tell: an average in bf16 would not move from 0.5 on."""
    model = model_of(0.5, torch.bfloat16)
    ema = EMA(model, 0.9999)
    ema.updates = 10**6  # warmed up
    set_to(model, 1.0)
    for _ in range(1000):
        ema.update()
    expected = 1 - 0.5 * 0.9999**1000
    assert ema.shadow["bias"].tolist() == pytest.approx([expected] * 2, abs=1e-5)


def test_applied_swaps_in_and_restores_even_after_an_error():
    model = model_of(0.0)
    ema = EMA(model, 0.5)
    set_to(model, 2.0)
    ema.update()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="in between"), ema.applied():
        assert all(torch.equal(p, ema.shadow[name]) for name, p in model.named_parameters())
        assert not torch.equal(model.weight, before["weight"])
        raise RuntimeError("in between")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.weight.requires_grad


def test_frozen_parameters_are_left_out():
    model = model_of(0.0)
    model.weight.requires_grad_(False)
    ema = EMA(model, 0.9)
    assert set(ema.shadow) == {"bias"}
    with ema.applied():
        assert not model.weight.any()


def test_a_restored_average_goes_on_as_if_never_stopped():
    model = model_of(0.0)
    ema = EMA(model, 0.9)
    set_to(model, 1.0)
    ema.update()
    state = {name: value.clone() if torch.is_tensor(value) else value for name, value in ema.state_dict().items()}
    again = EMA(model_of(5.0), 0.9)
    again.load_state_dict(state)
    for average in (ema, again):
        with torch.no_grad():
            for p in average.parameters.values():
                p.fill_(3.0)
        average.update()
    assert again.updates == ema.updates == 2
    assert all(torch.equal(again.shadow[name], ema.shadow[name]) for name in ema.shadow)
