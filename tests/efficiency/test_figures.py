"""Figures and tables replace what was there in one step, or leave it."""

from __future__ import annotations

import errno
import os

import pytest
from matplotlib.figure import Figure

from gatewise.efficiency._figures import save_figure, save_table
from gatewise.errors import Failure

BEGINNINGS = {"plot.png": b"\x89PNG", "plot.pdf": b"%PDF", "plot.svg": b"<?xml"}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_the_ending_names_the_form(tmp_path, name):
    save_figure(Figure(), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(BEGINNINGS[name])


def test_a_figure_without_an_ending_is_png(tmp_path):
    save_figure(Figure(), tmp_path / "plot")
    assert (tmp_path / "plot.png").read_bytes().startswith(BEGINNINGS["plot.png"])


def test_an_unknown_form_is_named(tmp_path):
    with pytest.raises(ValueError, match="xyz"):
        save_figure(Figure(), tmp_path / "plot.xyz")
    assert not list(tmp_path.iterdir())


def test_a_table_is_csv(tmp_path):
    save_table([("a", "b"), (1, "x,y")], tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_bytes() == b'a,b\r\n1,"x,y"\r\n'


@pytest.mark.parametrize("save", [lambda path: save_figure(Figure(), path), lambda path: save_table([(1,)], path)])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, save):
    path = tmp_path / "file.png"
    path.write_bytes(b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("gatewise.files.writing.os.fsync", full)
    with pytest.raises(Failure, match="cannot write .*file.png: No space left"):
        save(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
