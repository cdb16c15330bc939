"""Latents held to those of an image VAE: the four mappings, both constraints, and who can be aligned with whom."""

import pytest
import torch
from torch import nn

import vae
from lvdm.errors import UserError
from vae.alignment import Alignment, Identity
from vae.blocks import frames_to_batch
from vae.losses import Rendered
from vae.osvae import SCALE

IMAGE = vae.registry.entry("sdvae").tiny
SAMPLES = [7, 8]


@pytest.fixture(scope="module")
def models():
    """A frozen image VAE and a video VAE."""
    torch.manual_seed(0)
    return vae.build("sdvae", **IMAGE), vae.build("univae", width=16, blocks=1)


def clip(frames: int = 9, size: int = 16) -> torch.Tensor:
    return torch.rand(2, 3, frames, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def rendering(model, x: torch.Tensor) -> Rendered:
    noise = torch.randn(2, *model.spec.latent_shape(*x.shape[2:]), generator=torch.Generator().manual_seed(2))
    return Rendered(x, *model(x, noise), noise, SAMPLES, 0)


def numbered(frames: int) -> torch.Tensor:
    """Two clips whose every pixel is the number of its frame."""
    return torch.arange(float(frames)).view(1, 1, -1, 1, 1).expand(2, 3, -1, 2, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Mappings


@pytest.mark.parametrize(
    "mapping, frames", [("first", [0.0]), ("slice", [0.0, 1.0, 5.0]), ("average", [0.0, 2.5, 6.5])]
)
def test_mappings_give_a_frame_a_latent(mapping, frames, models):
    mapped = Alignment(*models, mapping, 0).mapped(numbered(9), SAMPLES)
    assert mapped.shape == (2, 3, len(frames), 2, 2)
    assert mapped[0, 0, :, 0, 0].tolist() == mapped[1, 2, :, 1, 1].tolist() == frames


def test_random_frames_are_of_their_group_and_a_function_of_the_sample(models):
    alignment = Alignment(*models, "random", 0)
    drawn = alignment.mapped(numbered(401), SAMPLES)[:, 0, :, 0, 0]
    assert drawn.shape == (2, 101) and not drawn[:, 0].any()
    groups = (drawn[:, 1:] - 1) // 4
    assert torch.equal(groups, torch.arange(100.0).expand(2, -1))
    assert {*((drawn[:, 1:] - 1) % 4).flatten().tolist()} == {0.0, 1.0, 2.0, 3.0}
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[1], alignment.mapped(numbered(401)[:1], [8])[0, 0, :, 0, 0])
    assert not torch.equal(drawn, Alignment(*models, "random", 1).mapped(numbered(401), SAMPLES)[:, 0, :, 0, 0])


@pytest.mark.parametrize("mapping", ["first", "slice", "average", "random"])
def test_an_image_is_mapped_to_itself(mapping, models):
    assert torch.equal(Alignment(*models, mapping, 0).mapped(clip(1), SAMPLES), clip(1))


# ---------------------------------------------------------------------------------------------------------------------
# Constraints


@pytest.mark.parametrize("frames", [1, 9])
@pytest.mark.parametrize("mapping", ["first", "slice", "average", "random"])
def test_constraints_are_the_papers_by_hand(mapping, frames, models):
    image, model = models
    alignment, x = Alignment(image, model, mapping, 0), clip(frames)
    rendered, mapped = rendering(model, x), alignment.mapped(x, SAMPLES)
    latents = mapped.shape[2]
    assert latents == (1 if mapping == "first" else (frames - 1) // 4 + 1)

    ours = torch.stack([image.decode(rendered.z[:, :, i]).sample for i in range(latents)], 2)
    torch.testing.assert_close(alignment.decoder(rendered), (mapped - ours).abs().mean())
    z = torch.stack([image.encode(mapped[:, :, i]).latent_dist.mean for i in range(latents)], 2)
    video = model.decode(z).sample
    assert video.shape[2] == (1 if mapping == "first" else frames)
    torch.testing.assert_close(alignment.encoder(rendered), (x[:, :, : video.shape[2]] - video).abs().mean())


def test_the_decoder_s_gradient_reaches_our_encoder_and_the_encoder_s_our_decoder(models):
    image, model = models
    alignment = Alignment(image, model, "slice", 0)
    for side, reached in (("decoder", {"encoder", "quant_conv"}), ("encoder", {"decoder"})):
        model.zero_grad()
        getattr(alignment, side)(rendering(model, clip())).backward()
        assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == reached
        assert all(p.grad is None and not p.requires_grad for p in image.parameters())


def test_vaes_that_share_no_latents_are_refused(models):
    image, model = models
    for wrong, message in (
        (
            vae.build("univae", width=16, blocks=1),
            "align_vae=x: expected an image VAE of 1 frames a latent, UniVAE has 4",
        ),
        (vae.build("vqgan", **vae.registry.entry("vqgan").tiny), "4 latent channels, VQGAN has 8"),
    ):
        with pytest.raises(UserError, match=message):
            Alignment(wrong, model, "slice", 0, "align_vae=x")
    osvae = vae.build("osvae", **vae.registry.entry("osvae").tiny)
    with pytest.raises(UserError, match="OSVAE has no latent of an image"):
        Alignment(image, osvae, "slice", 0)


# ---------------------------------------------------------------------------------------------------------------------
# Identity


def test_identity_is_the_distance_from_the_image_s_own_latent():
    torch.manual_seed(0)
    model, x = vae.build("osvae", **vae.registry.entry("osvae").tiny), clip(1)
    rendered, identity = rendering(model, x), Identity(model)
    own = SCALE * model.spatial.encode(frames_to_batch(x)).latent_dist.mode()
    torch.testing.assert_close(identity(rendered), (rendered.z[:, :, 0] - own).abs().mean())
    identity(rendered).backward()
    assert isinstance(model.encoder, nn.Module) and all(p.grad is not None for p in model.encoder.parameters())


def test_identity_needs_an_image_vae_inside(models):
    with pytest.raises(UserError, match="identity_weight: UniVAE has no image VAE inside"):
        Identity(models[1])
