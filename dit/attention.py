"""Softmax attention behind one function, so that a model does not know which kernel runs it."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lvdm.errors import UserError, nearest


def _math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, written out in fp32, under autocast too: the reference for the others."""
    with torch.autocast(q.device.type, enabled=False):
        logits = q.float() @ k.float().transpose(-2, -1) * q.shape[-1] ** -0.5
        return (logits.softmax(dim=-1) @ v.float()).to(v.dtype)


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """xformers' kernel, which takes and gives (B, N, heads, head_dim): views of ours."""
    from xformers.ops import memory_efficient_attention

    try:
        return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    except NotImplementedError as error:  # built for another torch, CUDA or GPU; or tensors on the CPU
        reason = str(error).partition("\n")[0].strip()
        raise UserError(f"attention=xformers: no operator of this build fits; use sdpa ({reason})") from None


BACKENDS = {"sdpa": scaled_dot_product_attention, "xformers": _xformers, "math": _math}


def check_backend(backend: str) -> str:
    """Returns `backend` if there is one of that name and it can run here, else raises UserError."""
    if backend not in BACKENDS:
        raise UserError(
            f"unknown attention backend {backend!r}{nearest(backend, BACKENDS)}; known: {', '.join(BACKENDS)}"
        )
    if backend == "xformers":
        try:
            import xformers.ops  # noqa: F401
        except ImportError:
            raise UserError("attention=xformers: not installed; pip install 'lvdm[xformers]' or use sdpa") from None
        if not torch.cuda.is_available():
            raise UserError("attention=xformers: its operators run on CUDA alone and there is none here; use sdpa")
    return backend


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "sdpa") -> Tensor:
    """Unmasked multi-head attention: q, k, v and the result are (B, heads, N, head_dim).

    The inputs may be strided views as long as their last dimension is contiguous; `backend` is a key of `BACKENDS`.
    """
    return BACKENDS[backend](q, k, v)
