"""How the official releases name, shape and size their weights: one table a layout, read by vae/checkpoints.py.

A table is pieces of our names and what they are called there. Sizes, and so the options of the model, come from the
shapes in the file.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vae.base import VideoVAE
from vae.blocks import norm_groups

State = Mapping[str, Tensor]
Options = dict[str, Any]
Rows = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Layout:
    """How one release names and shapes the weights of a family."""

    family: str
    """Its name in the registry."""
    model: str
    """Our class, or the one of diffusers inside it."""
    title: str
    signs: tuple[str, ...]
    """Keys that tell it from the layouts after it, all there."""
    options: Callable[[State, Options], Options]
    """(weights, their config.json or {}) -> the arguments of the model."""
    rows: Callable[[Options], Rows]
    """(ours, theirs), pieces of names, replaced one after the other. Several of ours with one name are stacked in it;
    braces name the parts that one of ours is stacked from: "conv_{2d,3d}"."""
    ranks: Callable[[Options], dict[str, int]] = lambda options: {}
    """Pattern of their names -> dimensions of the weights there; the first that matches, none means as many as ours."""
    wrapped: bool = False
    """Whether each 3D convolution is the attribute `conv` of a wrapper."""
    buffers: Callable[[VideoVAE], dict[str, Tensor]] = lambda model: {}
    """Tensors that are options here."""


# ---------------------------------------------------------------------------------------------------------------------
# Names: ours, theirs


def _skeleton(options: Options) -> Rows:
    """vae/skeleton.py in the names of latent diffusion's first stage, which most video VAEs kept."""
    for i in range(4):
        yield f"encoder.levels.{i}.", f"encoder.down.{i}.block."
        yield f"decoder.levels.{i}.", f"decoder.up.{3 - i}.block."
        yield f"encoder.downs.{i}.time.conv.", f"encoder.down.{i}.time_downsample."
        yield f"encoder.downs.{i}.time.", f"encoder.down.{i}.time_downsample."
        yield f"decoder.ups.{i}.time.", f"decoder.up.{3 - i}.time_upsample."
        for part in ("space.", "branches.0.", ""):
            yield f"encoder.downs.{i}.{part}", f"encoder.down.{i}.downsample.conv."
            yield f"decoder.ups.{i}.{part}conv.", f"decoder.up.{3 - i}.upsample.conv."
    yield from (("mid.block", "mid.block_"), ("mid.attention.", "mid.attn_1."), (".shortcut.", ".nin_shortcut."))
    yield from ((".to_q.", ".q."), (".to_k.", ".k."), (".to_v.", ".v."), (".to_out.", ".proj_out."))
    yield from ((".time_q.", ".q_t."), (".time_k.", ".k_t."), (".time_v.", ".v_t."), (".time_out.", ".proj_out_t."))
    yield from ((".time_norm.", ".norm_t."), ("decoder.post_quant_conv.", "post_quant_conv."))


def _ivvae(options: Options) -> Rows:
    """Levels and the steps between them are one list; level 3, the decoder's first, has an attention to each block."""
    n = options["blocks"]
    for i in range(4):
        up = 2 * (n + 1) + i * (n + 2)  # where the step after the decoder's i-th level is
        for j in range(2 * n + 2):
            yield f"encoder.levels.{i}.{j}.", f"encoder.downsamples.{i * (n + 1) + j}."
            yield f"decoder.levels.{i}.{j}.", f"decoder.upsamples.{j if i == 0 else up - n - 1 + j}."
        yield f"encoder.downs.{i}.", f"encoder.downsamples.{i * (n + 1) + n}."
        yield f"decoder.ups.{i}.", f"decoder.upsamples.{up}."
    yield from (("mid.block1.", "middle.0."), ("mid.attention.", "middle.1."), ("mid.block2.", "middle.2."))
    yield from (("norm1.weight", "residual.0.gamma"), ("norm2.weight", "residual.3.gamma"))
    yield from (("norm_out.weight", "head.0.gamma"), ("norm.weight", "norm.gamma"))
    for ours, theirs in (("conv1", "residual.2"), ("conv2", "residual.6"), ("shortcut", "shortcut")):
        yield from ((f".{ours}.{leaf}", f".{theirs}.conv.{leaf}") for leaf in ("weight", "bias"))  # of both halves
        yield f".{ours}.", f".{theirs}."
    yield from ((f"conv_out.branches.{i}.", f"head.2.PAC_{d}.conv.") for i, d in enumerate((0, 1, 3, 6, 9, 12)))
    yield from (("conv_out.mix.", "head.2.PAC_conv.conv."), ("conv_out.", "head.2."))
    yield from (("encoder.conv_in.", "encoder.conv1."), ("decoder.conv_in.", "decoder.conv1.conv."))
    yield from ((".merge.", ".time_conv."), (".split.", ".time_conv."), (".to_out.", ".proj."))
    yield from ((f".to_{x}.", ".to_qkv.") for x in "qkv")
    for half, name in (("keyframe", "2d"), ("motion", "3d")):
        yield f".space.{half}.", f".resample_{name}.1."
        yield from ((f".{half}.{part}.", f".Attention_{name}.{part}.") for part in ("norm", "to_qkv", "proj"))
        yield f".{half}.", f".conv_{name}."
    yield from (("post_quant_conv.", "conv2.conv_{2d,3d}."), ("quant_conv.", "conv1.conv_{2d,3d}."))


def _osvae(options: Options) -> Rows:
    """The image VAE in diffusers' names, as here; the temporal one in its own."""
    yield from (("encoder.", "temporal_vae.encoder."), ("decoder.", "temporal_vae.decoder."))
    yield from (("spatial.temporal_vae.", "spatial."), ("spatial.", "spatial_vae.module."))
    for i in range(4):
        yield f"temporal_vae.encoder.levels.{i}.", f"temporal_vae.encoder.block_res_blocks.{i}."
        yield f"temporal_vae.decoder.levels.{i}.", f"temporal_vae.decoder.block_res_blocks.{3 - i}."
        yield f"temporal_vae.encoder.downs.{i}.", f"temporal_vae.encoder.conv_blocks.{i}."
        yield f"temporal_vae.decoder.ups.{i}.conv.", f"temporal_vae.decoder.conv_blocks.{2 - i}."
    yield from (("coder.mid.", "coder.res_blocks."), ("coder.norm_out.", "coder.norm1."), (".shortcut.", ".conv3."))
    yield from (
        ("_vae.encoder.quant_conv.", "_vae.quant_conv."),
        ("_vae.decoder.post_quant_conv.", "_vae.post_quant_conv."),
    )
    yield from (("_vae.encoder.conv_out.", "_vae.encoder.conv2."), ("_vae.decoder.conv_in.", "_vae.decoder.conv1."))


def _autoencoder_kl(options: Options) -> Rows:
    yield "inner.", ""


def _old_autoencoder_kl(options: Options) -> Rows:
    """As diffusers wrote them at first (sd-vae-ft-mse)."""
    yield from (
        ("inner.", ""),
        ("to_q.", "query."),
        ("to_k.", "key."),
        ("to_v.", "value."),
        ("to_out.0.", "proj_attn."),
    )


def _stable_diffusion(options: Options) -> Rows:
    levels = len(options["arguments"]["block_out_channels"])
    yield "inner.", ""
    for i in range(levels):
        for coder, j, step in (("encoder.down", i, "downsample"), ("decoder.up", levels - 1 - i, "upsample")):
            yield f"{coder}_blocks.{i}.resnets.", f"{coder}.{j}.block."
            yield f"{coder}_blocks.{i}.{step}rs.0.", f"{coder}.{j}.{step}."
    yield from (("mid_block.resnets.0.", "mid.block_1."), ("mid_block.resnets.1.", "mid.block_2."))
    yield from (("mid_block.attentions.0.group_norm.", "mid.attn_1.norm."), ("mid_block.attentions.0.", "mid.attn_1."))
    yield from ((".to_q.", ".q."), (".to_k.", ".k."), (".to_v.", ".v."), (".to_out.0.", ".proj_out."))
    yield from ((".conv_norm_out.", ".norm_out."), (".conv_shortcut.", ".nin_shortcut."))


# ---------------------------------------------------------------------------------------------------------------------
# Options, from shapes


def _sizes(state: State, pattern: str) -> list[int]:
    """First dimensions of the tensors that `pattern` names for {} = 0, 1, 2, ..."""
    sizes: list[int] = []
    while pattern.format(len(sizes)) in state:
        sizes.append(state[pattern.format(len(sizes))].shape[0])
    return sizes


def _levels(state: State, block: str = "encoder.down.{}.block.{}") -> Options:
    """width, mult and blocks; `block` is the name of block {} of level {}."""
    widths = _sizes(state, block.format("{}", 0) + ".norm2.weight")
    blocks = len(_sizes(state, block.format(0, "{}") + ".norm2.weight"))
    return {"width": widths[0], "mult": tuple(w // widths[0] for w in widths), "blocks": blocks}


def _of_odvae(state: State, config: Options) -> Options:
    if "encoder.conv_in.weight" in state:
        variant = 3 if "decoder.up.0.block.0.conv1.weight" in state else 4
    else:
        variant = 2 if state["encoder.mid.block_1.conv2.conv.weight"].shape[2] == 1 else 1
    legacy = {"attn_reshape": "legacy"} if config.get("encoder_attention") == "AttnBlock3D" else {}
    return {"z": state["decoder.conv_in.conv.weight"].shape[1], "variant": variant, **_levels(state), **legacy}


def _of_ospvae(state: State, config: Options) -> Options:
    release = "1.1" if "encoder.down.1.time_downsample.mix_factor" in state else "1.0"
    return {"z": state["decoder.conv_in.conv.weight"].shape[1], "release": release, **_levels(state)}


def _of_cvvae(state: State, config: Options) -> Options:
    z, half_3d = state["decoder.conv_in.weight"].shape[1], state["encoder.mid.block_1.conv2.weight"].ndim == 4
    scale = {"latent_std": (1 / config["scaling_factor"],) * z} if "scaling_factor" in config else {}
    return {"z": z, "half_3d": half_3d, **_levels(state), **scale}


def _of_ivvae(state: State, config: Options) -> Options:
    name = "encoder.downsamples.{}"
    blocks = len(_sizes(state, f"{name}.residual.0.gamma"))  # up to the first downsampling
    dim = state["encoder.conv1.conv_2d.weight"].shape[0]
    firsts = [i * (blocks + 1) + (i == 3) for i in range(4)]  # an attention precedes the blocks of level 3
    mult = tuple(state[f"{name.format(i)}.residual.3.gamma"].shape[0] // (2 * dim) for i in firsts)
    return {"z": state["conv2.conv_2d.weight"].shape[1], "dim": dim, "mult": mult, "blocks": blocks}


def _of_osvae(state: State, config: Options) -> Options:
    statistics = {"latent_mean": state.get("shift"), "latent_std": state.get("scale")}
    return {
        "z": state["temporal_vae.decoder.conv1.conv.weight"].shape[1],
        "filters": state["temporal_vae.encoder.conv_in.conv.weight"].shape[0],
        "temporal_blocks": len(_sizes(state, "temporal_vae.encoder.res_blocks.{}.norm1.weight")),
        **_levels(state, "spatial_vae.module.encoder.down_blocks.{}.resnets.{}"),
        **{key: tuple(round(float(x), 6) for x in t.flatten()) for key, t in statistics.items() if t is not None},
    }


def _of_sdvae(state: State, config: Options) -> Options:
    old = "encoder.down.0.block.0.norm2.weight" in state
    levels = _levels(state, "encoder.down.{}.block.{}" if old else "encoder.down_blocks.{}.resnets.{}")
    widths = [levels["width"] * m for m in levels["mult"]]
    arguments = {
        "block_out_channels": widths,
        "layers_per_block": levels["blocks"],
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
        "norm_num_groups": config.get("norm_num_groups", norm_groups(widths[0])),
        "use_quant_conv": "quant_conv.weight" in state,
        "use_post_quant_conv": "post_quant_conv.weight" in state,
        **{key: config[key] for key in ("scaling_factor", "shift_factor", "act_fn") if key in config},
    }
    return {"kind": "AutoencoderKL", "arguments": arguments}


# ---------------------------------------------------------------------------------------------------------------------
# The layouts

_OUTER = r"encoder\.(conv_in|down\.[01]\.block)"  # 2D where a release has 2D blocks in its encoder
_FIRST = r"encoder\.down\.0\.downsample"
_OD_2D = {1: _FIRST, 2: _FIRST, 3: rf"{_OUTER}|{_FIRST}|decoder\.up\.[01]\.block", 4: rf"{_OUTER}|{_FIRST}"}
_OSP_2D = {"1.0": "(?!)", "1.1": rf"{_OUTER}|encoder\.down\.\d\.downsample"}
_ATTENTION = r"mid\.attn_1\.(q|k|v|proj_out)\."


def _osvae_buffers(model: VideoVAE) -> dict[str, Tensor]:
    pairs = (("scale", model.spec.latent_std), ("shift", model.spec.latent_mean))
    return {name: torch.tensor(values, device="cpu").view(1, -1, 1, 1, 1) for name, values in pairs}


LAYOUTS = (
    Layout(
        family="odvae",
        model="ODVAE",
        title="Open-Sora-Plan v1.2, variant {variant}",
        signs=("encoder.down.0.downsample.conv.weight", "encoder.down.1.downsample.conv.conv.weight"),
        options=_of_odvae,
        rows=_skeleton,
        ranks=lambda options: {_OD_2D[options["variant"]]: 4},
        wrapped=True,
    ),
    Layout(
        family="ospvae",
        model="OSPVAE",
        title="Open-Sora-Plan v{release}",
        signs=("quant_conv.conv.weight", "decoder.up.3.upsample.conv.conv.weight"),
        options=_of_ospvae,
        rows=_skeleton,
        ranks=lambda options: {_OSP_2D[str(options["release"])]: 4},
        wrapped=True,
    ),
    Layout(
        family="cvvae",
        model="CVVAE",
        title="CV-VAE",
        signs=("decoder.mid.attn_1.q_t.weight",),
        options=_of_cvvae,
        rows=_skeleton,
        ranks=lambda options: {_ATTENTION + (r"|\.conv2\." if options["half_3d"] else ""): 4},
    ),
    Layout(
        family="ivvae",
        model="IVVAE",
        title="IV-VAE z{z} dim{dim}",
        signs=("encoder.conv1.conv_2d.weight",),
        options=_of_ivvae,
        rows=_ivvae,
        ranks=lambda options: {r"Attention.*gamma": 3, "gamma": 4, "conv_3d|time_conv": 5, "": 4},
    ),
    Layout(
        family="osvae",
        model="OSVAE",
        title="Open-Sora v1.2",
        signs=("temporal_vae.encoder.conv_in.conv.weight",),
        options=_of_osvae,
        rows=_osvae,
        wrapped=True,
        buffers=_osvae_buffers,
    ),
    Layout(
        family="sdvae",
        model="AutoencoderKL",
        title="Stable Diffusion",
        signs=(
            "encoder.down.0.block.0.conv1.weight",
            "decoder.up.0.block.0.conv1.weight",
            "encoder.mid.attn_1.q.weight",
        ),
        options=_of_sdvae,
        rows=_stable_diffusion,
        ranks=lambda options: {_ATTENTION: 4},
    ),
    Layout(
        family="sdvae",
        model="AutoencoderKL",
        title="diffusers' AutoencoderKL",
        signs=("encoder.down_blocks.0.resnets.0.conv1.weight", "encoder.mid_block.attentions.0.to_q.weight"),
        options=_of_sdvae,
        rows=_autoencoder_kl,
    ),
    Layout(
        family="sdvae",
        model="AutoencoderKL",
        title="diffusers' AutoencoderKL, old names",
        signs=("encoder.down_blocks.0.resnets.0.conv1.weight", "encoder.mid_block.attentions.0.query.weight"),
        options=_of_sdvae,
        rows=_old_autoencoder_kl,
    ),
)
