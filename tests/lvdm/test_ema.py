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


def test_a_model_in_bf16_gives_the_fp32_average_and_then_its_own_memory_back():
    """As under DeepSpeed: weights are rounded after the average began, into views of one flat buffer."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    ema = EMA(model, 0.9)
    flat = torch.cat([p.detach().flatten() for p in model.parameters()]).bfloat16()
    for p, part in zip(model.parameters(), flat.split([6, 2]), strict=True):
        p.data = part.view_as(p)
    places, before = [p.data_ptr() for p in model.parameters()], flat.clone()
    x = torch.randn(1, 3)
    with ema.applied():
        assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())
        assert all(torch.equal(tensor, ema.shadow[name]) for name, tensor in model.state_dict().items())
        assert torch.equal(model(x), nn.functional.linear(x, ema.shadow["weight"], ema.shadow["bias"]))
    assert [p.data_ptr() for p in model.parameters()] == places and torch.equal(flat, before)
    assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in model.parameters())


def test_training_goes_on_after_it_as_if_nothing_had_been():
    def trained(shown: bool) -> tuple[EMA, nn.Linear]:
        torch.manual_seed(0)
        model, calls = nn.Linear(3, 2), []
        ema = EMA(model, 0.9)
        model.to(torch.bfloat16)
        model.weight.register_post_accumulate_grad_hook(calls.append)  # where engines take their gradients
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            model(torch.ones(1, 3, dtype=torch.bfloat16)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
            if shown:
                with ema.applied(), torch.no_grad():
                    model(torch.ones(1, 3))
        assert len(calls) == 3
        return ema, model

    (ema, model), (plain_ema, plain) = trained(True), trained(False)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    assert all(torch.equal(shadow, plain_ema.shadow[name]) for name, shadow in ema.shadow.items())


def test_frozen_parameters_are_not_averaged_and_come_back_as_they_were_before_rounding():
    model = model_of(1 / 3)
    model.weight.requires_grad_(False)
    ema = EMA(model, 0.9)
    assert set(ema.shadow) == {"bias"} and ema.frozen[0][1].data_ptr() == model.weight.data_ptr()  # no copy
    exact = model.weight.detach().clone()
    model.to(torch.bfloat16)
    with ema.applied():
        assert torch.equal(model.weight, exact)
    assert torch.equal(model.weight, exact.bfloat16()) and not model.weight.requires_grad


def test_buffers_are_those_of_the_model_at_that_time():
    model = nn.BatchNorm1d(2)
    ema = EMA(model, 0.9)
    model(torch.tensor([[0.0, 1.0], [2.0, 5.0]]))
    with ema.applied():
        assert model.running_mean.tolist() == pytest.approx([0.1, 0.3])
        assert model.state_dict()["num_batches_tracked"] == 1


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
