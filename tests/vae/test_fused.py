"""The fused GroupNorm and SiLU against plain formulas: in PyTorch's operators, and in kernels where Triton is there."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import vae
from lvdm.errors import UserError
from lvdm.rng import generator
from vae import fused
from vae.blocks import Norm, norm_silu

LAYOUTS = {"NCDHW": torch.contiguous_format, "NDHWC": torch.channels_last_3d}


@pytest.fixture(scope="module")
def kernels():
    """The Triton kernels, interpreted on the CPU. (test_gpu.py has them compiled.)"""
    pytest.importorskip("triton", reason="needs triton (700 MB), which comes with torch for CUDA")
    if os.environ.get("TRITON_INTERPRET") != "1":  # which Triton reads when it is imported
        pytest.skip("needs TRITON_INTERPRET=1")
    from vae import kernels

    return kernels


def formula(x, weight, bias, groups, per_frame, silu):
    """GroupNorm as it is defined, in fp64."""
    h = x.double().unflatten(1, (groups, -1))  # (B, G, C/G, T, H, W)
    over = (2, 4, 5) if per_frame else (2, 3, 4, 5)
    h = (h - h.mean(over, keepdim=True)) / (h.var(over, correction=0, keepdim=True) + 1e-6).sqrt()
    h = h.flatten(1, 2) * weight.double().view(-1, 1, 1, 1) + bias.double().view(-1, 1, 1, 1)
    return h * h.sigmoid() if silu else h


def drawn(shape, dtype=torch.float32, layout="NCDHW"):
    x = torch.randn(shape, generator=generator(0, "norm")) * 2 + 5  # a mean that careless sums would lose digits to
    return x.to(dtype).contiguous(memory_format=LAYOUTS[layout])


def check(function, x, groups, per_frame, silu, tolerance):
    """Values, layout, dtype and all gradients against the formula."""
    wide = torch.promote_types(x.dtype, torch.float32)  # as weights are under autocast
    weight, bias = (torch.randn(x.shape[1], generator=generator(0, n)).to(wide).requires_grad_() for n in "wb")
    dy = torch.randn(x.shape, generator=generator(0, "dy")).to(x.dtype)
    inputs = (x.detach().requires_grad_(), weight, bias)
    y = function(*inputs, groups, 1e-6, per_frame, silu)
    assert y.dtype == x.dtype and y.is_contiguous(memory_format=torch.channels_last_3d) == (x.stride(1) == 1)
    exact = [value.detach().double().requires_grad_() for value in inputs]
    expected = formula(*exact, groups, per_frame, silu)
    found = (y, *torch.autograd.grad(y, inputs, dy))
    for a, b in zip(found, (expected, *torch.autograd.grad(expected, exact, dy.double())), strict=True):
        assert (a.double() - b).norm() < tolerance * b.norm()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_frame", [True, False])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)]
)
def test_the_plain_path_is_the_formula(layout, per_frame, silu, dtype, tolerance):
    check(fused.group_norm, drawn((2, 16, 3, 8, 6), dtype, layout), 4, per_frame, silu, tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_frame", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_the_kernels_are_the_formula(kernels, layout, per_frame, dtype, tolerance):
    check(kernels.GroupNorm.apply, drawn((2, 16, 3, 8, 6), dtype, layout), 4, per_frame, True, tolerance)


@pytest.mark.parametrize("shape", [(1, 128, 1, 5, 7), (1, 4, 2, 128, 32)])
def test_the_kernels_take_odd_sizes_and_many_tiles(kernels, shape):
    check(kernels.GroupNorm.apply, drawn(shape, layout="NDHWC"), 4, True, False, 1e-5)


def test_the_kernels_take_frames_cut_out_of_a_clip(kernels):
    whole = drawn((2, 8, 5, 4, 4), layout="NDHWC")
    check(kernels.GroupNorm.apply, whole[:, :, 1:4], 2, False, True, 1e-5)


@pytest.mark.parametrize("view", [lambda x: x[..., 1:5], lambda x: x.transpose(3, 4), lambda x: x[:, :, :, ::2]])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernels_take_frames_whose_rows_do_not_join(kernels, layout, view):
    x = view(drawn((2, 8, 3, 4, 6), layout=layout))
    weight, bias, dy = torch.ones(8), torch.zeros(8), drawn((2, 3, *x.shape[3:], 8)).permute(0, 4, 1, 2, 3)
    y, *statistics = kernels.forward(x, weight, bias, 2, 1e-6, True, False)
    dx, _, _ = kernels.backward(dy, x, weight, bias, *statistics, False)
    exact = x.double().detach().requires_grad_()
    expected = formula(exact, weight, bias, 2, True, False)
    torch.testing.assert_close(y.double(), expected.detach(), atol=1e-5, rtol=1e-5)
    (slope,) = torch.autograd.grad(expected, exact, dy.double())
    torch.testing.assert_close(dx.double(), slope, atol=1e-5, rtol=1e-5)


def test_only_what_kernels_cannot_count_is_copied(kernels):
    """Layouts of 4 GiB and more, which the meta device holds none of."""
    with torch.device("meta"):
        clip = torch.empty(1, 128, 20, 720, 1280)
        assert kernels._evenly(clip).stride(1) == 1  # channels 18 million numbers apart
        assert kernels._evenly(clip[:, :, :1, :8, :1]).stride(1) == 1
        for there in (
            clip.contiguous(memory_format=torch.channels_last_3d),
            clip[:, :8],
            torch.empty(1, 1, 1, 9, 2**31),
        ):
            assert kernels._evenly(there) is there
            assert kernels._pixels(there)._is_view()


def test_offsets_of_large_frames_are_counted_in_64_bits(kernels):
    import triton
    import triton.language as tl

    @triton.jit
    def place(out, part, sp, offsets: tl.constexpr):
        at = tl.arange(0, 2)[:, None] * 2 + tl.arange(0, 2)[None, :]
        tl.store(out + at, offsets(part, 1, 0, 1, 0, sp, 2, 2))

    out = torch.zeros(2, 2, dtype=torch.int64)
    place[(1, 1)](out, 2**24, 256, kernels._offsets)
    first = 2**24 * 2 * 256
    assert out.tolist() == [[first, first + 1], [first + 256, first + 257]]


def test_the_look_at_the_kernels_finds_what_is_wrong(kernels, monkeypatch):
    assert fused.disagreement(torch.device("cpu")) == ""
    right = kernels.backward
    monkeypatch.setattr(kernels, "backward", lambda *given: (1.01 * right(*given)[0], *right(*given)[1:]))
    assert fused.disagreement(torch.device("cpu")) == "wrong dx"


def test_the_look_at_the_kernels_gives_packed_weights(monkeypatch):
    """As all parameters are: the kernels take no strides of a weight or bias, PyTorch's operators may look at them."""
    given = []
    stub = SimpleNamespace(forward=lambda x, *parameters: given.extend(parameters) or 1 / 0)
    monkeypatch.setitem(sys.modules, "vae.kernels", stub)
    monkeypatch.setattr(vae, "kernels", stub, raising=False)
    with pytest.raises(ZeroDivisionError):
        fused.disagreement(torch.device("cpu"))
    assert [p.stride() for p in given[:2]] == [(1,), (1,)]


def test_kernels_that_do_not_run_give_way_with_a_line(monkeypatch, capsys):
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(fused, "disagreement", lambda device: 1 / 0)
    fused._sound.cache_clear()
    assert not fused._sound(torch.device("cpu"))
    fused._sound.cache_clear()
    assert capsys.readouterr().err.startswith("norms: PyTorch's operators in place of Triton's kernels (ZeroDivision")


def test_the_switch_takes_no_third_value(monkeypatch):
    class OnCuda:
        is_cuda, shape, ndim, dtype = True, (1, 8), 5, torch.float32

        def numel(self):
            return 1

    monkeypatch.setenv(fused.SWITCH, "0")
    assert not fused._for_kernels(OnCuda())
    monkeypatch.setenv(fused.SWITCH, "off")
    with pytest.raises(UserError, match=r"LVDM_FUSED=off: expected 1 .* or 0"):
        fused._for_kernels(OnCuda())


def test_silu_of_any_norm_and_in_bf16_with_fp32_weights():
    x = drawn((1, 8, 2, 4, 4))
    for norm in (Norm(8, "frame"), torch.nn.GroupNorm(2, 8)):
        torch.testing.assert_close(norm_silu(x, norm), F.silu(norm(x)))
    with torch.autocast("cpu", torch.bfloat16):
        y = norm_silu(x.bfloat16(), Norm(8, "clip"))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), F.silu(Norm(8, "clip")(x)), atol=0.03, rtol=0.03)
