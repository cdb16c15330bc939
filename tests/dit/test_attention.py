"""Attention back ends against the textbook loop and against each other, and what they may not copy."""

import sys
from types import ModuleType

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dit.attention import BACKENDS, attention, check_backend
from dit.latte import SelfAttention
from lvdm.errors import UserError

COPIES = ("clone", "copy_", "_to_copy", "_reshape_copy", "contiguous")


@pytest.fixture
def xformers(monkeypatch):
    """A stand-in for the package, in the layout that the real one documents: (B, N, heads, head_dim), dense rows."""

    def memory_efficient_attention(q, k, v):
        assert all(x.ndim == 4 and x.stride(-1) == 1 for x in (q, k, v))
        weights = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhnm,bmhd->bnhd", weights.softmax(-1), v)

    package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    package.ops, ops.memory_efficient_attention = ops, memory_efficient_attention
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    return ops


def qkv(*shape: int) -> list[torch.Tensor]:
    return list(torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("xformers")
def test_equals_a_loop_over_heads_and_queries(backend):
    q, k, v = qkv(2, 3, 5, 4)
    expected = torch.empty_like(q)
    for b in range(2):
        for h in range(3):
            for i in range(5):
                logits = torch.stack([q[b, h, i] @ k[b, h, j] for j in range(5)]) / 2  # sqrt(head_dim)
                expected[b, h, i] = logits.softmax(0) @ v[b, h]
    torch.testing.assert_close(attention(q, k, v, backend), expected)


@pytest.mark.usefixtures("xformers")
def test_back_ends_agree_on_strided_views_and_in_their_gradients():
    results = []
    for backend in BACKENDS:
        packed = torch.randn(2, 7, 3, 3, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = attention(*packed.transpose(1, 2).unbind(3), backend)
        out.square().sum().backward()
        results.append((out.detach(), packed.grad))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@pytest.mark.parametrize("autocast", [False, True])
def test_the_reference_rounds_bf16_once(autocast):
    q, k, v = (x.bfloat16() for x in qkv(2, 3, 50, 8))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = attention(q, k, v, "math")
    assert torch.equal(out, attention(q.float(), k.float(), v.float(), "math").bfloat16())


def test_an_unknown_back_end_is_a_user_error():
    with pytest.raises(UserError, match=r"'spda' \(did you mean 'sdpa'\?\)"):
        check_backend("spda")


# ----------------------------------------------------------------------------------------------------------------------
# xformers


def test_xformers_is_asked_for_where_it_can_run(xformers, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert check_backend("xformers") == "xformers"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"attention=xformers: its operators run on CUDA alone .*; use sdpa"):
        check_backend("xformers")
    monkeypatch.setitem(sys.modules, "xformers.ops", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"attention=xformers: not installed; pip install 'lvdm\[xformers\]'"):
        check_backend("xformers")


def test_an_xformers_without_an_operator_is_a_user_error(xformers):
    def none(*_):
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward`\nwith inputs:\n...")

    xformers.memory_efficient_attention = none
    with pytest.raises(UserError, match=r"use sdpa \(No operator found for `memory_efficient_attention_forward`\)$"):
        attention(*qkv(1, 2, 3, 4), "xformers")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_xformers_itself_agrees_with_sdpa():
    pytest.importorskip("xformers.ops", exc_type=ImportError)
    q, k, v = (x.cuda().bfloat16() for x in qkv(2, 16, 21, 72))
    try:
        out = attention(q, k, v, "xformers")
    except UserError as error:
        pytest.skip(str(error))
    torch.testing.assert_close(out, attention(q, k, v), atol=2e-2, rtol=2e-2)


# ----------------------------------------------------------------------------------------------------------------------
# Copies


class CountCopies(TorchDispatchMode):
    """Collects the operators under it that copy a tensor."""

    def __init__(self):
        super().__init__()
        self.copies = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.copies += [name] if name in COPIES else []
        return function(*args, **(kwargs or {}))


UNMODULATED = (torch.zeros(1), torch.zeros(1))


@pytest.mark.parametrize("axis", ["space", "time"])
def test_the_kernel_gets_views_of_the_projection(axis, monkeypatch):
    layer, seen = SelfAttention(24, 3, axis), []
    kernel = BACKENDS["sdpa"]
    monkeypatch.setitem(BACKENDS, "sdpa", lambda *qkv: seen.extend(qkv) or kernel(*qkv))
    layer.qkv.register_forward_hook(lambda *args: seen.append(args[-1]))
    layer(torch.randn(2, 5, 8, 24), *UNMODULATED)
    projection, *views = seen
    assert len(views) == 3
    assert {x.untyped_storage().data_ptr() for x in views} == {projection.untyped_storage().data_ptr()}
    tokens = {"space": (2 * 5, 3, 8, 8), "time": (2, 8 * 3, 5, 8)}[axis]  # batch, heads, sequence, head_dim
    assert {tuple(x.shape) for x in views} == {tokens}


@pytest.mark.parametrize("axis, sequences", [("space", 2 * 5), ("time", 2 * 8)])
@torch.no_grad()
def test_sequences_in_another_order_give_the_same_in_that_order(axis, sequences):
    """Frames of all videos are the sequences of spatial attention, places those of temporal attention."""
    layer, x = SelfAttention(24, 3, axis), torch.randn(2, 5, 8, 24)
    order = torch.randperm(sequences, generator=torch.Generator().manual_seed(1))

    def permuted(x: torch.Tensor) -> torch.Tensor:
        x = x if axis == "space" else x.transpose(1, 2)
        x = x.flatten(0, 1)[order].unflatten(0, (2, -1))
        return x if axis == "space" else x.transpose(1, 2)

    out = layer(x, *UNMODULATED)
    torch.testing.assert_close(layer(permuted(x), *UNMODULATED), permuted(out))
    assert not torch.allclose(permuted(out), out, atol=1e-3)


@pytest.mark.parametrize("axis", ["space", "time"])
@torch.no_grad()
def test_attention_along_either_axis_copies_nothing(axis):
    layer, x = SelfAttention(24, 3, axis), torch.randn(2, 5, 8, 24)
    with CountCopies() as counter:
        layer(x, *UNMODULATED)
    assert counter.copies == []
    layer.backend = "math"  # which does copy: the count can fail
    with CountCopies() as counter:
        layer(x, *UNMODULATED)
    assert counter.copies
