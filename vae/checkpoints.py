"""Official checkpoints, read into our models and written back, by the tables of vae/layouts.py."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from re import search, sub

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import vae
from lvdm.errors import UserError
from lvdm.torchfile import SUFFIXES, differences, read_tree, state_dict, weight_file
from vae.base import VideoVAE
from vae.layouts import LAYOUTS, Layout, Options, State

CLASSES = (None, "CausalVAEModel", "CVVAEModel")
"""What the config.json of a folder of official weights says; others are read elsewhere."""


def explain(folder: str) -> str:
    """What the weights of an export folder look like, for an error about their not fitting its config; or nothing."""
    own = _config(Path(folder)).get("_class_name")
    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as weights:
                name = name_of(weights.keys())
        except (SafetensorError, OSError):
            return ""
        if name and vae.registry.entry(name).target.endswith(f":{own}"):
            return "; by their names the weights are of this family, with other options"
        return f"; by their names the weights are those of {name}" if name else ""
    return ""


def name_of(keys: Iterable[str]) -> str | None:
    """The registered model whose weights are called so, whatever its size; None where none is near."""

    def pattern(keys: Iterable[str]) -> set[str]:
        return {sub(r"(?<!branches)\.\d+", ".0", key) for key in keys if not key.startswith("refiner.")}

    wanted, best = pattern(keys), (0.8, None)
    for name in vae.names():
        with torch.device("meta"):
            own = pattern(vae.build(name, **vae.registry.entry(name).tiny).state_dict())
        best = max(best, (len(own & wanted) / max(1, len(own | wanted)), name), key=lambda pair: pair[0])
    return best[1]


def official(model: VideoVAE) -> dict[str, Tensor]:
    """The weights as the family's own code names and shapes them. UserError where no layout of the family is known."""
    name = model.title
    layout = next((layout for layout in LAYOUTS if name == layout.model), None)
    if layout is None:
        raise UserError(f"{name} has no official layout; {', '.join(_families())} have")
    weights, state = model.state_dict(), dict(layout.buffers(model))
    for ours, theirs in _links(model, layout):
        state |= _restacked([weights[key] for key in ours], theirs)
    return state


def convert(state: State, config: Options | None = None, origin: str = "these weights") -> tuple[VideoVAE, str]:
    """The model that an official state dict is of, in fp32 and eval mode, and what it is, in words.

    `config` is the config.json beside it. UserError, which begins with `origin`, where the keys are of no family, and
    where some are missing, left over or of another shape than the others imply.
    """
    names = _unprefixed(state)
    layout = _layout_of(names)
    if layout is None:
        found = f"keys such as {', '.join(list(state)[:2])} are" if state else "no tensors, so"
        own = name_of(names)
        hint = f"; they are those of our {own}: give the export folder, with its config.json" if own else ""
        raise UserError(f"{origin}: {found} of no official checkpoint known here ({', '.join(_families())}){hint}")
    state = {name: state[key] for name, key in names.items()}
    try:
        options = layout.options(state, config or {})
        with torch.device("meta"):
            model = vae.build(layout.family, **options)
    except (UserError, KeyError, IndexError) as error:
        raise UserError(f"{origin}: {layout.family} by its keys, but not whole ({error})") from None
    links = list(_links(model, layout))
    shapes = {key: shape for _, theirs in links for key, shape in theirs.items()}
    wrong = differences({key: t.shape for key, t in state.items() if key not in layout.buffers(model)}, shapes)
    if wrong:
        raise UserError(f"{origin}: {layout.family} by its keys, but not its weights: {wrong}")
    shapes, weights = {key: tensor.shape for key, tensor in model.state_dict().items()}, {}
    for ours, theirs in links:
        weights |= _restacked([state[key].float() for key in theirs], {key: shapes[key] for key in ours})
    model.load_state_dict(weights, assign=True)
    return model.eval(), f"{layout.family} ({layout.title.format(**options)})"


def _families() -> list[str]:
    return sorted({layout.family for layout in LAYOUTS})


def _layout_of(names: Iterable[str]) -> Layout | None:
    names = set(names)
    return next((layout for layout in LAYOUTS if names.issuperset(layout.signs)), None)


def _unprefixed(keys: Iterable[str]) -> dict[str, str]:
    """Names of the autoencoder's own tensors, and the keys they have inside a wrapper or a larger model."""
    names = {key: key for key in keys}
    for prefix in ("module.", "first_stage_model."):
        names = {n.removeprefix(prefix): k for n, k in names.items() if n.startswith(prefix)} or names
    return {name: key for name, key in names.items() if not name.startswith(("loss.", "model_ema."))}


def _links(model: VideoVAE, layout: Layout) -> Iterator[tuple[list[str], dict[str, tuple[int, ...]]]]:
    """Our keys, and their names with shapes, of tensors that hold the same rows one after the other."""
    rows, ranks = list(layout.rows(model.options)), layout.ranks(model.options)
    convs = {name for name, module in model.named_modules() if layout.wrapped and isinstance(module, nn.Conv3d)}
    weights, stacks = model.state_dict(), {}
    for key in weights:
        name = key
        for ours, theirs in rows:
            name = name.replace(ours, theirs)
        head, _, leaf = name.rpartition(".")
        if key.rpartition(".")[0] in convs and _rank(name, ranks) != 4:
            name = f"{head}.conv.{leaf}"
        stacks.setdefault(name, []).append(key)
    for name, ours in stacks.items():
        names = [name.replace("{2d,3d}", half) for half in ("2d", "3d")] if "{" in name else [name]
        height, rest = sum(len(weights[key]) for key in ours) // len(names), weights[ours[0]].shape[1:]
        yield ours, {n: _shape((height, *rest), n, _rank(n, ranks)) for n in names}


def _rank(name: str, ranks: Mapping[str, int]) -> int | None:
    return next((rank for pattern, rank in ranks.items() if search(pattern, name)), None)


def _shape(shape: tuple[int, ...], name: str, rank: int | None) -> tuple[int, ...]:
    """`shape` with so many dimensions: without time, or with ones behind. Vectors stay vectors, but for gammas."""
    if rank is None or (len(shape) == 1 and not name.endswith(".gamma")):
        return shape
    return (*shape[:2], *shape[2 + max(0, len(shape) - rank) :], *(1,) * (rank - len(shape)))


def _restacked(tensors: Iterable[Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The rows of all tensors, one after the other, cut into tensors of the given shapes."""
    rows = torch.cat([tensor.flatten(1) if tensor.ndim > 1 else tensor for tensor in tensors])
    parts = rows.split([shape[0] for shape in shapes.values()])
    return {key: part.reshape(shape).clone() for (key, shape), part in zip(shapes.items(), parts, strict=True)}


# ---------------------------------------------------------------------------------------------------------------------
# Files


def read(spec: str) -> VideoVAE | None:
    """The model of an official checkpoint: a weight file, or a folder with one and perhaps its config.json.

    Says on stderr what it found. None where `spec` is something else (a run, an export, a hub id, a folder of
    diffusers). UserError for a file that is damaged, asks to unpickle more than tensors, or is of no known family.
    """
    folder = Path(spec).expanduser()
    file = _only_weights(folder) if folder.is_dir() else weight_file(spec)
    if file is None:
        return None
    state, note = state_dict(read_tree(file), file, "ema_state_dict", ("state_dict", "gen_model"))
    model, title = convert(state, _config(file.parent), str(file))
    print(f"{file}: {title}, {note}{sum(p.numel() for p in model.parameters()):,} parameters", file=sys.stderr)
    return model


def _only_weights(folder: Path) -> Path | None:
    """The weight file of a folder of official weights; of several kinds the first of `SUFFIXES`."""
    if _config(folder).get("_class_name") not in CLASSES:
        return None
    files = next((found for suffix in SUFFIXES if (found := sorted(folder.glob(f"*{suffix}")))), [])
    if len(files) > 1:
        raise UserError(f"{folder}: several weight files ({', '.join(f.name for f in files[:5])}); name one of them")
    return files[0] if files else None


def _config(folder: Path) -> Options:
    """config.json in a folder, {} where there is none to read."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
