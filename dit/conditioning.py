"""What a video is conditioned on, as one object that follows the batch, and the module that turns it into a vector."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lvdm.errors import UserError


@dataclass(frozen=True)
class Condition:
    """The conditions of a batch: `Condition()` is none, `Condition(labels)` one class a video.

    `labels` is (B,) int64 in 0..num_classes-1, or -1 for the null class, which stands for "any".
    """

    labels: Tensor | None = None

    @classmethod
    def of_classes(cls, labels: Sequence[int], num_classes: int) -> "Condition":
        """One of `num_classes` classes a video, or -1 for any; raises UserError for a label outside."""
        for label in labels:
            if not -1 <= label < num_classes:
                raise UserError(
                    f"label {label} is unknown: the model has the classes 0..{num_classes - 1} and -1 for any"
                )
        return cls(torch.tensor(labels, dtype=torch.int64))

    def drop(self, mask: Tensor) -> "Condition":
        """The same conditions, but null where `mask` (B,) bool is true. The caller draws the mask (label dropout)."""
        return self if self.labels is None else Condition(self.labels.masked_fill(mask, -1))

    def null_like(self) -> "Condition":
        """As many null conditions, for guidance; raises UserError where there is no condition to lean away from."""
        if self.labels is None:
            raise UserError("guidance needs a conditional model: set the guidance scale to 1 for an unconditional one")
        return Condition(torch.full_like(self.labels, -1))

    def cat(self, other: "Condition") -> "Condition":
        """This batch followed by `other`, which must be of the same kind."""
        return self if self.labels is None else Condition(torch.cat([self.labels, other.labels]))

    def to(self, device: torch.device | str) -> "Condition":
        return self if self.labels is None else Condition(self.labels.to(device))


class LabelEmbedding(nn.Module):
    """Class labels to vectors (B, width). The null class is the last row, there only when labels are dropped."""

    def __init__(self, num_classes: int, label_dropout: float, width: int):
        super().__init__()
        self.null = num_classes
        self.table = nn.Embedding(num_classes + (label_dropout > 0), width)

    def forward(self, condition: Condition) -> Tensor:
        return self.table(torch.where(condition.labels < 0, self.null, condition.labels))
