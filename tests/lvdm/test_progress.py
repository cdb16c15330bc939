"""Progress in a log and on a terminal, with the time left of a program and of a plan."""

import pytest

from lvdm import progress
from lvdm.progress import bar, clock, whole


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def test_clock():
    assert [clock(s) for s in (0, 59.9, 60, 3599, 3600, 36_125)] == [
        "0:00",
        "0:59",
        "1:00",
        "59:59",
        "1:00:00",
        "10:02:05",
    ]


def test_a_line_every_tenth_with_the_time_left(time, capsys):
    with bar("train", 200) as task:
        for step in range(20):
            time.now += 3.0
            task.advance(10, f"l1 {step}")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0] == "train: 10% l1 1, 0:54 left"
    assert lines[4] == "train: 50% l1 9, 0:30 left"
    assert lines[9] == "train: 100% l1 19, 0:00 left"


def test_a_line_without_a_note_and_steps_over_several_tenths(time, capsys):
    with bar("encode", 4) as task:
        time.now += 8.0
        task.advance(3)
    assert capsys.readouterr().err == "encode: 70%, 0:02 left\n"


def test_a_resumed_run_counts_from_where_it_stood(time, capsys):
    with bar("train", 100, done=50) as task:
        time.now += 10.0
        task.advance(10)
        assert task.left() == pytest.approx(40.0)  # at the rate of this start, not of all samples
    assert capsys.readouterr().err == "train: 60%, 0:40 left\n"


def test_other_processes_are_silent(capsys):
    with bar("train", 10, show=False) as task:
        task.advance(10)
    with bar("nothing to do", 0) as task:
        pass
    assert capsys.readouterr().err == ""


def test_a_plan_tells_the_time_left_of_the_whole_from_its_costs(time, capsys):
    with whole("demo", [30.0, 10.0, 60.0]) as plan:
        plan.step_skipped(30.0)
        assert plan.line() == "30% of the whole"
        with plan.step(10.0), bar("encode", 2) as task:
            time.now += 10.0
            task.advance(1)
            time.now += 10.0
            task.advance(1)
        assert plan.line() == "40% of the whole, 2:00 left"  # 2 s a unit of cost, the skipped step left out
        with plan.step(60.0):
            assert plan.line() == "40% of the whole, 2:00 left"
        assert plan.line() == "100% of the whole, 0:00 left"
    assert capsys.readouterr().err.splitlines() == [
        "encode: 50%, 0:10 left | 35% of the whole, 2:10 left",
        "encode: 100%, 0:00 left | 40% of the whole, 2:00 left",
    ]
    with bar("alone", 1) as task:
        task.advance()
    assert "whole" not in capsys.readouterr().err


def test_several_bars_in_one_step_never_move_the_whole_back(time):
    with whole("demo", [1.0, 1.0]) as plan, plan.step(1.0):
        with bar("first", 2) as task:
            task.advance(2)
        with bar("second", 4) as task:
            time.now += 1.0
            task.advance(1)
        assert plan.share == 1.0


def test_bars_on_a_terminal_share_one_display(monkeypatch, capsys):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    with whole("demo", [1.0]) as plan, plan.step(1.0), bar("train", 4) as task:
        task.advance(2, "l1 0.5")
        live = progress._Terminal._live
        assert [(t.description, t.completed / t.total) for t in live.tasks] == [("demo", 0.5), ("train", 0.5)]
        assert live.tasks[1].fields["note"] == "l1 0.5"
    assert progress._Terminal._live is None and progress._Terminal._open == 0
    assert "train" in capsys.readouterr().err
