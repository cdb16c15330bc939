"""An exponential moving average of weights, kept in fp32 whatever the model trains in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """The shadow of a model's trainable parameters: shadow = d * shadow + (1 - d) * weight after each update.

    `d` warms up as min(decay, (1 + n) / (10 + n)) after n updates, so that a short run averages its end.
    Made once the model is on its device. Checkpoints hold it through `state_dict` / `load_state_dict`.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shadow = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Moves the shadow towards the weights as they are now."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        weights = [p.detach().float() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.shadow.values()), weights, 1.0 - decay)

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Within it, the model holds the averaged weights."""
        backup = {name: p.detach().clone() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            p.copy_(self.shadow[name])
        try:
            yield
        finally:
            for name, p in self.parameters.items():
                p.copy_(backup[name])

    def state_dict(self) -> dict[str, Tensor | int]:
        return {"updates": self.updates, **{f"shadow.{name}": value for name, value in self.shadow.items()}}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        self.updates = int(state["updates"])
        for name, value in self.shadow.items():
            value.copy_(state[f"shadow.{name}"])
