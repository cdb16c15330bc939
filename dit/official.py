"""Checkpoints of Latte's authors (models/latte.py and models/latte_img.py of Vchitect/Latte), read into our Latte."""

import sys
from dataclasses import asdict
from math import isqrt
from re import match, sub
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from dit.embeddings import grid_table, position_table
from dit.latte import Latte
from lvdm.errors import UserError
from lvdm.latents import LatentSpace
from lvdm.torchfile import differences, read_tree, state_dict, weight_file

State = dict[str, Tensor]

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Attention heads by width: no shape tells them."""
SD_SCALE = 0.18215
"""By which the latents of Stable Diffusion's VAE are multiplied."""
LABEL_DROPOUT = 0.1
"""With which all class-conditional checkpoints were trained, so that their table has a row for the null class."""
FOREIGN = {
    "text_embedding_projection.1.weight": "a text-conditional Latte",
    "temporal_transformer_blocks.0.attn1.to_q.weight": "a text-to-video Latte",
    "time_embed.mlp.0.weight": "a Latte of this project, which is loaded by its export folder",
}
"""Tensors of models that could be meant, but are not official checkpoints for classes or for no condition."""
NAMES = (
    (r"^patch_embed\.", "x_embedder.proj."),
    (r"^time_embed\.", "t_embedder."),
    (r"^label_embed\.table\.", "y_embedder.embedding_table."),
    (r"^head\.", "final_layer."),
    (r"\.modulation\.", ".adaLN_modulation.1."),
    (r"\.attention\.qkv\.", ".attn.qkv."),
    (r"\.attention\.out\.", ".attn.proj."),
    (r"^(blocks\.\d+\.mlp)\.0\.", r"\1.fc1."),
    (r"^(blocks\.\d+\.mlp)\.2\.", r"\1.fc2."),
)
"""Patterns in our names, and what the authors call the same."""


def read(spec: str) -> Latte | None:
    """The Latte of an official checkpoint, in fp32 and eval mode, its averaged weights where it has both.

    `spec` is a .pt file as their training saves it, or a state dict with the same names in a pickle or a safetensors
    file. Says on stderr what it found. None where `spec` names no file. UserError as for `convert`, and for a file that
    is damaged or asks to unpickle more than tensors.
    """
    file = weight_file(spec)
    if file is None:
        return None
    state, note = state_dict(read_tree(file), file, averaged="ema", wrappers=("model", "state_dict"))
    model = convert(state, str(file))
    c = model.config
    classes = f"{c.num_classes} classes" if c.condition == "class" else "unconditional"
    title = f"Latte of depth {c.depth} and width {c.width}, patch {c.patch}, {c.frames} frames, {classes}"
    print(f"{file}: {title}, {note}{sum(p.numel() for p in model.parameters()):,} parameters", file=sys.stderr)
    return model


def convert(state: State, origin: str = "these weights") -> Latte:
    """The Latte that an official state dict is of, in fp32 and eval mode.

    UserError, which begins with `origin`, for the weights of another model, for tensors that are missing, left over or
    of another shape than the others imply, and for position tables other than ours.
    """
    state = {sub(r"^(_orig_mod\.|module\.)+", "", key): tensor for key, tensor in state.items()}
    try:
        _check_kind(state)
        with torch.device("meta"):
            model = Latte(**_options(state))
        shapes = _official_shapes(model)
        if wrong := differences({key: tensor.shape for key, tensor in state.items()}, shapes):
            raise UserError(f"a Latte by its keys, but not its weights: {wrong}")
        _check_tables(state, model)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
    weights = {key: _ours(key, state[_official_name(key)], model.config.heads) for key in model.state_dict()}
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _check_kind(state: State) -> None:
    """Raises UserError for the weights of any other model, saying which where that can be told."""
    expected = "expected an official Latte, class-conditional or unconditional"
    for key, what in FOREIGN.items():
        if key in state:
            raise UserError(f"{what} ({key}); {expected}")
    signs = ("x_embedder.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight", "final_layer.linear.weight")
    if not state.keys() >= set(signs):
        found = f"keys such as {', '.join(list(state)[:2])}" if state else "no tensors"
        raise UserError(f"{found}; {expected} ({', '.join(signs)}, ...)")
    if "temp_embed" not in state:
        raise UserError(f"a DiT for images, without temp_embed; {expected}")


def _options(state: State) -> dict[str, Any]:
    """The config that the shapes imply."""
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    for key, rank in {"x_embedder.proj.weight": 4, "pos_embed": 3, "temp_embed": 3}.items():
        if len(shapes[key]) != rank:
            raise UserError(f"{key} is {shapes[key]}, expected {rank} dimensions")
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    places, rows = shapes["pos_embed"][1], shapes["final_layer.linear.weight"][0]
    if isqrt(places) ** 2 != places:
        raise UserError(f"pos_embed has {places} places, expected those of a square")
    if width not in HEADS:
        raise UserError(f"width {width} (x_embedder.proj.weight), expected {', '.join(map(str, HEADS))}")
    options = {
        "in_channels": channels,
        "frames": shapes["temp_embed"][1],
        "size": (isqrt(places) * patch,) * 2,
        "patch": patch,
        "depth": 1 + max(int(found[1]) for key in shapes if (found := match(r"blocks\.(\d+)\.", key))),
        "width": width,
        "heads": HEADS[width],
        "learn_sigma": rows == 2 * channels * patch**2,
    }
    if table := shapes.get("y_embedder.embedding_table.weight"):
        options |= {"condition": "class", "num_classes": table[0] - 1, "label_dropout": LABEL_DROPOUT}
    return options | {"latents": _latents(channels, options["frames"], options.get("num_classes", 0))}


def _latents(channels: int, frames: int, classes: int) -> dict[str, Any]:
    """What all of them were trained on: latents of Stable Diffusion's VAE, a frame each, every third frame of a video
    of 25 a second. Their classes are known by number only."""
    scale = {"mean": [0.0] * channels, "std": [1 / SD_SCALE] * channels}
    space = LatentSpace("", num_frames=frames, fps=25 / 3, stride=3, classes=[str(i) for i in range(classes)], **scale)
    return asdict(space)


def _official_name(key: str) -> str:
    for ours, theirs in NAMES:
        key = sub(ours, theirs, key)
    return key


def _official_shapes(model: Latte) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of an official checkpoint of such a model."""
    c = model.config
    shapes = {_official_name(key): tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    shapes["x_embedder.proj.weight"] = (c.width, c.in_channels, c.patch, c.patch)
    places = (c.size[0] // c.patch) * (c.size[1] // c.patch)
    return shapes | {"pos_embed": (1, places, c.width), "temp_embed": (1, c.frames, c.width)}


def _check_tables(state: State, model: Latte) -> None:
    """Raises UserError where the positions are not those that our Latte computes."""
    c = model.config
    tables = {
        "pos_embed": grid_table(c.size[0] // c.patch, c.size[1] // c.patch, c.width),
        "temp_embed": position_table(torch.arange(c.frames), c.width),
    }
    for key, table in tables.items():
        # Their moving average takes the tables too, and rounding lets them drift by some 1e-4.
        error = float((state[key][0].double() - table).abs().max())
        if not error < 1e-2:
            raise UserError(f"{key} is another position table than the sinusoids of Latte: off by {error:.2g}")


def _ours(key: str, tensor: Tensor, heads: int) -> Tensor:
    """A tensor of theirs as our `key` has it, in fp32: their qkv rows are ordered (q|k|v, head, head_dim)."""
    if ".qkv." in key:
        tensor = rearrange(tensor, "(qkv heads dim) ... -> (heads qkv dim) ...", qkv=3, heads=heads)
    if key == "patch_embed.weight":
        tensor = tensor.flatten(1)
    return tensor.to(torch.float32, copy=True)  # and so not a window into the file
