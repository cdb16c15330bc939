"""The table of VAEs and the stages of one: exact counts, the level table of UniVAE, closed forms of FLOPs."""

import math
import re

import pytest
import torch

import vae
from lvdm.errors import UserError
from sample import zoo
from sample.configs import DescribeVAE
from vae import memory
from vae.adapter import CLASSES

COUNTS = {"univae": 234_766_311, "odvae": 239_189_991, "cvvae": 182_446_475, "sdvae": 83_653_863}


def lines(text: str, first: str) -> dict[str, list[str]]:
    """The rows below the head that begins with `first`, by name."""
    block = next(block for block in text.split("\n\n") if block.startswith(first))
    return {row[0]: row[1:] for row in map(str.split, block.splitlines()[1:])}


def run(model, frames: int, size: int) -> dict[str, zoo.Stage]:
    """The stages of encoding a clip."""
    x = torch.empty(1, 3, frames, size, size, device="meta")
    encode = model.codes if model.spec.discrete else model.encode
    return {stage.name: stage for stage in zoo.measure(model, lambda: encode(x))[0]}


# ---------------------------------------------------------------------------------------------------------------------
# All of them


def test_the_table_has_every_name_with_exact_counts_and_says_what_spec_says(lvdm, capsys):
    assert lvdm("vae list") == 0
    table = capsys.readouterr().out.removesuffix("\n")
    assert table == zoo.table()  # and nothing else
    head, *rows = table.splitlines()
    assert [row.split()[0] for row in rows] == vae.names() and head.split()[0] == "name"
    assert all(len(row) <= 130 and row == row.rstrip() for row in (head, *rows))
    cells = {row.split()[0]: re.split(r"  +", row) for row in rows}
    for name, count in COUNTS.items():
        assert cells[name][1] == f"{count:,}"
    assert cells["univae"][2:8] == ["4x8x8", "4n+1", "4", "4x5x32x32", "yes", "continuous"]
    assert cells["odvae"][2:8] == ["4x8x8", "4n+1", "4", "4x5x32x32", "no", "continuous"]
    assert cells["sdvae"][2:8] == ["1x8x8", "any", "4", "4x17x32x32", "yes", "continuous"]
    for name, row in cells.items():
        model = vae.build(name, **vae.registry.entry(name).tiny)
        assert row[6:8] == ["yes" if model.streams else "no", "codes" if model.spec.discrete else "continuous"]
        assert row[8] == vae.registry.entry(name).paper


# ---------------------------------------------------------------------------------------------------------------------
# One of them

LEVELS = {  # C, T, H = W of UniVAE, 17 frames of 256x256
    "encode 17x256x256": {
        "encoder.conv_in": (128, 17, 256),
        "encoder.levels.0": (128, 17, 256),
        "encoder.downs.0": (128, 17, 128),
        "encoder.levels.1": (256, 17, 128),
        "encoder.downs.1": (256, 9, 64),
        "encoder.levels.2": (512, 9, 64),
        "encoder.downs.2": (512, 5, 32),
        "encoder.levels.3": (512, 5, 32),
        "encoder.mid": (512, 5, 32),
        "encoder.conv_out": (8, 5, 32),
        "quant_conv": (8, 5, 32),
    },
    "decode 4x5x32x32": {
        "decoder.post_quant_conv": (4, 5, 32),
        "decoder.conv_in": (512, 5, 32),
        "decoder.mid": (512, 5, 32),
        "decoder.levels.0": (512, 5, 32),
        "decoder.ups.0": (512, 9, 64),
        "decoder.levels.1": (512, 9, 64),
        "decoder.ups.1": (512, 17, 128),
        "decoder.levels.2": (256, 17, 128),
        "decoder.ups.2": (256, 17, 256),
        "decoder.levels.3": (128, 17, 256),
        "decoder.conv_out": (3, 17, 256),
    },
}


def test_univae_level_by_level():
    text = zoo.describe(DescribeVAE("univae"))
    for first, levels in LEVELS.items():
        rows = lines(text, first)
        assert list(rows) == list(levels)  # in the order in which they run
        for name, (channels, frames, side) in levels.items():
            assert rows[name][:4] == [str(n) for n in (channels, frames, side, side)], name
            mib = channels * frames * side * side * 4 / 2**20
            assert rows[name][6] == f"{mib:,.1f}", name
    assert text.endswith("largest single output 1,088.0 MiB (decoder.ups.2), in fp32")


def test_flops_and_parameters_of_convolutions_are_the_closed_forms():
    model = zoo.on_meta("univae", {})
    stages = run(model, 17, 256)
    assert stages["encoder.conv_in"].flops == 2 * 3 * 9 * 128 * 17 * 256 * 256  # a frame at a time
    assert stages["encoder.conv_out"].flops == 2 * 512 * 27 * 8 * 5 * 32 * 32
    groups = sum(2 * 64 * 9 * t * 64 * 9 * 64 * 64 for t in (3, 5, 7, 9))  # 9 frames of 64x64 from 4 groups of 64
    assert stages["encoder.downs.1"].flops == groups
    blocks = [128 * 9 * 256 + 256 * 9 * 256 + 128 * 256, 2 * 256 * 9 * 256]  # two convolutions each, one shortcut
    assert stages["encoder.levels.1"].flops == 2 * sum(blocks) * 17 * 128 * 128
    mid = zoo.parameters(model.encoder.mid)
    attention = 4 * 1024**2 * 512 * 5  # two products of 1024x1024 and 512 channels a frame
    weights = mid - 512 * (3 * 2 * 2 - 2) - 512 * 8  # without norms and biases
    assert stages["encoder.mid"].flops == 2 * weights * 5 * 32 * 32 + attention


@pytest.mark.parametrize("name", vae.names())
def test_every_registered_model_is_taken_apart_whole(name):
    """Rows and parts add up to all parameters, and the last rows are moments and frames of the right shape."""
    text = zoo.describe(DescribeVAE(name, frames=9, size=64))
    assert "cannot be counted" not in text and re.search(r"encode [\d.]+ TFLOP, decode [\d.]+ TFLOP", text)
    model = zoo.on_meta(name, {})
    assert sum(count for _, count in zoo.parts(model)) == zoo.parameters(model)
    z = model.spec.latent_shape(9, 64, 64)
    stages, total = zoo.measure(model, lambda: model._frames(torch.empty(1, *z, device="meta")))
    assert sum(stage.flops for stage in stages) == total > 0
    assert stages[-1].shape == ((6 if name == "ivvae" else 3), model.spec.frames(z[1]), 64, 64)
    moments = list(run(model, 9, 64).values())[-1].shape
    assert moments == ((1 if model.spec.discrete else 2) * z[0], *z[1:])


def test_stages_called_a_few_frames_at_a_time_add_up_and_the_largest_is_of_one_call():
    model = vae.build("sdvae", **vae.registry.entry("sdvae").tiny).to("meta")
    stage = run(model, 17, 32)["inner.encoder.conv_in"]
    assert stage.calls == [(8, 8, 32, 32), (8, 8, 32, 32), (8, 1, 32, 32)] and stage.shape == (8, 17, 32, 32)
    assert stage.flops == 2 * 3 * 9 * 8 * 17 * 32 * 32


def test_refinement_is_counted_with_what_it_needs_of_d1():
    options = {"width": 16, "blocks": 1, "refine": True}
    text = zoo.describe(DescribeVAE("univae", options, frames=9, size=32))
    rows = lines(text, "refine 4x3x4x4")
    assert rows["refiner.conv_out"][:4] == ["3", "17", "32", "32"] and rows["refiner.ups.1"][1] == "17"
    assert "decoder.ups.1" in rows and "decoder.levels.2" not in rows  # as far as the tap
    assert re.search(r"^refines +2T - 1 frames$", text, re.M) and re.search(r"^  refiner +[\d,]+$", text, re.M)


@pytest.mark.parametrize("kind", CLASSES)
def test_autoencoders_of_diffusers_are_counted_or_say_why_not(kind):
    try:
        model = zoo.on_meta(f"diffusers:{kind}", {})
    except UserError as error:
        assert re.search("no size of its own, give model_args: .*in_channels|diffusers [\\d.]+ has no", str(error))
        return
    text = zoo.levels(model, 5, 128)
    assert re.search(r"encode [\d.e-]+ TFLOP, decode [\d.e-]+ TFLOP; largest", text)


def test_what_looks_at_numbers_is_said_in_a_line(monkeypatch):
    model = zoo.on_meta("univae", {"width": 16, "blocks": 1})
    monkeypatch.setattr(model, "_frames", lambda z: bool(z.sum() > 0))
    text = zoo.levels(model, 5, 32)
    (line,) = (line for line in text.splitlines() if line.startswith("decode"))
    assert "cannot be counted without running it" in line and text.splitlines()[-1].startswith("encode 0.")
    assert not any(module._forward_hooks for module in model.modules())


def test_a_trained_model_is_described_by_its_folder(lvdm, refiner, capsys):
    assert lvdm("vae info", refiner, frames=9, size=32) == 0
    of_folder = capsys.readouterr().out.split("\n", 1)
    assert lvdm("vae info", "univae", "model_args={width: 16, blocks: 1, refine: true}", frames=9, size=32) == 0
    of_name = capsys.readouterr().out.split("\n", 1)
    assert vae.registry.entry("univae").paper in of_folder[0] and of_folder[0].startswith(refiner)
    assert [line.split() for line in of_folder[1].splitlines()] == [line.split() for line in of_name[1].splitlines()]


def test_a_second_count_is_the_first(lvdm, monkeypatch, capsys):
    """What a model asks of memory before a large clip is kept, and is no part of the count."""
    monkeypatch.setattr(memory, "_KNOWN", {})
    counts = []
    for _ in range(2):
        assert lvdm("vae info", "univae", "model_args={width: 16, blocks: 1}", frames=17, size=256) == 0
        counts.append(capsys.readouterr().out)
    assert counts[0] == counts[1] and "TFLOP" in counts[0]


@pytest.mark.parametrize(
    "words, message",
    [
        (["univea"], "unknown VAE 'univea' (did you mean 'univae'?); known: "),
        ([], "unknown VAE ''; known: "),
        (["nowhere/at/all"], "nowhere/at/all: no such folder"),
        (["univae", "size=100"], "size=100: must be divisible by 8, e.g. 96 or 104"),
        (["univae", "frames=0"], "frames=0: expected at least 1"),
        (["univae", "model_args.widht=8"], "VAE 'univae' has no option 'widht'"),
        (["diffusers:AutoencoderKLWam"], "'AutoencoderKLWam' is no image or video autoencoder of diffusers"),
    ],
)
def test_refused_in_one_line(words, message, lvdm, capsys):
    assert lvdm("vae info", *words) == 2
    out, error = capsys.readouterr()
    assert message in error and error.count("\n") == 1 and not out


def test_options_go_with_names_alone(lvdm, refiner, capsys):
    assert lvdm("vae info", refiner, "model_args.width=8") == 2
    assert capsys.readouterr().err.startswith(f"error: model_args: {refiner} is trained")


def test_numbers_are_one_where_all_are_equal():
    assert zoo.numbers((1 / 0.18215,) * 4) == "5.49" and zoo.numbers((1.0, math.pi)) == "1 3.142"
