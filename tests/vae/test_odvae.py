"""OD-VAE: UniVAE with one temporal kernel, published norm and upsampling, and no D2."""

import pytest
import torch

import vae
from lvdm.errors import UserError

TINY = {"width": 8, "blocks": 1}


def test_parameters_of_the_published_network():
    with torch.device("meta"):
        model = vae.build("odvae")
    assert sum(p.numel() for p in model.parameters()) == 239_189_991


@torch.no_grad()
def test_it_is_univae_with_one_kernel_and_the_published_switches():
    odvae = vae.build("odvae", **TINY).eval()
    univae = vae.build("univae", kernels=(3,), norm="clip", upsample="trilinear", **TINY).eval()
    univae.load_state_dict(odvae.state_dict())
    x = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    assert torch.equal(odvae(x)[0], univae(x)[0])
    assert not odvae.spec.exact_streaming


def test_its_config_holds_its_own_keys_alone():
    config = {key for key in vae.build("odvae", **TINY).config if not key.startswith("_")}
    assert config == {
        *("z", "width", "mult", "blocks", "variant"),
        *("norm", "upsample", "latent_mean", "latent_std"),
    }


@torch.no_grad()
def test_the_causal_switches_make_it_stream():
    model = vae.build("odvae", norm="frame", upsample="nearest", **TINY).double().eval()
    assert model.spec.exact_streaming
    x = torch.rand(1, 3, 10, 8, 16, dtype=torch.float64) * 2 - 1
    parts = torch.cat([part.mean for part in model.stream_encode(x.split(3, 2), chunk_frames=4)], 2)
    torch.testing.assert_close(parts, model.encode(x).latent_dist.mean, rtol=0, atol=1e-9)


def test_what_it_cannot_do_is_a_user_error():
    with pytest.raises(UserError, match="variant=3"):
        vae.build("odvae", variant=3, **TINY)
    model = vae.build("odvae", **TINY)
    assert not model.spec.refines
    with pytest.raises(UserError, match="ODVAE has no refinement decoder"):
        model.refine(torch.zeros(1, 4, 2, 1, 1))
    with pytest.raises(UserError, match="ODVAE cannot have a refinement decoder"):
        model.add_refiner("d1")
