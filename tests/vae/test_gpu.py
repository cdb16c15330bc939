"""What only a CUDA device can tell: the same results as the CPU in fp32, and bf16 close to them."""

import pytest
import torch

import vae
from lvdm.conv_check import bf16_problem
from vae import fused
from vae.blocks import Norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    return vae.build("univae", width=32, blocks=1, refine=True).eval()


@torch.no_grad()
def test_fp32_on_cuda_equals_the_cpu(model):
    x = torch.rand(1, 3, 9, 64, 64) * 2 - 1
    z = model.cpu().encode(x).latent_dist.mean
    d1, d2 = model.decode(z).sample, model.refine(z).sample
    model.cuda()
    torch.testing.assert_close(model.encode(x.cuda()).latent_dist.mean.cpu(), z, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(model.decode(z.cuda()).sample.cpu(), d1, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(model.refine(z.cuda()).sample.cpu(), d2, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_bf16_is_close_and_its_conv3d_is_sound(model):
    x = torch.rand(1, 3, 9, 64, 64, device="cuda") * 2 - 1
    model.cuda()
    z = model.encode(x).latent_dist.mean
    with torch.autocast("cuda", torch.bfloat16):
        low = model.encode(x).latent_dist.mean
    assert (low.float() - z).norm() / z.norm() < 0.05


@torch.no_grad()
def test_streams_on_cuda_equal_the_whole(model):
    model.cuda()
    z = torch.randn(1, 4, 5, 8, 8, device="cuda")
    pieces = torch.cat(list(model.stream_decode(z.split(1, 2), refine=True)), 2)
    torch.testing.assert_close(pieces, model.refine(z).sample, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_streams_on_cuda_take_as_much_memory_at_any_length(model):
    """33 and 257 frames within 5 %."""
    model.cuda()
    peaks = []
    for frames in (33, 257):
        torch.cuda.reset_peak_memory_stats()
        video = (torch.rand(1, 3, 8, 128, 128, device="cuda") for _ in range(frames // 8 + 1))
        latents = (posterior.mean for posterior in model.stream_encode(video))
        for _ in model.stream_decode(latents, refine=True):
            pass
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 1.05 * peaks[0]


@pytest.mark.parametrize("name", vae.names())
@torch.no_grad()
def test_every_family_is_the_same_on_cuda(name):
    torch.manual_seed(0)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    model = vae.build(name, **vae.registry.entry(name).tiny).eval()
    f = model.spec.space_factor
    x = torch.rand(1, 3, 9, 3 * f, 2 * f) * 2 - 1
    if model.spec.discrete:  # near ties between codes may fall either way
        codes = model.codes(x)
        y, again = model.decode(codes).sample, model.cuda().decode(codes.cuda()).sample
    else:
        z = model.encode(x).latent_dist.mean
        y = model.decode(z).sample
        torch.testing.assert_close(model.cuda().encode(x.cuda()).latent_dist.mean.cpu(), z, atol=1e-3, rtol=1e-2)
        again = model.decode(z.cuda()).sample
    torch.testing.assert_close(again.cpu(), y, atol=1e-3, rtol=1e-2)
    half = model.bfloat16()
    assert torch.isfinite(half.reconstruct(x.cuda().bfloat16())).all()


@pytest.mark.parametrize("mode", ["frame", "clip"])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("channels", [16, 128, 512])
def test_the_kernels_of_the_norms_equal_the_plain_path(mode, dtype, atol, channels):
    torch.manual_seed(0)
    norm = Norm(channels, mode).cuda()
    x = (torch.randn(2, channels, 3, 40, 24, device="cuda") + 3).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    given = (x, norm.weight, norm.bias, norm.num_groups, norm.eps, mode == "frame", True)
    y, plain = kernels_of_norms().apply(*given), fused.plain_group_norm(x.float(), *given[1:])
    assert fused.disagreement(x.device) == "" and y.is_contiguous(memory_format=torch.channels_last_3d)
    dy = torch.randn_like(x)
    torch.testing.assert_close(y.float(), plain, atol=atol, rtol=0.01)
    inputs = (x, norm.weight, norm.bias)
    for a, b in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(plain, inputs, dy.float()), strict=True):
        assert (a.float() - b.float()).norm() < max(atol, 1e-4) * b.float().norm()


def kernels_of_norms():
    return pytest.importorskip("vae.kernels").GroupNorm


def test_the_switch_leaves_the_kernels_out_and_changes_rounding_only(model, monkeypatch):
    model.cuda()
    x = torch.rand(1, 3, 9, 64, 64, device="cuda") * 2 - 1
    with torch.no_grad():
        by_kernels = model(x)[0]
        monkeypatch.setenv(fused.SWITCH, "0")
        torch.testing.assert_close(by_kernels, model(x)[0], atol=1e-3, rtol=1e-3)


def test_bf16_convolutions_are_right_here():
    assert bf16_problem(torch.device("cuda")) == ""
