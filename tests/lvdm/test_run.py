"""The run folder: one config, a log that never lies, whole checkpoints, an export replaced as a whole."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from lvdm.errors import UserError
from lvdm.run import RunFolder, Timer, finished, read_log, same_config, write_text


@dataclass
class Config:
    operational: ClassVar[tuple[str, ...]] = ("workers",)

    out: str = ""
    lr: float = 1e-6
    workers: int = 2
    options: dict[str, Any] = field(default_factory=lambda: {"kernels": (3, 5), "width": 8})
    phases: list[int] = field(default_factory=lambda: [1, 2])


class Model:
    """Writes its files as diffusers models do."""

    def __init__(self, *names: str):
        self.names = names

    def save_pretrained(self, folder: Path, safe_serialization: bool) -> None:
        assert safe_serialization
        folder.mkdir(parents=True)
        for name in self.names:
            (folder / name).write_text(name)


def save(folder: RunFolder, samples: int, keep: int = 2, best: dict[str, Any] | None = None) -> None:
    folder.save(samples, lambda path: (Path(path) / "state").write_text(str(samples)), keep, lambda: None, best)


def checkpoints(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in (folder.path / "checkpoints").iterdir())


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "a", Config())


# ---------------------------------------------------------------------------------------------------------------------
# Whose folder it is


def test_an_equal_config_comes_back_to_its_folder(folder):
    folder.log(samples=1)
    for config in (
        Config(),
        Config(workers=0),
        Config(out="elsewhere"),
        Config(options={"width": 8, "kernels": [3, 5]}),
    ):
        assert RunFolder(folder.path, config).records() == [{"samples": 1}]


def test_another_config_is_refused_by_the_names_of_its_keys(folder):
    folder.log(samples=1)
    before = (folder.path / "config.yaml").read_text()
    other = Config(lr=2e-6, phases=[1, 3], workers=5)
    assert same_config(folder.path, other) == ["lr", "phases"]
    with pytest.raises(UserError, match=r"runs/a: belongs to another config \(different: lr, phases\)"):
        RunFolder(folder.path, other)
    with pytest.raises(UserError, match="different: options"):
        RunFolder(folder.path, Config(options={"kernels": (3, 5), "width": 9}))
    assert (folder.path / "config.yaml").read_text() == before


def test_a_key_that_is_newer_than_the_run_had_its_default(folder):
    folder.log(samples=1)
    stored = folder.path / "config.yaml"
    stored.write_text("".join(line for line in stored.read_text().splitlines(True) if not line.startswith("lr")))
    assert same_config(folder.path, Config()) == []
    assert same_config(folder.path, Config(lr=2e-6)) == ["lr"]


def test_operational_keys_are_stored_as_they_are_now(folder):
    RunFolder(folder.path, Config(workers=7))
    assert "workers: 7" in (folder.path / "config.yaml").read_text()


def test_foreign_folders_files_and_no_folder_are_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(UserError, match="photos: not empty and not a run folder"):
        RunFolder(tmp_path / "photos", Config())
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]
    with pytest.raises(UserError, match=r"cat.jpg: is a file"):
        RunFolder(tmp_path / "photos" / "cat.jpg", Config())
    with pytest.raises(UserError, match="cannot make this folder"):
        RunFolder(tmp_path / "photos" / "cat.jpg" / "run", Config())
    with pytest.raises(UserError, match="out: expected the folder"):
        RunFolder("", Config())


def test_an_empty_folder_and_one_with_a_config_in_the_making_are_new(tmp_path):
    (tmp_path / ".config.yaml.4711").write_text("lr: ")
    RunFolder(tmp_path, Config(), main=False)
    RunFolder(tmp_path, Config())
    assert (tmp_path / "config.yaml").is_file()


def test_only_the_main_process_writes(tmp_path):
    other = RunFolder(tmp_path / "run", Config(), main=False)
    other.log(samples=1)
    other.finish()
    other.export(Model("a"))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Log


def test_the_log_is_json_whatever_the_numbers(folder):
    folder.log(samples=1, loss=float("nan"), best=float("-inf"), note="a\nb")
    folder.log(samples=2, loss=0.5)
    assert folder.records() == [
        {"samples": 1, "loss": "nan", "best": "-inf", "note": "a\nb"},
        {"samples": 2, "loss": 0.5},
    ]
    assert read_log(folder.path) == folder.records()
    assert read_log(folder.path / "nowhere") == []


def test_resuming_cuts_the_log_back_to_the_checkpoint(folder):
    folder.log(event="start")
    for samples in (8, 16, 24):
        folder.log(samples=samples, loss=1 / samples)
        if samples == 16:
            save(folder, samples)
    with open(folder.path / "log.jsonl", "a") as file:
        file.write('{"samples": 32, "lo')  # a kill in the middle of a line
    again, read = RunFolder(folder.path, Config()), []
    assert len(again.records()) == 4
    assert again.resume(read.append) == 16
    assert read == [str(folder.path / "checkpoints" / "000000016")]
    again.log(samples=24, loss=0.1)
    assert again.records() == [
        {"event": "start"},
        {"samples": 8, "loss": 1 / 8},
        {"samples": 16, "loss": 1 / 16},
        {"samples": 24, "loss": 0.1},
    ]
    assert all(json.loads(line) for line in (folder.path / "log.jsonl").read_text().splitlines())


def test_a_run_killed_before_its_first_checkpoint_starts_anew(folder):
    folder.log(event="start", samples=0)
    folder.log(samples=8)
    again = RunFolder(folder.path, Config())
    assert again.resume(pytest.fail) == 0
    assert again.records() == [{"event": "start", "samples": 0}]


def test_resuming_on_another_process_leaves_the_log_alone(folder):
    folder.log(samples=8)
    assert RunFolder(folder.path, Config(), main=False).resume(pytest.fail) == 0
    assert folder.records() == [{"samples": 8}]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_checkpoints_are_renamed_into_place_when_every_process_has_written(folder):
    seen = []

    def write(path: str) -> None:
        assert Path(path).parent == folder.path / "checkpoints" and not Path(path).name.isdigit()
        (Path(path) / "state").touch()
        seen.append("written")

    def barrier() -> None:
        seen.append(checkpoints(folder))

    folder.save(40, write, 2, barrier)
    partial = ["partial-000000040"]
    assert seen == [partial, "written", partial, ["000000040"]]
    assert folder.latest() == 40


def test_a_kill_while_writing_leaves_the_last_whole_checkpoint(folder):
    def killed(path: str) -> None:
        (Path(path) / "half").touch()
        raise KeyboardInterrupt

    save(folder, 8)
    with pytest.raises(KeyboardInterrupt):
        folder.save(16, killed, 2, lambda: None)
    assert checkpoints(folder) == ["000000008", "partial-000000016"]
    again, read = RunFolder(folder.path, Config()), []
    assert again.latest() == 8 == again.resume(read.append)
    assert Path(read[0], "state").read_text() == "8"
    save(again, 16)
    assert checkpoints(folder) == ["000000008", "000000016"]
    assert [path.name for path in (folder.path / "checkpoints" / "000000016").iterdir()] == ["state"]


def test_half_a_checkpoint_goes_when_the_run_goes_on_whatever_comes_next(folder):
    save(folder, 8)
    (folder.path / "checkpoints" / "partial-000000016").mkdir()
    RunFolder(folder.path, Config(), main=False).resume(lambda path: None)
    assert checkpoints(folder) == ["000000008", "partial-000000016"]  # one process removes
    RunFolder(folder.path, Config()).resume(lambda path: None)
    save(folder, 12)
    assert checkpoints(folder) == ["000000008", "000000012"]


def test_the_last_ones_are_kept(folder):
    assert folder.latest() == 0
    for samples in (8, 16, 24, 32):
        save(folder, samples, keep=2)
        assert folder.latest() == samples
    assert checkpoints(folder) == ["000000024", "000000032"]
    save(folder, 40, keep=1)
    assert checkpoints(folder) == ["000000040"]


def test_the_best_is_kept_besides_the_last_ones_until_a_better_one_comes(folder):
    assert folder.best() is None
    save(folder, 8)
    assert folder.best() is None
    save(folder, 16, best={"psnr": 20.0})
    for samples in (24, 32, 40):
        save(folder, samples)
    assert checkpoints(folder) == ["000000016", "000000032", "000000040"]
    again, read = RunFolder(folder.path, Config()), []
    assert again.best() == {"samples": 16, "psnr": 20.0}
    assert again.resume(read.append) == 40 and read[0].endswith("/000000040")  # the newest, not the best
    save(again, 48, best={"psnr": 21.0})
    save(again, 56, keep=1)
    assert checkpoints(folder) == ["000000048", "000000056"] and folder.best() == {"samples": 48, "psnr": 21.0}
    assert not (folder.path / "checkpoints" / "000000056" / "best.json").exists()


@pytest.mark.parametrize("moment", ["write", "rename", "prune"])
def test_a_kill_at_any_moment_leaves_a_best_with_its_checkpoint(folder, monkeypatch, moment):
    replace = os.replace

    def killed(*paths: str | Path, ignore_errors: bool = False) -> None:
        if moment == "rename" and not Path(paths[0]).is_dir():
            replace(*paths)  # best.json, which the kill finds written
        elif not ignore_errors:
            raise KeyboardInterrupt

    save(folder, 8, keep=1, best={"psnr": 20.0})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if moment != "write":
            patch.setattr({"rename": "lvdm.run.os.replace", "prune": "lvdm.run.shutil.rmtree"}[moment], killed)
        folder.save(16, killed if moment == "write" else lambda path: None, 1, lambda: None, {"psnr": 21.0})
    again, new = RunFolder(folder.path, Config()), moment == "prune"
    assert again.best() == ({"samples": 16, "psnr": 21.0} if new else {"samples": 8, "psnr": 20.0})
    assert again.latest() == again.best()["samples"]
    save(again, 24, keep=1)
    assert checkpoints(again)[:2] == ["000000016" if new else "000000008", "000000024"]


def test_counts_beyond_nine_digits_stay_in_order(folder):
    for samples in (999_999_992, 1_000_000_000):
        save(folder, samples, keep=1)
    read = []
    assert folder.resume(read.append) == 1_000_000_000
    assert read[0].endswith("/1000000000")


# ---------------------------------------------------------------------------------------------------------------------
# Export and end


def test_the_export_is_replaced_as_a_whole(folder):
    assert folder.export(Model("config.json", "part-1", "part-2")) == folder.path / "export"
    (folder.path / "partial-export").mkdir()
    (folder.path / "partial-export" / "rest-of-a-kill").touch()
    folder.export(Model("config.json", "whole"))
    assert sorted(path.name for path in (folder.path / "export").iterdir()) == ["config.json", "whole"]
    assert not (folder.path / "partial-export").exists()


def test_exports_of_other_names_stand_beside_it(folder):
    folder.export(Model("last"))
    assert folder.export(Model("best"), "export-best") == folder.path / "export-best"
    assert [path.name for path in (folder.path / "export").iterdir()] == ["last"]
    assert [path.name for path in (folder.path / "export-best").iterdir()] == ["best"]


def test_a_failed_export_leaves_the_old_one(folder):
    class Broken(Model):
        def save_pretrained(self, folder: Path, safe_serialization: bool) -> None:
            super().save_pretrained(folder, safe_serialization)
            raise OSError("disk full")

    folder.export(Model("old"))
    with pytest.raises(OSError, match="disk full"):
        folder.export(Broken("new"))
    assert [path.name for path in (folder.path / "export").iterdir()] == ["old"]


def test_finished_holds_the_summary(folder):
    assert folder.finished is None and finished(folder.path) is None
    folder.finish(samples=32, seconds=1.5)
    assert RunFolder(folder.path, Config()).finished == {"samples": 32, "seconds": 1.5}
    assert finished(folder.path) == folder.finished


def test_text_is_replaced_not_rewritten(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    before = path.stat().st_ino
    write_text(path, "new")
    assert path.read_text() == "new" and path.stat().st_ino != before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_the_timer_adds_up_over_starts(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("lvdm.run.time.monotonic", lambda: now[0])
    first = Timer()
    now[0] = 130.0
    state = first.state_dict()
    assert state == {"seconds": 30.0}
    now[0] = 1000.0
    second = Timer()
    now[0] = 1003.0  # loading the checkpoint is no work
    second.load_state_dict(state)
    now[0] = 1010.0
    assert second.seconds() == 37.0


def test_a_run_is_bound_to_what_it_reads(tmp_path):
    first = RunFolder(tmp_path / "run", Config())
    first.bind(videos="abc")
    first.log(samples=0)
    again = RunFolder(tmp_path / "run", Config())
    again.bind(videos="abc", latents="def")
    with pytest.raises(UserError, match="latents changed since this run began"):
        again.bind(videos="abc", latents="other")
    again.bind(latents="def")  # the refusal changed nothing


def test_a_start_that_did_nothing_binds_nothing(tmp_path):
    RunFolder(tmp_path / "run", Config()).bind(videos="abc")
    RunFolder(tmp_path / "run", Config()).bind(videos="other")
