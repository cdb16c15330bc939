"""Latte against a literal transcription of its equations, and the promises of its contract."""

import math
import pickle
import shutil

import pytest
import torch
from torch import Tensor

from dit.conditioning import Condition
from dit.latte import Block, Latte, modulated_norm
from lvdm import cost
from lvdm.errors import UserError

CONFIG = {"frames": 3, "size": (4, 8), "patch": 2, "depth": 4, "width": 24, "heads": 3}
CLASSES = {"condition": "class", "num_classes": 5}


def latte(seed: int = 0, **overrides) -> Latte:
    """A tiny Latte with random weights everywhere, so that no modulation is zero."""
    model = Latte(**{**CONFIG, **overrides}).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def batch(n: int = 2, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, 3, 4, 8, generator=generator), torch.tensor([3, 8, 700, 999])[:n]


# ----------------------------------------------------------------------------------------------------------------------
# The equations, one token at a time


def sinusoid(position: float, width: int) -> Tensor:
    angles = [position / 10000 ** (i / (width // 2)) for i in range(width // 2)]
    return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles])


def affine(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x: Tensor) -> Tensor:
    return (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + 1e-6)


def self_attention(weights: dict[str, Tensor], name: str, tokens: list[Tensor], heads: int) -> list[Tensor]:
    head_dim = len(tokens[0]) // heads
    qkv = [affine(weights, f"{name}.qkv", token).view(heads, 3, head_dim) for token in tokens]
    results = []
    for query in qkv:
        outputs = []
        for h in range(heads):
            logits = torch.stack([query[h, 0] @ other[h, 1] for other in qkv]) / math.sqrt(head_dim)
            outputs.append(sum(p * other[h, 2] for p, other in zip(logits.softmax(0), qkv, strict=True)))
        results.append(affine(weights, f"{name}.out", torch.cat(outputs)))
    return results


def block(weights: dict[str, Tensor], name: str, tokens: list[Tensor], vector: Tensor, heads: int) -> list[Tensor]:
    """A DiT block on one sequence, its modulation computed anew for every token."""
    modulations = [affine(weights, f"{name}.modulation", silu(vector)).chunk(6) for _ in tokens]
    normed = [layer_norm(x) * (1 + m[1]) + m[0] for x, m in zip(tokens, modulations, strict=True)]
    attended = self_attention(weights, f"{name}.attention", normed, heads)
    tokens = [x + m[2] * y for x, m, y in zip(tokens, modulations, attended, strict=True)]
    results = []
    for x, m in zip(tokens, modulations, strict=True):
        hidden = gelu(affine(weights, f"{name}.mlp.0", layer_norm(x) * (1 + m[4]) + m[3]))
        results.append(x + m[5] * affine(weights, f"{name}.mlp.2", hidden))
    return results


def reference(model: Latte, video: Tensor, timestep: int, label: int | None, still: bool = False) -> Tensor:
    """Latte's forward of one video (C, T, H, W), variant 1, with loops over frames, places and tokens.

    `still` is for an image of joint training, T = 1: no temporal block sees it, and it has no place in time.
    """
    weights, config = model.state_dict(), model.config
    p, width, heads, frames = config.patch, config.width, config.heads, video.shape[1]
    places = [(r, c) for r in range(config.size[0] // p) for c in range(config.size[1] // p)]

    angles = [timestep * math.exp(-math.log(10000) * i / 128) for i in range(128)]
    vector = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
    vector = affine(weights, "time_embed.mlp.2", silu(affine(weights, "time_embed.mlp.0", vector)))
    if label is not None:
        vector = vector + weights["label_embed.table.weight"][label]

    tokens = {}
    for t in range(frames):
        for r, c in places:
            patch = video[:, t, r * p : (r + 1) * p, c * p : (c + 1) * p]
            position = torch.cat([sinusoid(c, width // 2), sinusoid(r, width // 2)])
            tokens[t, r, c] = affine(weights, "patch_embed", patch.flatten()) + position

    for i in range(0, config.depth, 2 if still else 1):
        if i % 2 == 0:
            sequences = [[(t, r, c) for r, c in places] for t in range(frames)]
        else:
            sequences = [[(t, r, c) for t in range(frames)] for r, c in places]
        if i == 1:
            tokens = {(t, r, c): x + sinusoid(t, width) for (t, r, c), x in tokens.items()}
        for keys in sequences:
            results = block(weights, f"blocks.{i}", [tokens[key] for key in keys], vector, heads)
            tokens.update(zip(keys, results, strict=True))

    channels = 2 * config.in_channels if config.learn_sigma else config.in_channels
    out = torch.empty(channels, frames, *config.size)
    for (t, r, c), x in tokens.items():
        shift, scale = affine(weights, "head.modulation", silu(vector)).chunk(2)
        patch = affine(weights, "head.linear", layer_norm(x) * (1 + scale) + shift).view(p, p, channels)
        out[:, t, r * p : (r + 1) * p, c * p : (c + 1) * p] = patch.permute(2, 0, 1)
    return out


@pytest.mark.parametrize("overrides", [{}, CLASSES, {"learn_sigma": False}], ids=["none", "class", "no-sigma"])
@torch.no_grad()
def test_equals_the_equations(overrides):
    model = latte(**overrides)
    x, t = batch()
    labelled = "condition" in overrides
    out = model(x, t, Condition.of_classes([2, -1], 5) if labelled else None)
    for i, label in enumerate((2, 5) if labelled else (None, None)):
        expected = reference(model, x[i], int(t[i]), label)
        torch.testing.assert_close(out[i], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


# ----------------------------------------------------------------------------------------------------------------------
# Initialisation


@pytest.mark.parametrize("overrides", [{}, CLASSES])
def test_a_fresh_model_predicts_zero(overrides):
    model = Latte(**CONFIG, **overrides)
    x, t = batch()
    condition = Condition.of_classes([0, 1], 5) if overrides else Condition()
    assert torch.equal(model(x, t, condition), torch.zeros(2, 8, 3, 4, 8))


def test_initial_weights():
    model = Latte(**{**CONFIG, "width": 96}, condition="class", num_classes=500)
    weights = model.state_dict()
    assert all(not value.any() for name, value in weights.items() if name.endswith("bias") or "modulation" in name)
    assert not weights["head.linear.weight"].any()
    for name in ("time_embed.mlp.0.weight", "time_embed.mlp.2.weight", "label_embed.table.weight"):
        assert math.isclose(weights[name].std(), 0.02, rel_tol=0.05)
    for name in ("patch_embed.weight", "blocks.3.attention.qkv.weight", "blocks.2.mlp.2.weight"):
        bound = math.sqrt(6 / sum(weights[name].shape))  # Xavier, uniform
        assert 0.97 * bound < weights[name].abs().max() <= bound


# ----------------------------------------------------------------------------------------------------------------------
# Numerics


def test_attention_back_ends_agree():
    model = latte()
    x, t = batch()
    sdpa = model(x, t)
    model.set_attention_backend("math")
    assert {b.attention.backend for b in model.blocks} == {"math"}
    torch.testing.assert_close(model(x, t), sdpa, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="known: sdpa, xformers, math"):
        model.set_attention_backend("flash")


@torch.no_grad()
def test_rows_are_bitwise_independent_of_their_neighbours():
    model = latte(**CLASSES)
    x, t = batch(4)
    others, _ = batch(4, seed=2)
    labels = torch.tensor([0, 1, 2, 3])
    out = model(x, t, Condition(labels))
    keep = torch.tensor([False, True, False, False])
    mixed = torch.where(keep.view(-1, 1, 1, 1, 1), x, others)
    again = model(mixed, torch.where(keep, t, 17), Condition(torch.where(keep, labels, -1)))
    assert torch.equal(again[1], out[1])
    assert not torch.equal(again[0], out[0])


@pytest.mark.parametrize("frame", [0, 2])
def test_every_output_sees_every_frame_and_place(frame):
    x, t = batch(1)
    x.requires_grad_()
    latte()(x, t)[0, 0, frame, 0, 0].backward()
    assert x.grad.abs().amin() > 0


@torch.no_grad()
def test_bf16_stays_close_to_fp32():
    model, streams = latte(), []
    model.blocks[2].register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0].dtype))
    x, t = batch()
    exact = model(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(x, t)
    cast = model.bfloat16()(x, t)
    assert streams == [torch.float32, torch.float32, torch.bfloat16]
    for out in (autocast, cast):
        assert out.dtype == torch.bfloat16
        assert (out.float() - exact).norm() < 0.03 * exact.norm()


def test_norm_and_modulation_round_to_bf16_once():
    x, shift, scale = (torch.randn(3, 2, 4, 5, 16, generator=torch.Generator().manual_seed(0)) + 3).bfloat16()
    out = modulated_norm(x, shift, scale)
    assert torch.equal(out, modulated_norm(x.float(), shift.float(), scale.float()).bfloat16())


def gradients(model: Latte, x: Tensor, t: Tensor) -> tuple[list[Tensor], int]:
    """Gradients of a loss, and how often blocks were entered for them."""
    calls = []
    for module in model.blocks:
        module.register_forward_pre_hook(lambda *_: calls.append(1))
    model(x, t).square().mean().backward()
    return [p.grad for p in model.parameters()], len(calls)


@pytest.mark.parametrize("images", [0, 2])
def test_gradient_checkpointing_gives_equal_gradients(images):
    x, t = joint_batch()
    x = x[:, :, : 3 + images]
    plain, once = gradients(latte(), x, t)
    model = latte()
    model.enable_gradient_checkpointing()
    recomputed, twice = gradients(model, x, t)
    entered = CONFIG["depth"] + (CONFIG["depth"] // 2 if images else 0)
    assert (once, twice) == (entered, 2 * entered)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_norms_and_activations_are_computed_again_and_not_kept(monkeypatch):
    """A block keeps less than half of what it otherwise would, and gradients are the same bit by bit."""
    x, t = batch()
    lean, _ = gradients(latte(), x, t)

    def bytes_of_a_block() -> float:
        wide = {"width": 96, "patch": 1, "size": (8, 8)}
        shallow, deep = (latte(depth=depth, **wide) for depth in (2, 6))
        z = torch.randn(1, 4, 3, 8, 8)
        kept = [cost.forward_cost(lambda model=model: model(z, t[:1])).activation_bytes for model in (shallow, deep)]
        return (kept[1] - kept[0]) / 4

    little = bytes_of_a_block()
    monkeypatch.setattr("dit.latte.recomputed", lambda function, *inputs: function(*inputs))
    plain, _ = gradients(latte(), x, t)
    assert all(torch.equal(a, b) for a, b in zip(plain, lean, strict=True))
    assert little < 0.6 * bytes_of_a_block()  # in fp32; less in bf16, where norms are fp32 beside products in bf16


@pytest.fixture
def graphs():
    """How many graphs were compiled since, as a function."""
    stats = torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    stats.clear()
    return lambda: stats["unique_graphs"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_are_two_kinds_and_have_equal_gradients(graphs):
    x, t = batch()
    plain, _ = gradients(latte(), x, t)
    model = latte()
    model.compile_repeated_blocks()
    for _ in range(3):
        model.zero_grad(set_to_none=True)
        model(x, t).square().mean().backward()
    assert graphs() == 2  # spatial and temporal, however many blocks and steps
    for parameter, expected in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=5e-5 * max(1.0, float(expected.abs().max())))


def test_blocks_are_compiled_as_one_graph_each_for_all_sizes_that_may_come(monkeypatch):
    asked = []
    monkeypatch.setattr(Block, "compile", lambda self, **options: asked.append(options))
    with torch._dynamo.config.patch(recompile_limit=8):  # torch's own
        latte().compile_repeated_blocks(mode="max-autotune")
        assert torch._dynamo.config.recompile_limit >= 256
    assert asked == [{"fullgraph": True, "mode": "max-autotune"}] * CONFIG["depth"]


def test_compiled_blocks_keep_the_attention_switch_and_take_images(graphs):
    x, t = joint_batch()
    model = latte()
    expected = model(x, t)
    model.compile_repeated_blocks(backend="eager")
    for backend in ("sdpa", "math", "sdpa"):
        model.set_attention_backend(backend)
        for _ in range(2):
            torch.testing.assert_close(model(x, t), expected, rtol=1e-4, atol=1e-4)
    assert graphs() == 6  # for each back end: spatial blocks for videos and for images, temporal ones


# ----------------------------------------------------------------------------------------------------------------------
# Joint training with images

IMAGES = {"labels": torch.tensor([2, -1]), "image_labels": torch.tensor([[0, -1], [4, 3]])}


def joint_batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    """Two videos of three frames, two images behind each."""
    x, t = batch(seed=seed)
    images = torch.randn(2, 4, 2, 4, 8, generator=torch.Generator().manual_seed(100 + seed))
    return torch.cat([x, images], dim=2), t


@pytest.mark.parametrize("overrides", [{}, CLASSES], ids=["none", "class"])
@torch.no_grad()
def test_images_equal_the_equations_without_time(overrides):
    model = latte(**overrides)
    x, t = joint_batch()
    out = model(x, t, Condition(**IMAGES) if overrides else None)
    assert out.shape == (2, 8, 5, 4, 8)
    for i in range(2):
        for j in range(2):
            label = int(IMAGES["image_labels"][i, j]) % 6 if overrides else None  # -1 is the last row
            expected = reference(model, x[i, :, 3 + j : 4 + j], int(t[i]), label, still=True)
            atol = 1e-5 * float(expected.abs().max())
            torch.testing.assert_close(out[i, :, 3 + j : 4 + j], expected, rtol=0, atol=atol)


@pytest.mark.parametrize("overrides", [{}, CLASSES], ids=["none", "class"])
@torch.no_grad()
def test_images_change_no_bit_of_the_videos(overrides):
    model = latte(**overrides)
    x, t = joint_batch()
    joint = model(x, t, Condition(**IMAGES) if overrides else None)
    alone = model(x[:, :, :3], t, Condition(IMAGES["labels"]) if overrides else None)
    assert torch.equal(joint[:, :, :3], alone)


@torch.no_grad()
def test_images_are_independent_of_one_another_and_of_the_videos():
    model = latte(**CLASSES)
    x, t = joint_batch()
    others, _ = joint_batch(seed=2)
    out = model(x, t, Condition(**IMAGES))
    others[:, :, 4] = x[:, :, 4]  # all but the second image of each video is another
    labels = torch.tensor([[1, -1], [1, 3]])
    again = model(others, t, Condition(torch.tensor([0, 0]), labels))
    assert torch.equal(again[:, :, 4], out[:, :, 4])
    assert not torch.equal(again[:, :, 3], out[:, :, 3])


def test_modulation_is_computed_once_a_video_and_once_an_image():
    model, rows = latte(), []
    for block in model.blocks:
        block.modulation.register_forward_pre_hook(lambda _, inputs: rows.append(tuple(inputs[0].shape)))
    model(*joint_batch())
    assert rows == [(2, 24)] * 4 + [(4, 24)] * 2  # all blocks for the videos, the spatial ones for the images


def test_images_train_all_but_the_temporal_blocks():
    model = latte(**CLASSES)
    x, t = joint_batch()
    model(x, t, Condition(**IMAGES))[:, :, 3:].square().mean().backward()
    still = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    temporal = {n for n, _ in model.named_parameters() if n.startswith(("blocks.1.", "blocks.3."))}
    assert still - {n for n in still if n.endswith("qkv.bias")} == {n for n in temporal if not n.endswith("qkv.bias")}


def test_input_with_images_that_does_not_fit_is_a_user_error():
    x, t = joint_batch()
    with pytest.raises(UserError, match=r"2 images follow each video: expected image_labels \(2, 2\), got none"):
        latte(**CLASSES)(x, t, Condition(IMAGES["labels"]))
    with pytest.raises(UserError, match=r"0 images follow each video: expected none, got \(2, 2\)"):
        latte(**CLASSES)(x[:, :, :3], t, Condition(**IMAGES))
    with pytest.raises(UserError, match=r"expected image_labels \(2, 2\), got \(1, 2\)"):  # which would broadcast
        latte(**CLASSES)(x, t, Condition(IMAGES["labels"], IMAGES["image_labels"][:1]))
    with pytest.raises(UserError, match="condition='class' but none was given"):
        latte(**CLASSES)(x, t, Condition(None, IMAGES["image_labels"]))
    with pytest.raises(UserError, match="condition='none' but labels were given"):
        latte()(x, t, Condition(None, IMAGES["image_labels"]))


# ----------------------------------------------------------------------------------------------------------------------
# Saving, loading, the meta device


@torch.no_grad()
@pytest.mark.parametrize("low_memory", [True, False])
def test_saved_and_loaded_it_is_the_same(tmp_path, low_memory):
    model = latte(**CLASSES)
    model.save_pretrained(tmp_path)
    again = Latte.from_pretrained(tmp_path, low_cpu_mem_usage=low_memory)
    x, t = batch()
    condition = Condition.of_classes([1, 4], 5)
    assert torch.equal(again(x, t, condition), model(x, t, condition))
    assert not any("table" in name for name in model.state_dict() if "label" not in name)


@torch.no_grad()
def test_pickled_it_is_the_same():
    model, (x, t) = latte(), batch()
    assert torch.equal(pickle.loads(pickle.dumps(model))(x, t), model(x, t))


@torch.no_grad()
def test_loads_in_bf16(tmp_path):
    model = latte()
    model.save_pretrained(tmp_path)
    x, t = batch()
    out = Latte.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)(x, t)
    assert (out.float() - model(x, t)).norm() < 0.03 * model(x, t).norm()


@torch.no_grad()
@pytest.mark.parametrize("assign", [True, False])
def test_built_on_the_meta_device_it_gets_its_tables_with_its_weights(assign):
    model = latte()
    with torch.device("meta"):
        again = Latte(**CONFIG)
    x, t = batch()
    assert again(x.to("meta"), t.to("meta")).shape == (2, 8, 3, 4, 8)
    if not assign:
        again.to_empty(device="cpu")
    again.load_state_dict(model.state_dict(), assign=assign)
    assert torch.equal(again(x, t), model(x, t))


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"depth": 3}, "depth=3: expected an even number"),
        ({"heads": 5}, "width=24: expected a multiple of 4 and of heads=5"),
        ({"size": (4, 7)}, r"size=\(4, 7\): expected multiples of patch=2"),
        ({"condition": "text"}, "condition='text'"),
        ({"condition": "class"}, "needs num_classes"),
        ({"size": 8}, r"size=8: expected latent height and width, e.g. \[32, 32\]"),
        ({"size": [4, 4, 4]}, r"size=\[4, 4, 4\]: expected latent height and width"),
        ({"size": [0, 4]}, r"size=\[0, 4\]: expected latent height and width"),
        ({**CLASSES, "label_dropout": 1.5}, "label_dropout=1.5: expected a share, 0 to 1"),
        ({**CLASSES, "label_dropout": -0.1}, "label_dropout=-0.1: expected a share, 0 to 1"),
        ({"objective": "x0"}, "objective='x0': expected 'noise' or 'flow'"),
        ({"objective": "flow"}, "objective='flow' .*: set learn_sigma=False"),
    ],
)
def test_a_config_that_makes_no_model_is_a_user_error(overrides, message):
    with pytest.raises(UserError, match=message):
        Latte(**{**CONFIG, **overrides})


def test_the_objective_is_kept(tmp_path):
    model = Latte(**CONFIG, objective="flow", learn_sigma=False)
    model.save_pretrained(tmp_path)
    assert Latte.from_pretrained(tmp_path).config.objective == "flow"
    assert Latte(**CONFIG).config.objective == "noise"


def test_input_that_does_not_fit_is_a_user_error():
    x, t = batch()
    with pytest.raises(UserError, match=r"\(B, 4, 3, 4, 8\) but got \(2, 4, 2, 4, 8\)"):
        latte()(x[:, :, :2], t)
    with pytest.raises(UserError, match="condition='none' but labels were given"):
        latte()(x, t, Condition.of_classes([0, 1], 5))
    with pytest.raises(UserError, match="condition='class' but none was given"):
        latte(**CLASSES)(x, t)
    for labels in ([1], [0, 1, 2]):  # one would broadcast
        with pytest.raises(UserError, match=rf"labels of shape \({len(labels)},\): expected one a video, \(2,\)"):
            latte(**CLASSES)(x, t, Condition.of_classes(labels, 5))
    with pytest.raises(UserError, match=r"timestep of shape \(1,\): expected one a video, \(2,\)"):
        latte()(x, t[:1])
    with pytest.raises(UserError, match="label -1: this model has no null class"):
        latte(**CLASSES, label_dropout=0.0)(x, t, Condition.of_classes([0, -1], 5))
