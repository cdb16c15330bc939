"""How a number was made. A number without its protocol is never shown, and different protocols never share a column."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

from lvdm.errors import UserError

FVD_COUNT = 2048  # clips a side, customary since StyleGAN-V


@dataclass(frozen=True)
class Protocol:
    """Everything that moves a metric besides the model. None means that a field does not apply."""

    metric: str
    """e.g. "fvd", "kvd", "psnr"."""
    features: str | None
    """Name of the feature extractor or LPIPS trunk."""
    weights_sha256: str | None
    """Of the published weights of `features`."""
    frames: int
    """Frames a clip."""
    stride_real: int | None
    """Distance of neighbouring frames of a real clip, in frames of the source; None where `fps` decides."""
    stride_fake: int | None
    """The same of a generated or reconstructed clip."""
    resize: str
    """From the source to what is compared, in words."""
    count_real: int
    """Real clips."""
    count_fake: int
    """Generated or reconstructed clips."""
    split: str
    """The dataset and split the real clips are drawn from."""
    seed: int
    """Of the draw of clips."""
    estimator: str
    """From features or pixels to the number, in words."""
    fps: float | None = None
    """Frames a second of all clips, where that and no stride was asked for."""

    def describe(self) -> str:
        """One line for a reader, fields that do not apply left out."""
        features = f", {self.features}" if self.features else ""
        weights = f" (weights {self.weights_sha256[:8]})" if self.weights_sha256 else ""
        strides = f"stride {self.stride_real} real / {self.stride_fake} fake"
        pace = strides if self.fps is None else f"{self.fps:g} frames a second"
        return (
            f"{self.metric}{features}{weights}, {self.frames} frames, {pace}, {self.resize}, "
            f"{self.count_real} real / {self.count_fake} fake clips, {self.split}, seed {self.seed}, {self.estimator}"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `Protocol(**d)` reads it back."""
        return asdict(self)

    def warning(self) -> str | None:
        """What a reader must know before comparing this number with another one, or None."""
        count = min(self.count_real, self.count_fake)
        if "fvd" not in self.metric.lower() or count >= FVD_COUNT:
            return None
        return (
            f"{self.metric} with N = {count} clips is biased upwards: two samples of one distribution score about 100 "
            f"at N = {FVD_COUNT} and thousands at N = 64; compare it only with numbers of the same N"
        )


def require_same(protocols: Iterable[Protocol]) -> None:
    """Raises UserError, naming the first field that differs, unless all `protocols` are equal."""
    for first, other in pairwise(protocols):
        for field in fields(Protocol):
            a, b = getattr(first, field.name), getattr(other, field.name)
            if a != b:
                raise UserError(
                    f"{first.metric}: these numbers cannot be compared, their protocols differ in {field.name}: "
                    f"{a!r} and {b!r}; evaluate them again with one protocol"
                )
