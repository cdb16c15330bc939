"""What a dry run promises: FLOPs of what learns and of what does not, and the bytes that judges of renderings take."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vae
from lvdm.config import load
from lvdm.cost import parameters
from train.budget import Judges, step_costs
from train.configs import Kind, TrainVAE
from train.refine import Refinement
from vae.discriminators import PatchGAN

KIND = Kind(frames=9, size=16)


def config(**keys) -> TrainVAE:
    keys = {"lpips_weight": 0, "adversarial_weight": 0, "discriminator_width": 8, **keys}
    return load(TrainVAE, overrides={"phases": [{"samples": 8, "batch": 2, "frames": 9, "size": 16}], **keys})


@pytest.fixture
def model():
    return vae.build("univae", width=16, blocks=1, refine=True)


def test_what_is_frozen_runs_forward_alone(model):
    renderer = Refinement(model)
    cost = step_costs(config(), model, renderer, rate=2)[9, 16]
    with FlopCounterMode(display=False) as counter:
        renderer(torch.zeros(1, 3, 9, 16, 16), torch.zeros(1, 4, 2, 2, 2))
    of_d2 = sum(counter.get_flop_counts()["Refinement.model.refiner"].values())
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=1e-3)  # another kernel of attention
    assert cost.backward_flops == pytest.approx(2 * of_d2, rel=0.01) and of_d2 < 0.8 * cost.flops
    assert all(p.device.type == "cpu" and p.grad is None for p in model.parameters())


def test_checkpointing_keeps_less_and_computes_the_forward_pass_again():
    model = vae.build("univae", width=16, blocks=1)
    plain = step_costs(config(), model, model)[9, 16]
    model.train().enable_gradient_checkpointing()
    again = step_costs(config(), model, model)[9, 16]
    assert again.flops == plain.flops and again.activation_bytes < 0.8 * plain.activation_bytes
    assert plain.backward_flops == pytest.approx(2 * plain.flops, rel=0.02)
    assert plain.backward_flops < again.backward_flops <= plain.backward_flops + plain.flops


def test_without_judges_a_step_keeps_what_the_renderer_keeps():
    judges = Judges(config())
    assert judges.state_bytes == 0 and judges.peak_bytes(KIND, 3, 1000) == 3000


def test_the_adversary_adds_to_the_renderer_s_step_or_has_its_own():
    judges, critic = Judges(config(adversarial_weight=0.5)), PatchGAN(3, 8)
    assert judges.state_bytes == 16 * parameters(critic)
    kept: dict[int, int] = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    clips = torch.zeros(2, 3, 9, 16, 16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = critic(clips)
    assert logits.requires_grad and judges.peak_bytes(KIND, 2, 0) == 2 * sum(kept.values())  # clips and renderings
    opposing = judges.peak_bytes(KIND, 2, 10**9) - 2 * 10**9
    assert 0 < opposing <= sum(kept.values())


@pytest.mark.parametrize("shown, chunk, frames", [(0, 100, 18), (4, 100, 8), (0, 5, 5), (4, 3, 3)])
def test_lpips_keeps_one_chunk_of_the_frames_it_looks_at(shown, chunk, frames):
    judges = Judges(config(lpips_weight=1.0, lpips_frames=shown, lpips_chunk=chunk))
    one = Judges(config(lpips_weight=1.0, lpips_frames=1)).peak_bytes(KIND, 1, 0)
    assert judges.state_bytes == 4 * 14_716_160
    assert judges.peak_bytes(KIND, 2, 0) == pytest.approx(frames * one, rel=0.01)
