"""Official checkpoints: their names and shapes, both ways; files and wrappers; what is refused."""

import json
from collections import Counter

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import save_file

import vae
from lvdm.errors import UserError
from vae.checkpoints import convert, explain, name_of, official, read

SIZES = {  # family, options -> tensors, numbers in them, weights by number of dimensions (of what was released)
    "odvae": ({}, 248, 239_189_991, {1: 52, 4: 11, 5: 61}),
    "odvae 3": ({"variant": 3}, 248, 228_868_071, None),
    "odvae 2": ({"variant": 2}, 248, 171_072_231, None),
    "odvae 1": ({"variant": 1}, 248, 244_505_319, None),
    "ospvae 1.1": ({"release": "1.1"}, 260, 246_859_499, {1: 52, 4: 13, 5: 63}),
    "ospvae 1.0": ({"release": "1.0"}, 248, 229_169_895, {1: 52, 5: 72}),
    "cvvae": ({}, 254, 182_446_475, {1: 53, 2: 4, 4: 32, 5: 38}),
    "cvvae 3D": ({"half_3d": False}, 254, 255_879_563, None),
    "ivvae 4": ({"z": 4}, 362, 107_170_842, {3: 16, 4: 157, 5: 41}),
    "ivvae 8": ({"z": 8}, 362, 107_379_150, {3: 16, 4: 157, 5: 41}),
    "ivvae 16": ({"z": 16}, 362, 107_798_550, {3: 16, 4: 157, 5: 41}),
    "ivvae 96": ({"z": 16, "dim": 96}, 362, 241_854_742, {3: 16, 4: 157, 5: 41}),
    "osvae": ({}, 515 + 2, 393_341_007 + 8, {1: 134, 2: 8, 4: 64, 5: 94}),
    "sdvae": ({}, 248, 83_653_863, {1: 52, 4: 72}),
}

KEYS = {  # of the published files
    "odvae": {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down.0.block.0.conv1.weight": (128, 128, 3, 3),
        "encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
        "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.down.1.downsample.conv.conv.weight": (256, 256, 3, 3, 3),
        "encoder.down.2.block.0.nin_shortcut.conv.weight": (512, 256, 1, 1, 1),
        "encoder.down.2.downsample.conv.conv.bias": (512,),
        "encoder.down.3.block.1.norm2.bias": (512,),
        "encoder.mid.block_1.conv1.conv.weight": (512, 512, 3, 3, 3),
        "encoder.mid.attn_1.norm.weight": (512,),
        "encoder.mid.attn_1.q.conv.weight": (512, 512, 1, 1, 1),
        "encoder.mid.attn_1.proj_out.conv.bias": (512,),
        "encoder.norm_out.weight": (512,),
        "encoder.conv_out.conv.weight": (8, 512, 3, 3, 3),
        "quant_conv.conv.weight": (8, 8, 1, 1, 1),
        "post_quant_conv.conv.bias": (4,),
        "decoder.conv_in.conv.weight": (512, 4, 3, 3, 3),
        "decoder.up.3.block.2.conv2.conv.weight": (512, 512, 3, 3, 3),
        "decoder.up.3.upsample.conv.conv.weight": (512, 512, 3, 3, 3),
        "decoder.up.1.block.0.nin_shortcut.conv.weight": (256, 512, 1, 1, 1),
        "decoder.up.1.upsample.conv.conv.weight": (256, 256, 1, 3, 3),
        "decoder.up.0.block.0.nin_shortcut.conv.weight": (128, 256, 1, 1, 1),
        "decoder.conv_out.conv.weight": (3, 128, 3, 3, 3),
    },
    "ospvae 1.0": {
        "encoder.conv_in.conv.weight": (128, 3, 3, 3, 3),
        "encoder.down.0.block.0.conv1.conv.weight": (128, 128, 3, 3, 3),
        "encoder.down.2.downsample.conv.conv.weight": (512, 512, 1, 3, 3),
        "decoder.up.2.upsample.conv.conv.weight": (512, 512, 1, 3, 3),
    },
    "ospvae 1.1": {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
        "encoder.down.1.time_downsample.conv.weight": (256, 256, 3, 3, 3),
        "encoder.down.2.time_downsample.mix_factor": (1,),
        "decoder.up.3.time_upsample.conv.conv.weight": (512, 512, 3, 3, 3),
        "decoder.up.2.time_upsample.mix_factor": (1,),
        "decoder.up.1.upsample.conv.conv.weight": (256, 256, 1, 3, 3),
    },
    "cvvae": {
        "encoder.conv_in.weight": (128, 3, 3, 3, 3),
        "encoder.down.1.block.0.conv1.weight": (256, 128, 3, 3, 3),
        "encoder.down.1.block.0.conv2.weight": (256, 256, 3, 3),
        "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1, 1),
        "encoder.down.1.downsample.conv.weight": (256, 256, 3, 3, 3),
        "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "decoder.mid.attn_1.norm_t.weight": (512,),
        "decoder.mid.attn_1.v_t.weight": (512, 512),
        "decoder.mid.attn_1.proj_out_t.bias": (512,),
        "decoder.up.3.upsample.conv.weight": (1024, 512, 3, 3, 3),
        "decoder.up.2.upsample.conv.weight": (512, 512, 3, 3, 3),
        "decoder.up.1.upsample.conv.weight": (512, 256, 3, 3, 3),
        "decoder.conv_out.weight": (3, 128, 3, 3, 3),
    },
    "ivvae 4": {
        "encoder.conv1.conv_2d.weight": (64, 3, 3, 3),
        "encoder.conv1.conv_3d.weight": (64, 3, 3, 3, 3),
        "encoder.downsamples.0.residual.0.gamma": (128, 1, 1, 1),
        "encoder.downsamples.2.resample_2d.1.weight": (64, 64, 3, 3),
        "encoder.downsamples.3.shortcut.conv_2d.weight": (128, 128, 1, 1),
        "encoder.downsamples.4.residual.6.conv_3d.weight": (128, 256, 3, 3, 3),
        "encoder.downsamples.5.time_conv.weight": (128, 128, 2, 1, 1),
        "encoder.downsamples.8.resample_3d.1.bias": (256,),
        "encoder.downsamples.9.Attention_2d.norm.gamma": (256, 1, 1),
        "encoder.downsamples.10.residual.2.conv.weight": (512, 512, 3, 3),
        "encoder.downsamples.13.Attention_3d.to_qkv.weight": (768, 256, 1, 1),
        "encoder.middle.1.Attention_2d.proj.weight": (256, 256, 1, 1),
        "encoder.middle.2.residual.3.gamma": (512, 1, 1, 1),
        "encoder.head.0.gamma": (512, 1, 1, 1),
        "encoder.head.2.PAC_0.conv.weight": (8, 512, 1, 1),
        "encoder.head.2.PAC_12.conv.weight": (8, 512, 3, 3),
        "encoder.head.2.PAC_conv.conv.weight": (8, 48, 1, 1),
        "conv1.conv_2d.weight": (4, 8, 1, 1),
        "conv1.conv_3d.weight": (4, 8, 1, 1, 1),
        "conv2.conv_3d.bias": (2,),
        "decoder.conv1.conv.weight": (512, 4, 3, 3),
        "decoder.upsamples.5.Attention_2d.to_qkv.bias": (768,),
        "decoder.upsamples.6.time_conv.weight": (512, 256, 1, 1, 1),
        "decoder.upsamples.6.resample_3d.1.weight": (128, 256, 3, 3),
        "decoder.upsamples.7.shortcut.conv_3d.weight": (256, 256, 1, 1, 1),
        "decoder.upsamples.14.resample_2d.1.weight": (64, 128, 3, 3),
        "decoder.upsamples.17.residual.6.conv_3d.weight": (64, 128, 3, 3, 3),
        "decoder.head.0.gamma": (128, 1, 1, 1),
        "decoder.head.2.conv_3d.weight": (3, 128, 3, 3, 3),
    },
    "osvae": {
        "scale": (1, 4, 1, 1, 1),
        "shift": (1, 4, 1, 1, 1),
        "spatial_vae.module.encoder.conv_norm_out.weight": (512,),
        "spatial_vae.module.encoder.down_blocks.1.resnets.0.conv_shortcut.weight": (256, 128, 1, 1),
        "spatial_vae.module.encoder.mid_block.attentions.0.to_out.0.weight": (512, 512),
        "spatial_vae.module.decoder.up_blocks.0.upsamplers.0.conv.weight": (512, 512, 3, 3),
        "spatial_vae.module.quant_conv.weight": (8, 8, 1, 1),
        "temporal_vae.encoder.conv_in.conv.weight": (128, 4, 3, 3, 3),
        "temporal_vae.encoder.block_res_blocks.1.0.conv3.conv.weight": (256, 128, 1, 1, 1),
        "temporal_vae.encoder.block_res_blocks.3.3.norm2.bias": (512,),
        "temporal_vae.encoder.conv_blocks.2.conv.weight": (256, 256, 3, 3, 3),
        "temporal_vae.encoder.res_blocks.3.conv1.conv.weight": (512, 512, 3, 3, 3),
        "temporal_vae.encoder.norm1.weight": (512,),
        "temporal_vae.encoder.conv2.conv.weight": (8, 512, 1, 1, 1),
        "temporal_vae.quant_conv.conv.weight": (8, 8, 1, 1, 1),
        "temporal_vae.post_quant_conv.conv.bias": (4,),
        "temporal_vae.decoder.conv1.conv.bias": (512,),
        "temporal_vae.decoder.block_res_blocks.2.0.conv3.conv.weight": (256, 512, 1, 1, 1),
        "temporal_vae.decoder.conv_blocks.2.conv.weight": (1024, 512, 3, 3, 3),
        "temporal_vae.decoder.conv_blocks.1.conv.weight": (512, 256, 3, 3, 3),
        "temporal_vae.decoder.conv_out.conv.weight": (4, 128, 3, 3, 3),
    },
    "sdvae": {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
        "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "decoder.up.0.block.2.conv2.weight": (128, 128, 3, 3),
        "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "quant_conv.weight": (8, 8, 1, 1),
    },
}

BLOCKS = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
SD = {
    "block_out_channels": [8, 16, 24, 24],
    "layers_per_block": 2,
    "norm_num_groups": 2,
    "latent_channels": 4,
    **BLOCKS,
}
TINY = {
    "odvae": {"width": 8},
    "odvae 3": {"width": 8, "variant": 3, "blocks": 1},
    "odvae 2": {"width": 8, "variant": 2, "blocks": 1},
    "odvae 1": {"width": 8, "variant": 1, "mult": (1, 1, 2, 3)},
    "ospvae 1.1": {"width": 8, "blocks": 1},
    "ospvae 1.0": {"width": 8, "blocks": 1, "release": "1.0"},
    "cvvae": {"width": 8, "z": 6},
    "cvvae 3D": {"width": 8, "half_3d": False},
    "ivvae": {"dim": 4, "blocks": 1, "mult": (1, 2, 2, 3), "z": 8},
    "osvae": {
        "width": 8,
        "filters": 8,
        "temporal_blocks": 2,
        "latent_mean": (0.1, 2, 3, 4),
        "latent_std": (9, 3.85, 1, 2),
    },
    "sdvae": {"arguments": SD},
}


def build(name: str, **options):
    return vae.build(name.split()[0], **options)


def same(one, other) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture(scope="module")
def tiny():
    """A tiny OD-VAE and its official state dict."""
    torch.manual_seed(0)
    model = vae.build("odvae", width=8, blocks=1)
    return model, official(model)


# ---- names and shapes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_the_names_and_shapes_of_the_published_files(name):
    options, tensors, numbers, ranks = SIZES[name]
    with torch.device("meta"):
        model = build(name, **options)
    state = official(model)
    assert (len(state), sum(t.numel() for t in state.values())) == (tensors, numbers)
    if ranks:
        assert Counter(t.ndim for key, t in state.items() if key.endswith((".weight", ".gamma"))) == ranks
    for key, shape in KEYS.get(name, {}).items():
        assert tuple(state[key].shape) == shape, key
    back, title = convert(state)
    assert title.split()[0] == name.split()[0]
    assert {key: t.shape for key, t in back.state_dict().items()} == {k: t.shape for k, t in model.state_dict().items()}
    assert back.spec == model.spec


@pytest.mark.parametrize("name", TINY)
def test_there_and_back_is_the_same_model(name):
    model = build(name, **TINY[name])
    back, title = convert(official(model))
    assert same(back, model) and title.startswith(name.split()[0])
    assert back.spec == model.spec and not back.training
    assert all(parameter.requires_grad for parameter in back.parameters())
    x = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    with torch.no_grad():
        assert torch.equal(back.reconstruct(x), model.eval().reconstruct(x))


def test_the_last_level_is_the_decoders_first(tiny):
    model, state = tiny
    assert torch.equal(state["decoder.up.3.block.1.conv2.conv.weight"], model.decoder.levels[0][1].conv2.weight)
    assert torch.equal(state["encoder.down.0.block.0.conv1.weight"], model.encoder.levels[0][0].conv1.weight[:, :, 0])


def test_ivvaes_stacks():
    model = vae.build("ivvae", **TINY["ivvae"])
    state, attention = official(model), model.decoder.levels[0][1].motion
    stack = torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight])[..., 0]
    assert torch.equal(state["decoder.upsamples.1.Attention_3d.to_qkv.weight"], stack)
    halves = (state["conv1.conv_2d.weight"][:, :, None], state["conv1.conv_3d.weight"])
    assert torch.equal(torch.cat(halves), model.quant_conv.weight)


def test_stable_diffusions_names_are_those_that_diffusers_converts():
    model = vae.build("sdvae", arguments=SD)
    theirs, ours = convert_ldm_vae_checkpoint(official(model), SD), model.inner.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in ours)


@pytest.mark.parametrize("old", [False, True])
def test_diffusers_own_names(old):
    model = vae.build("sdvae", arguments={**SD, "use_quant_conv": False, "use_post_quant_conv": False})
    state = model.inner.state_dict()
    if old:
        for new, then in (("to_q.", "query."), ("to_k.", "key."), ("to_v.", "value."), ("to_out.0.", "proj_attn.")):
            state = {key.replace(new, then): value for key, value in state.items()}
    back, title = convert(state, {"scaling_factor": 0.5})
    assert same(back, model) and title.startswith("sdvae (diffusers") and back.spec.latent_std == (2.0,) * 4


def test_the_config_beside_the_weights_is_heard(tiny):
    assert convert(tiny[1], {"encoder_attention": "AttnBlock3D"})[0].options.attn_reshape == "legacy"
    assert convert(tiny[1], {"encoder_attention": "AttnBlock3DFix"})[0].options.attn_reshape == "frame"
    cvvae = official(vae.build("cvvae", width=8, blocks=1))
    assert convert(cvvae, {"scaling_factor": 0.25})[0].spec.latent_std == (4.0,) * 4


# ---- files -----------------------------------------------------------------------------------------------------------


def plain(state):
    return state


def averaged(state):
    return {"ema_state_dict": {f"module.{key}": t for key, t in state.items()}, "state_dict": {"gen_model": {}}}


def trained(state):
    return {"state_dict": {"gen_model": state, "dics_model": {"w": torch.ones(1)}}, "ema_state_dict": {}, "epoch": 3}


def lightning(state):
    return {"state_dict": {**state, "loss.logvar": torch.zeros(1)}, "global_step": 7}


def a_part_of(state):
    return {**{f"first_stage_model.{key}": t for key, t in state.items()}, "model.conv_in.weight": torch.zeros(1)}


@pytest.mark.parametrize("wrap", [plain, averaged, trained, lightning, a_part_of])
def test_pickled_files(wrap, tiny, tmp_path, capsys):
    torch.save(wrap(tiny[1]), tmp_path / "checkpoint.ckpt")
    assert same(read(str(tmp_path / "checkpoint.ckpt")), tiny[0])
    line = capsys.readouterr().err
    numbers = sum(p.numel() for p in tiny[0].parameters())
    assert (
        line.endswith(
            f"checkpoint.ckpt: odvae (Open-Sora-Plan v1.2, variant 4), {'EMA weights, ' * (wrap is averaged)}"
            f"{numbers:,} parameters\n"
        )
        and line.count("\n") == 1
    )


def test_files_of_old_torch(tiny, tmp_path):
    torch.save(tiny[1], tmp_path / "weights.pth", _use_new_zipfile_serialization=False)
    assert same(read(str(tmp_path / "weights.pth")), tiny[0])


def test_a_folder_in_half_precision(tiny, tmp_path):
    save_file({key: t.half() for key, t in tiny[1].items()}, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"_class_name": "CausalVAEModel", "encoder_attention": "AttnBlock3D"})
    )
    model = vae.load(str(tmp_path))
    assert {p.dtype for p in model.parameters()} == {torch.float32} and model.options.attn_reshape == "legacy"
    weight = model.encoder.conv_in.weight
    assert torch.equal(weight, tiny[0].encoder.conv_in.weight.half().float())


def test_open_soras_config_names_no_class_of_diffusers(tmp_path):
    model = vae.build("osvae", width=8, filters=8, blocks=1, temporal_blocks=1)
    save_file(official(model), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "VideoAutoencoderPipeline", "micro_frame_size": 17}')
    assert same(vae.load(str(tmp_path)), model)


def test_what_was_read_can_be_exported(tmp_path):
    torch.save(official(vae.build("ivvae", **TINY["ivvae"])), tmp_path / "ivvae.pth")
    model = vae.load(str(tmp_path / "ivvae.pth"))
    model.save_pretrained(tmp_path / "export")
    assert same(vae.load(str(tmp_path / "export")), model)


def test_what_is_not_official_is_left_to_others(tmp_path):
    vae.build("odvae", width=8, blocks=1).save_pretrained(tmp_path / "export")
    for spec in (tmp_path, tmp_path / "export", "owner/name", "odvae", "diffusers:owner/name"):
        assert read(str(spec)) is None


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_weights_that_do_not_fit_are_listed(tiny):
    state = dict(tiny[1])
    del state["decoder.norm_out.weight"]
    state |= {f"extra.{i}": torch.zeros(1) for i in range(7)}
    state["encoder.conv_out.conv.bias"] = torch.zeros(9)
    with pytest.raises(UserError) as error:
        convert(state, origin="vae.ckpt")
    assert str(error.value) == (
        "vae.ckpt: odvae by its keys, but not its weights: 1 missing (decoder.norm_out.weight),"
        " 7 unexpected (extra.0; extra.1; extra.2; extra.3; extra.4; ...),"
        " 1 of another shape (encoder.conv_out.conv.bias: (9,), expected (8,))"
    )


def test_a_part_of_the_weights(tiny):
    state = {key: t for key, t in tiny[1].items() if not key.startswith("encoder.down.3.")}
    with pytest.raises(UserError, match=r"^half\.ckpt: odvae by its keys, but not whole \(mult="):
        convert(state, origin="half.ckpt")


def test_other_weights(tmp_path):
    save_file({"transformer.wte.weight": torch.zeros(2)}, tmp_path / "gpt.safetensors")
    with pytest.raises(
        UserError, match=r"transformer\.wte\.weight are of no official.*cvvae, ivvae, odvae, ospvae, osvae"
    ):
        read(str(tmp_path / "gpt.safetensors"))
    with pytest.raises(UserError, match="UniVAE has no official layout"):
        official(vae.build("univae", width=8, blocks=1))
    with pytest.raises(UserError, match="AutoencoderKLTemporalDecoder has no official layout"):
        official(build("svdvae", **vae.registry.entry("svdvae").tiny))


class Danger:
    def __reduce__(self):
        raise_ = "import pathlib; pathlib.Path('executed').touch()"
        return exec, (raise_,)


def test_nothing_is_executed(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({**tiny[1], "more": Danger()}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"x\.ckpt: holds Python objects other than tensors"):
        read("x.ckpt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", "x.pth"])
def test_damaged_files(name, tmp_path):
    (tmp_path / name).write_bytes(b"PK\x03\x04 not a checkpoint at all")
    with pytest.raises(UserError, match=rf"{name}: (damaged|holds Python objects)"):
        read(str(tmp_path / name))


def test_paths_that_name_no_checkpoint(tiny, tmp_path):
    with pytest.raises(UserError, match=r"none\.ckpt: no such file"):
        read(str(tmp_path / "none.ckpt"))
    (tmp_path / "a.yaml").touch()
    with pytest.raises(UserError, match=r"a\.yaml: expected a weight file \(\.safetensors, \.ckpt"):
        read(str(tmp_path / "a.yaml"))
    for name in ("a.ckpt", "b.ckpt"):
        torch.save(tiny[1], tmp_path / name)
    with pytest.raises(UserError, match=r"several weight files \(a\.ckpt, b\.ckpt\); name one"):
        read(str(tmp_path))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match=r"list\.pt: expected a state dict, found a list"):
        read(str(tmp_path / "list.pt"))


# ---------------------------------------------------------------------------------------------------------------------
# Our own names


@pytest.mark.parametrize("name", [name for name in vae.names() if name not in ("svdvae",)])
def test_weights_of_ours_are_named_whatever_their_size(name):
    """(The image VAE and its relatives inside diffusers share most names, and are told by the rest.)"""
    with torch.device("meta"):
        assert name_of(vae.build(name).state_dict()) == name
    assert name_of(["nothing.of", "ours"]) is None


def test_options_do_not_hide_a_family():
    with torch.device("meta"):
        for options in ({"refine": True}, {"fuse": "conv1x1"}, {"width": 16, "blocks": 1}):
            assert name_of(vae.build("univae", **options).state_dict()) == "univae"


def test_an_export_with_foreign_weights_says_whose(tmp_path):
    vae.build("univae", width=8, blocks=1).save_pretrained(tmp_path / "univae")
    vae.build("odvae", width=8, blocks=1).save_pretrained(tmp_path / "odvae")
    config = (tmp_path / "odvae" / "config.json").read_text()
    (tmp_path / "univae" / "config.json").write_text(config)
    with pytest.raises(UserError, match="by their names the weights are those of univae"):
        vae.load(str(tmp_path / "univae"))
    (tmp_path / "odvae" / "config.json").write_text(config.replace('"width": 8', '"width": 16'))
    with pytest.raises(UserError, match="of this family, with other options"):
        vae.load(str(tmp_path / "odvae"))
    assert explain(str(tmp_path)) == ""


def test_groups_of_norms_come_from_the_config_beside(tmp_path):
    model = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        expected = model.encode(x).latent_dist.mean
        torch.testing.assert_close(vae.load(str(file)).encode(x).latent_dist.mean, expected)
