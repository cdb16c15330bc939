"""What a program must know of a VAE before it sees a frame: factors, channels, the frame rule, what streams."""

from dataclasses import dataclass

from lvdm.errors import UserError


@dataclass(frozen=True)
class VAESpec:
    """The facts of one VAE. Lengths follow T = time_factor * n + first_frames, n >= 0."""

    time_factor: int
    """Frames a latent, after the first."""
    space_factor: int
    """Pixels a latent, in height and in width."""
    latent_channels: int
    latent_mean: tuple[float, ...] = ()
    latent_std: tuple[float, ...] = ()
    """Defaults a channel, for users without statistics of their own data; empty means 0 and 1."""
    first_frames: int = 1
    """Frames that the first latent stands for: 1 where the first frame is an image, else `time_factor`."""
    inexact: str = ""
    """Why a stream of chunks is not the whole clip's result; empty where it is, to rounding."""
    refines: bool = False
    """Whether `refine` renders 2T - 1 frames."""
    discrete: bool = False
    """Whether it quantises: codes instead of a posterior, reconstruction only."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "latent_mean", tuple(self.latent_mean) or (0.0,) * self.latent_channels)
        object.__setattr__(self, "latent_std", tuple(self.latent_std) or (1.0,) * self.latent_channels)
        for key in ("latent_mean", "latent_std"):
            if len(getattr(self, key)) != self.latent_channels:
                raise UserError(
                    f"{key}={list(getattr(self, key))}: expected {self.latent_channels} numbers, one a channel"
                )
        if not all(std > 0 for std in self.latent_std):
            raise UserError(f"latent_std={list(self.latent_std)}: expected numbers above 0")

    @property
    def exact_streaming(self) -> bool:
        """Whether any chunking and any prefix give the whole clip's result."""
        return not self.inexact

    @property
    def frame_rule(self) -> str:
        """The lengths it takes without padding, in words."""
        if self.time_factor == 1:
            return "any"
        return f"{self.time_factor}n" + (f"+{self.first_frames}" if self.first_frames < self.time_factor else "")

    def valid_frames(self, frames: int) -> int:
        """The least length >= `frames` that the frame rule allows."""
        rest = max(0, frames - self.first_frames)
        return -(-rest // self.time_factor) * self.time_factor + self.first_frames

    def check_frames(self, frames: int, key: str = "") -> None:
        """A UserError with the rule and the lengths next to `frames` where the rule does not allow it.

        `key` is the config key that `frames` comes from.
        """
        high = self.valid_frames(frames)
        if frames != high:
            what = f"{key}={frames}" if key else f"{frames} frames"
            fits = " or ".join(str(n) for n in (high - self.time_factor, high) if n > 0)
            raise UserError(f"{what}: expected {self.frame_rule}, e.g. {fits}")

    def latent_frames(self, frames: int) -> int:
        """Latents of a clip of `frames` frames, after padding to a valid length."""
        return (self.valid_frames(frames) - self.first_frames) // self.time_factor + 1

    def frames(self, latent_frames: int) -> int:
        """Frames that `decode` renders from so many latents."""
        return (latent_frames - 1) * self.time_factor + self.first_frames

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(z, t, h, w) of a clip; a UserError where the size is not divisible by the spatial factor."""
        self.check_size(height, width)
        f = self.space_factor
        return self.latent_channels, self.latent_frames(frames), height // f, width // f

    def check_size(self, height: int, width: int) -> None:
        """A UserError naming sizes that fit where the spatial factor does not divide height and width."""
        f = self.space_factor
        if height % f or width % f:
            fits = " or ".join(f"{max(f, height // f * f + k)}x{max(f, width // f * f + k)}" for k in (0, f))
            raise UserError(f"frames of {height}x{width} (height x width): both must be divisible by {f}, e.g. {fits}")

    def check_square(self, size: int, key: str) -> None:
        """The same of a config key for height and width."""
        f = self.space_factor
        if size % f:
            low = max(f, size // f * f)
            raise UserError(f"{key}={size}: must be divisible by {f}, e.g. {low} or {low + f}")
