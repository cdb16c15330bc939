import hashlib

import pytest
import torch
import torch.nn.functional as F

from lvdm.errors import UserError
from lvdm.metrics.lpips import LPIPS, _unit
from lvdm.rng import generator

PRETRAINED = pytest.mark.parametrize("net", ["alex", "vgg"])


def frames(key: str, n: int = 2, size: int = 64) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=generator(0, key)) * 2 - 1


def ramps() -> tuple[torch.Tensor, torch.Tensor]:
    """From dark to bright, rightwards and downwards."""
    line = torch.linspace(-1, 1, 64)
    return line.view(1, 1, 1, 64).expand(1, 3, 64, 64), line.view(1, 1, 64, 1).expand(1, 3, 64, 64)


@pytest.mark.parametrize("net, turned, negated", [("alex", 0.51093644, 0.40991294), ("vgg", 0.51703197, 0.40696865)])
def test_values_of_the_official_implementation(net, turned, negated):
    """Computed with the forward pass and the heads of the package lpips 0.1.4."""
    lpips, (x, y) = LPIPS(net), ramps()
    assert lpips(x, y).item() == pytest.approx(turned, abs=1e-5)
    assert lpips(x, -x).item() == pytest.approx(negated, abs=1e-5)


@pytest.mark.parametrize(
    "net, sha256",
    [
        ("alex", "718a8b40b0d22f96192d34ab93c0db5c7943558ff6c2407f44812dce2f29b5f4"),
        ("vgg", "9153a2043dccf3b525d4f13db916e93ef040548ea923b6f2100de5ebac141a78"),
    ],
)
def test_heads_are_the_published_ones(net, sha256):
    """The hash is of lin0 ... lin4 in lpips/weights/v0.1/NET.pth of the package lpips 0.1.4, as fp32 bytes."""
    heads = torch.cat([head.flatten() for head in LPIPS(net).heads])
    assert hashlib.sha256(heads.numpy().tobytes()).hexdigest() == sha256


@PRETRAINED
def test_is_a_distance_that_grows_with_noise(net):
    lpips, x = LPIPS(net), frames("x", 1)
    grey, noise = x.mean(dim=1, keepdim=True).expand_as(x) * 0.5, frames("noise", 1)
    assert lpips(x, x).eq(0).all()
    torch.testing.assert_close(lpips(x, noise), lpips(noise, x))
    steps = [lpips(grey, grey + amount * noise).item() for amount in (0.05, 0.15, 0.45)]
    assert 0 < steps[0] < steps[1] < steps[2]


def test_chunks_do_not_matter():
    lpips = LPIPS("alex")
    x, y = (frames(key, 10).unflatten(0, (2, 5)).transpose(1, 2) for key in "xy")
    whole = lpips.video(x, y)
    assert whole.shape == (2, 5)
    torch.testing.assert_close(whole[1, 3], lpips(x[1:, :, 3], y[1:, :, 3])[0])
    for chunk in (1, 3, 7):
        torch.testing.assert_close(lpips.video(x, y, chunk=chunk), whole)


def test_loss_has_gradients_for_frames_and_none_for_weights():
    lpips, x, y = LPIPS("vgg"), frames("x", 1, 16).requires_grad_(), frames("y", 1, 16)
    lpips(x, y).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in lpips.parameters())
    assert not any(parameter.requires_grad for parameter in lpips.train().parameters())
    with torch.no_grad():
        assert lpips(x - 0.1 * x.grad / x.grad.abs().max(), y) < lpips(x, y)


def test_autocast_compares_in_fp32(monkeypatch):
    lpips, x, y = LPIPS("alex"), frames("x"), frames("y")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = lpips(x, y)
        features = [list(lpips._features(images)) for images in (x, y)]
    assert {layer.dtype for layers in features for layer in layers} == {torch.bfloat16}
    torch.testing.assert_close(value, lpips(x, y), rtol=0.02, atol=0)
    monkeypatch.setattr(lpips, "_features", lambda images: [layer.float() for layer in features[images is y]])
    assert torch.equal(value, lpips(x, y))


@PRETRAINED
def test_spatial_means_maps_of_full_size(net):
    plain, spatial = LPIPS(net), LPIPS(net, spatial=True)
    assert (plain.name, spatial.name) == (f"lpips-{net}", f"lpips-{net}-spatial")
    x, y = frames("x", size=75), frames("y", size=75)
    y[..., :20] = x[..., :20]
    maps = [
        ((_unit(a) - _unit(b)).square() * head.view(-1, 1, 1)).sum(1, keepdim=True)
        for head, a, b in zip(plain.heads, plain._features(x), plain._features(y), strict=True)
    ]
    full = sum(F.interpolate(m, (75, 75), mode="bilinear", align_corners=False) for m in maps)
    torch.testing.assert_close(spatial(x, y), full.mean((1, 2, 3)))
    assert not torch.equal(spatial(x, y), plain(x, y))
    assert spatial(x, x).eq(0).all()


def test_enlarging_by_whole_factors_keeps_the_mean():
    """So VGG's maps of frames whose sides 16 divides have one LPIPS, spatial or not."""
    x, y = frames("x", size=64), frames("y", size=64)
    torch.testing.assert_close(LPIPS("vgg", spatial=True)(x, y), LPIPS("vgg")(x, y))


def test_weights_are_named():
    assert LPIPS("alex").weights_sha256.startswith("443c5bc3")
    assert LPIPS("alex", pretrained=False).weights_sha256 is None


def test_bad_input():
    with pytest.raises(UserError, match=r"unknown LPIPS net 'vgg16' .*'vgg'.*alex, vgg"):
        LPIPS("vgg16")
    for net, smallest in (("alex", 31), ("vgg", 16)):
        lpips = LPIPS(net, pretrained=False)
        assert lpips(frames("x", 1, smallest), frames("y", 1, smallest)).shape == (1,)
        with pytest.raises(UserError, match=f"sides of at least {smallest}"):
            lpips(frames("x", 1, smallest - 1), frames("y", 1, smallest - 1))
        with pytest.raises(UserError, match="one shape"):
            lpips(frames("x", 2), frames("y", 1))
