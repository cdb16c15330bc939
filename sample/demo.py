"""The whole job at a small size (`lvdm demo`): a plan of the same programs that the full size runs, then a report."""

import json
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lvdm.cli import program
from lvdm.run import RunFolder, read_log
from sample.configs import Demo
from sample.plan import Plan

HOLDOUT, SIZE, FRAMES = 0.2, 64, 17
BEST = {"PSNR (dB)": "max", "SSIM": "max", "LPIPS": "min", "flicker": "min"}
FULL_NOTE = (
    "A demonstration of the machinery, not of quality: a VAE of an eighth of the full width saw a handful of clips for "
    "two minutes. Pictures are blurred, motion is coarse, D2's middle frames need not beat a linear blend, and samples "
    "mostly recall the training clips."
)
SMOKE_NOTE = "The smoke scale: a few steps of everything, to see that it works. Nothing here has learnt anything."


def run(config: Demo) -> Path:
    """Runs what is not finished of the plan, writes `report/index.html`, and says where it is."""
    videos = config.videos or fetch()
    check(videos, config)
    plan = plan_of(config, videos)
    plan.run("demo")
    page = report(config, videos, plan)
    print(f"report: {page}")
    return page


def plan_of(config: Demo, videos: str) -> Plan:
    """The plan of configs/demo/plan.yaml with this config's values."""
    return Plan.load(
        "demo/plan.yaml",
        config.scale,
        out=config.out,
        videos=videos,
        labels=config.labels,
        seed=config.seed,
        vae=config.vae,
        refine=config.refine or "d1",
        dit=config.dit,
    )


def fetch() -> str:
    """The folder of the default clips; they are fetched once."""
    from lvdm.data.samples import sample_videos

    return str(sample_videos())


def check(videos: str, config: Demo) -> None:
    """Refuses videos that a later step could not use, videos that have changed since the demo began, and missing
    weights, before the first step spends time."""
    from lvdm import weights
    from lvdm.data.clips import ClipPolicy, Clips
    from lvdm.data.index import open_index

    index = open_index(videos, config.labels)
    shots = sum(len(row.shots()) for row in index.ok)
    print(f"{len(index.ok)} videos, {shots} shots, {sum(row.frames for row in index.ok)} frames in {index.root}")
    for split in ("train", "val"):
        Clips(index, ClipPolicy(FRAMES, 1, SIZE, split=split, holdout=HOLDOUT), seed=config.seed)
    RunFolder(config.out, config).bind(videos=index.hash())
    for name in ("i3d", "lpips-alex", "lpips-vgg"):
        weights.load(name)


# ---------------------------------------------------------------------------------------------------------------------
# Report


def report(config: Demo, videos: str, plan: Plan) -> Path:
    """`report/index.html` in the demo's folder, self-contained, and an mp4 a rendering beside it."""
    from lvdm.data.index import open_index
    from lvdm.metrics.protocol import Protocol
    from lvdm.report import Page
    from sample.measure.evaluate import read_results

    out = Path(config.out)
    folder = out / "report"
    folder.mkdir(exist_ok=True)
    index = open_index(videos, config.labels)
    page = Page(
        "Latent video diffusion, end to end",
        "A video VAE with a refinement decoder, a latent store and a diffusion transformer, trained from nothing in "
        "minutes on a few clips, by the same programs that train the full size.",
    )
    page.note(SMOKE_NOTE if config.scale == "smoke" else FULL_NOTE)
    page.section("Generated", "Sampled by class with guidance; one latent, rendered by D1 and at twice the rate by D2.")
    groups = list(generated(out, folder))
    for players in groups:
        page.players(players)
    page.images({"Every sample, from its first frame to its last": out / "samples" / "sheet.png"})
    page.section(
        "Held-out clips",
        f"The last {HOLDOUT:.0%} of each shot was never trained on. The encoder sees every second frame; D1 renders "
        "those, D2 renders all.",
    )
    for players in reconstructions(config, videos, folder):
        page.players(players)
    picture(folder, groups)
    page.section("Metrics", "Each table carries the protocol of its numbers.")
    for name in ("reconstruction", "refinement", "generation"):
        for table in read_results(out / "metrics" / name):
            best = {name: how for name, how in BEST.items() if name in table.header}
            page.table(table.header, table.rows, table.title, Protocol(**table.protocol).describe(), table.note, best)
    page.section("Training", "Loss against samples seen.")
    for name, title, keys in (
        ("vae", "VAE, stage 1", ("l1", "lpips")),
        ("refine", "VAE, stage 2 (D2)", ("l1", "lpips")),
        ("dit", "DiT", ("mse", "vlb")),
    ):
        page.chart(title, curves(out / name, keys), "samples", "loss", log_y=True)
    page.section("Data and machine")
    page.table(
        ["video", "class", "frames", "fps", "size", "shots begin at"],
        [
            [
                r.path,
                r.label or "",
                r.frames,
                round(r.fps, 2),
                f"{r.width}x{r.height}",
                ", ".join(map(str, [0, *r.cuts])),
            ]
            for r in index.ok
        ],
        "Videos",
    )
    page.facts(facts(config, plan))
    return page.write(folder / "index.html")


def generated(out: Path, folder: Path) -> Iterator[list[Any]]:
    """A group of players a class: two samples, each by D1 and D2."""
    from lvdm.report import Player

    by_class: dict[str, list[int]] = {}
    for line in (out / "samples" / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        by_class.setdefault(sample["class"] or "generated", []).append(sample["id"])
    for name, ids in list(by_class.items())[:6]:
        players = []
        for i in ids[:2]:
            for decoder, rate in (("d1", "half rate"), ("d2", "native rate")):
                path = folder / f"generated-{i:03d}-{decoder}.mp4"
                shutil.copyfile(out / "samples" / decoder / f"{i:06d}.mp4", path)
                players.append(Player(f"{name} #{i}, {decoder.upper()}", path, rate))
        yield players


def reconstructions(config: Demo, videos: str, folder: Path) -> Iterator[list[Any]]:
    """A group of players a held-out clip: input at both rates, D1, D2."""
    import torch

    import vae
    from lvdm.accelerator import device
    from lvdm.data.clips import ClipPolicy, Clips
    from lvdm.data.index import open_index
    from lvdm.media import to_float, to_uint8, write_mp4
    from lvdm.report import Player

    model = vae.load(f"{config.out}/refine").to(device())
    clips = Clips(open_index(videos, config.labels), ClipPolicy(FRAMES, 1, SIZE, split="val", holdout=HOLDOUT), seed=0)
    for number, window in enumerate(clips.grid(1)[:4]):
        clip, fps = clips.read(window), clips.rows[window.row_index].fps
        x = to_float(clip.video[None].to(device()))
        with torch.no_grad():
            z = model.encode(x[:, :, ::2]).latent_dist.mean
            shown = {
                "input, half rate": (x[:, :, ::2], fps / 2),
                "D1": (model.decode(z).sample, fps / 2),
                "input, native rate": (x, fps),
                "D2": (model.refine(z).sample, fps),
            }
        players = []
        for name, (video, rate) in shown.items():
            path = folder / f"heldout-{number}-{name.replace(', ', '-').replace(' ', '-').lower()}.mp4"
            write_mp4(path, to_uint8(video[0].cpu()).permute(1, 2, 3, 0), rate)
            players.append(Player(name, path, f"{clip.source} from frame {clip.start}"))
        yield players


def picture(folder: Path, groups: list[list[Any]]) -> None:
    """`report/picture.png`: the first 9 frames of a held-out clip, of D1 and D2 rendering it, of generated videos."""
    import torch

    from lvdm.data.reader import iter_frames
    from lvdm.media import contact_sheet

    def first(path: Path) -> torch.Tensor:
        return torch.stack([torch.as_tensor(frame) for frame in iter_frames(path)])[:9]

    d1 = first(folder / "heldout-0-d1.mp4")
    spread = torch.full_like(d1, 255)
    spread[::2] = d1[: len(spread[::2])]  # D1 renders every second frame
    rows = {"held-out clip": first(folder / "heldout-0-input-native-rate.mp4"), "D1": spread}
    rows["D2"] = first(folder / "heldout-0-d2.mp4")
    rows |= {f"generated, {group[1].title}": first(group[1].video) for group in groups[:3]}
    contact_sheet(list(rows.values()), folder / "picture.png", columns=9, labels=list(rows))


def curves(run: Path, keys: tuple[str, ...]) -> dict[str, list[tuple[float, float]]]:
    """Loss terms of a run by samples."""
    records = read_log(run)
    return {key: [(r["samples"], r[key]) for r in records if isinstance(r.get(key), float)] for key in keys}


def facts(config: Demo, plan: Plan) -> dict[str, object]:
    """Machine, versions and times."""
    import diffusers
    import torch

    import lvdm

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    seconds = plan.seconds()
    return {
        "device": f"{device} ({platform.processor() or platform.machine()})",
        "versions": f"lvdm {lvdm.__version__}, torch {torch.__version__}, diffusers {diffusers.__version__}",
        "time": f"{sum(seconds.values()):.0f} s: " + ", ".join(f"{name} {s:.0f} s" for name, s in seconds.items()),
        "command": f"lvdm demo videos={config.videos or '(default)'} scale={config.scale} seed={config.seed}",
    }


def describe(config: Demo) -> str:
    """The steps, as commands; needs neither the videos nor torch."""
    return plan_of(config, config.videos or "(fetched)").describe()


def main(argv: list[str] | None = None) -> int:
    """`lvdm demo`."""
    return program(Demo, argv, run, describe, describe)


if __name__ == "__main__":
    sys.exit(main())
