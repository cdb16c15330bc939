"""The instruments of the benchmarks: turns, memory, what does not fit, and the table of it all."""

import ast
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from lvdm import bench
from lvdm.bench import MATMUL, Row, Work
from lvdm.errors import UserError

CPU = torch.device("cpu")
MIB = 2**20


def test_runs_alternate_and_ratios_are_of_the_same_round():
    order = []
    seconds = bench.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 3 and all(len(times) == 3 for times in seconds.values())
    assert bench.ratio({"a": [4.0, 9.0, 2.0], "b": [2.0, 3.0, 2.0]}, "a", "b") == 2.0


def test_the_first_turn_is_not_timed():
    turns = []
    rows = bench.time_all({"a": Work(lambda: turns.append(0), flops=6.0, frames=3)}, 4, CPU)
    assert len(turns) == 5 and len(rows["a"].seconds) == 4  # and one of another process
    assert (rows["a"].flops, rows["a"].frames, rows["a"].error) == (6.0, 3, "")


MEMORY = """
import torch
from lvdm import bench
from lvdm.bench import Work

MIB = 2**20
held = torch.ones(10 * MIB // 4)
del [torch.ones(MIB) for _ in range(100)][:]
peaks = {
    "two": Work(lambda: [torch.ones(50 * MIB // 4) for _ in range(2)]),
    "one after the other": Work(lambda: [torch.ones(50 * MIB // 4).sum() for _ in range(3)]),
    "small ones": Work(lambda: [torch.ones(8192) for _ in range(1600)]),
    "held": Work(lambda: None, held=lambda: [held, held[3:]]),
}
print({name: 1024 * row.peak_gib for name, row in bench.time_all(peaks, 1, torch.device("cpu")).items()})
"""


def test_memory_is_the_most_at_a_time_and_what_is_held():
    """Whatever is free in the process already; in one of its own, since a heap with many holes takes more."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, timeout=120)
    found = ast.literal_eval(run.stdout)
    assert found == pytest.approx({"two": 100, "one after the other": 50, "small ones": 50, "held": 10}, abs=8)


def test_what_the_first_turns_leave_behind_counts():
    left = []
    work = Work(lambda: left.append(torch.ones(20 * MIB // 4)), turns=2)
    assert 1024 * bench.time_all({"a": work}, 1, CPU)["a"].peak_gib == pytest.approx(40, abs=8)


def test_a_work_without_memory_says_so_and_the_others_go_on():
    here = os.getpid()

    def killed() -> None:
        assert os.getpid() != here, "the child dies in its place"
        os.kill(os.getpid(), signal.SIGKILL)

    works = {"killed": Work(killed), "refused": Work(lambda: torch.empty(2**60)), "fine": Work(lambda: None)}
    rows = bench.time_all(works, 2, CPU)
    assert list(rows) == ["killed", "refused", "fine"]
    assert [row.error for row in rows.values()] == ["out of memory", "out of memory", ""]
    assert [len(row.seconds) for row in rows.values()] == [0, 0, 2]
    assert rows["killed"].median is rows["killed"].tflops is rows["killed"].peak_gib is None


def test_a_work_that_runs_out_of_memory_later_says_so_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(bench, "_peak_of_child", lambda work: 0.5)
    turns = {"fits twice": 0, "fine": 0}

    def run(name: str, fits: int) -> None:
        turns[name] += 1
        if turns[name] > fits:
            raise torch.OutOfMemoryError

    works = {name: Work(partial(run, name, fits)) for name, fits in (("fits twice", 2), ("fine", 9))}
    rows = bench.time_all(works, 4, CPU)
    assert turns == {"fits twice": 3, "fine": 5}  # the first of each is not timed
    assert (rows["fits twice"].error, rows["fits twice"].seconds) == ("out of memory", [])
    assert (rows["fine"].error, len(rows["fine"].seconds)) == ("", 4)


def test_memory_that_the_system_does_not_tell_is_not_measured(monkeypatch):
    monkeypatch.setattr(bench, "_read", lambda path: "VmRSS:\t 12 kB\n")
    row = bench.time_all({"a": Work(lambda: None)}, 1, CPU)["a"]
    assert row.peak_gib is None and not row.error and len(row.seconds) == 1


def test_compiled_work_is_in_no_child_that_would_wait_for_the_compiler():
    here = os.getpid()
    works = {"compiled": Work(lambda: os._exit(1) if os.getpid() != here else None, compiled=True)}
    row = bench.time_all(works, 1, CPU)["compiled"]
    assert row.peak_gib is None and not row.error and len(row.seconds) == 1


def test_other_errors_are_not_hidden():
    with pytest.raises(RuntimeError, match="shape"):
        bench.time_all({"a": Work(lambda: torch.ones(2).reshape(3))}, 1, CPU)


def test_table_of_rows():
    rows = {
        (MATMUL, "fp32"): Row([0.5, 1.0, 2.0], flops=4e12),
        ("encode", "a"): Row([2.0, 4.0, 3.0], flops=6e12, peak_gib=1.5, frames=9),
        ("encode", "b"): Row([1.0, 8.0, 3.0]),
        ("encode", "c"): Row([], flops=1.0, error="out of memory"),
    }
    beside = {("encode", name): ("encode", "a") for name in "bc"}
    header, lines = bench.table(["work", "model"], rows, beside)
    assert header[2:] == ["seconds", "from", "to", "frames/s", "TFLOP/s", "share", "peak GiB", "times"]
    assert lines == [
        [MATMUL, "fp32", 1.0, 0.5, 2.0, None, 4.0, 1.0, None, None],
        ["encode", "a", 3.0, 2.0, 4.0, 3.0, 2.0, 0.5, 1.5, None],
        ["encode", "b", 3.0, 1.0, 8.0, None, None, None, None, 1.0],
        ["encode", "c", "out of memory", None, None, None, None, None, None, None],
    ]
    text = bench.text(header, lines, 2).splitlines()
    assert " ".join(text[2].split()) == "encode a 3 2 4 3 2 0.5 1.5 -" and len(text) == 5


@dataclass
class Config:
    out: str = ""


def test_report_is_a_table_json_and_a_page(tmp_path, capsys):
    rows = {("encode", "a", 9): Row([1.0], peak_gib=0.5, frames=18)}
    config = Config(str(tmp_path / "new" / "bench.json"))
    charts = {"encode, GiB": {"a": [(9, 0.5)]}}
    bench.report(config, "A title", CPU, ["work", "model", "T"], rows, charts=charts, notes=["a note"])
    assert "A title" in (printed := capsys.readouterr().out) and "a note" in printed
    kept = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert kept["rows"][0] | {"T": 9, "seconds": [1.0], "frames": 18} == kept["rows"][0]
    assert kept["config"] == {"out": config.out} and kept["machine"]["torch"] == torch.__version__
    page = (tmp_path / "new" / "bench.html").read_text()
    assert "A title" in page and "encode, GiB" in page and "a note" in page


def test_product_is_counted():
    work = bench.product(CPU, "fp32")
    a, b = work.held()
    assert work.flops == 2 * a.shape[0] * a.shape[1] * b.shape[1] and work.run().shape == (len(a), b.shape[1])


def test_models_are_named_with_their_options():
    given = ["univae", "odvae", "odvae:variant=1:norm=frame", "diffusers:VQModel:block_out_channels=[8,8]", "runs/a"]
    assert bench.named(given[0], {"width": 8}, given[1:]) == {
        given[0]: ("univae", {"width": 8}),
        given[1]: ("odvae", {}),
        given[2]: ("odvae", {"variant": 1, "norm": "frame"}),
        given[3]: ("diffusers:VQModel", {"block_out_channels": [8, 8]}),
        given[4]: ("runs/a", {}),
    }


@pytest.mark.parametrize("against", [["univae"], ["odvae", "odvae"]])
def test_models_of_one_name_are_refused(against):
    with pytest.raises(UserError, match=rf"against={against[-1]}: already a model of this run"):
        bench.named("univae", {"width": 8}, against)
