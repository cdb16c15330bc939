"""A video VAE that starts from an image VAE: where an image goes through both alike, and how far apart elsewhere."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL

import vae
from lvdm.errors import UserError
from vae.inflation import inflate

WIDTHS = {"width": 8, "mult": (1, 1, 1, 1), "blocks": 1}  # equal widths, so that one number of groups fits all levels
CAUSAL = {"norm": "frame", "upsample": "nearest", **WIDTHS}
CLOSE = {"rtol": 0.0, "atol": 1e-10}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def image() -> AutoencoderKL:
    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8] * 4,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
    )
    for parameter in model.parameters():  # biases and norms of their own, too
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval()


def test_it_is_found_where_users_look(image):
    model = vae.build("odvae", **CAUSAL).double()
    assert vae.inflate(model, image.state_dict(), mode="tail") is model


def grown(name: str, image: AutoencoderKL, mode: str, **options):
    torch.manual_seed(1)
    return inflate(vae.build(name, **options).double().eval(), image.state_dict(), mode)


def pictures(count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(count, 3, 24, 16, generator=generator, dtype=torch.float64) * 2 - 1


def distances(model, image: AutoencoderKL) -> tuple[float, float]:
    """How far an image's latents, and its reconstruction from the same latents, are from the image VAE's (relative)."""
    z, own = image.encode(pictures()).latent_dist.mean, model.encode(pictures()).latent_dist.mean
    x, shown = image.decode(z).sample, model.decode(z).sample
    return tuple(((a - b).norm() / b.norm()).item() for a, b in ((own, z), (shown, x)))


@pytest.mark.parametrize("mode", ["tail", "center", "average"])
@pytest.mark.parametrize("norm", ["frame", "clip"])
@pytest.mark.parametrize("name", ["odvae", "univae"])
def test_an_image_goes_through_as_through_the_image_vae(name, norm, mode, image):
    options = {**CAUSAL, "norm": norm} | ({"kernels": (3,)} if name == "univae" else {})
    assert max(distances(grown(name, image, mode, **options), image)) < 1e-10


def test_with_tail_the_latents_of_a_video_are_those_of_every_fourth_frame(image):
    model = grown("odvae", image, "tail", **CAUSAL)
    x = pictures(9).transpose(0, 1)[None]
    alone = image.encode(x[0, :, ::4].transpose(0, 1)).latent_dist.mean
    torch.testing.assert_close(model.encode(x).latent_dist.mean[0].transpose(0, 1), alone, **CLOSE)
    still = model.decode(model.encode(x[:, :, :1].expand(-1, -1, 9, -1, -1)).latent_dist.mean).sample
    torch.testing.assert_close(still, still[:, :, :1].expand_as(still), **CLOSE)


@pytest.mark.parametrize(("mode", "exact"), [("center", True), ("tail", False)])
def test_the_group_causal_convolution_needs_the_center(mode, exact, image):
    latents, frames = distances(grown("odvae", image, mode, conv="group", **CAUSAL), image)
    assert (latents < 1e-10 and frames < 1e-10) if exact else min(latents, frames) > 0.1


def test_trilinear_upsampling_is_near_and_not_equal(image):
    latents, frames = distances(grown("odvae", image, "tail", **{**CAUSAL, "upsample": "trilinear"}), image)
    assert latents < 1e-10 and 1e-3 < frames < 0.6


def test_a_split_kernel_keeps_the_diagonal_blocks_and_loses_the_rest(image):
    model = grown("univae", image, "tail", **CAUSAL)
    dense = image.state_dict()["encoder.down_blocks.1.downsamplers.0.conv.weight"]
    for i, (branch, taps) in enumerate(zip(model.encoder.downs[1].branches, (3, 5, 7, 9), strict=True)):
        part = slice(2 * i, 2 * i + 2)
        assert branch.weight.shape[2] == taps
        assert torch.equal(branch.weight[:, :, -1], dense[part, part]) and not branch.weight[:, :, :-1].any()
    latents, frames = distances(model, image)
    assert frames < 1e-10 and 0.1 < latents < 2.0  # the decoder is whole, the encoder is not


def test_cvvae_is_exact_around_its_attention_over_time(image):
    """Its encoder in every mode; its decoder with "center", where the attention of the middle says nothing."""
    for mode in ("tail", "center", "average"):
        assert distances(grown("cvvae", _as_cvvae_has_it(image), mode, **WIDTHS), _as_cvvae_has_it(image))[0] < 1e-10
    silent = _as_cvvae_has_it(image)
    attention = silent.decoder.mid_block.attentions[0].to_out[0]
    attention.weight.zero_()
    attention.bias.zero_()
    model = grown("cvvae", silent, "center", **WIDTHS)
    assert distances(model, silent)[1] < 1e-10
    assert distances(grown("cvvae", silent, "tail", **WIDTHS), silent)[1] > 0.1
    spoken = _as_cvvae_has_it(image)
    assert 1e-3 < distances(grown("cvvae", spoken, "center", **WIDTHS), spoken)[1] < 1.0


def test_the_eps_of_cvvae_moves_the_latents_of_a_real_image_vae(image):
    assert 1e-7 < distances(grown("cvvae", image, "center", **WIDTHS), image)[0] < 1e-3


def _as_cvvae_has_it(image: AutoencoderKL) -> AutoencoderKL:
    """CV-VAE's norms have another eps, and no post_quant_conv, whose bias would differ at the zero-padded border."""
    image = copy.deepcopy(image)
    image.post_quant_conv.bias.zero_()
    for module in image.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.eps = 1e-5
    return image


def test_random_keeps_the_fresh_temporal_kernels_alone(image):
    torch.manual_seed(1)
    fresh = vae.build("odvae", **CAUSAL).double().state_dict()
    for name, weight in grown("odvae", image, "random", **CAUSAL).state_dict().items():
        temporal = weight.ndim == 5 and weight.shape[2] > 1
        assert torch.equal(weight, fresh[name]) == temporal, name


def test_d2_inherits_what_d1_does(image):
    model = grown("univae", image, "tail", refine=True, inject="gate", **CAUSAL)
    d1, d2 = model.decoder.state_dict(), model.refiner.state_dict()
    assert all(torch.equal(weight, d2[name]) for name, weight in d1.items())
    assert d2.keys() - d1.keys() == {"injection.gate"}


def test_what_does_not_fit_is_refused_and_changes_nothing(image):
    model = vae.build("odvae", **CAUSAL).double()
    before = model.latent_sha256()
    state = image.state_dict()
    missing = {k: v for k, v in state.items() if k != "decoder.conv_in.weight"}
    for weights, message in (
        (missing, "no decoder.conv_in.weight"),
        ({**state, "decoder.extra.weight": state["quant_conv.weight"]}, r"1 keys have no place in this ODVAE.*extra"),
        ({**state, "encoder.conv_in.weight": torch.zeros(4, 3, 3, 3)}, r"would be \(4, 3, 1, 3, 3\).*same width"),
    ):
        with pytest.raises(UserError, match=message):
            inflate(model, weights)
    with pytest.raises(UserError, match=r"mode='centre'.*did you mean 'center'"):
        inflate(model, state, "centre")
    assert model.latent_sha256() == before
