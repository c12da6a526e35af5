"""The command line: dispatch, exit status, one line per error."""

from __future__ import annotations

import pytest

from gatewise.cli import GROUPS, main
from gatewise.errors import Failure, Interrupted


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    for commands in GROUPS.values():
        assert all(name in printed for name in commands)


@pytest.mark.parametrize("name", [name for commands in GROUPS.values() for name in commands])
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert f"gatewise {name}" in capsys.readouterr().out


def test_unknown_command_suggests_the_closest(capsys):
    assert main(["measur"]) == 2
    assert capsys.readouterr().err == "gatewise: error: unknown command 'measur'; did you mean 'measure'?\n"


def test_wrong_argument_is_one_line(capsys):
    assert main(["list", "--nonsense"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--nonsense" in error


def test_list_takes_a_pattern(capsys):
    assert main(["list", "focalnet_tiny_?rf"]) == 0
    assert capsys.readouterr().out.split() == ["focalnet_tiny_lrf", "focalnet_tiny_srf"]


def test_list_without_a_match_is_a_users_mistake(capsys):
    assert main(["list", "fokalnet_tiny_srf"]) == 2
    assert "focalnet_tiny_srf" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("a bad value"), 2),
        (FileNotFoundError(2, "No such file", "x.yaml"), 2),
        (Failure("the disk is full"), 1),
        (RuntimeError("broken\nin two lines"), 1),
        (FileExistsError(17, "File exists", "x.yaml"), 2),
        (OSError(28, "No space left on device", "x.ckpt"), 1),
        (MemoryError(), 1),
    ],
)
def test_errors_are_one_line_and_tell_mistake_from_failure(monkeypatch, capsys, error, status):
    def fail(_arguments):
        raise error

    monkeypatch.setattr("gatewise.cli._main._run", fail)
    assert main(["list"]) == status
    printed = capsys.readouterr().err
    assert printed.startswith("gatewise: error: ")
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "is_bug"),
    [
        (KeyError("epoch"), True),
        (TypeError("no text"), True),
        (Failure("the disk is full"), False),
        (ValueError("a bad value"), False),
        (OSError(28, "No space left on device"), False),
        (MemoryError("2 GiB"), False),
    ],
)
def test_what_nobody_foresaw_is_called_a_bug(monkeypatch, capsys, error, is_bug):
    def fail(_arguments):
        raise error

    monkeypatch.setattr("gatewise.cli._main._run", fail)
    main(["list"])
    assert ("this is a bug; run again with --debug" in capsys.readouterr().err) == is_bug


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (Interrupted(15), 143, "interrupted"),
        (Interrupted(1, "interrupted before it began"), 129, "interrupted before it began"),
    ],
)
def test_an_interruption_exits_with_the_number_of_its_signal(monkeypatch, capsys, error, status, line):
    def fail(_arguments):
        raise error

    monkeypatch.setattr("gatewise.cli._main._run", fail)
    assert main(["list"]) == status
    assert capsys.readouterr().err == f"gatewise: {line}\n"


def test_debug_shows_the_traceback(capsys):
    assert main(["--debug", "list", "nothing_like_it"]) == 2
    assert "Traceback" in capsys.readouterr().err
