"""On one H200: time and memory of the VAEs against those of the official code of OD-VAE on the same chip, in bf16."""

import pytest
import torch

import vae
from lvdm.accelerator import device
from sample.bench.vae import measure
from train import bench
from train.configs import BenchTrainVAE

H200 = "H200" in torch.cuda.get_device_name() if torch.cuda.is_available() else False

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not H200, reason="the figures to beat are of an H200"),
]

OFFICIAL = [
    ((1, 25, 256, 256), 0.0371, 0.1577),
    ((8, 25, 256, 256), 0.266, 0.827),
    ((1, 81, 256, 256), 0.114, 0.500),
    ((1, 17, 720, 1280), 0.371, 1.588),
]
"""Shape, and seconds to encode and to decode, of the official OD-VAE."""
OFFICIAL_STEPS = [((1, 25, 256), 0.519, 60.7), ((8, 17, 128), 0.631, 82.0)]
"""Batch, frames and size, seconds and peak GiB of its training step with L1 alone."""


def built(name: str, **options):
    torch.manual_seed(0)
    return vae.build(name, **options).to(device(), torch.bfloat16).eval()


@pytest.mark.parametrize("name", ["odvae", "univae"])
@pytest.mark.parametrize(("shape", "encode", "decode"), OFFICIAL)
def test_encodes_and_decodes_at_2_2_times_the_speed(name, shape, encode, decode):
    rows = measure({name: built(name)}, ["encode", "decode"], shape, rounds=10, precision="bf16")[name]
    assert rows["encode"].median <= encode / 2.2 and rows["decode"].median <= decode / 2.2


def test_streams_are_flat_and_take_4_gib():
    model = {"univae": built("univae", refine=True)}
    works = ["encode", "decode", "refine"]
    short, long = (
        measure(model, works, (1, frames, 256, 256), rounds=1, precision="bf16", stream=True)["univae"]
        for frames in (33, 257)
    )
    for work in works:
        assert long[work].peak_gib <= 4 and long[work].peak_gib <= 1.05 * short[work].peak_gib


def test_720p_is_decoded_in_10_gib_and_refined_in_12_at_the_speed_of_the_whole_clip():
    model = {"univae": built("univae", refine=True)}
    whole, stream = (
        measure(model, ["decode", "refine"], (1, 17, 720, 1280), rounds=5, precision="bf16", stream=stream)["univae"]
        for stream in (False, True)
    )
    assert stream["decode"].peak_gib <= 10 and stream["refine"].peak_gib <= 12
    assert all(stream[work].median <= 1.1 * whole[work].median for work in ("decode", "refine"))


def test_a_frame_of_d2_takes_1_2_times_one_of_d1():
    model = {"univae": built("univae", refine=True)}
    rows = measure(model, ["decode", "refine"], (1, 25, 256, 256), rounds=10, precision="bf16")["univae"]
    assert rows["refine"].median / rows["refine"].frames <= 1.2 * rows["decode"].median / rows["decode"].frames


@pytest.mark.parametrize(("clip", "seconds", "gib"), OFFICIAL_STEPS)
def test_a_training_step_is_1_8_times_as_fast_in_60_percent_of_the_memory(clip, seconds, gib):
    batch, frames, size = clip
    keys = {"losses": ["l1"], "checkpointing": False, "precision": "bf16", "compile": True}
    rows = bench.run(BenchTrainVAE("odvae", batch=batch, frames=frames, size=size, **keys))
    row = rows["l1", "kept", "odvae"]
    assert row.median <= seconds / 1.8 and row.peak_gib <= 0.6 * gib
