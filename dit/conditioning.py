"""What a video is conditioned on, as one object that follows the batch, and the module that turns it into a vector."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lvdm.errors import UserError


@dataclass(frozen=True)
class Condition:
    """The conditions of a batch: `Condition()` is none, `Condition(labels)` one class a video.

    Labels are int64 in 0..num_classes-1, or -1 for the null class, which stands for "any".
    """

    labels: Tensor | None = None
    """(B,), one a video."""
    image_labels: Tensor | None = None
    """(B, I), one for each of the I images that follow the frames of a video in joint training."""

    @classmethod
    def of_classes(cls, labels: Sequence[int], num_classes: int) -> "Condition":
        """One of `num_classes` classes a video, or -1 for any; raises UserError for a label outside."""
        for label in labels:
            if not -1 <= label < num_classes:
                raise UserError(
                    f"label {label} is unknown: the model has the classes 0..{num_classes - 1} and -1 for any"
                )
        return cls(torch.tensor(labels, dtype=torch.int64))

    def drop(self, mask: Tensor, image_mask: Tensor | None = None) -> "Condition":
        """The same conditions, but null where `mask` (B,) bool, and for images `image_mask` (B, I), is true.

        The caller draws the masks (label dropout); `image_mask` is needed where there are image labels.
        """
        return self._map(lambda labels, where: labels.masked_fill(where, -1), mask, image_mask)

    def null_like(self) -> "Condition":
        """As many null conditions, for guidance; raises UserError where there is no condition to lean away from."""
        if self.labels is None:
            raise UserError("guidance needs a conditional model: set the guidance scale to 1 for an unconditional one")
        return self._map(lambda labels, _: torch.full_like(labels, -1))

    def cat(self, other: "Condition") -> "Condition":
        """This batch followed by `other`, which must be of the same kind."""
        return self._map(lambda *labels: torch.cat(labels), other.labels, other.image_labels)

    def to(self, device: torch.device | str) -> "Condition":
        return self._map(lambda labels, _: labels.to(device))

    def _map(self, change: Callable, for_videos: Tensor | None = None, for_images: Tensor | None = None) -> "Condition":
        """`change(labels, for_videos)` and `change(image_labels, for_images)` of those that are there."""
        pairs = ((self.labels, for_videos), (self.image_labels, for_images))
        return Condition(*(None if labels is None else change(labels, other) for labels, other in pairs))


class LabelEmbedding(nn.Module):
    """Class labels (N,) to vectors (N, width). The null class is the last row, there only when labels are dropped.

    Raises UserError for the null class where there is none, on a CPU: a GPU would have to be waited for.
    """

    def __init__(self, num_classes: int, label_dropout: float, width: int):
        super().__init__()
        self.null = num_classes
        self.table = nn.Embedding(num_classes + (label_dropout > 0), width)

    def forward(self, labels: Tensor) -> Tensor:
        if labels.device.type == "cpu" and self.null == len(self.table.weight) and bool((labels < 0).any()):
            raise UserError("label -1: this model has no null class (label_dropout=0); give each video its class")
        return self.table(torch.where(labels < 0, self.null, labels))
