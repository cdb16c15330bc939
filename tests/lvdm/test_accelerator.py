"""One place makes accelerators: several in a process, of any precision, with errors a user understands."""

from types import SimpleNamespace

import accelerate.tracking
import pytest
import torch

from lvdm import accelerator as accelerators
from lvdm.accelerator import average_gradients, make_accelerator
from lvdm.errors import UserError
from train.configs import Training


def test_several_of_different_precision_in_one_process():
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        accelerator = make_accelerator(precision)
        layer = accelerator.prepare(torch.nn.Linear(2, 2))
        with accelerator.autocast():
            assert torch.nn.functional.linear(torch.ones(1, 2, device=accelerator.device), layer.weight).dtype == dtype
        accelerators.close(accelerator)


def test_gradients_sync_once_in_so_many_micro_batches():
    for accumulate in (3, 1, 2):
        accelerator = make_accelerator("fp32", accumulate)
        model = accelerator.prepare(torch.nn.Linear(1, 1))
        synced = []
        for _ in range(2 * accumulate):
            with accelerator.accumulate(model):
                synced.append(accelerator.sync_gradients)
        assert synced == ([False] * (accumulate - 1) + [True]) * 2
        accelerators.close(accelerator)


def test_accumulated_gradient_is_the_mean():
    accelerator = make_accelerator("fp32", accumulate=2)
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    before = model.weight.item()
    for x in (3.0, 5.0):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.full((1, 1), x, device=accelerator.device)).sum())
            optimizer.step()
            optimizer.zero_grad()
    assert model.weight.item() == pytest.approx(before - 4.0)
    accelerators.close(accelerator)


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 works on CUDA")
def test_fp16_without_a_gpu_is_refused():
    with pytest.raises(UserError, match="precision=fp16: needs a GPU"):
        make_accelerator("fp16")


@pytest.mark.filterwarnings("ignore:.*no supported trackers")
def test_tracker_that_is_not_installed_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: [])
    with pytest.raises(UserError, match="tracker=tensorboard: not installed; pip install tensorboard"):
        make_accelerator("fp32", tracker="tensorboard", folder=str(tmp_path))


def test_threads_are_set_or_left():
    before = torch.get_num_threads()
    try:
        assert accelerators.threads(1) == torch.get_num_threads() == 1
        assert accelerators.threads(0) == torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_gradients_are_averaged_over_processes():
    matrix, bias = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(3))

    def give() -> None:
        matrix.grad, bias.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([5.0, 6.0, 7.0])

    def reduce(tensor: torch.Tensor, how: str) -> torch.Tensor:
        assert how == "mean"
        return (tensor + torch.full((7,), 2.0)) / 2  # the other process has a gradient of 2 everywhere

    give()
    average_gradients(SimpleNamespace(num_processes=1), [matrix, bias])
    assert matrix.grad.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    average_gradients(SimpleNamespace(num_processes=2, reduce=reduce), [matrix, bias])
    assert matrix.grad.tolist() == [[1.5, 2.0], [2.5, 3.0]] and bias.grad.tolist() == [3.5, 4.0, 4.5]


def test_fp32_means_fp32_unless_tf32_is_asked_for():
    products = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    for tf32, expected in ((True, "tf32"), (False, "ieee")):
        accelerators.close(make_accelerator("fp32", tf32=tf32))
        assert [kind.fp32_precision for kind in products] == [expected] * 2


def test_parts_of_the_output_get_gradients_beside_a_deepspeed_engine():
    engine = SimpleNamespace(module="the module")
    assert accelerators.callable_of(SimpleNamespace(distributed_type="DEEPSPEED"), engine) == "the module"
    assert accelerators.callable_of(SimpleNamespace(distributed_type="MULTI_GPU"), engine) is engine


def test_threads_are_those_that_the_run_began_with():
    before = torch.get_num_threads()
    try:
        log = [{"samples": 0, "event": "start", "threads": 1}, {"samples": 4, "l1": 0.5}]
        assert accelerators.threads(2) == 2 and accelerators.threads(0) == 2
        assert accelerators.threads(0, log) == 1
        assert accelerators.threads(2, log) == 2
    finally:
        torch.set_num_threads(before)


def test_batches_that_cannot_be_shared_are_refused_in_any_phase(monkeypatch):
    monkeypatch.setattr(
        accelerators, "make_accelerator", lambda *_, **__: SimpleNamespace(num_processes=3, distributed_type="NO")
    )
    phases = [SimpleNamespace(batch=12), SimpleNamespace(batch=8)]
    config = Training(out="run", precision="fp32")
    config.phases, config.accumulate = phases, 2
    with pytest.raises(UserError, match=r"phases\[1\].batch=8: must be divisible by accumulate x processes = 2 x 3"):
        accelerators.for_training(config)
    config.phases = phases[:1]
    assert accelerators.for_training(config).num_processes == 3
