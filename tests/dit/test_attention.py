"""Attention back ends against the textbook loop and against each other."""

import pytest
import torch

from dit.attention import BACKENDS, attention, check_backend
from lvdm.errors import UserError


def qkv(*shape: int) -> list[torch.Tensor]:
    return list(torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_a_loop_over_heads_and_queries(backend):
    q, k, v = qkv(2, 3, 5, 4)
    expected = torch.empty_like(q)
    for b in range(2):
        for h in range(3):
            for i in range(5):
                logits = torch.stack([q[b, h, i] @ k[b, h, j] for j in range(5)]) / 2  # sqrt(head_dim)
                expected[b, h, i] = logits.softmax(0) @ v[b, h]
    torch.testing.assert_close(attention(q, k, v, backend), expected)


def test_back_ends_agree_on_strided_views_and_in_their_gradients():
    results = []
    for backend in BACKENDS:
        packed = torch.randn(2, 7, 3, 3, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = attention(*packed.transpose(1, 2).unbind(3), backend)
        out.square().sum().backward()
        results.append((out.detach(), packed.grad))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("autocast", [False, True])
def test_the_reference_rounds_bf16_once(autocast):
    q, k, v = (x.bfloat16() for x in qkv(2, 3, 50, 8))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = attention(q, k, v, "math")
    assert torch.equal(out, attention(q.float(), k.float(), v.float(), "math").bfloat16())


def test_an_unknown_back_end_is_a_user_error():
    with pytest.raises(UserError, match=r"'spda' \(did you mean 'sdpa'\?\)"):
        check_backend("spda")
