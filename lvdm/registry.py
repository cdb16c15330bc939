"""Named models: build one at full size, or tiny for a test, and hear the right names when the name is wrong."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lvdm.errors import UserError, nearest


@dataclass(frozen=True)
class Entry:
    """A registered model: `build(**overrides)` makes the full size; `tiny` are the overrides of a CPU test's size."""

    build: Callable[..., Any]
    tiny: dict[str, Any] = field(default_factory=dict)


class Registry:
    """A table of models of one `kind` ("VAE", "DiT"), the only way to turn a name into a model."""

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, Entry] = {}

    def add(self, name: str, build: Callable[..., Any], tiny: dict[str, Any]) -> None:
        """Registers `build` under `name`; a name is given once."""
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        self._entries[name] = Entry(build, tiny)

    def names(self) -> list[str]:
        return sorted(self._entries)

    def entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise UserError(
                f"unknown {self.kind} {name!r}{nearest(name, self._entries)}; known: {', '.join(self.names())}"
            )
        return self._entries[name]

    def build(self, name: str, **overrides: Any) -> Any:
        """The model called `name`, full size unless `overrides` say otherwise; works under `torch.device("meta")`."""
        entry = self.entry(name)
        try:
            return entry.build(**overrides)
        except TypeError as error:
            if "unexpected keyword argument" in str(error):
                raise UserError(f"{self.kind} {name!r}: {error}") from None
            raise
