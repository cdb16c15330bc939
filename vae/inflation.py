"""A video VAE from an image VAE: 2D kernels become 3D ones, so that training starts from what images have taught.

What the first step then gives (tests/vae/test_inflation.py pins each line):

- OD-VAE and UniVAE with one temporal kernel, upsampling `nearest`: an image goes through as through the image VAE, in
  every mode but "random", since a causal convolution sees one frame as often as it has taps. With `norm="frame"` and
  "tail" the latents of a video are those of its frames 0, 4, 8, ...
- IV-VAE's group causal convolutions and centred ones see zeros after the last frame: there only "center" is exact.
- CV-VAE's norms have an eps of 1e-5 where those of image VAEs have 1e-6: latents differ by some 1e-5 of their size.
- Not exact in any mode: trilinear upsampling (the image VAE repeats pixels), more than one temporal kernel (a block of
  the dense kernel a group of channels, the rest of it is lost), the attention over time of CV-VAE's decoder (its
  LayerNorm cannot be the identity).
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from lvdm.errors import UserError, nearest
from vae.base import VideoVAE
from vae.cvvae import CVVAE, ChannelUpsample
from vae.odvae import ODVAE
from vae.univae import UniVAE

MODES = ("tail", "center", "average", "random")

_BLOCK = "(norm1|conv1|norm2|conv2)"
_NAMES = [  # a module of vae/skeleton.py -> its twin in diffusers' AutoencoderKL
    (r"quant_conv", "quant_conv"),
    (r"decoder\.post_quant_conv", "post_quant_conv"),
    (r"(encoder|decoder)\.(conv_in|conv_out)", r"\1.\2"),
    (r"(encoder|decoder)\.norm_out", r"\1.conv_norm_out"),
    (rf"encoder\.levels\.(\d)\.(\d)\.{_BLOCK}", r"encoder.down_blocks.\1.resnets.\2.\3"),
    (rf"decoder\.levels\.(\d)\.(\d)\.{_BLOCK}", r"decoder.up_blocks.\1.resnets.\2.\3"),
    (r"encoder\.levels\.(\d)\.(\d)\.shortcut", r"encoder.down_blocks.\1.resnets.\2.conv_shortcut"),
    (r"decoder\.levels\.(\d)\.(\d)\.shortcut", r"decoder.up_blocks.\1.resnets.\2.conv_shortcut"),
    (r"encoder\.downs\.(\d)(\.branches\.\d)?", r"encoder.down_blocks.\1.downsamplers.0.conv"),
    (r"decoder\.ups\.(\d)\.conv", r"decoder.up_blocks.\1.upsamplers.0.conv"),
    (rf"(encoder|decoder)\.mid\.block1\.{_BLOCK}", r"\1.mid_block.resnets.0.\2"),
    (rf"(encoder|decoder)\.mid\.block2\.{_BLOCK}", r"\1.mid_block.resnets.1.\2"),
    (r"(encoder|decoder)\.mid\.attention\.norm", r"\1.mid_block.attentions.0.group_norm"),
    (r"(encoder|decoder)\.mid\.attention\.(to_[qkv])", r"\1.mid_block.attentions.0.\2"),
    (r"(encoder|decoder)\.mid\.attention\.to_out", r"\1.mid_block.attentions.0.to_out.0"),
]


@torch.no_grad()
def inflate(model: VideoVAE, image: Mapping[str, Tensor], mode: str = "tail") -> VideoVAE:
    """Gives `model` (odvae, univae or cvvae), in place, the weights of an image VAE; returns it.

    `image` is the state dict of a diffusers AutoencoderKL of the same width, multipliers, blocks and channels. A 2D
    kernel K becomes a temporal one of k taps: "tail" puts it at the last tap (OD-VAE eq. 3), "center" at the middle
    one, "average" K / k everywhere; "random" keeps the fresh temporal kernels. Where a convolution makes two frames of
    one, both repeat (IV-VAE supplement 2.2, W_up). UserError for other models, missing or left-over keys and sizes
    that differ; the model is then as it was.
    """
    if mode not in MODES:
        raise UserError(f"mode={mode!r}: expected one of {', '.join(MODES)}{nearest(mode, MODES)}")
    if not isinstance(model, ODVAE | UniVAE | CVVAE):
        raise UserError(f"{model.title} cannot start from an image VAE; odvae, univae and cvvae can")
    image = image if hasattr(model, "quant_conv") else _without_quant_convs(image)
    weights, used = {}, set()
    for name, old in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        twin = _twin(re.sub(r"^refiner\.", "decoder.", module))
        if twin is None:
            continue
        if f"{twin}.{leaf}" not in image:
            raise UserError(f"image VAE: no {twin}.{leaf}: expected the layout of diffusers' AutoencoderKL, all of it")
        used.add(f"{twin}.{leaf}")
        source = _part(model, module, image[f"{twin}.{leaf}"])
        weights[name] = _inflated(source, old, mode) if old.ndim > 1 else source
        if weights[name].shape != old.shape:
            raise UserError(
                f"image VAE: {name} would be {tuple(weights[name].shape)}, the video VAE has {tuple(old.shape)}: both"
                " need the same width, mult, blocks and z"
            )
    left = sorted(set(image) - used)
    if left:
        raise UserError(f"image VAE: {len(left)} keys have no place in this {model.title}, e.g. {left[:3]}")
    weights |= _identities(model)
    model.load_state_dict(weights, strict=False)
    return model


def _twin(module: str) -> str | None:
    """The module of AutoencoderKL that a module inherits from; None for those that images know nothing of."""
    for ours, theirs in _NAMES:
        match = re.fullmatch(ours, module)
        if match:
            return match.expand(theirs)
    return None


def _part(model: VideoVAE, module: str, source: Tensor) -> Tensor:
    """What a module inherits of an image VAE's weight or bias: all, the diagonal block of its branch, or all twice."""
    if source.ndim == 2:  # attention's linear layers
        source = source[..., None, None]
    branch = re.fullmatch(r"(.*)\.branches\.(\d)", module)
    if branch:  # a group of channels sees itself only
        parts, i = len(model.get_submodule(branch[1]).branches), int(branch[2])
        block = source.chunk(parts, 0)[i]
        return block if block.ndim == 1 else block.chunk(parts, 1)[i]
    up = model.get_submodule(module.rpartition(".")[0])
    return torch.cat([source] * up.time) if isinstance(up, ChannelUpsample) else source


def _inflated(kernel: Tensor, old: Tensor, mode: str) -> Tensor:
    """(O, I, h, w) -> (O, I, t, h, w)."""
    taps = old.shape[2]
    if taps > 1 and mode == "random":
        return old
    if mode == "average":
        return kernel[:, :, None].expand(-1, -1, taps, -1, -1) / taps
    value = kernel.new_zeros(*kernel.shape[:2], taps, *kernel.shape[2:])
    value[:, :, taps // 2 if mode == "center" else -1] = kernel
    return value


def _without_quant_convs(image: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The 1x1 convolutions around the latents multiplied into their neighbours, for models that have none.

    Exact but for a `post_quant_conv` bias at the border, where the next convolution pads with zeros.
    """
    image = dict(image)
    try:
        quant, shift = image.pop("quant_conv.weight")[:, :, 0, 0], image.pop("quant_conv.bias")
        image["encoder.conv_out.weight"] = torch.einsum("om,mihw->oihw", quant, image["encoder.conv_out.weight"])
        image["encoder.conv_out.bias"] = quant @ image["encoder.conv_out.bias"] + shift
        post, shift = image.pop("post_quant_conv.weight")[:, :, 0, 0], image.pop("post_quant_conv.bias")
        kernel = image["decoder.conv_in.weight"]
        image["decoder.conv_in.weight"] = torch.einsum("omhw,mi->oihw", kernel, post)
        image["decoder.conv_in.bias"] = image["decoder.conv_in.bias"] + torch.einsum("omhw,m->o", kernel, shift)
    except KeyError as error:
        raise UserError(f"image VAE: no {error.args[0]}: expected the layout of diffusers' AutoencoderKL") from None
    return image


def _identities(model: VideoVAE) -> dict[str, Tensor]:
    """Layers over time that images know nothing of and that can start by letting features through."""
    found = {}
    for name, old in model.state_dict().items():
        if re.search(r"\.time_(v|out)\.weight$", name):
            found[name] = torch.eye(len(old)).to(old)
        elif re.search(r"\.time_(v|out)\.bias$", name):
            found[name] = torch.zeros_like(old)
    return found
