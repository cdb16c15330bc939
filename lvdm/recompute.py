"""Less memory for training: what is cheap to compute is computed again in the backward pass rather than kept."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """`function(*inputs)`, its inner activations computed again in the backward pass rather than kept.

    For what is cheap beside the product behind it: a norm or an activation in front of a convolution or a linear
    layer, which is not repeated. More than half of what a block would keep is of that kind.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
