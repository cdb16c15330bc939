"""Official checkpoints: their names and shapes, what they compute, the files they come in, what is refused."""

import math
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor

import dit
from dit.conditioning import Condition
from dit.embeddings import grid_table, position_table
from dit.latte import Latte
from dit.official import HEADS, convert
from lvdm.errors import UserError
from lvdm.latents import LatentSpace

XL = {"depth": 28, "width": 1152, "patch": 2, "side": 16, "frames": 16}
SMALL = {"depth": 4, "width": 384, "patch": 2, "side": 3, "frames": 4}
TINY = {"depth": 2, "width": 8, "patch": 2, "side": 2, "frames": 3}


def official_shapes(depth, width, patch, side, frames, channels=4, out=8, classes=0) -> dict[str, tuple[int, ...]]:
    """Every tensor of models/latte.py's state dict, by the authors' names; tables are parameters there."""
    d = width
    linears = {"t_embedder.mlp.0": (d, 256), "t_embedder.mlp.2": (d, d)}
    for i in range(depth):
        linears |= {
            f"blocks.{i}.attn.qkv": (3 * d, d),
            f"blocks.{i}.attn.proj": (d, d),
            f"blocks.{i}.mlp.fc1": (4 * d, d),
            f"blocks.{i}.mlp.fc2": (d, 4 * d),
            f"blocks.{i}.adaLN_modulation.1": (6 * d, d),
        }
    linears |= {"final_layer.linear": (patch**2 * out, d), "final_layer.adaLN_modulation.1": (2 * d, d)}
    shapes = {"pos_embed": (1, side**2, d), "temp_embed": (1, frames, d)}
    shapes |= {"x_embedder.proj.weight": (d, channels, patch, patch), "x_embedder.proj.bias": (d,)}
    if classes:
        shapes["y_embedder.embedding_table.weight"] = (classes + 1, d)
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def official_state(seed: int = 0, device: str = "cpu", **sizes: int) -> dict[str, Tensor]:
    """Random weights under those names, and the real tables."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in official_shapes(**sizes).items():
        state[key] = torch.empty(shape, device="meta") if device == "meta" else torch.randn(shape, generator=generator)
        state[key] = state[key] * 0.04
    state["pos_embed"] = grid_table(sizes["side"], sizes["side"], sizes["width"])[None].float()
    state["temp_embed"] = position_table(torch.arange(sizes["frames"]), sizes["width"])[None].float()
    return state


def to_official(model: Latte) -> dict[str, Tensor]:
    """The authors' state dict of one of our models."""
    c, ours = model.config, model.state_dict()
    names = {"patch_embed": "x_embedder.proj", "time_embed": "t_embedder", "head": "final_layer"}
    leaves = {"modulation": "adaLN_modulation.1", "attention.qkv": "attn.qkv", "attention.out": "attn.proj"}
    state = {}
    for key, tensor in ours.items():
        if ".qkv." in key:
            tensor = tensor.view(c.heads, 3, c.width // c.heads, *tensor.shape[1:]).transpose(0, 1).flatten(0, 2)
        if key == "patch_embed.weight":
            tensor = tensor.view(c.width, c.in_channels, c.patch, c.patch)
        if key.startswith("blocks"):
            key = key.replace("mlp.0", "mlp.fc1").replace("mlp.2", "mlp.fc2")
        for name, theirs in (names | leaves).items():
            key = key.replace(f"{name}.", f"{theirs}.")
        state[key.replace("label_embed.table", "y_embedder.embedding_table")] = tensor
    state["pos_embed"] = model.space_table[None]
    state["temp_embed"] = model.time_table[None, :, 0]
    return state


# ----------------------------------------------------------------------------------------------------------------------
# What they compute, by their names


def linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def official_block(state: dict[str, Tensor], name: str, x: Tensor, vector: Tensor, heads: int) -> Tensor:
    """Sequences (B, N, D), one vector (B, D) each."""
    m = linear(state, f"{name}.adaLN_modulation.1", F.silu(vector)).chunk(6, dim=1)
    qkv = linear(state, f"{name}.attn.qkv", modulated(x, m[0], m[1]))
    q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=heads)
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    x = x + m[2][:, None] * linear(state, f"{name}.attn.proj", rearrange(weights @ v, "b h n d -> b n (h d)"))
    hidden = F.gelu(linear(state, f"{name}.mlp.fc1", modulated(x, m[3], m[4])), approximate="tanh")
    return x + m[5][:, None] * linear(state, f"{name}.mlp.fc2", hidden)


def official_forward(state: dict[str, Tensor], x: Tensor, t: Tensor, label: Tensor | None, heads: int) -> Tensor:
    """Videos (B, F, C, H, W) as the authors lay them out, and so the result."""
    kernel, batch, frames = state["x_embedder.proj.weight"], *x.shape[:2]
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    hidden = linear(state, "t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], dim=1))
    vector = linear(state, "t_embedder.mlp.2", F.silu(hidden))
    if label is not None:
        vector = vector + state["y_embedder.embedding_table.weight"][label]

    grid = F.conv2d(x.flatten(0, 1), kernel, state["x_embedder.proj.bias"], stride=kernel.shape[-1])
    x = rearrange(grid, "bf d h w -> bf (h w) d") + state["pos_embed"]
    for i in range(sum(key.endswith("attn.qkv.bias") for key in state)):
        if i % 2 == 0:
            x = official_block(state, f"blocks.{i}", x, vector.repeat_interleave(frames, 0), heads)
        else:
            places = x.shape[1]
            x = rearrange(x, "(b f) n d -> (b n) f d", b=batch) + (state["temp_embed"] if i == 1 else 0)
            x = official_block(state, f"blocks.{i}", x, vector.repeat_interleave(places, 0), heads)
            x = rearrange(x, "(b n) f d -> (b f) n d", b=batch)

    vector = vector.repeat_interleave(frames, 0)
    shift, scale = linear(state, "final_layer.adaLN_modulation.1", F.silu(vector)).chunk(2, dim=1)
    x = linear(state, "final_layer.linear", modulated(x, shift, scale))
    sizes = {"b": batch, "h": grid.shape[2], "p": kernel.shape[2], "q": kernel.shape[3]}
    return rearrange(x, "(b f) (h w) (p q c) -> b f c (h p) (w q)", **sizes)


@pytest.mark.parametrize("overrides", [{}, {"classes": 5}, {"out": 4}], ids=["none", "class", "no-sigma"])
@torch.no_grad()
def test_a_converted_checkpoint_equals_the_authors_equations(overrides):
    state = official_state(**SMALL, **overrides)
    model = convert(state)
    x, t = torch.randn(2, 4, 4, 6, 6, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 998])
    labelled = "classes" in overrides
    out = model(x.transpose(1, 2), t, Condition(torch.tensor([2, -1])) if labelled else None)
    expected = official_forward(state, x, t, torch.tensor([2, 5]) if labelled else None, heads=6)
    assert expected.std() > 0.1
    torch.testing.assert_close(out.transpose(1, 2), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("classes", "parameters", "tensors"), [(0, 673_681_568, 292), (101, 673_799_072, 293)], ids=["sky", "ucf101"]
)
def test_latte_xl_2_is_read_whole(classes, parameters, tensors):
    state = official_state(device="meta", **XL, classes=classes)
    assert len(state) == tensors
    model = convert(state)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(t.numel() for t in state.values()) == parameters + (16 * 16 + 16) * 1152
    c = model.config
    assert (c.in_channels, c.frames, c.size, c.patch, c.depth, c.width, c.heads) == (4, 16, (32, 32), 2, 28, 1152, 16)
    assert (c.learn_sigma, c.objective, c.num_classes) == (True, "noise", classes)
    assert c.condition == ("class" if classes else "none")
    space = LatentSpace(**c.latents)
    assert (space.vae_sha256, space.num_frames, space.stride, len(space.classes)) == ("", 16, 3, classes)
    sampled = torch.full((4, 1, 1, 1), 0.18215)
    torch.testing.assert_close(space.scale.denormalise(sampled), torch.ones(4, 1, 1, 1))
    again = to_official(model)
    assert {key: tensor.shape for key, tensor in again.items()} == {key: t.shape for key, t in state.items()}


@pytest.mark.parametrize("width", HEADS)
def test_heads_follow_from_the_width(width):
    model = convert(official_state(device="meta", **{**TINY, "width": width}))
    with torch.device("meta"):
        named = {m.config.width: m.config.heads for m in (dit.build(f"latte-{s}/2") for s in ("s", "b", "l", "xl"))}
    assert model.config.heads == HEADS[width] == named[width]


def test_the_round_trip_changes_no_bit():
    state = official_state(**SMALL, classes=5)
    again = to_official(convert(state))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


# ----------------------------------------------------------------------------------------------------------------------
# Files


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(HEADS, TINY["width"], 2)
    return official_state(**TINY)


@pytest.mark.parametrize("wrapped", ["ema", "model", "bare", "compiled", "safetensors"])
def test_files_as_trainers_write_them(tiny, tmp_path, capsys, wrapped):
    raw = official_state(seed=1, **TINY)
    prefixed = {f"module._orig_mod.{key}": tensor for key, tensor in tiny.items()}
    trees = {"ema": {"model": raw, "ema": tiny}, "model": {"model": tiny}, "compiled": {"ema": prefixed}}
    file = tmp_path / ("latte.safetensors" if wrapped == "safetensors" else "0150000.pt")
    save_file(tiny, file) if wrapped == "safetensors" else torch.save(trees.get(wrapped, tiny), file)
    model = dit.load(str(file))
    assert not model.training
    assert all(torch.equal(tensor, tiny[key]) for key, tensor in to_official(model).items())
    told = capsys.readouterr().err
    assert "Latte of depth 2 and width 8, patch 2, 3 frames, unconditional" in told
    assert ("EMA weights" in told) == (wrapped in ("ema", "compiled"))


def test_half_precision_becomes_single(tiny, tmp_path):
    torch.save({key: tensor.half() for key, tensor in tiny.items()}, tmp_path / "half.pt")
    model = dit.load(str(tmp_path / "half.pt"))
    assert torch.equal(model.head.linear.weight, tiny["final_layer.linear.weight"].half().float())


def test_a_loaded_model_does_not_hang_on_the_file(tiny, tmp_path):
    torch.save(tiny, tmp_path / "latte.pt")
    model = dit.load(str(tmp_path / "latte.pt"))
    with (tmp_path / "latte.pt").open("r+b") as file:
        file.write(bytes((tmp_path / "latte.pt").stat().st_size))
    assert torch.equal(model.head.linear.weight, tiny["final_layer.linear.weight"])


def test_files_that_are_no_checkpoint_are_user_errors(tiny, tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.pt: no such file"):
        dit.load(str(tmp_path / "nowhere.pt"))
    torch.save({"ema": tiny, "args": Namespace(seed=0)}, tmp_path / "objects.pt")
    with pytest.raises(UserError, match=r"objects\.pt: holds Python objects other than tensors"):
        dit.load(str(tmp_path / "objects.pt"))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match=r"list\.pt: expected a state dict, found a list"):
        dit.load(str(tmp_path / "list.pt"))


def test_an_export_folder_is_still_ours(tmp_path):
    Latte(frames=2, size=(4, 4), depth=2, width=16, heads=2).save_pretrained(tmp_path)
    assert dit.load(str(tmp_path)).config.width == 16
    with pytest.raises(UserError, match="a Latte of this project, which is loaded by its export folder"):
        dit.load(str(tmp_path / "diffusion_pytorch_model.safetensors"))


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_embedding_projection.1.weight": (8, 59136)}, "a text-conditional Latte .*; expected an official Latte"),
        ({"temporal_transformer_blocks.0.attn1.to_q.weight": (8, 8)}, "a text-to-video Latte"),
        ({"temp_embed": None}, "a DiT for images, without temp_embed"),
        ({"x_embedder.proj.weight": None}, "keys such as pos_embed, temp_embed; expected an official Latte"),
        ({"x_embedder.proj.weight": (8, 16)}, r"x_embedder\.proj\.weight is \(8, 16\), expected 4 dimensions"),
        ({"x_embedder.proj.weight": (12, 4, 2, 2)}, "width 12 .*, expected 384, 768, 1024, 1152"),
        ({"pos_embed": (1, 6, 8)}, "pos_embed has 6 places, expected those of a square"),
        ({"blocks.1.mlp.fc2.bias": None}, r"1 missing \(blocks\.1\.mlp\.fc2\.bias\)"),
        ({"blocks.1.norm.weight": (8,)}, r"1 unexpected \(blocks\.1\.norm\.weight\)"),
        ({"blocks.0.attn.proj.bias": (9,)}, r"blocks\.0\.attn\.proj\.bias: \(9,\), expected \(8,\)"),
        ({"final_layer.linear.weight": (12, 8)}, r"final_layer\.linear\.weight: \(12, 8\), expected \(16, 8\)"),
        ({"blocks.2.attn.proj.bias": (8,)}, "depth=3: expected an even number"),
    ],
)
def test_other_weights_are_refused_by_name(tiny, change, message):
    for key, shape in change.items():
        tiny.pop(key, None)
        if shape is not None:
            tiny[key] = torch.zeros(shape)
    with pytest.raises(UserError, match=f"^their.pt: .*{message}"):
        convert(tiny, "their.pt")


@pytest.mark.parametrize("key", ["pos_embed", "temp_embed"])
def test_another_position_table_is_refused_but_one_that_drifted_in_the_average_is_not(tiny, key):
    convert(tiny | {key: tiny[key] + 1e-3})
    for wrong in (tiny[key].flip(1), tiny[key] + float("nan")):
        with pytest.raises(UserError, match=f"{key} is another position table"):
            convert(tiny | {key: wrong})
