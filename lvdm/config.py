"""One configuration grammar for every program: a dataclass, a YAML recipe, and `key=value` on the command line.

A program's dataclass documents each field with a string below it; those strings are the `--help`. Nothing here imports
torch, so that help and plans answer at once.
"""

import ast
import dataclasses
import inspect
import itertools
import textwrap
import typing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from lvdm.errors import UserError, nearest

T = TypeVar("T")

PRECISIONS = ("fp32", "bf16", "fp16")
TRACKERS = ("none", "wandb", "tensorboard")


@dataclass(frozen=True)
class Flags:
    """What is not a key of the config: the flags every program takes."""

    help: bool = False
    dry_run: bool = False
    plan: bool = False


def choice(config: Any, key: str, options: tuple[str, ...]) -> None:
    """Raises a UserError unless `config.key` is one of `options`; for use in `__post_init__`."""
    value = getattr(config, key)
    if value not in options:
        raise UserError(f"{key}={value!r}: expected one of {', '.join(options)}{nearest(str(value), options)}")


def at_least(config: Any, **bounds: float) -> None:
    """Raises a UserError for each `key` of `config` that is below its bound; for use in `__post_init__`."""
    for key, bound in bounds.items():
        if not getattr(config, key) >= bound:  # nan is refused too
            raise UserError(f"{key}={getattr(config, key)}: expected at least {bound}")


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def parse(cls: type[T], argv: list[str]) -> tuple[T | None, Flags]:
    """`[positionals] [--config FILE] [key=value | --key value ...]` as a validated `cls`, and the flags.

    Later keys win over earlier ones and over the recipe. With `--help` the config is None.
    """
    flags: dict[str, bool] = {}
    recipe, overrides, positionals = None, {}, []
    words = list(argv)
    while words:
        word = words.pop(0)
        name = word.removeprefix("--").replace("-", "_")
        if word in ("-h", "--help", "--dry-run", "--plan"):
            flags["help" if word == "-h" else name] = True
        elif word == "--config":
            recipe = _value_of(word, words)
        elif word.startswith("--config="):
            recipe = word.removeprefix("--config=")
        elif word.startswith("--") and "=" not in word:
            _refuse_unknown_key(cls, name, "command line")
            bare = _field_type(cls, name) in (bool, bool | None) and (not words or words[0] not in ("true", "false"))
            _set_last(overrides, name, "true" if bare else _value_of(word, words))
        elif "=" in word:
            key, _, value = word.removeprefix("--").partition("=")
            _set_last(overrides, key.replace("-", "_"), value)
        else:
            positionals.append(word)
    if flags.get("help"):
        return None, Flags(**flags)
    overrides |= _bind_positionals(cls, positionals)
    return load(cls, recipe, overrides), Flags(**flags)


def load(cls: type[T], recipe: str | Path | None = None, overrides: dict[str, Any] | None = None) -> T:
    """A validated `cls` from a YAML `recipe` (a path, or a name under `configs/`) and `overrides` ("a.b": value).

    Unknown keys, wrong types and refused values are UserErrors that name the key and where it stood.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config = OmegaConf.structured(cls)
    source = str(recipe) if recipe else "command line"
    try:
        if recipe is not None:
            values = read_yaml(recipe)
            _refuse_unknown(cls, values, source)
            config = OmegaConf.merge(config, values)
        source = "command line"
        for key, value in (overrides or {}).items():
            _refuse_unknown_key(cls, key, source)
            OmegaConf.update(config, key, _typed(cls, key, value), merge=True)
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or ""
        raise UserError(f"{source}: key {key!r}: {str(error).splitlines()[0]}") from None


def read_yaml(recipe: str | Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, found by its path or by its name under the shipped `configs/`.

    `base: OTHER` begins with another recipe: what the file says replaces, key by key, what that one says. `above` are
    the files that name this one as theirs.
    """
    from omegaconf import OmegaConf

    path = find_recipe(recipe)
    if path in above:
        raise UserError(f"{path}: base goes round in a circle: {' -> '.join(map(str, (*above, path)))}")
    try:
        values = OmegaConf.load(path)
    except Exception as error:  # yaml raises its own family
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(values):
        raise UserError(f"{path}: expected a mapping of keys to values at the top")
    base = values.pop("base", None)
    return values if base is None else OmegaConf.merge(read_yaml(base, (*above, path)), values)


def find_recipe(recipe: str | Path) -> Path:
    """The file `recipe` names: a path as it is, or a name such as `demo/vae.yaml` under the shipped configs."""
    root = configs_root()
    for path in (Path(recipe), root / recipe, root / f"{recipe}.yaml", root.parent / recipe):
        if path.is_file():
            return path
    shipped = [str(path.relative_to(root)) for path in sorted(root.rglob("*.yaml"))]
    raise UserError(f"no config {str(recipe)!r}{nearest(str(recipe), shipped)}; shipped: {', '.join(shipped)}")


def configs_root() -> Path:
    """The folder of shipped recipes, in an installed package or in a checkout."""
    package = Path(__file__).parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain nested dicts, lists and scalars."""
    return dataclasses.asdict(config)


def defaults(cls: type) -> dict[str, Any]:
    """What the keys of a config dataclass are where nothing is said, as `to_dict` gives them."""
    bare = object.__new__(cls)  # unchecked: a config may refuse its own defaults
    for field in dataclasses.fields(cls):
        made = field.default_factory is not dataclasses.MISSING
        setattr(bare, field.name, field.default_factory() if made else field.default)
    return to_dict(bare)


def to_yaml(config: Any) -> str:
    """The config as YAML, as it is printed and stored in run folders."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


# ---------------------------------------------------------------------------------------------------------------------
# Help


def usage(cls: type, verb: str) -> str:
    """The `--help` of a program, from its dataclass: one entry a key with type, default and the field's docstring."""
    positionals = " ".join(name.upper() for name in getattr(cls, "positionals", ()))
    positionals += " ..." if _takes_several(cls) else ""
    keys = "[--config FILE] [key=value ...] [--dry-run]" if _fields(cls) else ""
    lines = [" ".join(f"usage: {verb} {positionals} {keys}".split()), "", textwrap.dedent(inspect.getdoc(cls) or "")]
    if keys:
        lines += ["", "Every key also works as --key value. Keys:", ""]
    for name, kind, default, doc in _fields(cls):
        lines.append(f"  {name}={default}  ({kind})")
        lines += textwrap.wrap(doc, 110, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


@cache
def field_docs(cls: type) -> dict[str, str]:
    """The docstring below each field of a dataclass and of its bases."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for field, below in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                docs[field.target.id] = " ".join(ast.literal_eval(below.value).split())
    return docs


def _fields(cls: type, prefix: str = "") -> list[tuple[str, str, str, str]]:
    rows = []
    hints = typing.get_type_hints(cls)
    declared = [vars(base).get("__annotations__", {}) for base in cls.__mro__]  # the program's own keys first
    for field in sorted(
        dataclasses.fields(cls), key=lambda field: [field.name in keys for keys in declared].index(True)
    ):
        hint, doc = hints[field.name], field_docs(cls).get(field.name, "")
        item = typing.get_args(hint)[0] if typing.get_origin(hint) is list else None
        if dataclasses.is_dataclass(item):
            rows.append((f"{prefix}{field.name}", "list", "[...]", doc))
            rows += _fields(item, f"{prefix}{field.name}[i].")
        else:
            rows.append((f"{prefix}{field.name}", _kind(hint), _default(field), doc))
    return rows


def _kind(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
    return str(field.default_factory()) if field.default_factory is not dataclasses.MISSING else "(required)"


# ---------------------------------------------------------------------------------------------------------------------
# Keys and types


def _value_of(flag: str, words: list[str]) -> str:
    if not words:
        raise UserError(f"{flag}: expected a value after it")
    return words.pop(0)


def _set_last(overrides: dict[str, str], key: str, value: str) -> None:
    overrides.pop(key, None)  # so that it comes after a key given in between that holds it
    overrides[key] = value


def _bind_positionals(cls: type, words: list[str]) -> dict[str, Any]:
    """Words to the config's `positionals` in their order; a last one that is a list takes all that are left."""
    names = getattr(cls, "positionals", ())
    if len(words) >= len(names) and _takes_several(cls):
        words = [*words[: len(names) - 1], words[len(names) - 1 :]]
    if len(words) > len(names):
        takes = " ".join(name.upper() for name in names) or "no positional arguments"
        raise UserError(f"unexpected argument {words[len(names)]!r}: this command takes {takes}, then key=value")
    return dict(zip(names, words, strict=False))


def _takes_several(cls: type) -> bool:
    names = getattr(cls, "positionals", ())
    return bool(names) and typing.get_origin(_field_type(cls, names[-1])) is list


def _field_type(cls: Any, key: str) -> Any:
    """The type hint at the dotted `key` ("phases.0.lr", "model_args.width"), or None when there is no such key."""
    for part in key.replace("[", ".").replace("]", "").split("."):
        if dataclasses.is_dataclass(cls):
            cls = typing.get_type_hints(cls).get(part) if part in {f.name for f in dataclasses.fields(cls)} else None
        elif typing.get_origin(cls) is list and part.isdigit():
            cls = typing.get_args(cls)[0]
        elif typing.get_origin(cls) is dict:
            cls = typing.get_args(cls)[1]
        else:
            return None
    return cls


def _typed(cls: type, key: str, value: Any) -> Any:
    """A command line's text as YAML would read it; as it stands where the key holds text, and `a,b` as a list."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    hint = _field_type(cls, key)
    if not isinstance(value, str) or hint is str:
        return value
    if typing.get_origin(hint) is list and not value.startswith("["):
        value = f"[{value}]"
    try:
        return OmegaConf.from_dotlist([f"value={value}"])["value"]
    except YAMLError as error:
        raise UserError(f"command line: key {key!r}: {value!r} is not valid YAML ({error.problem})") from None


def _refuse_unknown(cls: Any, values: Any, source: str, prefix: str = "") -> None:
    """Walks a recipe and refuses the first key that the dataclass does not have, and a list where none is expected."""
    from omegaconf import OmegaConf

    if dataclasses.is_dataclass(cls) and OmegaConf.is_dict(values):
        for key in values:
            _refuse_unknown_key(cls, str(key), source, prefix)
            value = values._get_node(key)
            hint = typing.get_type_hints(cls)[key]
            if typing.get_origin(hint) is list:
                if not OmegaConf.is_list(value):
                    raise UserError(f"{source}: key {prefix + key!r}: expected a list")
                for i in range(len(value)):
                    _refuse_unknown(typing.get_args(hint)[0], value._get_node(i), source, f"{prefix}{key}[{i}].")
            elif typing.get_origin(hint) is dict and OmegaConf.is_list(value):
                raise UserError(f"{source}: key {prefix + key!r}: expected a mapping")


def _refuse_unknown_key(cls: type, key: str, source: str, prefix: str = "") -> None:
    if _field_type(cls, key) is None:
        parent, _, name = key.rpartition(".")
        owner = _field_type(cls, parent) if parent else cls
        if not dataclasses.is_dataclass(owner):
            owner, name = cls, key
        known = [field.name for field in dataclasses.fields(owner)]
        raise UserError(f"{source}: unknown key {prefix + key!r}{nearest(name, known)}; known: {', '.join(known)}")
