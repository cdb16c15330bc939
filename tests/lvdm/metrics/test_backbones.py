import hashlib
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEModel

from lvdm import weights
from lvdm.errors import UserError
from lvdm.media import to_uint8
from lvdm.metrics.backbones import tf1_resized
from lvdm.metrics.features import make_extractor
from lvdm.rng import generator


def videos(b: int = 2, t: int = 17, size: tuple[int, int] = (12, 20)) -> Tensor:
    return torch.rand(b, 3, t, *size, generator=generator(0)) * 2 - 1


class ToyI3D(nn.Module):
    """Takes what StyleGAN-V gives its I3D, and tells what it got."""

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        assert x.dtype == torch.uint8 and rescale and resize and return_features
        return x.double().mean((1, 2, 3, 4))[:, None].expand(-1, 400)


class ToyC3D(nn.Module):
    """101 probabilities of 16 frames in uint8."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.uint8 and x.shape[2] == 16
        rest = torch.zeros(len(x), 99)
        p = x[:, 0, 0, 0, :1].float() / 255
        return torch.cat([p, 1 - p, rest], 1)


class ToyInception(nn.Module):
    """Mean, least and greatest of what it is given, and zeros."""

    def forward(self, x: Tensor) -> Tensor:
        assert list(x.shape[1:]) == [3, 299, 299]
        flat = x.flatten(1)
        return torch.cat([flat.mean(1, True), flat.amin(1, True), flat.amax(1, True), torch.zeros(len(x), 2045)], 1)


def saved(module: nn.Module, path: Path) -> str:
    torch.jit.script(module).save(str(path))
    return str(path)


def test_i3d_torchscript_is_called_as_stylegan_v_calls_it(tmp_path):
    path = saved(ToyI3D(), tmp_path / "i3d_torchscript.pt")
    extractor, x = make_extractor("i3d-torchscript", weights=path), videos()
    features = extractor(x)
    assert features.shape == (2, 400) and features.dtype == torch.float32
    torch.testing.assert_close(features[:, 7], to_uint8(x).double().mean((1, 2, 3, 4)).float())
    assert extractor.weights_sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert (extractor.name, extractor.per) == ("i3d-torchscript", "clip") and "uint8" in extractor.resize


def test_c3d_gives_log_probabilities_of_the_last_16_frames(tmp_path):
    x = videos()
    x[:, 0, 1, 0, 0] = torch.tensor([-1.0, 0.2])  # 0 and 153 in the first of the last 16 frames
    c3d = make_extractor("c3d", weights=saved(ToyC3D(), tmp_path / "c3d_ucf101.pt"))
    probabilities = c3d(x).exp()
    torch.testing.assert_close(probabilities[:, :2], torch.tensor([[0.0, 1.0], [0.6, 0.4]]))
    with pytest.raises(UserError, match="T >= 16"):
        c3d(videos(t=15))


def test_inception_gives_a_row_a_frame_clip_after_clip(tmp_path):
    inception = make_extractor("inception", weights=saved(ToyInception(), tmp_path / "inception.pt"))
    x = torch.linspace(-1, 1, 34).view(2, 1, 17, 1, 1).expand(2, 3, 17, 6, 8)
    features = inception(x)
    assert features.shape == (34, inception.dim) and inception.per == "frame"
    pixels = to_uint8(torch.linspace(-1, 1, 34)).float()
    torch.testing.assert_close(features[:, :3], ((pixels - 128) / 128)[:, None].expand(-1, 3), atol=1e-5, rtol=0)


def test_inception_without_a_path_is_the_published_file(monkeypatch, tmp_path):
    path = saved(ToyInception(), tmp_path / "default_1.pt")
    monkeypatch.setattr(weights, "script", lambda name: Path(path) if name == "inception" else None)
    assert make_extractor("inception").weights_sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_tensorflow_1_resizes_without_a_half_pixel():
    ramp = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    line = tf1_resized(ramp, 8)[0, 0, 0]
    torch.testing.assert_close(line, torch.tensor([0, 0.5, 1, 1.5, 2, 2.5, 3, 3]))  # the last source pixel is repeated
    torch.testing.assert_close(tf1_resized(ramp, 2)[0, 0, 0], torch.tensor([0.0, 2.0]))
    image = torch.rand(2, 3, 9, 9, generator=generator(0))
    torch.testing.assert_close(tf1_resized(image, 9), image)
    torch.testing.assert_close(tf1_resized(image, 4), tf1_resized(image.mT, 4).mT)


@pytest.fixture(scope="module")
def tiny_videomae(tmp_path_factory) -> str:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 8, "num_frames": 4, "hidden_size": 8, "intermediate_size": 8}
    config = VideoMAEConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, use_mean_pooling=False)
    folder = tmp_path_factory.mktemp("videomae")
    VideoMAEModel(config).save_pretrained(folder)
    return str(folder)


def test_videomae_means_its_last_hidden_states(tiny_videomae):
    extractor, x = make_extractor("videomae", weights=tiny_videomae), videos(t=6, size=(16, 16))
    features = extractor(x)
    assert (extractor.dim, extractor.min_frames, extractor.per) == (8, 4, "clip") and features.shape == (2, 8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((x[:, :, 2:] + 1) / 2 - mean.view(3, 1, 1, 1)) / std.view(3, 1, 1, 1)
    with torch.no_grad():
        hidden = VideoMAEModel.from_pretrained(tiny_videomae).eval()(pixels.transpose(1, 2)).last_hidden_state
    torch.testing.assert_close(features, hidden.mean(1), rtol=1e-4, atol=1e-5)
    assert len(extractor.weights_sha256) == 64
    with pytest.raises(UserError, match="T >= 4"):
        extractor(videos(t=3))


def test_wrong_files_are_told_with_what_is_expected(tmp_path):
    empty, toy = tmp_path / "empty.pt", tmp_path / "toy.pt"
    empty.touch()
    saved(ToyInception(), toy)
    for name, wanted in [
        ("i3d-torchscript", "i3d_torchscript.pt"),
        ("c3d", "c3d_ucf101.pt"),
        ("inception", "default_1"),
    ]:
        with pytest.raises(UserError, match=rf"weights.{name}={tmp_path}/none.pt: no such file; .*{wanted}"):
            make_extractor(name, weights=f"{tmp_path}/none.pt")
        with pytest.raises(UserError, match=rf"weights.{name}={empty}: no TorchScript file; .*{wanted}"):
            make_extractor(name, weights=str(empty))
    with pytest.raises(UserError, match="its forward lacks rescale, resize, return_features"):
        make_extractor("i3d-torchscript", weights=str(toy))
    with pytest.raises(UserError, match=r"weights\.c3d=: no such file; features=c3d takes .*github.com/.*sha256"):
        make_extractor("c3d")


def test_another_network_is_found_out_by_what_it_gives(tmp_path):
    i3d = make_extractor("c3d", weights=saved(Flat(400), tmp_path / "a.pt"))
    with pytest.raises(UserError, match=r"gave \(2, 400\), expected \(N, 101\)"):
        i3d(videos())
    logits = make_extractor("c3d", weights=saved(Flat(101), tmp_path / "b.pt"))
    with pytest.raises(UserError, match="no probabilities"):
        logits(videos())


class Flat(nn.Module):
    """Zeros."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), self.dim)


def test_videomae_of_another_kind_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"weights\.videomae=: missing; .*MCG-NJU/videomae-base"):
        make_extractor("videomae")
    with pytest.raises(
        UserError, match=rf"weights\.videomae={tmp_path}: .*; features=videomae takes a folder or hub id"
    ):
        make_extractor("videomae", weights=str(tmp_path))


def test_timm_that_is_not_installed_is_a_user_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"features=timm:resnet18 needs timm .* pip install 'lvdm\[timm\]'"):
        make_extractor("timm:resnet18")


def test_timm_gives_pooled_features_of_frames(tmp_path):
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm: {error}")
    with pytest.raises(UserError, match="has no such model"):
        make_extractor("timm:no_such_model")
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("resnet18", num_classes=5).state_dict(), path)
    extractor = make_extractor("timm:resnet18", weights=str(path))
    assert (extractor.per, extractor.dim) == ("frame", 512) and extractor(videos(1, 3)).shape == (3, 512)
    with pytest.raises(UserError, match="of another model"):
        make_extractor("timm:resnet50", weights=str(path))
