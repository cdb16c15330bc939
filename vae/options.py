"""Options of models, refused by name where they make none."""

from typing import Any

from lvdm.errors import UserError, nearest


def check_mult(mult: Any, levels: int | None = None) -> None:
    """A UserError unless `mult` is a whole multiplier a level, of `levels` levels where there is a fixed number."""
    many = isinstance(mult, list | tuple) and len(mult) > 0 and all(map(positive, mult))
    if not many or (levels and len(mult) != levels):
        example = (1, 2, 4, 4, 4, 4)[: levels or 4]
        raise UserError(
            f"mult={mult}: expected {levels or 'some'} whole multipliers, one a level, e.g. {list(example)}"
        )


def check_choices(options: Any, allowed: dict[str, tuple[str, ...]]) -> None:
    """A UserError where an option is none of its allowed names."""
    for key, names in allowed.items():
        if options[key] not in names:
            value = options[key]
            raise UserError(f"{key}={value!r}: expected one of {', '.join(names)}{nearest(str(value), names)}")


def check_counts(options: Any, *keys: str) -> None:
    """A UserError where one of `keys` is no whole number of at least 1."""
    for key in keys:
        if not positive(options[key]):
            raise UserError(f"{key}={options[key]!r}: expected a whole number of at least 1")


def positive(value: Any) -> bool:
    """Whether it is a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
