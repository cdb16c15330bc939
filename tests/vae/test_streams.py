"""Streams equal the whole clip whatever the pieces, hold what they need and no more, and choose their pieces."""

import copy
import itertools
import os
import subprocess
import sys
import threading
import weakref
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import vae
from lvdm.errors import UserError
from lvdm.rng import generator
from vae import base, memory
from vae.streams import Stage, Stream

EXACT = {"rtol": 0.0, "atol": 1e-9}
CAUSAL = {"width": 8, "blocks": 1, "norm": "frame", "upsample": "nearest"}
MODELS = {
    "univae": ("univae", {"width": 8, "blocks": 1, "refine": True}),
    "univae blend": ("univae", {"width": 8, "blocks": 1, "refine": True, "inject": "blend", "fuse": "conv1x1"}),
    "odvae 1": ("odvae", {**CAUSAL, "variant": 1}),
    "odvae 4": ("odvae", CAUSAL),
    "odvae group": ("odvae", {**CAUSAL, "conv": "group", "variant": 3}),
    "ivvae": ("ivvae", vae.registry.entry("ivvae").tiny),
    "sdvae": ("sdvae", vae.registry.entry("sdvae").tiny),
}
GIB = 2**30


@cache
def model(name: str, dtype: torch.dtype = torch.float64):
    kind, options = MODELS[name]
    torch.manual_seed(0)
    built = vae.build(kind, **options).to(dtype).eval()
    assert built.spec.exact_streaming
    return built


def clip(frames: int, key: int = 0, size: tuple[int, int] = (16, 8), dtype=torch.float64) -> torch.Tensor:
    return (torch.rand(1, 3, frames, *size, generator=generator(key, "clip", frames)) * 2 - 1).to(dtype)


def latents(frames: int, key: int = 0, size: tuple[int, int] = (2, 1), dtype=torch.float64) -> torch.Tensor:
    return torch.randn(1, 4, frames, *size, generator=generator(key, "latents", frames)).to(dtype)


def cut(x: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """`x` in chunks of `sizes` frames, over and over."""
    bounds = [0, *itertools.takewhile(lambda end: end < x.shape[2], itertools.accumulate(itertools.cycle(sizes)))]
    return [x[:, :, a:b] for a, b in itertools.pairwise([*bounds, x.shape[2]])]


def joined(parts) -> torch.Tensor:
    return torch.cat(list(parts), 2)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# ---------------------------------------------------------------------------------------------------------------------
# The whole clip, to rounding

PLANS = st.lists(st.integers(1, 11), min_size=1, max_size=4)
AT_A_TIME = st.sampled_from([None, 1, 2, 3, 4, 8, 13])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(name=st.sampled_from(sorted(MODELS)), frames=st.integers(1, 22), plan=PLANS, at_a_time=AT_A_TIME)
def test_streamed_encoding_equals_the_whole_clip(name, frames, plan, at_a_time):
    ours, x = model(name), clip(frames)
    whole, parts = ours.encode(x).latent_dist, list(ours.stream_encode(cut(x, plan), at_a_time))
    torch.testing.assert_close(joined(part.mean for part in parts), whole.mean, **EXACT)
    torch.testing.assert_close(joined(part.logvar for part in parts), whole.logvar, **EXACT)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    case=st.sampled_from([(name, refine) for name in sorted(MODELS) for refine in (False, "univae" in name)]),
    count=st.integers(1, 5),
    plan=PLANS,
    at_a_time=AT_A_TIME,
    width=st.integers(1, 3),
    trim=st.integers(0, 8),
)
def test_streamed_decoding_and_refining_equal_the_whole_clip(case, count, plan, at_a_time, width, trim):
    name, refine = case
    ours, z = model(name), latents(count, size=(1, width))
    whole = (ours.refine if refine else ours.decode)(z).sample
    wanted = max(1, whole.shape[2] - trim) if trim else None
    parts = ours.stream_decode(cut(z, plan), refine=refine, num_frames=wanted, chunk_frames=at_a_time)
    torch.testing.assert_close(joined(parts), whole[:, :, :wanted], **EXACT)


@pytest.mark.parametrize("name", ["univae", "ivvae"])
def test_in_fp32_streams_are_the_whole_clip_within_its_rounding(name):
    ours, x = model(name, torch.float32), clip(13, size=(32, 24), dtype=torch.float32)
    whole = ours.encode(x).latent_dist.mean
    torch.testing.assert_close(joined(p.mean for p in ours.stream_encode([x], 1)), whole, rtol=1e-4, atol=1e-5)
    frames = ours.decode(whole).sample
    torch.testing.assert_close(joined(ours.stream_decode([whole], chunk_frames=1)), frames, rtol=1e-4, atol=1e-5)


def test_compiled_blocks_stream_the_whole_clip():
    ours, x, z = copy.deepcopy(model("univae")), clip(21), latents(6)
    encoded, decoded, refined = ours.encode(x).latent_dist.mean, ours.decode(z).sample, ours.refine(z).sample
    ours.compile_repeated_blocks(backend="eager")
    for _ in range(2):  # whole clips between, whose graphs are compiled
        torch.testing.assert_close(joined(p.mean for p in ours.stream_encode(cut(x, [3]), 4)), encoded, **EXACT)
        torch.testing.assert_close(joined(ours.stream_decode(cut(z, [1]), chunk_frames=4)), decoded, **EXACT)
        torch.testing.assert_close(joined(ours.stream_decode(cut(z, [1]), True, chunk_frames=4)), refined, **EXACT)
        torch.testing.assert_close(ours.encode(x[:, :, :5]).latent_dist.mean, encoded[:, :, :2], **EXACT)


def test_compiled_blocks_are_compiled_for_whole_clips_alone():
    ours, graphs = copy.deepcopy(model("univae")), []
    ours.compile_repeated_blocks(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    list(ours.stream_decode([latents(3)], chunk_frames=4))
    assert not graphs
    ours.decode(latents(3))
    assert graphs


def test_how_the_frames_arrive_does_not_change_a_bit():
    ours, x, z = model("univae", torch.float32), clip(14, dtype=torch.float32), latents(4, dtype=torch.float32)
    encoded = [joined(p.mean for p in ours.stream_encode(cut(x, plan), 4)) for plan in ([1], [3, 5], [14])]
    refined = [joined(ours.stream_decode(cut(z, plan), True, chunk_frames=4)) for plan in ([1], [3], [4])]
    for same in (encoded, refined):
        assert all(torch.equal(other, same[0]) for other in same[1:])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    frames=st.lists(st.integers(0, 9), max_size=6),
    chunk=st.integers(1, 9),
    rate=st.sampled_from([1, 2, 4]),
    step=st.sampled_from([1, 2, 4]),
    first=st.integers(0, 1),
)
def test_a_stage_takes_every_frame_once_in_pieces_of_its_kind(frames, chunk, rate, step, first):
    seen = []
    stream = Stream([Stage(lambda x, _: seen.append(x) or x, rate, step, first)], chunk)
    video = torch.arange(sum(frames)).view(1, 1, -1, 1, 1)
    for part in video.split(frames, 2):
        list(stream.push(part))
    taken = sum(x.shape[2] for x in seen)
    assert torch.equal(torch.cat([video[:, :, :0], *seen], 2), video[:, :, :taken])
    assert sum(frames) - taken < max(step, first + (not seen))
    for i, piece in enumerate(seen):
        length = piece.shape[2] - (first if i == 0 else 0)
        assert length % step == 0 and piece.shape[2] <= max(chunk // rate, step, 1)


# ---------------------------------------------------------------------------------------------------------------------
# What a stream holds


@pytest.mark.parametrize(("refine", "times"), [(False, 4), (True, 8)])
def test_the_largest_pictures_go_frame_by_frame_and_the_lower_levels_in_their_pieces(refine, times):
    ours, seen = model("univae"), {}
    decoder = ours.refiner if refine else ours.decoder
    for i, level in enumerate(decoder.levels):
        level[0].register_forward_pre_hook(lambda _, x, i=i: seen.setdefault(i, set()).add(x[0].shape[2]))
    for at_a_time, expected in ((1, [1, 1, 1, 1]), (2, [1, 1, 2, 2]), (times, [1, 2, times, times])):
        seen.clear()
        list(ours.stream_decode([latents(6)], refine, chunk_frames=at_a_time))
        assert [max(seen[i]) for i in range(4)] == expected
    for level in decoder.levels:
        level[0]._forward_pre_hooks.clear()


def test_refining_does_d1_to_the_tap_and_d2_and_nothing_twice():
    ours, z = model("univae", torch.float32), latents(4, dtype=torch.float32)

    def flops(run) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    tap = ours.decoder.trunk(z)
    d1, d2 = flops(lambda: ours.decoder.trunk(z)), flops(lambda: ours.refiner(z, tap))
    assert flops(lambda: ours.refine(z)) == d1 + d2
    for at_a_time in (1, 8, 24):
        assert flops(lambda n=at_a_time: list(ours.stream_decode([z], True, chunk_frames=n))) == d1 + d2


def test_two_streams_at_once_do_not_disturb_each_other():
    ours, videos, codes = model("univae"), [clip(13, k) for k in range(2)], [latents(4, k) for k in range(2)]
    encoded = zip(*[ours.stream_encode(cut(x, [3]), 4) for x in videos], strict=True)
    for k, parts in enumerate(zip(*encoded, strict=True)):
        torch.testing.assert_close(joined(p.mean for p in parts), ours.encode(videos[k]).latent_dist.mean, **EXACT)
    decoded = zip(*[ours.stream_decode(cut(z, [1]), True, chunk_frames=1) for z in codes], strict=True)
    for k, parts in enumerate(zip(*decoded, strict=True)):
        torch.testing.assert_close(joined(parts), ours.refine(codes[k]).sample, **EXACT)


def test_threads_stream_from_one_model():
    ours, videos, results = model("univae"), [clip(21, k) for k in range(4)], {}

    def work(k: int) -> None:
        posteriors = ours.stream_encode(cut(videos[k], [5]), 2)
        results[k] = joined(ours.stream_decode((p.mean for p in posteriors), True, chunk_frames=2))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, x in enumerate(videos):
        torch.testing.assert_close(results[k], ours.refine(ours.encode(x).latent_dist.mean).sample, **EXACT)


@pytest.mark.parametrize("work", ["encode", "refine"])
def test_a_stream_closed_early_lets_go_of_everything(work, monkeypatch):
    made = []
    monkeypatch.setattr(base, "Stream", lambda *given: made.append(Stream(*given)) or made[-1])
    ours = model("univae")
    endless = (clip(4) if work == "encode" else latents(1) for _ in itertools.count())
    stream = ours.stream_encode(endless, 4) if work == "encode" else ours.stream_decode(endless, True, chunk_frames=4)
    next(stream), next(stream)
    (inside,) = made
    made.clear()
    held = [weakref.ref(frames) for frames in inside.state.values()]
    del inside
    assert len(held) > 10 and all(ref() is not None for ref in held)
    stream.close()
    assert all(ref() is None for ref in held)


@pytest.mark.parametrize("work", ["encode", "decode", "refine"])
def test_the_peak_of_tensors_does_not_depend_on_the_length(work):
    ours, peaks = memory.without_weights(model("univae", torch.float32)), []
    for count in (33, 257):
        like = torch.empty(1, 3, 8, 64, 64) if work == "encode" else torch.empty(1, 4, 1, 8, 8)
        pieces = (like.to("meta") for _ in range(count // 8 if work == "encode" else count // 4))
        with memory.PeakBytes() as peak:
            if work == "encode":
                for _ in ours.stream_encode(pieces, 4):
                    pass
            else:
                for _ in ours.stream_decode(pieces, work == "refine", chunk_frames=4):
                    pass
        peaks.append(peak.most)
    assert peaks[0] == peaks[1] > 0


FLAT = r"""
import itertools, re, torch, vae
from pathlib import Path
torch.set_num_threads(1)
torch.manual_seed(0)
model = vae.build("univae", width=4, blocks=1, refine=True).eval()

def peak():
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # ru_maxrss is the parent's, too

before = peak()
for frames in (16, 128):
    video = (torch.rand(1, 3, 8, 96, 96) for _ in range(frames // 8))
    video = itertools.chain(video, [torch.rand(1, 3, 1, 96, 96)])
    latents = (posterior.mean for posterior in model.stream_encode(video, 8))
    for _ in model.stream_decode(latents, refine=True, chunk_frames=8):
        pass
    print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss is Linux's")
def test_the_memory_of_the_process_is_flat():
    """Its peak over what it had before the first frame, after 33 frames are rendered, and 257 more: within 5 %.

    glibc maps each tensor by itself here, so that the peak is of what is held and not of the holes in its heap.
    """
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run([sys.executable, "-c", FLAT], capture_output=True, text=True, check=True, timeout=300, env=env)
    short, long = map(int, run.stdout.split())
    assert 0 < long < 1.05 * short


@pytest.mark.parametrize(
    ("work", "size", "most"),
    [("encode", (256, 256), 4), ("refine", (256, 256), 4), ("decode", (720, 1280), 10), ("refine", (720, 1280), 12)],
)
def test_the_full_size_streams_within_its_memory_in_bf16(work, size, most):
    """GiB of weights and tensors with the default piece; what kernels borrow within themselves is not counted."""
    with torch.device("meta"):
        ours = vae.build("univae", refine=True).bfloat16().eval()
    height, width = size
    shape = (1, 3, 17, height, width) if work == "encode" else (1, 4, 5, height // 8, width // 8)
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    weights = sum(p.nbytes for p in ours.parameters())
    assert weights + memory.stream_bytes(ours, work, x, memory.default_chunk(ours, work, x)) < most * GIB


# ---------------------------------------------------------------------------------------------------------------------
# Pieces chosen from free memory


def frame(height: int, width: int, frames: int = 9) -> torch.Tensor:
    return torch.empty(1, 3, frames, height, width, device="meta")


def test_the_default_piece_falls_with_the_size_and_with_free_memory(monkeypatch):
    ours = model("univae", torch.float32)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 100 * GIB)
    sizes = [(64, 64), (256, 256), (512, 512), (720, 1280)]
    assert [memory.chunk_frames(ours, "encode", frame(*size)) for size in sizes] == [16, 8, 2, 1]
    needs = {n: memory.stream_bytes(ours, "encode", frame(256, 256), n) for n in (1, 2, 4, 8)}
    assert sorted(needs.values()) == list(needs.values()) and needs[8] > 1.5 * needs[1]
    for n, needed in needs.items():
        monkeypatch.setattr(memory, "free_bytes", lambda device, needed=needed: 1.01 * needed / memory.OTHER_SHARE)
        assert memory.chunk_frames(ours, "encode", frame(256, 256)) == n


def test_a_device_too_small_for_one_frame_is_told_what_would_fit(monkeypatch):
    ours = model("univae", torch.float32)
    needed = memory.stream_bytes(ours, "encode", frame(720, 1280), 1)
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed)
    with pytest.raises(UserError, match=r"encode of 720x1280 .* needs .* GiB .* tile=\d+ needs .*; bf16 needs about"):
        memory.chunk_frames(ours, "encode", frame(720, 1280))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    with pytest.raises(UserError, match="needs"):
        next(ours.stream_encode([torch.zeros(1, 3, 1, 264, 256)]))


@pytest.mark.parametrize("work", ["encode", "decode", "refine"])
def test_a_clip_larger_than_memory_goes_piece_by_piece_and_is_the_same(work, monkeypatch):
    monkeypatch.setattr(memory, "SMALL", 0)
    ours = model("univae")
    x = clip(9, size=(32, 24)) if work == "encode" else latents(3, size=(4, 3))

    def run():
        return ours.encode(x).latent_dist.mean if work == "encode" else getattr(ours, work)(x).sample

    whole, streams = run(), []
    needed = memory.stream_bytes(ours, work, x, 1)
    assert needed < 0.7 * memory.whole_bytes(ours, work, x)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1.01 * needed / memory.SHARE["cpu"])
    monkeypatch.setattr(base, "Stream", lambda *given: streams.append(given) or Stream(*given))
    torch.testing.assert_close(run(), whole, **EXACT)
    assert streams[-1][1] == 1


@pytest.mark.parametrize("name", vae.names())
def test_every_exact_model_reconstructs_a_clip_in_runs_after_asking_for_memory(name, monkeypatch):
    """Discrete ones too, whose public streams are refused."""
    monkeypatch.setattr(memory, "SMALL", 0)
    ours = vae.build(name, **vae.registry.entry(name).tiny).eval()
    if not ours.spec.exact_streaming:
        pytest.skip("streams are not exact")
    x = clip(7, size=(32, 32), dtype=torch.float32)
    whole = ours.reconstruct(x)
    ours.enable_tiling(0, 0, 5)
    torch.testing.assert_close(ours.reconstruct(x), whole, rtol=1e-3, atol=1e-4)


def test_what_tiles_need_is_counted_from_one_as_from_all():
    ours, size = model("univae", torch.float32), (144, 256)
    ours = copy.deepcopy(ours)
    ours.reach = 0  # any tile will do
    ours.enable_tiling(64, frames=0)
    x = frame(*size, frames=9)
    twin = memory.without_weights(ours)
    with memory.PeakBytes() as peak:
        for _ in twin.stream_encode([torch.empty(1, 3, 9, *size, device="meta")], 4):
            pass
    assert abs(memory.stream_bytes(ours, "encode", x, 4) / peak.most - 1) < 0.15


def test_chunks_and_numbers_that_do_not_fit_are_user_errors():
    ours, x, z = model("univae", torch.float32), clip(5, dtype=torch.float32), latents(2, dtype=torch.float32)
    for call, message in (
        (lambda: ours.stream_decode([z], num_frames=0), "num_frames=0: expected at least 1"),
        (lambda: ours.stream_decode([z], num_frames=-1), "num_frames=-1: expected at least 1"),
        (lambda: ours.stream_encode([x], 2.5), "chunk_frames=2.5: expected at least 1"),
        (lambda: ours.encode(x.numpy()), "encode: expected a tensor, .* got ndarray"),
        (lambda: ours.encode(x.double()), "encode: expected torch.float32, the model's dtype, got torch.float64"),
        (lambda: list(ours.stream_encode([x, x[..., :8, :]])), "expected a chunk like the first"),
        (lambda: list(ours.stream_encode([x, torch.cat([x, x])])), "expected a chunk like the first"),
        (lambda: list(ours.stream_encode([x, x.double()])), "the model's dtype"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_never_where_gradients_are_needed(monkeypatch):
    ours, x = model("univae"), clip(5)
    monkeypatch.setattr(memory, "SMALL", 0)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    with torch.enable_grad():
        z = ours.encode(x).latent_dist.mean
    assert z.requires_grad


def test_latents_in_bf16_for_a_model_in_fp32_are_counted_in_fp32(monkeypatch):
    """As autocast gives them, of which a meta tensor has none."""
    monkeypatch.setattr(memory, "SMALL", 0)
    monkeypatch.setattr(memory, "_KNOWN", {})
    ours, z = model("univae", torch.float32), latents(2, dtype=torch.float32)
    counts = []
    with torch.autocast("cpu", torch.bfloat16):
        for given in (z.bfloat16(), z):
            memory._KNOWN.clear()
            counts.append([memory.stream_bytes(ours, "decode", given, 1), memory.whole_bytes(ours, "decode", given)])
        whole, parts = ours.decode(z.bfloat16()).sample, joined(ours.stream_decode([z.bfloat16()]))
    assert counts[0] == counts[1]
    assert whole.dtype == parts.dtype == torch.bfloat16 and whole.shape == parts.shape == (1, 3, 5, 16, 8)


def test_what_is_on_meta_always_fits(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    assert memory.fits(model("univae", torch.float32), "encode", frame(2048, 2048))


def test_what_is_counted_is_what_is_allocated():
    """Two tensors of 4 KiB at once, a view, and a third after both are gone."""
    with memory.PeakBytes() as peak:
        a = torch.zeros(1024)
        b = a[10:] + 1
        assert peak.now == 4 * 1024 + 4 * 1014
        del a, b
        assert peak.now == 0
        torch.zeros(8)
    assert peak.most == 4 * 1024 + 4 * 1014
