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


def test_the_reference_keeps_its_softmax_in_fp32():
    q, k, v = (x.bfloat16() for x in qkv(1, 1, 300, 8))
    v.fill_(1)  # attention weights of a row sum to one
    out = attention(0 * q, k, v, "math")
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), torch.ones(1, 1, 300, 8), atol=4e-3, rtol=0)


def test_an_unknown_back_end_is_a_user_error():
    with pytest.raises(UserError, match=r"'spda' \(did you mean 'sdpa'\?\)"):
        check_backend("spda")
