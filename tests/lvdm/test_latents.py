import json
import pickle
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lvdm.errors import UserError
from lvdm.latents import (
    LatentScale,
    LatentStore,
    LatentWriter,
    Manifest,
    load_latent,
    sample_posterior,
    save_latent,
    weights_hash,
)
from lvdm.rng import generator

MANIFEST = Manifest(
    vae={"name": "univae", "config": {"z": 3, "norm": "frame"}},
    vae_sha256="ab" * 32,
    num_frames=9,
    stride=3,
    size=(16, 24),
    crop="center",
    shape=(3, 3, 2, 3),
    dtype="float32",
    count=11,
    shard_size=4,
    sources=[f"video{i}.mp4" for i in range(11)],
    classes=["run", "swim"],
    data={"index": "1234", "clips": 1, "flip": True, "seed": 0},
)


def record(i: int) -> dict:
    """Item `i`, with a mean and a scale of its own in every channel."""
    g = generator(0, "item", i)
    level = torch.tensor([-20.0, 0.0, 300.0]).view(3, 1, 1, 1) + 0.1 * i
    return {
        "mean": level + torch.randn(3, 3, 2, 3, generator=g),
        "logvar": torch.randn(3, 3, 2, 3, generator=g) - 1,
        "label": i % 2,
        "source": i,
        "start": 10 * i,
        "flip": i % 3 == 0,
        "num_frames": 9 - i % 2,
        "fps": 29.97 / 3,
    }


def fill(folder, manifest=MANIFEST, shards=None):
    writer = LatentWriter(folder, manifest)
    for shard in writer.missing() if shards is None else shards:
        writer.write(shard, [record(i) for i in manifest.items(shard)])
    return writer


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path):
    fill(tmp_path / "store").finish()
    return tmp_path / "store"


def test_items_come_back_exactly_in_float32(folder):
    store = LatentStore(folder)
    assert len(store) == 11 and len(list(store)) == 11
    for i in (10, 0, 3, 4, 7):
        item, expected = store[i], record(i)
        assert item.keys() == expected.keys()
        for name in ("mean", "logvar"):
            assert item[name].dtype == torch.float32 and torch.equal(item.pop(name), expected.pop(name))
        assert item == expected and type(item["flip"]) is bool
    with pytest.raises(IndexError):
        store[11]


def test_bfloat16_rounds_to_nearest(tmp_path):
    fill(tmp_path, replace(MANIFEST, dtype="bfloat16")).finish()
    for i, item in enumerate(LatentStore(tmp_path)):
        for name in ("mean", "logvar"):
            assert item[name].dtype == torch.float32
            assert torch.equal(item[name], record(i)[name].bfloat16().float())


def test_an_item_owns_its_memory(folder):
    item = LatentStore(folder)[5]
    assert item["mean"].untyped_storage().nbytes() == item["mean"].nbytes
    item["mean"].zero_()
    assert torch.equal(LatentStore(folder)[5]["mean"], record(5)["mean"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_statistics_are_those_of_posterior_samples(tmp_path, dtype):
    manifest = fill(tmp_path, replace(MANIFEST, dtype=dtype)).finish()
    items = list(LatentStore(tmp_path))
    mean = torch.stack([item["mean"] for item in items]).double()
    var = torch.stack([item["logvar"] for item in items]).double().exp()
    dims = (0, 2, 3, 4)
    assert np.allclose(manifest.mean, mean.mean(dims), rtol=1e-13, atol=1e-13)
    total = mean.var(dims, correction=0) + var.mean(dims)
    assert np.allclose(np.square(manifest.std), total, rtol=1e-12, atol=0)
    assert manifest.complete and LatentStore(tmp_path).manifest == manifest


def test_normalised_samples_have_zero_mean_and_unit_deviation(folder):
    store = LatentStore(folder)
    batch = [store[i % 11] for i in range(11 * 200)]
    mean, logvar = (torch.stack([item[name] for item in batch]) for name in ("mean", "logvar"))
    z = sample_posterior(mean, logvar, generator(0))
    normal = store.scale.normalise(z)
    assert torch.allclose(normal.mean((0, 2, 3, 4)), torch.zeros(3), atol=0.02)
    assert torch.allclose(normal.std((0, 2, 3, 4)), torch.ones(3), atol=0.02)
    assert torch.allclose(store.scale.denormalise(normal), z, atol=1e-4)
    assert torch.equal(store.scale.normalise(z[0]), normal[0])
    with pytest.raises(ValueError, match="expected"):
        store.scale.normalise(z[:, :2])


def test_scale_is_the_affine_map_of_its_numbers():
    scale = LatentScale(mean=[1.0, -2.0], std=[2.0, 0.5])
    z = torch.tensor([5.0, -1.0]).view(1, 2, 1, 1, 1)
    assert scale.normalise(z).flatten().tolist() == [2.0, 2.0]
    assert scale.normalise(z.bfloat16()).dtype == torch.float32


def test_posterior_draw_is_a_function_of_the_generator():
    mean, logvar = torch.full((100_000,), 3.0), torch.full((100_000,), 2 * np.log(0.5))
    z = sample_posterior(mean, logvar, generator(7))
    assert torch.equal(z, sample_posterior(mean, logvar, generator(7)))
    assert not torch.equal(z, sample_posterior(mean, logvar, generator(8)))
    # Five standard errors of 100,000 draws.
    assert abs(z.mean() - 3) < 5 * 0.5 / 316 and abs(z.var() - 0.25) < 5 * 0.25 * 2**0.5 / 316
    assert torch.allclose(sample_posterior(mean, torch.full_like(mean, -1e4), generator(7)), mean, rtol=0, atol=5e-6)
    assert sample_posterior(mean, torch.full_like(mean, 1e4), generator(7)).isfinite().all()


def test_an_interrupted_store_is_finished_to_the_same_bytes(folder, tmp_path):
    again = tmp_path / "again"
    writer = fill(again, shards=[0, 2])
    (again / ".shard-00001.safetensors.0123.part.safetensors").write_bytes(b"half a sha")
    damaged = again / "shard-00002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert writer.missing() == [1, 2]
    with pytest.raises(UserError, match=r"2 of 3 shards missing.*shard-00001.*lvdm train latents"):
        writer.finish()
    with pytest.raises(UserError, match=r"incomplete.*lvdm train latents"):
        LatentStore(again)
    fill(again).finish()
    assert contents(again) == contents(folder)
    assert fill(again).missing() == []
    fill(again).finish()
    assert contents(again) == contents(folder)


def test_writers_of_disjoint_shards_make_the_store_of_one(folder, tmp_path):
    writers = [LatentWriter(tmp_path / "shared", MANIFEST) for _ in range(2)]
    for shard in (2, 1, 0):
        # The strides of a VAE that runs in channels_last_3d.
        records = [record(i) for i in MANIFEST.items(shard)]
        mean = torch.stack([r["mean"] for r in records]).to(memory_format=torch.channels_last_3d)
        writers[shard % 2].write(shard, [r | {"mean": m} for r, m in zip(records, mean, strict=True)])
    writers[0].finish()
    assert contents(tmp_path / "shared") == contents(folder)


def test_a_folder_keeps_the_store_it_has(folder):
    before = contents(folder)
    other = replace(MANIFEST, num_frames=17, vae={"name": "univae", "config": {"z": 3, "norm": "clip"}})
    with pytest.raises(UserError, match=r"num_frames: .* 9, asked 17; vae\.config\.norm: .* 'frame'") as info:
        LatentWriter(folder, other)
    assert "stride" not in str(info.value) and "complete" not in str(info.value)
    assert contents(folder) == before
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="unknown store"):
        LatentWriter(folder, MANIFEST)


def test_require_lists_what_differs(folder):
    store = LatentStore(folder)
    store.require(vae_sha256="ab" * 32, num_frames=9, shape=(3, 3, 2, 3), size=(16, 24))
    with pytest.raises(UserError, match=r"num_frames: store says 9, asked 17; shape: ") as info:
        store.require(num_frames=17, shape=(4, 3, 2, 3), stride=3)
    assert str(folder) in str(info.value) and "stride" not in str(info.value)


def test_a_broken_store_is_refused_by_name(folder, tmp_path):
    with pytest.raises(UserError, match=r"none is no latent store.*lvdm train latents"):
        LatentStore(tmp_path / "none")
    shard, whole = folder / "shard-00001.safetensors", (folder / "shard-00001.safetensors").read_bytes()
    for damage in (whole[:-1], b"", b"\xff" * 100):
        shard.write_bytes(damage)
        with pytest.raises(UserError, match=r"shard-00001.safetensors is damaged.*lvdm train latents"):
            LatentStore(folder)
    shard.write_bytes((folder / "shard-00002.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"shard-00001.safetensors is not the shard"):
        LatentStore(folder)
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-00001.safetensors is missing.*lvdm train latents"):
        LatentStore(folder)
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps(asdict(MANIFEST) | {"version": 99}))
    with pytest.raises(UserError, match="version 99, this program reads 1"):
        LatentStore(folder)
    manifest.write_text(manifest.read_text()[:50])
    with pytest.raises(UserError, match=r"manifest.json is not JSON"):
        LatentStore(folder)


def test_bad_items_are_refused(tmp_path):
    writer = LatentWriter(tmp_path, MANIFEST)
    records = [record(i) for i in range(4)]
    with pytest.raises(ValueError, match="4 items, got 3"):
        writer.write(0, records[:3])
    with pytest.raises(ValueError, match="expected latents of"):
        writer.write(0, [r | {"mean": r["mean"][:2], "logvar": r["logvar"][:2]} for r in records])
    records[2]["logvar"][0, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match=r"item 2 \(video2.mp4\)"):
        writer.write(0, records)
    assert writer.missing() == [0, 1, 2]
    with pytest.raises(UserError, match="bfloat16, float32"):
        replace(MANIFEST, dtype="float16")


def test_pickled_stores_and_worker_processes_read_the_same(folder):
    store = LatentStore(folder)
    copy = pickle.loads(pickle.dumps(store))
    assert copy.manifest == store.manifest and torch.equal(copy[7]["mean"], store[7]["mean"])
    batch = next(iter(torch.utils.data.DataLoader(store, batch_size=11, num_workers=1)))
    assert torch.equal(batch["mean"], torch.stack([record(i)["mean"] for i in range(11)]))
    assert batch["flip"].dtype == torch.bool and batch["start"].tolist() == [10 * i for i in range(11)]


def test_weights_hash_tells_weights_apart_and_nothing_else():
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1.0), "c": torch.zeros(0, 2)}
    same = {"c": torch.zeros(0, 2), "b": torch.tensor(1.0), "a": torch.arange(6.0).view(2, 3).T.contiguous().T}
    assert weights_hash(same) == weights_hash(state)
    changes = [
        {"a": state["a"].nextafter(torch.tensor(9.0))},
        {"a": state["a"].view(3, 2)},
        {"a": state["a"].bfloat16()},
        {"a": state["a"].view(torch.int32)},
        {"d": torch.zeros(1)},
    ]
    hashes = {weights_hash(state | change) for change in changes}
    assert len(hashes) == len(changes) and weights_hash(state) not in hashes


def test_latent_files_round_trip(tmp_path):
    latent = torch.randn(4, 3, 2, 2, generator=generator(0)).permute(0, 1, 3, 2)
    for name in ("a", "b"):
        save_latent(tmp_path / name, latent, num_frames=9, fps=7.5, vae_sha256="cd", extra={"seed": "3", "class": "é"})
    file = load_latent(tmp_path / "a")
    assert torch.equal(file.latent, latent)
    assert (file.num_frames, file.fps, file.vae_sha256, file.extra) == (9, 7.5, "cd", {"seed": "3", "class": "é"})
    assert contents(tmp_path).keys() == {"a", "b"}
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    save_latent(tmp_path / "a", torch.zeros(1, 1, 1, 1), num_frames=1, fps=8, vae_sha256="cd")
    before = contents(tmp_path)
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_latent(tmp_path / "a", torch.ones(1, 1, 1, 1), num_frames=1, fps=8, vae_sha256="cd")
    assert contents(tmp_path) == before


def test_other_files_are_no_latent_files(tmp_path, folder):
    save_file({"latent": torch.zeros(1, 1, 1, 1)}, tmp_path / "bare")
    (tmp_path / "text").write_text("not a latent, but long enough for a header")
    for path, message in [
        (tmp_path / "none", "no such latent file"),
        (tmp_path / "text", "no latent file"),
        (tmp_path, "no latent file"),
        (folder / "shard-00000.safetensors", "no latent file"),
        (tmp_path / "bare", "without its number of frames"),
    ]:
        with pytest.raises(UserError, match=message):
            load_latent(path)
