"""A folder to train from: an image goes through it as through the image VAE, or the reason is said."""

import re
import shlex

import pytest
import torch
from diffusers import AutoencoderKL

import vae
from lvdm import cli
from lvdm.config import parse
from train import init
from train.configs import InitVAE, TrainVAE
from train.vae import build_model


@pytest.fixture(scope="module")
def image_of(tmp_path_factory):
    """`image_of(scaling_factor=0.5)`: the folder of a tiny AutoencoderKL."""

    def save(widths=(8, 8, 8, 8), **config) -> str:
        torch.manual_seed(0)
        kinds = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
        sizes = {"block_out_channels": list(widths), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 3}
        model = AutoencoderKL(**kinds, **{**sizes, **config})
        for parameter in model.parameters():  # biases and norms of their own, too
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        folder = str(tmp_path_factory.mktemp("image"))
        model.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def lvdm(capsys):
    """`lvdm("vae init", "univae", out=...)`: exit code, output and errors."""

    def run(verb: str, *words: str, **keys: object) -> tuple[int, str, str]:
        code = cli.main([*verb.split(), *words, *(f"{key}={value}" for key, value in keys.items())])
        return code, *capsys.readouterr()

    return run


CAUSAL = {
    "univae": ["model_args.kernels=[3]"],
    "odvae": ["model_args.upsample=nearest", "model_args.norm=frame"],
}


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_an_image_goes_through_the_export_as_through_the_image_vae(name, image_of, lvdm, tmp_path):
    source, out = image_of(scaling_factor=0.5, shift_factor=0.25), tmp_path / "new" / "out"
    code, printed, _ = lvdm("vae init", name, *CAUSAL[name], source=source, out=out)
    assert code == 0 and "so images go through as before" in printed
    model, image = vae.load(str(out)), AutoencoderKL.from_pretrained(source).eval()
    x = torch.rand(2, 3, 32, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    shown = image.decode(image.encode(x).latent_dist.mode()).sample
    assert (model.reconstruct(x) - shown).abs().max() < 1e-5 * shown.abs().max()
    assert model.spec.latent_channels == 3 and model.spec.latent_std == (2.0,) * 3  # 1 / 0.5
    assert model.spec.latent_mean == (0.25,) * 3
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    distance = float(re.search(r"largest difference ([\d.e+-]+),", printed)[1])
    assert distance < 1e-4


def test_the_command_that_it_prints_trains_from_it(image_of, lvdm, tmp_path):
    _, printed, _ = lvdm("vae init", "univae", source=image_of((8, 16, 16, 16)), out=tmp_path / "out")
    words = shlex.split(printed.split("train it: lvdm train vae ")[1])
    config, _ = parse(TrainVAE, words[:-1])
    assert words[-1] == "..." and config.init == str(tmp_path / "out") and config.model == "univae"
    model, made = build_model(config), vae.load(str(tmp_path / "out"))
    assert model.latent_sha256() == made.latent_sha256() and model.spec == made.spec
    assert (made.options.width, tuple(made.options.mult), made.options.blocks) == (8, (1, 2, 2, 2), 1)


def test_an_image_vae_trained_here_is_a_source_and_its_child_trains(launch, command, lvdm, tmp_path):
    tiny = {"block_out_channels": [8] * 4, "layers_per_block": 1, "norm_num_groups": 2}
    tiny |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    phases = [{"samples": 2, "batch": 2, "frames": 1, "size": 16, "lr": 1e-3}]
    image, out, child = tmp_path / "image", tmp_path / "out", tmp_path / "child"
    assert launch("train vae", model="sdvae", model_args={"arguments": tiny}, phases=phases, out=image) == 0
    code, printed, _ = lvdm("vae init", "univae", "model_args.kernels=[3]", source=image, out=out)
    assert code == 0 and "images go through as before" in printed
    words = shlex.split(printed.split("train it: lvdm ")[1])[:-1]
    asked = parse(TrainVAE, words[2:])[0]
    assert launch("train vae", model_args=asked.model_args, init=out, out=child) == 0
    assert vae.load(str(child)).options == vae.load(str(out)).options


REASONS = [
    ("univae", ["model_args.norm=frame"], {}, "each see a part of the channels"),
    ("odvae", [], {}, "its upsampling is trilinear"),
    ("odvae", ["model_args.upsample=nearest", "model_args.conv=group"], {}, "mode=center"),
    ("odvae", ["model_args.upsample=nearest", "mode=random"], {}, "its temporal kernels are fresh"),
    ("cvvae", ["mode=center"], {}, "its decoder attends over time"),
    ("odvae", ["model_args.upsample=nearest"], {"norm_num_groups": 4}, "norms of 8 channels have 2 groups here and 4"),
]


@pytest.mark.parametrize("name, words, config, message", REASONS)
def test_why_an_image_changes_is_said(name, words, config, message, image_of, lvdm, tmp_path):
    code, printed, _ = lvdm("vae init", name, *words, source=image_of(**config), out=tmp_path / "out")
    (line,) = (line for line in printed.splitlines() if line.startswith("an image through both"))
    assert code == 0 and message in line and "as before" not in line
    assert vae.load(str(tmp_path / "out")).options.width == 8


def test_every_distance_has_a_reason_and_equal_seeds_give_equal_weights(image_of, tmp_path):
    source, hashes = image_of(), []
    for seed, out in ((1, "a"), (1, "b"), (2, "c")):
        config = InitVAE("odvae", {"upsample": "nearest"}, source, "random", str(tmp_path / out), seed)
        hashes.append(vae.load(str(init.run(config))).latent_sha256())
    assert hashes[0] == hashes[1] != hashes[2]
    exact = vae.build("odvae", width=8, mult=(1, 1, 1, 1), blocks=1, upsample="nearest")
    assert init.reasons(exact, vae.load(source), "tail") == []


@pytest.mark.parametrize(
    "what, message",
    [
        ("width", "would be (8, 3, 1, 3, 3), the video VAE has (16, 3, 1, 3, 3): both need the same width"),
        ("no model", "unknown VAE 'odvea' (did you mean 'odvae'?)"),
        ("no video VAE", "TATS cannot start from an image VAE"),
        ("no image VAE", ": UniVAE, which is no image VAE; expected diffusers' AutoencoderKL"),
        ("no source", "source: expected an image VAE"),
        ("no such source", "nowhere: no such folder"),
        ("no out", "out: expected the folder"),
        ("full", "out: there is something already; name a new folder"),
        ("option", "'odvae' has no option 'widht'"),
    ],
)
def test_refused_in_one_line_and_nothing_is_written(what, message, image_of, lvdm, tmp_path):
    model, keys = "odvae", {"source": image_of(), "out": tmp_path / "out"}
    words = {"width": ["model_args.width=16"], "option": ["model_args.widht=16"]}.get(what, [])
    if what == "no model":
        model = "odvea"
    elif what == "no video VAE":
        model, words = "tats", ["model_args={width: 4, z: 4, codes: 8}"]
    elif what == "no image VAE":
        vae.build("univae", width=16, blocks=1).save_pretrained(keys["source"])
    elif what == "no such source":
        keys["source"] = tmp_path / "nowhere"
    elif what in ("no source", "no out"):
        del keys[what.removeprefix("no ")]
    elif what == "full":
        keys["out"].mkdir()
        (keys["out"] / "notes.txt").write_text("mine")
    code, out, error = lvdm("vae init", model, *words, **keys)
    assert code == 2 and not out and message in error and error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.rglob("*")) == (["notes.txt", "out"] if what == "full" else [])


def test_a_write_that_fails_leaves_nothing(image_of, tmp_path, monkeypatch):
    def fail(self, path, **_):
        path.mkdir()
        raise OSError("no space left on device")

    monkeypatch.setattr("vae.odvae.ODVAE.save_pretrained", fail)
    with pytest.raises(OSError, match="no space"):
        init.run(InitVAE("odvae", {}, image_of(), "tail", str(tmp_path / "out")))
    assert not list(tmp_path.iterdir())
