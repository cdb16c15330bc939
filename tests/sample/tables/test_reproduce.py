"""Tables of the papers: every one at every scale is a sound plan; some are made from end to end, one of them killed."""

import csv
import dataclasses
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import vae
from lvdm import config as configs
from lvdm.bench import Row
from lvdm.errors import UserError
from lvdm.run import RunFolder
from sample.measure import figures, scores
from sample.plan import Plan, Step
from sample.tables import speed, timing
from sample.tables.configs import Reproduce
from sample.tables.estimate import IMAGE_VAES, Chain, disk, seconds
from sample.tables.reproduce import left_out, measures, models_of, over, plan_of, policies, timing_of
from sample.tables.table import Arm, Scale, Table, load_table
from train.vae import check_model

TABLES = sorted(path.stem for path in (configs.configs_root() / "tables").glob("*.yaml"))
SCALES = ("tiny", "small", "paper")
EVERY = pytest.mark.parametrize("table, scale", [(table, scale) for table in TABLES for scale in SCALES])


@cache
def table_of(name: str) -> Table:
    return load_table(Reproduce(table=name, scale="tiny", out="here"))


@cache
def planned(table: str, scale: str, **keys):
    loaded = table_of(table)
    videos = "" if loaded.what == "speed" else "my clips"
    config = Reproduce(table=table, scale=scale, videos=videos, out="here", **keys)
    return config, loaded, plan_of(config, loaded)


@cache
def resolved(table: str, scale: str) -> list:
    """The config of each step."""
    return [step.resolve() for step in planned(table, scale)[2].steps]


def arms(table: str, scale: str) -> list:
    """The configs of the trainings of the arms."""
    config, loaded, _ = planned(table, scale)
    outs = {model.vae for model in models_of(config, loaded) if model.trained}
    return [step for step in resolved(table, scale) if step.out in outs]


@cache
def on_meta(model: str, options: str) -> vae.base.VideoVAE:
    """The model of these options, JSON."""
    with torch.device("meta"):
        return vae.build(model, **json.loads(options))


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def test_there_are_tables():
    asked = {
        "univae": "fig5 fig6 fig7 norm table1 table2 table3",
        "odvae": "fig4 table1 table2 table3 table4",
        "cvvae": "table1 table4 table5",
        "ivvae": "gcconv table1 table2 table5 table6",
    }
    assert sorted(f"{paper}-{name}" for paper, names in asked.items() for name in names.split()) == TABLES
    for table in map(table_of, TABLES):
        assert all(isinstance(said, str) for said in table.shows_not) and table.title and table.says and table.protocol


@EVERY
def test_every_model_takes_its_clips_and_what_it_starts_from_was_made_before(table, scale):
    steps = resolved(table, scale)
    outs = [step.out for step in steps]
    assert len(set(outs)) == len(outs) and all(out.startswith("here/") for out in outs)
    for step in steps:
        if hasattr(step, "kl_weight") and step.seed == 0:
            check_model(step, on_meta(step.model, json.dumps(step.model_args)))
        for key in ("vae", "init", "source", "align_vae", "latents", "dit", "samples"):
            if (start := getattr(step, key, "")).startswith("here/"):
                assert start in outs[: outs.index(step.out)]


@pytest.mark.parametrize("table", TABLES)
def test_a_printed_command_is_its_step(table):
    """At the scale that changes the most keys."""
    for step, config in zip(planned(table, "tiny")[2].steps, resolved(table, "tiny"), strict=True):
        words = shlex.split(step.command().removeprefix(f"lvdm {step.verb} "))
        assert configs.parse(type(config), words)[0] == config


@EVERY
def test_all_models_of_a_table_see_the_same_clips_in_the_same_batches(table, scale):
    free = {"out", "seed", "model", "model_args", "init", "vae", "inject", "align_vae", "align", "align_mapping"}
    trained = arms(table, scale)
    for arm in trained[1:]:
        idle = set() if arm.adversarial_weight else {"update", "discriminator_norm"}
        assert {key for key in vars(arm) if getattr(arm, key) != getattr(trained[0], key)} <= free | idle


@EVERY
def test_every_arm_is_trained_with_every_seed_or_can_be_given(table, scale):
    config, loaded, _ = planned(table, scale)
    if loaded.what == "speed":
        assert set(timing_of(config, loaded).models) == set(loaded.arms)
        return
    models, absent = models_of(config, loaded), left_out(config, loaded)
    assert {model.arm.name for model in models} | absent.keys() == loaded.arms.keys()
    seeds = loaded.scales[scale].seeds
    assert len(arms(table, scale)) == seeds * sum(model.trained for model in models if not model.seed)
    for name, how in absent.items():
        if not loaded.arms[name].built:
            assert how == "not built here"
            continue
        key = re.match(r"to have it: given\.(\w+)=WEIGHTS \(.+\)$", how)[1]
        had = models_of(dataclasses.replace(config, given={key: "a/model"}), loaded)
        assert [model.vae for model in had if model.arm.name == name] == ["a/model"]


@EVERY
def test_lengths_fit_what_is_measured(table, scale):
    _, loaded, _ = planned(table, scale)
    chosen = loaded.scales[scale]
    if loaded.what == "speed":
        assert all(side % 8 == 0 for side in timing_of(*planned(table, scale)[:2]).size)
    factor = 8 if loaded.what == "refinement" else 4
    assert all(frames % factor == 1 for frames in chosen.frames) and chosen.size % 8 == 0
    assert chosen.frames == sorted(chosen.frames)


def test_paper_scale_takes_the_recipes_as_they_are():
    _, loaded, plan = planned("univae-table3", "paper")
    for arm, step, given in zip(loaded.arms.values(), plan.steps, resolved("univae-table3", "paper"), strict=True):
        recipe = configs.load(step.config_class(), arm.config)
        changed = {key for key in vars(given) if getattr(given, key) != getattr(recipe, key)}
        assert changed == {"out", "videos", "labels", "holdout"}


PAPERS = {
    ("univae-table3", "PSNR"): [31.16, 34.08, 34.13],
    ("univae-table3", "SSIM"): [0.8694, 0.8785, 0.8783],
    ("univae-table3", "LPIPS"): [0.0586, 0.0527, 0.0525],
    ("univae-table1", "PSNR"): [31.16, 26.26, 30.19, 31.15, 23.10, 30.76, 31.12, 34.13],
    ("univae-table2", "FVD, UCF101"): [8742.42, 8047.60, 7777.71],
    ("univae-table2", "KVD, SkyTimelapse"): [11.25, 9.41, 9.56],
    ("odvae-table1", "LPIPS, Panda-70M"): [0.0454, 0.0722, 0.0396, 0.0379, 0.2858, 0.0673, 0.0666],
    ("odvae-table1", "parameters (M)"): [239.19, 69.00, 83.65, 97.74, 52.19, 182.45, 393.34],
    ("odvae-table2", "IS, UCF101"): [58.98, 33.00, 31.41, 61.11, 53.13],
    ("odvae-table2", "it/s, SkyTimelapse"): [1.76, 0.86, 0.86, 1.29, 1.49],
    ("odvae-table3", "encode (it/s)"): [4.13, 2.15, 2.44, 4.13],
    ("odvae-table4", "PSNR"): [31.05, 30.98],
    ("cvvae-table1", "PSNR, COCO"): [27.6, 27.7, 26.6, 22.7, 23.4, 27.0],
    ("cvvae-table4", "SSIM"): [0.803, 0.748, 0.795],
    ("cvvae-table5", "LPIPS"): [0.153, 0.191, 0.172, 0.168],
    ("ivvae-table1", "LPIPS"): [0.05152, 0.02158, 0.08041, 0.08016, 0.05457, 0.02849],
    ("ivvae-table2", "FVD, FaceForensics"): [259.8, 328.2, 316.3, 285.5],
    ("ivvae-table5", "SSIM, position 2"): [0.8986, 0.9049, 0.9103, 0.9167],
    ("ivvae-table6", "both (s)"): [3.3, 5.4, 3.8, 3.8, 6.3],
}
"""Read in the papers' text, in the order of the arms."""


@pytest.mark.parametrize("table, metric", PAPERS)
def test_the_papers_numbers_are_the_papers(table, metric):
    told = [arm.told.get(metric) for arm in planned(table, "paper")[1].arms.values()]
    assert [number for number in told if number is not None] == PAPERS[table, metric]


@pytest.mark.parametrize("table", TABLES)
def test_the_papers_numbers_keep_their_text(table):
    """YAML takes the last 0 from a number without quotes."""
    path = configs.configs_root() / "tables" / f"{table}.yaml"
    blocks = re.findall(r"paper: \{([^}]*)\}", path.read_text().partition("\nscales:")[0])
    written = [number for block in blocks for number in re.findall(r': "?([\d.]+)"?(?:,|$)', block)]
    arms = OmegaConf.to_container(OmegaConf.load(path)).get("arms", {})
    own = [name for name, arm in arms.items() if "paper" in arm]
    assert written == [number for name in own for number in table_of(table).arms[name].paper.values()]
    assert len(own) == len(blocks)


def test_differences_between_positions_in_a_group_are_those_of_its_numbers():
    for arm in planned("ivvae-table5", "paper")[1].arms.values():
        ssim = [arm.told[f"SSIM, position {i}"] for i in (1, 2, 3, 4)]
        assert max(ssim) - min(ssim) == pytest.approx(arm.told["SSIM, largest difference"], abs=1e-9)


def test_seeds_come_one_after_the_other_and_the_stages_once():
    config, loaded, plan = planned("univae-fig7", "tiny", seeds=2)
    assert [step.verb for step in plan.steps] == ["train vae"] + 10 * ["train refine"]
    assert [model.seed for model in models_of(config, loaded)] == 5 * [0] + 5 * [1]
    assert [step.resolve().seed for step in plan.steps] == [0] + 5 * [0] + 5 * [1]


def test_seeds_are_of_models_and_the_real_clips_are_the_same_for_all():
    _, _, plan = planned("ivvae-table2", "tiny", seeds=2, c3d="c3d.pt")
    found = {(step.verb, step.resolve().seed) for step in plan.steps if "seed" in vars(step.resolve())}
    both = ("train vae", "train dit", "sample")
    assert found == {(verb, seed) for verb in both for seed in (0, 1)} | {("evaluate generation", 0)}


def test_a_scale_replaces_whole_keys_and_null_takes_them_back():
    assert over({"a.b": 1, "a.c": 2, "ab": 3}, {"a": {"b": 4}}) == {"ab": 3, "a": {"b": 4}}
    assert over({"a.b": 1, "ab": 3}, {"ab": None, "c": None}) == {"a.b": 1}


def test_hours_and_disk_follow_samples_and_width():
    _, _, plan = planned("univae-table3", "paper")
    step = "train vae", plan.steps[0].resolve()
    assert seconds(*step, 128) == pytest.approx(3_040_000 * 25 * 256**2 * 0.631 / (8 * 17 * 128**2))
    assert seconds(*step, 64) == seconds(*step, 128) / 2
    assert disk(*step, 128) == (3 * 16 + 4) * 240e6 == 4 * disk(*step, 64)


def test_hours_of_a_chain_are_those_of_the_published_steps():
    """Latte-XL/2 took 0.3206 s for 8 of 16 latent frames of 32x32."""
    steps = {step.verb: step.resolve() for step in planned("ivvae-table2", "small")[2].steps}
    class_free = {"condition": "class", "label_dropout": 0.1}
    transformer = dataclasses.replace(steps["train dit"], model="latte-xl/2", model_args={}, **class_free)
    latents = dataclasses.replace(steps["train latents"], frames=61, size=256)
    drawn = dataclasses.replace(steps["sample"], count=8, steps=1)

    def hours_of(verb: str, config, **changed):
        configs = {"train latents": latents, "train dit": transformer, "sample": drawn, **changed}
        return seconds(verb, config, 128, Chain(configs={name.replace("_", " "): c for name, c in configs.items()}))

    trained = hours_of("train dit", transformer)
    assert trained == pytest.approx(transformer.total * 0.3206 / 8)
    small = dataclasses.replace(transformer, model="latte-b/2")
    assert hours_of("train dit", small, train_dit=small) == pytest.approx(trained * 12 * 768**2 / (28 * 1152**2))
    assert disk("train dit", transformer, 1) == pytest.approx((3 * 16 + 4) * 674e6, rel=0.01)
    free = dataclasses.replace(transformer, condition="none", label_dropout=0.0)
    decoded = hours_of("evaluate generation", steps["evaluate generation"])
    assert decoded == pytest.approx(0.827 * 61 / 25)
    assert hours_of("sample", drawn, train_dit=free) == pytest.approx(0.1155 + decoded)
    assert hours_of("sample", drawn) == pytest.approx(2 * 0.1155 + decoded)  # guidance takes two passes
    one = dataclasses.replace(drawn, guidance=1)
    assert hours_of("sample", one, sample=one) == pytest.approx(0.1155 + decoded)


def test_disk_of_a_chain_is_that_of_its_store_and_samples():
    """Two clips of each of UCF101's 13,320 videos, and their mirrors: mean and variance of 81 frames, or of 21."""
    given, sets = {"sd_vae": "sd", "cv_vae": "cv"}, {"ucf101": "ucf"}
    config = Reproduce(table="odvae-table2", scale="paper", out="here", videos="web", given=given, sets=sets)
    steps = {step.name: step for step in plan_of(config, table_of(config.table)).steps}
    for name, frames in (("OD-VAE", 21), ("SD-VAE", 81), ("CV-VAE", 21)):
        latent = 4 * 4 * frames * 32 * 32
        assert steps[f"{name}, UCF101: latents"].disk == 13_320 * 2 * 2 * 2 * latent
        assert steps[f"{name}, UCF101: samples"].disk == 2048 * (latent + 3 * 81 * 256 * 256 // 8)
        encoded = 13_320 * 4 * 81 * 256**2 * 0.266 / (8 * 25 * 256**2)
        assert steps[f"{name}, UCF101: latents"].cost == pytest.approx(1 + encoded)
    assert steps["SD-VAE, UCF101: latents"].disk == 141_416_202_240


@pytest.mark.parametrize("name", vae.names())
def test_vaes_that_keep_the_number_of_frames_are_known_without_torch(name):
    assert on_meta(name, "{}").spec.time_factor == (1 if name in IMAGE_VAES else 4)


def mixed() -> Step:
    """A training that mixes strides, and then kinds."""
    mix = [{"share": 0.75, "frames": 1, "size": 64}, {"share": 0.25, "frames": 9, "size": 32, "fps": 12}]
    strides = {"samples": 60, "batch": 2, "frames": 5, "size": 32, "strides": [1, 3]}
    phases = [strides, {"samples": 100, "batch": 2, "mix": mix}]
    return Step("mixed", "train vae", "vae/univae.yaml", {"phases": phases, "holdout": 0.25})


def test_hours_of_a_mixture_are_those_of_its_kinds():
    video, image = 60 * 5 * 32**2 + 25 * 9 * 32**2, 75 * 64**2 / 2.2
    assert seconds("train vae", mixed().resolve(), 128) == pytest.approx((video + image) * 0.631 / (8 * 17 * 128**2))


def test_clips_of_every_kind_and_stride_are_looked_for():
    def shapes(**keys):
        return [(p.frames, p.stride, p.fps, p.size) for p in policies(dataclasses.replace(mixed().resolve(), **keys))]

    videos = [(5, 1, 0, 32), (5, 3, 0, 32), (9, 1, 12, 32)]
    assert shapes() == [*videos[:2], (1, 1, 0, 64), videos[2]]
    assert shapes(images="pictures") == videos
    assert {(p.split, p.holdout) for p in policies(mixed().resolve())} == {("train", 0.25)}


@pytest.mark.parametrize("table", TABLES)
def test_printing_writes_nothing(table, tmp_path, capsys, monkeypatch, lvdm):
    monkeypatch.chdir(tmp_path)
    videos = {} if table_of(table).what == "speed" else {"videos": "my clips"}
    assert lvdm("reproduce", table, "--plan", scale="paper", out="here", **videos) == 0
    printed = capsys.readouterr().out
    assert re.search(r"(about [\d.,]+|under 0.1) hours of one H200.*not measured.* GB of disk$", printed.strip())
    assert not list(tmp_path.iterdir())


def test_printing_needs_no_torch(tmp_path):
    heavy = {"torch", "numpy", "av", "diffusers", "accelerate"}
    words = ["reproduce", "univae-fig7", "scale=tiny", "--plan"]
    code = f"import sys; from lvdm.cli import main; sys.exit(main({words}) or bool({heavy} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "under 0.1 hours" in done.stdout


def test_a_wrong_table_lists_the_right_ones(lvdm, capsys, tmp_path):
    assert lvdm("reproduce", "univae-tabel3", "--plan") == 2
    said = capsys.readouterr().err
    assert all(table in said for table in TABLES) and "did you mean 'univae-table3'?" in said
    (tmp_path / "own.yaml").write_text("base: tables/univae-norm.yaml\nclaims: none\n")
    assert lvdm("reproduce", tmp_path / "own.yaml", "--plan") == 2
    assert "unknown key 'claims'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "table, said",
    [
        ({"arms": {"A b": Arm(), "a-B": Arm()}}, "names that differ"),
        (
            {"what": "speed", "works": ["encode"], "arms": {"a": Arm(paper={"foo (s)": "1"})}},
            "'foo .s.' is nothing that",
        ),
        (
            {"what": "speed", "works": ["encode"], "arms": {"a": Arm(paper={"both (s)": "1"})}},
            "some of encode .s., encode",
        ),
        ({"what": "speed", "works": ["encoding"]}, "works=encoding: expected some of encode.*did you mean 'encode'"),
        ({"what": "refinement"}, "verb=train vae: expected train refine"),
        (
            {"what": "positions", "scales": {"tiny": Scale(frames=[9, 16])}},
            "scales.tiny.frames=.9, 16.: positions needs 4n",
        ),
        ({"lpips": "vgg"}, "lpips='vgg': expected one of lpips, lpips-spatial"),
    ],
)
def test_wrong_tables_are_refused(table, said):
    with pytest.raises(UserError, match=said):
        Table(**table)


def test_numbers_of_a_paper_that_are_none_are_refused():
    with pytest.raises(UserError, match=r"paper.PSNR='31.1 dB': expected a number"):
        Arm(paper={"PSNR": "31.1 dB"})


@pytest.mark.parametrize(
    "scale, said",
    [
        ({"frames": []}, r"frames=\[\]: expected the lengths"),
        ({"precision": "int4"}, "precision='int4': expected one of fp32, bf16, fp16"),
        ({"rounds": 0}, "rounds=0: expected at least 1"),
    ],
)
def test_wrong_scales_are_refused(scale, said):
    with pytest.raises(UserError, match=said):
        Scale(**scale)


@pytest.mark.parametrize(
    "table, key, said",
    [
        ("univae-table3", "given.f_3_7", "given.f_3_7: expected given. with one of f_3, f_3_5, f_3_5_7_9"),
        ("univae-table2", "sets.ucf", "sets.ucf: expected sets. with one of ucf101, sky (did you mean 'ucf101'?)"),
        ("univae-table3", "sets.sky", "sets.sky: this table has no datasets; leave sets out"),
        ("ivvae-table5", "given.ktc", "given.ktc: expected given. with one of baseline, baseline_gcconv, ktc_gcconv"),
        ("univae-table2", "c3d", "c3d: this table has no inception score; leave c3d out"),
        ("odvae-table3", "given.variant_1", "given: this table times untrained models"),
        *(("odvae-table3", key, f"{key}: this table times untrained") for key in ("videos", "val", "c3d", "sets.sky")),
    ],
)
def test_unknown_names_of_models_and_datasets_are_refused(table, key, said, lvdm, capsys):
    said = said.replace("sets.sky: this table times", "sets: this table times")
    assert lvdm("reproduce", table, f"{key}=somewhere", "--plan") == 2
    assert said in capsys.readouterr().err


def test_what_is_given_is_neither_trained_nor_made_from():
    given = {"image": "sd", "vqgan": "codes", "cv_vae_3d": "published"}
    config = Reproduce(table="cvvae-table1", scale="tiny", videos="my clips", out="here", given=given)
    steps = {step.name: step.resolve() for step in plan_of(config, table_of(config.table)).steps}
    assert "image" not in steps and steps["half"].source == "sd" == steps["CV-VAE (2D+3D)"].align_vae
    models = {model.arm.name: model for model in models_of(config, table_of(config.table))}
    assert "CV-VAE (3D)" not in steps and models["CV-VAE (3D)"].vae == "published"
    assert (models["VAE-SD2.1"].vae, models["VQGAN"].vae) == ("sd", "codes") and "TATS" not in models


def test_an_inception_score_is_measured_where_its_weights_are_given():
    def verbs(**keys):
        return [step.name for step in planned("ivvae-table2", "tiny", **keys)[2].steps if "inception" in step.name]

    arms = ("IV-VAE", "CV-VAE", "OS-VAE", "OD-VAE")  # of C3D's own videos, and not of FaceForensics
    assert verbs() == [] and verbs(c3d="c3d.pt") == [f"{arm}, videos in the place of UCF101: inception" for arm in arms]


def test_stages_that_nobody_begins_with_are_left_out():
    given = {"cv_vae_2d_3d": "one", "cv_vae_3d": "two"}
    config = Reproduce(table="cvvae-table1", scale="tiny", videos="my clips", out="here", given=given)
    names = [step.name for step in plan_of(config, table_of(config.table)).steps]
    assert names == ["image", "VAE-OSP"]  # VAE-SD2.1 is measured; nothing is inflated
    arms = {"univae": "d2", "univae_v2": "d2", "gate": "d2", "replace": "d2", "blend": "d2"}
    config = Reproduce(table="univae-fig7", scale="tiny", videos="my clips", out="here", given=arms)
    assert plan_of(config, table_of(config.table)).steps == []


@pytest.mark.parametrize("table", ["cvvae-table1", "cvvae-table4", "cvvae-table5", "odvae-table1"])
def test_what_is_measured_is_as_in_the_paper(table):
    """CV-VAE: 33 frames at stride 3, LPIPS; OD-VAE: 25 neighbouring frames, LPIPS with spatial maps."""
    _, measure = next(measures(*planned(table, "paper")[:2]))
    own = (measure.frames, measure.stride, measure.metrics[2])
    assert own == (([25], 1, "lpips-spatial") if table == "odvae-table1" else ([33], 3, "lpips"))


def test_datasets_have_their_own_folders_and_recipes_and_other_videos_not_their_name():
    config = Reproduce(table="univae-table2", scale="paper", videos="web", out="here", sets={"ucf101": "ucf"})
    steps = {step.name: step.resolve() for step in plan_of(config, table_of(config.table)).steps}
    other = "videos in the place of SkyTimelapse"
    ucf, sky = (steps[f"UniVAE, {name}: latents"] for name in ("UCF101", other))
    assert (ucf.videos, ucf.labels, sky.videos, sky.labels) == ("ucf", "auto", "web", "none")
    assert steps["UniVAE, UCF101: transformer"].condition == "class"
    assert steps[f"UniVAE, {other}: transformer"].condition == "none"


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def test_measured_frames_are_the_same_at_every_length(videos, vae_of, tmp_path):
    config = scores.Measure(str(tmp_path), vae_of(), videos=str(videos), frames=[5, 9], size=32, per_video=2)
    scores.run(config)
    found = scores.read(tmp_path)
    assert len(found[9].sources) == 6 and found[5].sources == found[9].sources
    short, long = (found[frames].values["model"] for frames in (5, 9))
    for a, b in zip(short["PSNR"], long["PSNR"], strict=True):  # an exactly causal VAE does not look ahead
        assert (len(a), len(b)) == (5, 9) and a == pytest.approx(b[:5], abs=1e-3)
    assert [len(row) for row in long["flicker"]] == 6 * [8]


# ---------------------------------------------------------------------------------------------------------------------
# A table from its first step to its page


TRIED = {
    "univae-table3": ("F = [3]", "F = [3, 5]"),
    "univae-fig7": ("UniVAE", "UniVAE-V2"),
    "odvae-fig4": ("variant 4, tail", "variant 1, tail"),
}
"""Tables of every shape (models alone, a refinement of one stage 1, models that start from others), two arms each."""
FRAMES = {"univae-table3": 5, "univae-fig7": 9, "odvae-fig4": 5}
"""Of the measured clips. Shots hold out 8 frames; refinements, whose clips have 8n+1, are measured on whole shots."""
FEW = """
scales:
  tiny:
    size: 32
    per_video: 2
    set:
      train vae: &few
        phases: [{samples: 4, batch: 2, frames: 9, size: 32, lr: 1.0e-3}]
        precision: fp32
        lpips_weight: 0.0
        warmup: 0
        save_every: 2
        log_every: 2
      train refine: *few
      image: {phases: [{samples: 4, batch: 2, frames: 1, size: 32, lr: 1.0e-3}]}
"""


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """`trial(table)`: a table of ours, but two of its arms and what they need, two steps each."""
    folder = tmp_path_factory.mktemp("tables")

    def write(table: str):
        own = OmegaConf.merge(configs.read_yaml(f"tables/{table}.yaml"), OmegaConf.create(FEW))
        own = OmegaConf.to_container(own, resolve=False)
        own["arms"] = {name: arm for name, arm in own["arms"].items() if name in TRIED[table]}
        used = [step for step in own["steps"] if step["verb"] == "train vae" or f"/{step['name']}" in str(own["arms"])]
        own["steps"], own["scales"]["tiny"]["frames"] = used, [FRAMES[table]]
        OmegaConf.save(own, folder / f"{table}.yaml")
        return folder / f"{table}.yaml"

    return cache(write)


@pytest.fixture(scope="module")
def page(trial, lvdm, videos, tmp_path_factory):
    """`page(table)`: the folder of the trial of a table."""
    runs = tmp_path_factory.mktemp("runs")

    def make(table: str):
        whole = {"val": videos} if FRAMES[table] > 8 else {}
        assert lvdm("reproduce", trial(table), videos=videos, scale="tiny", out=runs / table, **whole) == 0
        return runs / table

    return cache(make)


@pytest.mark.parametrize("table", TRIED)
def test_the_page_has_all_numbers_in_all_formats(table, page):
    out, last = page(table), TRIED[table][1]
    results = json.loads((out / "results.json").read_text())["results"]
    lines = list(csv.DictReader((out / "results.csv").open()))
    assert len(results) == len(lines) == 2 * 5
    for row, line in zip(results, lines, strict=True):
        assert row["low"] <= row["mean"] <= row["high"] and float(line["mean"]) == row["mean"]
    loaded = load_table(Reproduce(table=table, scale="tiny"))
    part = slice(1, None, 2) if loaded.what == "refinement" else slice(None)
    folder = loaded.arms[last].folder
    found = scores.read(out / "scores" / f"{folder}-0")[FRAMES[table]]
    shown = next(row for row in results if row["arm"] == last and row["metric"].startswith("PSNR"))
    written = torch.tensor(found.values["model"]["PSNR"])[:, part]
    assert written.shape == (6, 4 if loaded.what == "refinement" else 5)
    assert shown["mean"] == pytest.approx(written.double().mean().item())
    for name in ("index.html", "results.md"):
        text = (out / name).read_text()
        for said in (around(shown), scores.REFERENCES[loaded.what], "What these runs do not show", "commit"):
            assert said in text
        assert ("the encoder saw every second frame" in text) == (loaded.what == "refinement")
        assert all(f"lvdm {verb}" in text for verb in {loaded.verb, *(step.verb for step in loaded.steps)})
    assert (out / "index.html").read_text().count('<figure class="chart"') == 4


def around(row: dict) -> str:
    return figures.around(row["mean"], row["low"], row["high"])


def test_the_papers_numbers_stand_beside_ours(page):
    out = page("univae-table3")
    results = json.loads((out / "results.json").read_text())["results"]
    shown = next(row for row in results if (row["arm"], row["metric"]) == ("F = [3, 5]", "PSNR (dB)"))
    assert (shown["paper"], shown["paper_difference"]) == (34.08, 2.92)
    for name in ("index.html", "results.md"):
        assert all(said in (out / name).read_text() for said in ("34.08", "WebVid-10M", "+2.92"))


def test_arms_of_a_refinement_share_stage_1_and_differ_in_d2(page):
    stage1, add, none = (vae.load(str(page("univae-fig7") / name)) for name in ("stage1", "univae-0", "univae-v2-0"))
    for key, value in stage1.state_dict().items():
        assert torch.equal(value, add.state_dict()[key]) and torch.equal(value, none.state_dict()[key])
    assert (add.config["inject"], none.config["inject"]) == ("add", "none")


def test_arms_start_from_the_inflated_image_vae(page):
    """Two steps of at most 1e-3 each from it, which fresh weights are not."""
    for start, arm in (("tail-4", "variant-4-tail-0"), ("tail-1", "variant-1-tail-0")):
        start, trained = (vae.load(str(page("odvae-fig4") / name)).state_dict() for name in (start, arm))
        assert max((start[key] - trained[key]).abs().max() for key in start) < 2.1e-3


def test_the_same_command_again_trains_and_measures_nothing(page, trial, lvdm, videos, capsys):
    out = page("odvae-fig4")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*/*") if path.is_file()}
    capsys.readouterr()
    assert lvdm("reproduce", trial("odvae-fig4"), videos=videos, scale="tiny", out=out) == 0
    assert capsys.readouterr().out.count("finished before, skipped") == 5  # an image VAE, two inflated, two trained
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_killed_table_goes_on_to_the_same_numbers(page, trial, lvdm, videos, tmp_path, monkeypatch, capsys):
    whole, save, saved = page("univae-table3"), RunFolder.save, []

    def kill(self, samples, *args):
        save(self, samples, *args)
        saved.append((self.path.name, samples))
        if saved[-1] == ("f-3-5-0", 2):
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "save", kill)
    words, command = trial("univae-table3"), {"videos": videos, "scale": "tiny", "out": tmp_path / "killed"}
    assert lvdm("reproduce", words, **command) == 130
    assert saved == [("f-3-0", 2), ("f-3-0", 4), ("f-3-5-0", 2)]
    assert lvdm("reproduce", words, **command) == 0
    assert saved[3:] == [("f-3-5-0", 4)] and "F = [3]: finished before, skipped" in capsys.readouterr().out
    results = [json.loads((out / "results.json").read_text())["results"] for out in (whole, tmp_path / "killed")]
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "changed, said",
    [
        ("frames: [5, 41]", "no shot is long enough: 41 frames at stride 1"),
        ("set: {train vae: {phases: [{samples: 4, batch: 2, frames: 9, size: 32, strides: [1, 5]}]}}", "at stride 5"),
    ],
)
def test_clips_that_are_too_short_are_refused_before_training(changed, said, trial, lvdm, videos, tmp_path, capsys):
    own = tmp_path / "long.yaml"
    own.write_text(f"base: {trial('univae-table3')}\nscales: {{tiny: {{{changed}}}}}\n")
    assert lvdm("reproduce", own, videos=videos, val=videos, scale="tiny", out=tmp_path / "out") == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_is_given_without_a_d2_is_refused_before_training(trial, lvdm, videos, vae_of, tmp_path, capsys):
    keys = {"videos": videos, "val": videos, "scale": "tiny", "out": tmp_path / "out", "given.univae": vae_of()}
    assert lvdm("reproduce", trial("univae-fig7"), **keys) == 2
    assert "has no D2, which this table measures" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_another_model_given_to_a_table_that_is_there_is_refused_before_training(
    page, trial, lvdm, videos, refiner, capsys
):
    out = page("univae-fig7")
    keys = {"videos": videos, "val": videos, "scale": "tiny", "out": out, "given.univae": refiner}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "run", lambda *args: pytest.fail("a step began"))
        assert lvdm("reproduce", trial("univae-fig7"), **keys) == 2
    assert f"out={out}/scores/univae-0: belongs to another config (different: vae)" in capsys.readouterr().err


def test_every_table_has_its_place_in_the_documents():
    text = (Path(__file__).parents[3] / "docs" / "results.md").read_text()
    named = set(re.findall(r"^    lvdm reproduce ([\w-]+) ", text, re.M))
    assert named == set(TABLES) and text.count("\n## ") == 2 + len(TABLES)
    assert sorted(re.findall(r"^\| ([\w-]+) \| .* s \| .* s \|$", text, re.M)) == TABLES  # their times at tiny


# ---------------------------------------------------------------------------------------------------------------------
# Tables of other kinds


def altered(table: str, changes: str, folder, keep: dict[str, list[str]]) -> Path:
    """A table of ours with changes, of which only those arms and the like stay that `keep` names."""
    own = OmegaConf.merge(configs.read_yaml(f"tables/{table}.yaml"), OmegaConf.create(changes))
    own = OmegaConf.to_container(own, resolve=False)
    for key, names in keep.items():
        if isinstance(own[key], dict):
            own[key] = {name: own[key][name] for name in names}
        else:
            own[key] = [stage for stage in own[key] if stage["name"] in names]
    OmegaConf.save(own, folder / f"{table}.yaml")
    return folder / f"{table}.yaml"


GENERATED = """
scales:
  tiny:
    published: true
    frames: [5]
    size: 32
    set:
      train latents: {frames: 9, size: 32, per_video: 2}
      train dit:
        model_args: {width: 32, depth: 2, heads: 2}
        phases: [{samples: 4, batch: 2, lr: 1.0e-3}]
        log_every: 2
      sample: {count: 3, steps: 2, batch: 3}
      evaluate generation: {per_video: 2}
      train vae:
        phases: [{samples: 4, batch: 2, frames: 9, size: 32, lr: 1.0e-3}]
        lpips_weight: 0.0
        save_every: 4
"""


def test_what_is_generated_stands_beside_its_floor(lvdm, videos, tmp_path, capsys):
    keep = {"datasets": ["ucf101"], "chain": ["latents", "transformer", "samples", "distances"]}
    table, out = altered("univae-table2", GENERATED, tmp_path, keep), tmp_path / "out"
    keys = {"scale": "tiny", "out": out, "sets.ucf101": videos, "videos": videos, "seeds": 2}
    assert lvdm("reproduce", table, **keys) == 0
    said = capsys.readouterr().out
    assert "CV-VAE: left out; to have it: given.cv_vae=WEIGHTS (the release of CV-VAE)" in said
    results = json.loads((out / "results.json").read_text())["results"]
    found = [(row["metric"], row["seed"]) for row in results if "dataset" in row]
    apart = {row["metric"]: row for row in results if "dataset" in row}
    assert found == [(metric, seed) for seed in (0, 1) for metric in ("FVD", "KVD")]
    assert {row["arm"] for row in results} == {"UniVAE"} and apart["FVD"]["protocol"]["seed"] == 0
    assert apart["FVD"]["mean"] > 0 <= apart["FVD"]["floor"] and apart["KVD"]["fake"] == 3
    assert (apart["FVD"]["paper"], apart["KVD"]["paper"]) == (7777.71, 19.35)
    assert "N = 3" in apart["FVD"]["warning"] and len(list(csv.DictReader((out / "results.csv").open()))) == 5 + 4
    page = (out / "index.html").read_text()
    for shown in ("UCF101, sample 1", "UCF101: Fr", "floor", "7777.71", "UniVAE, seed 1"):
        assert shown in page
    assert "given.od_vae=WEIGHTS" in page and "lvdm train dit" in page
    assert page.count("<video") == 2 * 2 + 2  # two clips and their reconstructions, two samples
    assert lvdm("reproduce", table, **keys) == 0
    assert capsys.readouterr().out.count("finished before, skipped") == 2 * 5


def test_tiles_are_measured_beside_whole_clips(lvdm, videos, inexact, tmp_path):
    out = tmp_path / "out"
    table = altered("odvae-table4", "scales: {tiny: {size: 32, per_video: 1}}", tmp_path, {})
    keys = {"scale": "tiny", "videos": videos, "val": videos, "out": out, "given.odvae": inexact}
    assert lvdm("reproduce", table, **keys) == 0
    found = {row["arm"]: row for row in json.loads((out / "results.json").read_text())["results"]}
    assert found["in groups"]["difference"] != 0 == found["at once"]["difference"]
    whole, tiled = (scores.read(out / "scores" / f"{name}-0")[17].values["model"]["PSNR"] for name in FOLDERS)
    first = [torch.tensor(values)[:, :1] for values in (whole, tiled)]
    assert whole != tiled and all(values.isfinite().all() for values in first)
    assert not (out / "odvae").exists() and (out / "index.html").read_text().count("<video") == 2 * 3


FOLDERS = ("at-once", "in-groups")


def test_a_table_is_made_whole_at_its_shipped_tiny_scale(lvdm, videos, tmp_path):
    out = tmp_path / "out"
    assert lvdm("reproduce", "odvae-table4", scale="tiny", videos=videos, val=videos, out=out) == 0
    found = json.loads((out / "results.json").read_text())["results"]
    assert len(found) == 2 * 5
    log = [json.loads(line) for line in (out / "odvae" / "log.jsonl").read_text().splitlines()]
    trained = {record["samples"]: record["l1"] for record in log if "l1" in record}
    assert max(trained) == 160 and trained[160] < trained[min(trained)]  # of 168, the last that was logged
    page = (out / "index.html").read_text()
    for shown in ("These numbers mean nothing", "31.05", "97 frames of 256x256", "in groups", "lvdm train vae"):
        assert shown in page


def test_two_processes_make_a_table_together(trial, page, videos, lvdm, tmp_path, capsys):
    """They share trainings and measurements, one of them inflates and writes; one alone finds all of it finished."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    table, keys = trial("odvae-fig4"), {"videos": videos, "out": tmp_path / "out", "scale": "tiny"}
    words = [*torchrun, "sample.tables.reproduce", str(table), *(f"{key}={value}" for key, value in keys.items())]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("page: ") == 1 and done.stdout.count("tail-1: odvae with the weights of") == 1
    found, alone = (
        {(row["arm"], row["metric"]): row["mean"] for row in json.loads((out / "results.json").read_text())["results"]}
        for out in (tmp_path / "out", page("odvae-fig4"))
    )
    assert len(found) == 2 * 5 and found == pytest.approx(alone, rel=1e-3)  # gradients are summed in another order
    assert lvdm("reproduce", table, **keys) == 0
    assert capsys.readouterr().out.count("finished before, skipped") == 5


def test_speeds_stand_beside_the_papers_ratios(lvdm, tmp_path):
    changes = "scales: {tiny: {frames: [5], size: 16, aspect: 1.0, rounds: 2}}"
    table = altered("ivvae-table6", changes, tmp_path, {"arms": ["IV-VAE", "CV-VAE", "UniVAE"]})
    out = tmp_path / "out"
    assert lvdm("reproduce", table, scale="tiny", out=out) == 0
    results = json.loads((out / "results.json").read_text())["results"]
    figures = {(row["arm"], row["metric"]): row for row in results if "times" in row}
    assert len(figures) == 9 and {row["seconds"] is not None for row in results if "seconds" in row} == {True}
    both, encode, decode = (figures["CV-VAE", f"{name} (s)"] for name in ("both", "encode", "decode"))
    _, rows = timing.read(out / "timing")
    rounds = [rows["CV-VAE", work].seconds for work in ("encode", "decode")]
    assert [encode["mean"], decode["mean"]] == [statistics.median(times) for times in rounds]
    assert both["mean"] == statistics.median(map(sum, zip(*rounds, strict=True)))
    assert encode["paper_times"] == pytest.approx(1.9 / 1.3) and figures["UniVAE", "both (s)"]["paper"] is None
    assert figures["IV-VAE", "decode (s)"]["times"] == 1
    before = (out / "timing" / "results.json").stat().st_mtime_ns
    assert lvdm("reproduce", table, scale="tiny", out=out) == 0
    assert (out / "timing" / "results.json").stat().st_mtime_ns == before
    assert "106,978" not in (page := (out / "index.html").read_text()) and "107,170,842" in page


def test_a_model_that_could_not_be_timed_leaves_no_number(monkeypatch, tmp_path):
    """Neither a ratio to it nor a file that is no JSON."""
    table = table_of("ivvae-table6")
    rows = {(arm, "encode"): Row([2.0, 4.0]) for arm in table.arms} | {("IV-VAE", "encode"): Row([], error="no memory")}
    monkeypatch.setattr(timing, "measure", lambda config: rows)
    monkeypatch.setattr(timing, "machine", lambda device: {"device": "none"})
    timing.run(timing.Timing(out=str(tmp_path)))
    found = list(speed.figures(table, timing.read(tmp_path)[1]))
    assert {figure.arm for figure in found} == {*table.arms} - {"IV-VAE"}
    assert {(figure.mean, figure.times) for figure in found} == {(3.0, None)}
    assert not found[0].apart(found[1]) and found[0].apart(dataclasses.replace(found[1], low=4.5, high=5.0))
