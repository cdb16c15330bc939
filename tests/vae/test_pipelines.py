"""Our VAEs in the place of the image VAE of diffusers' pipelines, which is what tables 2 and 3 of CV-VAE do.

The pipelines decode latents frame by frame, as images; `output_type="latent"` and our `decode` make a longer video.
"""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    LattePipeline,
    LatteTransformer3DModel,
    StableDiffusionPipeline,
    StableVideoDiffusionPipeline,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

import vae

LATENT = 4  # height and width of the latents
PIXELS = 8 * LATENT
TEXT = {"prompt_embeds": torch.linspace(-1, 1, 160).view(1, 5, 32), "negative_prompt_embeds": torch.zeros(1, 5, 32)}


@pytest.fixture(params=["univae", "cvvae"])
def model(request):
    torch.manual_seed(0)
    return vae.build(request.param, width=8, blocks=1).eval()


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def svd(model) -> StableVideoDiffusionPipeline:
    unet = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=LATENT,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=32,
        num_attention_heads=8,
        projection_class_embeddings_input_dim=96,
        addition_time_embed_dim=32,
    )
    config = CLIPVisionConfig(
        hidden_size=32, projection_dim=32, num_hidden_layers=1, num_attention_heads=4, patch_size=32
    )
    eye = CLIPVisionModelWithProjection(config)
    return quiet(StableVideoDiffusionPipeline(model, eye, unet, EulerDiscreteScheduler(), CLIPImageProcessor()))


def test_stable_video_diffusion(model):
    pipe, picture = svd(model), Image.new("RGB", (PIXELS, PIXELS), "teal")

    def draw(output: str) -> torch.Tensor:
        keys = {"height": PIXELS, "width": PIXELS, "num_frames": 3, "num_inference_steps": 2}
        return pipe(picture, **keys, output_type=output, generator=torch.Generator().manual_seed(0)).frames

    frames, latents = draw("pt"), draw("latent")
    assert frames.shape == (1, 3, 3, PIXELS, PIXELS) and latents.shape == (1, 3, 4, LATENT, LATENT)
    with torch.no_grad():
        z = latents / model.config.scaling_factor
        images = model.decode(z[0]).sample  # what the pipeline does, each latent an image
        video = model.decode(z.transpose(1, 2)).sample  # and what a video VAE is for
    torch.testing.assert_close(frames[0], (images / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)
    assert video.shape == (1, 3, 9, PIXELS, PIXELS)
    if model.spec.exact_streaming:
        torch.testing.assert_close(video[:, :, 0], images[:1], rtol=0, atol=1e-4)


def test_stable_diffusion(model):
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=LATENT,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
    )
    parts = {"vae": model, "unet": unet, "scheduler": scheduler(), "text_encoder": None, "tokenizer": None}
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = quiet(StableDiffusionPipeline(**parts, **none))
    keys = {"height": PIXELS, "width": PIXELS, "num_inference_steps": 2}
    image = pipe(**TEXT, **keys, output_type="pt", generator=torch.Generator().manual_seed(0)).images
    z = pipe(**TEXT, **keys, output_type="latent", generator=torch.Generator().manual_seed(0)).images
    with torch.no_grad():
        expected = model.decode(z / model.config.scaling_factor).sample
    torch.testing.assert_close(image, (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


def test_latte(model):
    transformer = LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        sample_size=LATENT,
        patch_size=2,
        caption_channels=32,
        video_length=3,
        activation_fn="gelu-approximate",
        attention_bias=True,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        num_embeds_ada_norm=1000,
    )
    pipe = quiet(LattePipeline(None, None, model, transformer, scheduler()))
    keys = {"height": PIXELS, "width": PIXELS, "video_length": 3, "num_inference_steps": 2, "negative_prompt": None}
    keys |= {"clean_caption": False, "mask_feature": False}
    frames = pipe(**TEXT, **keys, output_type="pt", generator=torch.Generator().manual_seed(0)).frames
    z = pipe(**TEXT, **keys, output_type="latent", generator=torch.Generator().manual_seed(0)).frames
    assert frames.shape[-2:] == (PIXELS, PIXELS) and z.shape == (1, 4, 3, LATENT, LATENT)
    with torch.no_grad():
        assert model.decode(z / model.config.scaling_factor).sample.shape == (1, 3, 9, PIXELS, PIXELS)


def test_pipelines_find_the_keys_they_ask_for(model):
    config = model.config
    assert 2 ** (len(config.block_out_channels) - 1) == 8 and config.latent_channels == 4
    assert config.scaling_factor == pytest.approx(0.18215 if type(model).__name__ == "CVVAE" else 1.0)
    assert "scaling_factor" not in model.options and "width" in model.options
