"""An exponential moving average of weights, kept in fp32 whatever the model trains in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """The shadow of a model's trainable parameters: shadow = d * shadow + (1 - d) * weight after each update.

    `d` warms up as min(decay, (1 + n) / (10 + n)) after n updates, so that a short run averages its end.
    Made once the model is on its device and before an engine rounds its weights: those that are frozen are remembered
    as they are, without a copy of fp32. Checkpoints hold the shadow through `state_dict` / `load_state_dict`.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shadow = {name: p.detach().float().clone() for name, p in self.parameters.items()}
        self.frozen = [(p, p.detach().float()) for p in model.parameters() if not p.requires_grad]

    @torch.no_grad()
    def update(self) -> None:
        """Moves the shadow towards the weights as they are now."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        weights = [p.detach().float() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.shadow.values()), weights, 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, the parameters are the fp32 average (and the frozen ones), whatever the model trains in.

        Nothing is copied: they hold the shadow itself, and afterwards the memory they had, in which an engine steps.
        """
        averaged = [*((p, self.shadow[name]) for name, p in self.parameters.items()), *self.frozen]
        trained = [p.data for p, _ in averaged]
        for p, weight in averaged:
            p.data = weight
        try:
            yield
        finally:
            for (p, _), weight in zip(averaged, trained, strict=True):
                p.data = weight

    def state_dict(self) -> dict[str, Tensor | int]:
        return {"updates": self.updates, **{f"shadow.{name}": value for name, value in self.shadow.items()}}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        self.updates = int(state["updates"])
        for name, value in self.shadow.items():
            value.copy_(state[f"shadow.{name}"])
