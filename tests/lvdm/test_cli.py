"""The command line: quick help without torch, exit codes, and one line for what the user can put right."""

import subprocess
import sys
import time
from dataclasses import dataclass
from typing import ClassVar

import pytest

import lvdm
from lvdm import cli
from lvdm.errors import UserError, nearest


@dataclass
class Task:
    """A task."""

    positionals: ClassVar[tuple[str, ...]] = ("what",)

    what: str = ""
    """What to do."""
    times: int = 1
    """How often."""


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["train", "vae", "--help"],
        ["vae", "info", "--help"],
        ["evaluate", "generation", "-h"],
        ["--version"],
        ["nonsense"],
    ],
)
def test_help_answers_at_once_and_imports_no_torch(words):
    code = (
        "import sys; from lvdm.cli import main; code = main(sys.argv[1:]);"
        "sys.exit(99 if {'torch', 'diffusers', 'numpy'} & set(sys.modules) else code)"
    )
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
        seconds.append(time.monotonic() - started)
        assert done.returncode == (2 if words == ["nonsense"] else 0), done.stderr
    assert min(seconds) < 0.5


def test_the_installed_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "lvdm", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == lvdm.__version__


def test_the_overview_names_every_verb(capsys):
    for argv in ([], ["-h"], ["--help"], ["help"]):
        assert cli.main(argv) == 0
        out = capsys.readouterr().out
        assert all(
            f"  {name}  " in out.replace("   ", "  ") and verb.summary in out for name, verb in cli.VERBS.items()
        )


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_verb_has_its_help_and_its_program(name, capsys):
    assert cli.main([*name.split(), "--help"]) == 0
    assert capsys.readouterr().out.startswith((f"usage: lvdm {name} ", f"usage: lvdm {name}\n"))
    assert callable(cli._resolve(cli.VERBS[name].program))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["evalute"], r"error: unknown verb 'evalute' (did you mean 'evaluate'?); known: demo, vae list"),
        (["vae"], "error: lvdm vae: expected one of list, info, card, init after it"),
        (["train"], "error: lvdm train: expected one of vae, refine, latents, dit after it"),
        (["train", "gan"], "error: lvdm train: expected one of vae, refine, latents, dit after it"),
        (["train", "vae", "sede=3"], "error: command line: unknown key 'sede' (did you mean 'seed'?)"),
        (["train", "vae", "--config", "demo/vea.yaml"], "error: no config 'demo/vea.yaml'"),
        (["render", "a", "b"], "error: unexpected argument 'b'"),
        (["train", "vae", "--plan"], "error: --plan: this command runs one program"),
    ],
)
def test_what_the_user_can_put_right_is_one_line_and_exit_code_2(argv, message, capsys):
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(message)
    assert err.count("\n") == 1


def test_a_program_runs_describes_plans_or_helps(capsys):
    ran = []

    def call(*argv: str) -> tuple[int, str]:
        code = cli.program(Task, list(argv), ran.append, lambda task: f"{task.times} times", lambda task: "first, last")
        return code, capsys.readouterr().out

    assert call("sing", "times=3") == (0, "")
    assert ran == [Task("sing", 3)]
    assert call("sing", "--dry-run", "times=2") == (0, "what: sing\ntimes: 2\n2 times\n")
    assert call("sing", "--plan") == (0, "first, last\n")
    assert call("--help")[1].startswith("usage: Task WHAT")
    assert len(ran) == 1


def test_a_user_error_of_a_program_is_one_line_and_other_errors_keep_their_traceback(capsys):
    def refuse(_):
        raise UserError("videos:\n  no such   folder")

    def crash(_):
        raise RuntimeError("a bug")

    def interrupt(_):
        raise KeyboardInterrupt

    assert cli.program(Task, [], refuse) == 2
    assert capsys.readouterr().err == "error: videos: no such folder\n"
    assert cli.program(Task, [], interrupt) == 130
    assert capsys.readouterr().err.startswith("interrupted;")
    with pytest.raises(RuntimeError, match="a bug"):
        cli.program(Task, [], crash)


def test_a_user_error_reaches_the_shell_without_a_traceback():
    argv = [sys.executable, "-m", "lvdm", "render", "nothing.safetensors", "vae=nowhere"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_nearest():
    assert nearest("sead", ["seed", "samples"]) == " (did you mean 'seed'?)"
    assert nearest("xyz", ["seed"]) == nearest("a", []) == ""
