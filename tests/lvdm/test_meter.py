"""What the log says of the steps since the last record."""

import time
from types import SimpleNamespace

import pytest
import torch

from lvdm.meter import Meter, Pace, peak_tflops


def alone(**more) -> SimpleNamespace:
    """An accelerator of one process."""
    return SimpleNamespace(reduce=lambda parts, how: parts, num_processes=1, device=torch.device("cpu"), **more)


def test_means_are_over_all_values_since_the_last_record():
    meter = Meter(alone())
    meter.add("loss", torch.tensor([1.0, 2.0]))
    meter.add("loss", torch.tensor(6.0))  # another micro-batch
    meter.step()
    meter.add("loss", torch.tensor([7.0]))
    meter.step()
    assert meter.read() == {"loss": 4.0}
    assert meter.read() == {}


def test_values_are_counted_where_they_are_asked_for():
    meter = Meter(alone())
    values, quarter = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 3, 3])
    for number in (0, 1, 3):
        meter.add(f"q{number}", values, where=quarter == number)
    meter.step()
    assert meter.read() == {"q0": 1.0, "q3": 3.0}  # none fell into quarter 1


def test_processes_are_weighed_by_what_they_saw():
    elsewhere = {"loss": [10.0, 1.0]}

    def reduce(parts, how):
        assert how == "sum"
        return parts + torch.tensor([elsewhere["loss"]], dtype=parts.dtype)

    meter = Meter(SimpleNamespace(reduce=reduce))
    meter.add("loss", torch.tensor([1.0, 1.0, 0.0]))
    meter.step()
    assert meter.read() == {"loss": 3.0}


def test_what_is_not_read_yet_survives_a_restart():
    meter, again = Meter(alone()), Meter(alone())
    meter.add("loss", torch.tensor([1.0, 2.0]))
    meter.step()
    again.load_state_dict(meter.state_dict())
    for each in (meter, again):
        each.add("loss", torch.tensor([6.0]))
        each.step()
    assert meter.read() == again.read() == {"loss": 3.0}


def test_a_step_without_values_is_none():
    meter = Meter(alone())
    meter.step()
    assert meter.read() == {}


def test_pace_is_samples_flops_and_waiting_over_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    pace = Pace(5e12, SimpleNamespace(device=torch.device("cpu"), num_processes=2))

    def slow():
        for batch in range(2):
            now[0] += 1.0  # the data take a second
            yield batch

    for _ in pace.wait(slow()):
        now[0] += 3.0  # the step takes three
    assert pace.read(16) == {"samples_per_s": 2.0, "tflops": 5.0, "waiting": 0.25}
    with pace.paused():
        now[0] += 100.0  # a preview
    now[0] += 4.0
    assert pace.read(4) == {"samples_per_s": 1.0, "tflops": 2.5, "waiting": 0.0}


@pytest.mark.parametrize(
    "device, peak",
    [("NVIDIA H200", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA A100-SXM4-80GB", 312)],
)
def test_peak_of_known_devices(device, peak):
    assert peak_tflops(device) == peak and peak_tflops("Some Other Chip") is None
