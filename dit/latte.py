"""Latte, the video diffusion transformer (Ma et al. 2024, "Latte: Latent Diffusion Transformer for Video Generation").

Variant 1: a spatial block looks across the places of each frame, the next, temporal block across the frames at each
place, and so on. Tokens stay (B, T, N, D) throughout, N = places a frame, D = width. The named sizes are in
dit/__init__.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from dit.attention import attention, check_backend
from dit.conditioning import Condition, LabelEmbedding
from dit.embeddings import TimestepEmbedding, grid_table, position_table
from lvdm.errors import UserError
from lvdm.recompute import recomputed

# ----------------------------------------------------------------------------------------------------------------------
# Blocks


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without affine, then x * (1 + scale) + shift, all in fp32; shift and scale broadcast over T and N."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)
    return (normed * (1 + scale.float()) + shift.float()).to(x.dtype)


def modulated_linear(linear: nn.Linear, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`linear` of the modulated norm of x."""
    return linear(modulated_norm(x, shift, scale))


class SelfAttention(nn.Module):
    """Attention in (B, T, N, D): over the N places of each frame ("space") or the T frames of each place ("time"), of
    x after its modulated norm."""

    def __init__(self, width: int, heads: int, axis: str):
        super().__init__()
        self.heads, self.axis, self.backend = heads, axis, "sdpa"
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        b, t, n, d = x.shape
        qkv = recomputed(modulated_linear, self.qkv, x, shift, scale)
        # Features are ordered (head, q|k|v, head_dim), so that both foldings are views of one projection: over space
        # the frames join the batch, over time the places join the heads.
        batch, tokens, heads = (b * t, n, self.heads) if self.axis == "space" else (b, t, n * self.heads)
        q, k, v = qkv.view(batch, tokens, heads, 3, d // self.heads).transpose(1, 2).unbind(3)
        return self.out(attention(q, k, v, self.backend).transpose(1, 2).reshape(b, t, n, d))


class Block(nn.Module):
    """A DiT block with adaLN-zero (Peebles & Xie 2023): attention along one axis and an MLP, both modulated and gated.

    `condition` (B, D) is one vector a sample, after its SiLU; its modulation is computed once and broadcast.
    """

    def __init__(self, width: int, heads: int, axis: str):
        super().__init__()
        self.modulation = nn.Linear(width, 6 * width)
        self.attention = SelfAttention(width, heads, axis)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        modulation = self.modulation(condition)[:, None, None]
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        x = x + gate_attn * self.attention(x, shift_attn, scale_attn)
        hidden = recomputed(modulated_linear, self.mlp[0], x, shift_mlp, scale_mlp)
        return x + gate_mlp * recomputed(self._contract, hidden)

    def _contract(self, hidden: Tensor) -> Tensor:
        """The second half of the MLP."""
        return self.mlp[2](self.mlp[1](hidden))


class Head(nn.Module):
    """The last modulated norm and the projection of each token to its patch."""

    def __init__(self, width: int, features: int):
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, features)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(condition)[:, None, None].chunk(2, dim=-1)
        return self.linear(modulated_norm(x, shift, scale))


# ----------------------------------------------------------------------------------------------------------------------
# Model


class Latte(ModelMixin, ConfigMixin):
    """Noisy latents (B, C, T, H, W) to predicted noise or flow, with `learn_sigma` also the variance: (B, 2C, T, H, W).

    Config:
        in_channels: latent channels C.
        frames: latent frames T.
        size: latent height and width (H, W), both multiples of `patch`.
        patch: side of the square patch that makes a token.
        depth: number of blocks, even: spatial, temporal, spatial, ...
        width: features a token, a multiple of 4 and of `heads`.
        heads: attention heads.
        condition: "none", or "class" with `num_classes` labels.
        label_dropout: rate at which training replaces labels by the null class; 0 leaves no null class.
        learn_sigma: whether the variance is predicted too.
        objective: what the output means, for samplers: "noise", or the velocity of a "flow" (then without variance).
        latents: what it was trained on, carried for samplers and not used here: the VAE's hash, the latents' mean and
            std, frames, fps and class names (see `lvdm.latents.LatentSpace`).

    Raises UserError for a config that makes no model.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (the names diffusers looks for)
    _repeated_blocks = ["Block"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        frames: int = 16,
        size: tuple[int, int] = (32, 32),
        patch: int = 2,
        depth: int = 28,
        width: int = 1152,
        heads: int = 16,
        condition: str = "none",
        num_classes: int = 0,
        label_dropout: float = 0.1,
        learn_sigma: bool = True,
        objective: str = "noise",
        latents: dict | None = None,
    ):
        super().__init__()
        _check(self.config)
        out_channels = 2 * in_channels if learn_sigma else in_channels
        # A convolution whose stride is its kernel is one product a patch.
        self.patch_embed = nn.Linear(in_channels * patch**2, width)
        self.time_embed = TimestepEmbedding(width)
        self.label_embed = LabelEmbedding(num_classes, label_dropout, width) if condition == "class" else None
        self.blocks = nn.ModuleList(Block(width, heads, ("space", "time")[i % 2]) for i in range(depth))
        self.head = Head(width, out_channels * patch**2)
        self.gradient_checkpointing = False
        self._set_tables()
        self.register_load_state_dict_post_hook(_tables_follow_weights)
        self._init_weights()

    def forward(self, x: Tensor, timestep: Tensor, condition: Condition | None = None) -> Tensor:
        """The model's prediction for the latents `x` (B, C, T, H, W) at `timestep` (B,), int or float in 0..999.

        `condition` holds B labels for a class-conditional model; None is the same as `Condition()`.
        Joint training with images appends I of them, frames of other videos, to those of `x`, which is then
        (B, C, T + I, H, W) like the result: temporal blocks do not see them, and each has its own label.
        Raises UserError when the shape or the kind of condition is not the config's.
        """
        condition, frames = condition or Condition(), self.config.frames
        images = self._check_input(x, timestep, condition)
        out = self._denoise(x[:, :, :frames], self._embed(timestep, condition.labels), [*self.blocks])
        if images:
            # To a spatial block a frame is a sequence of its own, so an image is a video of one frame.
            stills = rearrange(x[:, :, frames:], "b c i h w -> (b i) c 1 h w")
            labels = None if condition.image_labels is None else condition.image_labels.flatten()
            vector = self._embed(timestep.repeat_interleave(images), labels)
            stills = self._denoise(stills, vector, [*self.blocks][::2])
            out = torch.cat([out, rearrange(stills, "(b i) c 1 h w -> b c i h w", i=images)], dim=2)
        return out

    def set_attention_backend(self, backend: str) -> None:
        """Which kernel of dit/attention.py all blocks use, "sdpa" at first; it is not part of config or checkpoint."""
        for block in self.blocks:
            block.attention.backend = check_backend(backend)

    def compile_repeated_blocks(self, **options: Any) -> None:
        """Compiles the blocks, in place, each as one graph. `options` are those of torch.compile."""
        # Batches of several sizes, images and previews are more graphs than torch's own limit allows
        torch._dynamo.config.recompile_limit = max(256, torch._dynamo.config.recompile_limit)
        super().compile_repeated_blocks(**{"fullgraph": True, **options})

    def _check_input(self, x: Tensor, timestep: Tensor, condition: Condition) -> int:
        """The number of images that follow the frames of each video; raises UserError for input that does not fit."""
        c = self.config
        if x.ndim != 5 or (x.shape[1], *x.shape[3:]) != (c.in_channels, *c.size) or x.shape[2] < c.frames:
            raise UserError(
                f"Latte was built for latents (B, {c.in_channels}, {c.frames}, {c.size[0]}, {c.size[1]}) but got "
                f"{tuple(x.shape)}: build it with in_channels, frames and size to fit"
            )
        images, labels, image_labels = x.shape[2] - c.frames, condition.labels, condition.image_labels
        if c.condition == "none" and not (labels is None and image_labels is None):
            raise UserError("this Latte has condition='none' but labels were given")
        if c.condition == "class" and labels is None:
            raise UserError("this Latte has condition='class' but none was given")
        for name, given in (("timestep", timestep), ("labels", labels)):
            if given is not None and given.shape != x.shape[:1]:
                raise UserError(f"{name} of shape {tuple(given.shape)}: expected one a video, ({len(x)},)")
        found = None if image_labels is None else tuple(image_labels.shape)
        if c.condition == "class" and found != ((len(x), images) if images else None):
            wanted = f"image_labels {(len(x), images)}" if images else "none"
            raise UserError(f"{images} images follow each video: expected {wanted}, got {found or 'none'}")
        return images

    def _denoise(self, x: Tensor, vector: Tensor, blocks: list[Block]) -> Tensor:
        """The prediction for latents `x` (B, C, t, H, W) under conditions `vector` (B, D), by these of our blocks."""
        rows, patch, dtype = self.config.size[0] // self.config.patch, self.config.patch, self.patch_embed.weight.dtype
        x = rearrange(x, "b c t (h p) (w q) -> b t (h w) (c p q)", p=patch, q=patch)
        # Under autocast this leaves the residual stream in fp32; in a bf16 module it is bf16.
        x = self.patch_embed(x.to(dtype)) + self.space_table.to(dtype)
        for block in blocks:
            if block is self.blocks[1]:  # once, before the first temporal block
                x = x + self.time_table.to(dtype)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, vector)
            else:
                x = block(x, vector)
        return rearrange(self.head(x, vector), "b t (h w) (p q c) -> b c t (h p) (w q)", h=rows, p=patch, q=patch)

    def _embed(self, timestep: Tensor, labels: Tensor | None) -> Tensor:
        """The vector (B, D) of timestep and label, after the SiLU that all modulations share."""
        vector = self.time_embed(timestep)
        return F.silu(vector if labels is None else vector + self.label_embed(labels))

    def _set_tables(self, device: torch.device | None = None) -> None:
        """Fixed position tables (N, D) and (T, 1, D), on the default device at first.

        Not on that of the weights: `from_pretrained` builds those, and those alone, on the meta device.
        """
        config = self.config
        rows, columns = config.size[0] // config.patch, config.size[1] // config.patch
        space = grid_table(rows, columns, config.width).to(device, torch.float32)
        time = position_table(torch.arange(config.frames), config.width)[:, None].to(device, torch.float32)
        self.register_buffer("space_table", space, persistent=False)
        self.register_buffer("time_table", time, persistent=False)

    def _init_weights(self) -> None:
        """DiT's initialisation: with the modulations and the last layer at zero, a fresh model predicts zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.time_embed.mlp[0].weight, std=0.02)
        nn.init.normal_(self.time_embed.mlp[2].weight, std=0.02)
        if self.label_embed is not None:
            nn.init.normal_(self.label_embed.table.weight, std=0.02)
        for module in (*self.blocks, self.head):
            nn.init.zeros_(module.modulation.weight)
        nn.init.zeros_(self.head.linear.weight)


def _tables_follow_weights(model: Latte, _: Any) -> None:
    """Tables are not in the checkpoint: a model built on the meta device gets them when it gets its weights."""
    model._set_tables(model.patch_embed.weight.device)


def _check(config: Any) -> None:
    """Raises UserError, naming the key, for a config that makes no Latte."""
    for key in ("in_channels", "frames", "patch", "depth", "width", "heads"):
        if not isinstance(config[key], int) or config[key] < 1:
            raise UserError(f"{key}={config[key]!r}: expected a whole number of at least 1")
    size = config.size if isinstance(config.size, list | tuple) else ()
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise UserError(f"size={config.size!r}: expected latent height and width, e.g. [32, 32]")
    height, width = size
    if config.depth < 2 or config.depth % 2:
        raise UserError(f"depth={config.depth}: expected an even number, spatial and temporal blocks come in pairs")
    if config.width % config.heads or config.width % 4:
        raise UserError(f"width={config.width}: expected a multiple of 4 and of heads={config.heads}")
    if height % config.patch or width % config.patch:
        raise UserError(f"size=({height}, {width}): expected multiples of patch={config.patch}")
    if config.condition not in ("none", "class"):
        raise UserError(f"condition={config.condition!r}: expected 'none' or 'class'")
    if config.condition == "class" and config.num_classes < 1:
        raise UserError("condition='class' needs num_classes: the number of labels in the data")
    if not 0 <= config.label_dropout <= 1:
        raise UserError(f"label_dropout={config.label_dropout}: expected a share, 0 to 1")
    if config.objective not in ("noise", "flow"):
        raise UserError(f"objective={config.objective!r}: expected 'noise' or 'flow'")
    if config.objective == "flow" and config.learn_sigma:
        raise UserError("objective='flow' has no variance to learn: set learn_sigma=False with it")
