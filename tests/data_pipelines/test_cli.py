"""The commands' entrance: help, exit statuses and what may never be a traceback."""

import argparse
import shlex
import subprocess
import sys

import pytest

from data_pipelines import command_line, inspection
from data_pipelines.__main__ import COMMANDS, main
from data_pipelines.catalog import CATALOG

SAMPLE = ["inspect", "--source", "shapes", "--index", "0"]


def test_help_names_all_commands_and_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    for name in (*COMMANDS, *CATALOG):
        assert any(line.startswith(f"  {name} ") for line in lines), name
    assert max(map(len, lines)) <= 110


def test_help_imports_nothing_that_takes_long() -> None:
    program = "import sys; from data_pipelines.__main__ import main; main(['-h']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "argparse" in loaded
    assert not loaded & {"jax", "tensorflow_datasets", "array_record", "grain"}


def test_no_command_is_wrong_use_and_gets_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "inspect" in err


def test_an_unknown_command_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["look"])
    assert ended.value.code == 2
    assert "'look'" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_of_its_own(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: python -m data_pipelines {command} " in capsys.readouterr().out


def test_a_missing_package_hinders_its_own_command_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "data_pipelines.builder", None)
    assert main(["prepare", "--help"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: prepare needs a package that is missing or broken: ")
    assert main(SAMPLE) == 0


def test_ctrl_c_ends_with_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspection, "run", run)
    assert main(SAMPLE) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


@pytest.mark.parametrize("error", [ValueError("two\n  lines"), FileNotFoundError("two lines")])
def test_errors_are_one_line(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(args: object) -> int:
        raise error

    monkeypatch.setattr(inspection, "run", run)
    assert main(SAMPLE) == 2
    assert capsys.readouterr() == ("", "error: two lines\n")


def test_a_reader_that_leaves_is_no_error_to_tell() -> None:
    arguments = [sys.executable, "-m", "data_pipelines", "--help"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        # Long before the first line is written.
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.parametrize("command", ["inspect --source shapes --index 0", "stats --source shapes"])
def test_a_closed_stdout_is_one_line(command: str) -> None:
    shell = f"exec {shlex.quote(sys.executable)} -m data_pipelines {command} >&-"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: stdout is closed: there is nowhere to print to\n")


def test_what_the_terminal_cannot_show_is_replaced() -> None:
    program = "from data_pipelines.command_line import echo, printable; echo(printable('ü 犬 \\ud800 \\x1b'))"
    environment = {"PYTHONIOENCODING": "latin-1", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment, check=True)
    assert done.stdout == "ü ? \\ud800 \\x1b\n".encode("latin-1")


def test_options_belong_to_the_source_that_they_follow() -> None:
    options = ["--source", "a", "--annotations", "1", "--source", "b", "--source", "c", "--images", "2"]
    parser = argparse.ArgumentParser()
    command_line.add_source_arguments(parser)
    given = parser.parse_args(options).sources
    assert [(entry["source"], *map(str, list(entry.values())[1:])) for entry in given] == [
        ("a", "1"),
        ("b",),
        ("c", "2"),
    ]
