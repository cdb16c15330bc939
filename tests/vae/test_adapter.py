"""Autoencoders of diffusers behind our contract: each class, tiny, gives what it gives by itself, in our shapes."""

import json
from dataclasses import dataclass
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import nn

import vae
from lvdm.errors import UserError
from vae.adapter import CLASSES, DiffusersVAE

# ---------------------------------------------------------------------------------------------------------------------
# A tiny one of each class


@dataclass(frozen=True)
class Tiny:
    """Arguments of a tiny model, and its factors by its paper or model card: frames and pixels a latent."""

    time: int
    space: int
    arguments: dict


def down(n: int, **widths) -> dict:
    return {"down_block_types": ["DownEncoderBlock2D"] * n, **widths}


def sd(n: int) -> dict:
    return down(n, up_block_types=["UpDecoderBlock2D"] * n, block_out_channels=[8] * n, norm_num_groups=4)


EIGHTS = {"block_out_channels": [8] * 4, "latent_channels": 4, "layers_per_block": 1}
WAN = {"base_dim": 4, "z_dim": 4, "dim_mult": [1] * 4, "num_res_blocks": 1}
WAN |= {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}
HUNYUAN15 = {"block_out_channels": [16] * 5, "latent_channels": 4, "layers_per_block": 1}
LTX = {"latent_channels": 4, "layers_per_block": [1] * 5}
DC = {"encoder_block_types": ["ResBlock", "EfficientViTBlock"], "encoder_qkv_multiscales": [[], [5]]}
DC |= {key.replace("encoder", "decoder"): value for key, value in DC.items()}
DC |= {f"{half}_{key}": value for half in ("encoder", "decoder") for key, value in
       (("block_out_channels", [8, 8]), ("layers_per_block", [1, 1]))}  # fmt: skip

TINY = {
    "AsymmetricAutoencoderKL": Tiny(1, 2, down(2, up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=4)
                                    | {"down_block_out_channels": [8, 8], "up_block_out_channels": [8, 8]}),
    "AutoencoderDC": Tiny(1, 2, {"latent_channels": 4, "attention_head_dim": 4, **DC}),
    "AutoencoderKL": Tiny(1, 4, {**sd(3), "shift_factor": 0.5}),
    "AutoencoderKLCogVideoX": Tiny(4, 8, {**EIGHTS, "norm_num_groups": 2}),
    "AutoencoderKLCosmos": Tiny(8, 8, {"latent_channels": 4, "num_layers": 1, "resolution": 64,
                                       "encoder_block_out_channels": [8] * 4, "decode_block_out_channels": [8] * 4,
                                       "latents_mean": list(range(8)), "latents_std": [2.0] * 8}),
    "AutoencoderKLFlux2": Tiny(1, 2, {**sd(2), "latent_channels": 4, "layers_per_block": 1}),
    "AutoencoderKLHunyuanImage": Tiny(1, 2, {"in_channels": 3, "out_channels": 3, "latent_channels": 4,
                                             "block_out_channels": [32, 32], "layers_per_block": 1,
                                             "spatial_compression_ratio": 2, "sample_size": 32}),
    "AutoencoderKLHunyuanVideo": Tiny(4, 8, {**EIGHTS, "norm_num_groups": 4}),
    "AutoencoderKLHunyuanVideo15": Tiny(4, 16, HUNYUAN15),
    "AutoencoderKLKVAE": Tiny(1, 2, {"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4,
                                     "ch_mult": [1, 1]}),
    "AutoencoderKLKVAEVideo": Tiny(4, 8, {"ch": 32, "ch_mult": [1] * 4, "num_res_blocks": 1, "z_channels": 4}),
    "AutoencoderKLLTX2Video": Tiny(8, 32, {**LTX, "block_out_channels": [8, 16, 32, 64],
                                           "decoder_block_out_channels": [8, 16, 32],
                                           "decoder_layers_per_block": [1] * 4}),
    "AutoencoderKLLTXVideo": Tiny(8, 32, {**LTX, "block_out_channels": [8] * 4, "decoder_block_out_channels": [8] * 4,
                                          "decoder_layers_per_block": [1] * 5, "timestep_conditioning": True}),
    "AutoencoderKLMagvit": Tiny(4, 8, {**EIGHTS, "norm_num_groups": 4}),
    "AutoencoderKLMochi": Tiny(6, 8, {"latent_channels": 4, "layers_per_block": [1] * 5,
                                      "encoder_block_out_channels": [32] * 4, "decoder_block_out_channels": [32] * 4,
                                      "latents_mean": [1.0] * 4, "latents_std": [3.0] * 4}),
    "AutoencoderKLQwenImage": Tiny(4, 8, WAN),
    "AutoencoderKLTemporalDecoder": Tiny(1, 2, down(2, block_out_channels=[32, 32])),
    "AutoencoderKLWan": Tiny(4, 16, {**WAN, "in_channels": 12, "out_channels": 12, "patch_size": 2}),
    "AutoencoderTiny": Tiny(1, 4, {f"{half}coder_block_out_channels": [8] * 3 for half in ("en", "de")}
                            | {f"num_{half}coder_blocks": [1] * 3 for half in ("en", "de")}),
    "AutoencoderVidTok": Tiny(4, 8, {"ch": 32, "ch_mult": [1] * 4, "num_res_blocks": 1}),
    "Kandinsky6SRVAE": Tiny(4, 16, {"latent_channels": 4, "layers_per_block": 1,
                                    "encoder_block_out_channels": [16] * 5, "decoder_block_out_channels": [16] * 5}),
    "VQModel": Tiny(1, 2, {**sd(2), "num_vq_embeddings": 16}),
}  # fmt: skip
IMAGES = [kind for kind, tiny in TINY.items() if tiny.time == 1 and kind != "AutoencoderKLTemporalDecoder"]
VIDEOS = [kind for kind in TINY if kind not in IMAGES]
CERTAIN = ("AutoencoderDC", "AutoencoderKLCosmos", "AutoencoderKLKVAEVideo", "AutoencoderTiny", "VQModel")
RECOMPUTE = [
    kind for kind in TINY if CLASSES[kind].recomputes and getattr(diffusers, kind)._supports_gradient_checkpointing
]


def make(kind: str) -> DiffusersVAE:
    torch.manual_seed(0)
    return vae.build(f"diffusers:{kind}", **TINY[kind].arguments).eval()


def clip(model: DiffusersVAE, frames: int, batch: int = 1) -> torch.Tensor:
    f = model.spec.space_factor
    return torch.rand(batch, 3, frames, 2 * f, 3 * f, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_each_class_has_its_tiny_one():
    assert set(TINY) == set(CLASSES)


# ---------------------------------------------------------------------------------------------------------------------
# The contract


@pytest.mark.parametrize(
    ("name", "parameters"), [("sdvae", 83_653_863), ("svdvae", 97_742_847), ("cogvideox", 215_583_907)]
)
def test_parameters_of_the_published_networks(name, parameters):
    with torch.device("meta"):
        model = vae.build(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert (model.spec.time_factor, model.spec.space_factor) == (4 if name == "cogvideox" else 1, 8)
    assert model.config.scaling_factor == pytest.approx(1.15258426 if name == "cogvideox" else 0.18215)


@pytest.mark.parametrize("kind", TINY)
@torch.no_grad()
def test_shapes_are_those_of_the_spec_and_latents_those_of_diffusers(kind):
    model, tiny = make(kind), TINY[kind]
    spec = model.spec
    assert (spec.time_factor, spec.space_factor, spec.first_frames) == (tiny.time, tiny.space, 1)
    assert spec.exact_streaming == (kind in IMAGES) and spec.latent_channels == (3 if kind == "VQModel" else 4)
    for frames in (1, 4):  # an image, and a length that no rule of these knows
        x = clip(model, frames)
        posterior = model.encode(x).latent_dist
        assert posterior.mean.shape == (1, *spec.latent_shape(frames, *x.shape[3:]))
        video = model.decode(posterior.mode(), num_frames=frames).sample
        assert video.shape == x.shape
        assert model.decode(posterior.mode()).sample.shape[2] == spec.valid_frames(frames)
        if frames == 1:
            image = model.encode(x[:, :, 0]).latent_dist
            torch.testing.assert_close(image.mean, posterior.mean[:, :, 0])
            torch.testing.assert_close(model.decode(image.mode()).sample, video[:, :, 0])
    assert bool((posterior.logvar == -30).all()) == (kind in CERTAIN)


@pytest.mark.parametrize("kind", IMAGES)
@torch.no_grad()
def test_an_image_model_is_diffusers_own_on_each_frame(kind):
    model = make(kind)
    x = clip(model, 3, batch=2)
    frames = x.transpose(1, 2).flatten(0, 1)
    z = model.inner.encode(frames)[0]
    z = z if isinstance(z, torch.Tensor) else z.mode()
    y = model.inner.decode(z).sample.unflatten(0, (2, 3)).transpose(1, 2)
    posterior = model.encode(x).latent_dist
    torch.testing.assert_close(posterior.mean, z.unflatten(0, (2, 3)).transpose(1, 2))
    torch.testing.assert_close(model.decode(posterior.mean).sample, y)


@pytest.mark.parametrize("kind", [kind for kind in VIDEOS if TINY[kind].time > 1])
@torch.no_grad()
def test_a_video_model_is_diffusers_own_on_the_clip(kind):
    model = make(kind)
    x = clip(model, 1 + 2 * model.spec.time_factor)
    front = x[:, :, :1].expand(-1, -1, 3 if kind == "AutoencoderVidTok" else 0, -1, -1)  # its own forward pads so
    z = model.inner.encode(torch.cat([front, x], 2))[0].mode()
    noise = (torch.zeros(1),) if kind == "AutoencoderKLLTXVideo" else ()  # the time step of a decoder that denoises
    y = model.inner.decode(z, *noise)
    if kind == "AutoencoderKLMagvit":
        model.inner._clear_conv_cache()
    posterior = model.encode(x).latent_dist
    assert torch.equal(posterior.mean, z)
    assert torch.equal(model.decode(z).sample, y if isinstance(y, torch.Tensor) else y.sample)


@torch.no_grad()
def test_the_temporal_decoder_is_diffusers_own_on_the_clip():
    model = make("AutoencoderKLTemporalDecoder")
    x = clip(model, 3)
    z = model.encode(x).latent_dist.mean
    torch.testing.assert_close(z[0].transpose(0, 1), model.inner.encode(x[0].transpose(0, 1)).latent_dist.mean)
    y = model.inner.decode(z[0].transpose(0, 1), num_frames=3).sample
    assert torch.equal(model.decode(z).sample[0].transpose(0, 1), y)
    assert not torch.equal(model.decode(z[:, :, :2]).sample[0].transpose(0, 1), y[:2])  # it does look ahead


@pytest.mark.parametrize(
    ("kind", "latents"), [(kind, n) for kind, numbers in
                          (("AutoencoderKLCogVideoX", (2, 4)), ("AutoencoderKLKVAEVideo", (6,))) for n in numbers]
)  # fmt: skip
@torch.no_grad()
def test_numbers_of_latents_that_diffusers_renders_at_another_length(kind, latents):
    model = make(kind)
    z = torch.randn(1, 4, latents, 2, 2)
    assert model.inner.decode(z).sample.shape[2] != 4 * (latents - 1) + 1  # else there is no need for the exception
    longer = model.inner.decode(torch.cat([z, z[:, :, -1:]], 2)).sample
    assert torch.equal(model.decode(z).sample, longer[:, :, : 4 * (latents - 1) + 1])


@pytest.mark.parametrize("kind", [kind for kind in VIDEOS if TINY[kind].time in (4, 6)])
@torch.no_grad()
def test_clips_that_diffusers_cuts_in_runs(kind):
    model = make(kind)
    x = clip(model, 18)
    assert model.reconstruct(x).shape == x.shape


# ---------------------------------------------------------------------------------------------------------------------
# Streams, memory, state


@torch.no_grad()
def test_an_image_model_streams_exactly_and_does_not_care_how_many_frames_it_sees():
    torch.manual_seed(0)
    model = DiffusersVAE("AutoencoderKL", sd(3), frame_batch=2).double().eval()
    x = clip(model, 7).double()
    z = model.encode(x).latent_dist.mean
    chunks = [p.mean for p in model.stream_encode(x.split([1, 4, 2], 2), chunk_frames=3)]
    torch.testing.assert_close(torch.cat(chunks, 2), z, rtol=0, atol=1e-9)
    frames = torch.cat(list(model.stream_decode(z.split(3, 2))), 2)
    torch.testing.assert_close(frames, model.decode(z).sample, rtol=0, atol=1e-9)

    sizes = []
    model.inner.encoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    model.encode(x)
    assert sizes == [2, 2, 2, 1]


@pytest.mark.parametrize("kind", VIDEOS)
def test_a_video_model_says_why_it_does_not_stream(kind):
    model = make(kind)
    with pytest.raises(UserError, match=f"does not stream exactly .{CLASSES[kind].inexact}"):
        next(model.stream_encode([clip(model, 1)]))


@pytest.mark.parametrize("kind", VIDEOS)
@torch.no_grad()
def test_one_call_leaves_nothing_to_the_next(kind):
    model = make(kind)
    x = clip(model, 1 + model.spec.time_factor)
    z = model.encode(x).latent_dist.mean
    y = model.decode(z).sample
    (last,) = (layer for layer in model.inner.modules() if getattr(layer, "weight", None) is model.last_layer)
    hook = last.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # with all caches filled
        model.decode(z)
    hook.remove()
    model.encode(x.flip(2)), model.decode(z.flip(2))
    assert torch.equal(model.encode(x).latent_dist.mean, z) and torch.equal(model.decode(z).sample, y)


@pytest.mark.parametrize("kind", TINY)
@torch.no_grad()
def test_the_last_layer_is_the_last_to_run(kind):
    model, ran = make(kind), []
    for layer in model.inner.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d):
            layer.register_forward_hook(lambda layer, *_: ran.append(layer))
    model.reconstruct(clip(model, 1))
    assert ran[-1].weight is model.last_layer


@pytest.mark.parametrize("kind", RECOMPUTE)
def test_gradient_checkpointing_keeps_the_gradients(kind):
    model = make(kind).train()
    x, gradients = clip(model, 1 + model.spec.time_factor), []
    for _ in range(2):
        model.zero_grad()
        model(x)[0].square().mean().backward()
        gradients.append(model.last_layer.grad.clone())
        first = next(model.parameters())
        gradients.append(first.grad.clone())
        model.enable_gradient_checkpointing()
        assert model.is_gradient_checkpointing
    assert torch.equal(gradients[0], gradients[2]) and torch.equal(gradients[1], gradients[3])


@pytest.mark.parametrize("kind", [kind for kind in TINY if kind not in RECOMPUTE])
def test_gradient_checkpointing_that_diffusers_lacks_or_breaks_is_a_user_error(kind):
    with pytest.raises(UserError, match=f"gradient_checkpointing: none that works for diffusers' {kind}"):
        make(kind).enable_gradient_checkpointing()


@pytest.mark.parametrize(("kind", "reach"), [("AutoencoderDC", 13), ("AutoencoderVidTok", 111)])
def test_reach_needs_no_checkpointing_and_leaves_out_convolutions_over_time(kind, reach):
    assert make(kind).reach == reach


# ---------------------------------------------------------------------------------------------------------------------
# Latent statistics


@pytest.mark.parametrize(
    ("kind", "mean", "std"),
    [
        ("AutoencoderKL", [0.5] * 4, [1 / 0.18215] * 4),
        ("AutoencoderKLWan", [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]),
        ("AutoencoderKLMochi", [1.0] * 4, [3.0] * 4),
        ("AutoencoderKLCosmos", [0.5, 2.5, 4.5, 6.5], [2.0] * 4),  # two latent frames a channel
        ("AutoencoderKLHunyuanImage", [0.0] * 4, [1.0] * 4),  # no scaling factor
        ("AutoencoderTiny", [0.0] * 4, [1.0] * 4),
    ],
)
def test_latent_statistics_are_those_that_diffusers_pipelines_use(kind, mean, std):
    spec = make(kind).spec
    assert spec.latent_mean == pytest.approx(mean) and spec.latent_std == pytest.approx(std)


def test_latent_statistics_among_the_weights_are_kept(tmp_path):
    model = make("AutoencoderKLLTXVideo")
    model.inner.latents_mean += torch.arange(4)
    model.inner.latents_std *= 2
    model.inner.save_pretrained(tmp_path / "ltx")
    loaded = vae.load(str(tmp_path / "ltx"))
    assert loaded.spec.latent_mean == (0, 1, 2, 3) and loaded.spec.latent_std == (2,) * 4
    loaded.save_pretrained(tmp_path / "ours")
    assert vae.load(str(tmp_path / "ours")).spec == loaded.spec


def test_own_statistics_come_first():
    model = DiffusersVAE("AutoencoderKL", sd(2), latent_mean=(1.0,) * 4, latent_std=(2.0,) * 4)
    assert model.spec.latent_mean == (1.0,) * 4 and model.spec.latent_std == (2.0,) * 4


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("kind", TINY)
@torch.no_grad()
def test_our_export_and_diffusers_own_come_back(kind, tmp_path, capfd):
    model = make(kind)
    x = clip(model, 2)
    y = model(x)[0]
    model.save_pretrained(tmp_path / "ours")
    model.inner.save_pretrained(tmp_path / "diffusers")
    for folder in ("ours", "diffusers"):
        loaded = vae.load(str(tmp_path / folder))
        assert type(loaded) is DiffusersVAE and not loaded.training and loaded.spec == model.spec
        assert loaded.latent_sha256() == model.latent_sha256()
        torch.testing.assert_close(loaded(x)[0], y)
        again = DiffusersVAE(**loaded.options)
        assert [p.shape for p in again.parameters()] == [p.shape for p in model.parameters()]
    assert capfd.readouterr() == ("", "")


def test_pipelines_prefixes_and_unknown_keys_of_a_config(tmp_path, capfd):
    model = make("AutoencoderKL")
    model.inner.save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "LattePipeline", "vae": ["diffusers", "AutoencoderKL"]}'
    )
    config = tmp_path / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "from_the_future": 1}))
    for spec in (tmp_path, tmp_path / "vae", f"diffusers:{tmp_path}", f"diffusers:{tmp_path}/vae"):
        assert vae.load(str(spec)).latent_sha256() == model.latent_sha256()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("subfolder", ["", "vae"])
def test_a_hub_id(subfolder, tmp_path, monkeypatch):
    model = make("AutoencoderTiny")
    model.inner.save_pretrained(tmp_path / subfolder)

    def download(repository: str, file: str) -> str:
        if repository != "owner/name" or not (tmp_path / file).is_file():
            raise LocalEntryNotFoundError(f"no {file}")
        return str(tmp_path / file)

    original, asked = diffusers.AutoencoderTiny.from_pretrained, []

    def from_pretrained(repository: str, **options):
        asked.append((repository, options["subfolder"]))
        return original(tmp_path, **options)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(diffusers.AutoencoderTiny, "from_pretrained", from_pretrained)
    assert vae.load("diffusers:owner/name").latent_sha256() == model.latent_sha256()
    assert asked == [("owner/name", subfolder)]
    with pytest.raises(UserError, match="diffusers:other/name: not a folder here, and the hub did not give it"):
        vae.load("diffusers:other/name")
    if not subfolder:
        with pytest.raises(UserError, match=r"holds a AutoencoderTiny, not a VAE of ours.*try diffusers:owner/name"):
            vae.load("owner/name")


def break_weights(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state.pop("encoder.conv_in.bias")
    save_file(state, path, metadata={"format": "pt"})


def remove_weights(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (break_weights, "another architecture than its config.json, e.g. .'encoder.conv_in.bias'"),
        (remove_weights, "cannot load AutoencoderKL"),
    ],
)
def test_weights_that_do_not_fit(tamper, message, tmp_path):
    make("AutoencoderKL").inner.save_pretrained(tmp_path)
    tamper(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}: .*{message}"):
        vae.load(str(tmp_path))


def test_folders_without_an_autoencoder_of_ours_or_diffusers(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config.json here and none in vae/"):
        vae.load(f"diffusers:{tmp_path}/empty")
    with pytest.raises(UserError, match=r"no export/ and no config.json here"):
        vae.load(f"{tmp_path}/empty")
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderOobleck"}')
    for spec in (str(tmp_path), f"diffusers:{tmp_path}"):
        with pytest.raises(UserError, match=f"{spec}: 'AutoencoderOobleck' is no image or video.*known: .*KLWan"):
            vae.load(spec)
    (tmp_path / "config.json").write_text("{}")
    for spec in (str(tmp_path), f"diffusers:{tmp_path}"):
        with pytest.raises(UserError, match=r"expected a diffusers config.json with a _class_name"):
            vae.load(spec)
    (tmp_path / "config.json").write_text('{"_class_name": "Latte"}')
    with pytest.raises(UserError, match="holds a Latte, not a VAE of ours"):
        vae.load(str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def test_wrong_classes_and_arguments_are_user_errors():
    with pytest.raises(UserError, match=r"kind: 'AutoencoderKLWann' .*did you mean 'AutoencoderKLWan'.*known: Asymm"):
        vae.build("diffusers:AutoencoderKLWann")
    with pytest.raises(UserError, match="'diffusers:AutoencoderKL' has no option 'widht'"):
        vae.build("diffusers:AutoencoderKL", widht=8)
    with pytest.raises(UserError, match="frame_batch=0"):
        DiffusersVAE("AutoencoderKL", sd(2), frame_batch=0)
    with pytest.raises(UserError, match=r"frames of 16x10 .height x width.: both must be divisible by 4"):
        make("AutoencoderKL").encode(torch.zeros(1, 3, 16, 10))


@torch.no_grad()
def test_arguments_that_make_another_frame_rule_are_a_user_error():
    model = vae.build("diffusers:AutoencoderKLWan", **{**WAN, "temperal_downsample": [False, False, True]}).eval()
    assert model.spec.time_factor == 2  # but diffusers cuts clips in fours
    with pytest.raises(UserError, match=r"AutoencoderKLWan gave .* was expected: its arguments make a model"):
        model.encode(torch.zeros(1, 3, 3, 8, 8))
