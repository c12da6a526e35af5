from __future__ import annotations

import os

import pytest

from gatewise.errors import Failure, UserError
from gatewise.tasks.logs import CsvLog, TensorBoardLog, read_log


def test_columns_that_come_later_are_added(tmp_path):
    log = CsvLog(tmp_path / "metrics.csv")
    log.log_metrics({"train/loss": 2.0, "epoch": 0}, 0)
    log.log_metrics({"val/top1": 0.5, "epoch": 0}, 0)
    log.log_metrics({"train/loss": 1.0, "epoch": 1}, 1)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "step,epoch,train/loss,val/top1",
        "0,0,2.0,",
        "0,0,,0.5",
        "1,1,1.0,",
    ]


def test_a_resumed_log_drops_what_is_run_again_and_goes_on(tmp_path):
    path = tmp_path / "metrics.csv"
    first = CsvLog(path)
    for step in range(4):
        first.log_metrics({"train/loss": float(step)}, step)
    resumed = CsvLog(path, from_step=2)
    resumed.log_metrics({"train/loss": 20.0}, 2)
    assert [row["train/loss"] for row in read_log(path)] == [0.0, 1.0, 20.0]


def test_a_new_run_starts_anew(tmp_path):
    path = tmp_path / "metrics.csv"
    CsvLog(path).log_metrics({"train/loss": 1.0}, 0)
    CsvLog(path)
    assert read_log(path) == []


def test_an_unfinished_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,epoch,train/loss\n0,0,1.0\n1,")
    assert read_log(path) == [{"step": 0.0, "epoch": 0.0, "train/loss": 1.0}]


def test_a_last_number_cut_short_is_not_taken_for_whole(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,epoch,train/loss\n0,0,1.0\n1,0,2.5")
    assert [row["train/loss"] for row in read_log(path)] == [1.0]
    CsvLog(path, from_step=5).log_metrics({"train/loss": 3.0, "epoch": 0}, 1)
    assert [row["train/loss"] for row in read_log(path)] == [1.0, 3.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step,epoch\n0,0\nx,1\n", "row 3: step must be a whole number, not 'x'"),
        ("step,epoch\n-1,0\n", "row 2: step must be a whole number, not '-1'"),
        ("step,epoch\n1.5,0\n", "row 2: step must be a whole number, not '1.5'"),
        ("step,epoch,loss\n0,0,high\n", "row 2: loss must be a number, not 'high'"),
        ("step,epoch\n0\n1,1\n", "row 2: expected 2 cells, not 1"),
        ("step,epoch\n0,0,7\n", "row 2: expected 2 cells, not 3"),
        ("name,price\na,1\n", "expected different columns with step"),
        ("step,step\n0,0\n", "expected different columns with step"),
        ('step,epoch\n"0,0\n', "is damaged"),
    ],
)
def test_a_damaged_log_is_refused_and_left_as_it_is(tmp_path, text, message):
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    for read in (read_log, lambda path: CsvLog(path, from_step=9)):
        with pytest.raises(UserError, match=r"metrics\.csv") as caught:
            read(path)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert path.read_text() == text


def test_a_row_is_written_at_once(tmp_path, monkeypatch):
    log = CsvLog(tmp_path / "metrics.csv")
    log.log_metrics({"train/loss": 1.0}, 0)
    written = []
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: written.append(data) or write(file, data))
    log.log_metrics({"train/loss": 2.0}, 1)
    assert written == [b"1,,2.0\r\n"]


def test_a_full_disk_leaves_whole_rows_and_is_told_with_the_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.csv"
    log = CsvLog(path)
    log.log_metrics({"train/loss": 1.0}, 0)
    before = path.read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:2]))
    with pytest.raises(Failure, match=r"cannot write .*metrics\.csv"):
        log.log_metrics({"train/loss": 2.0}, 1)
    assert path.read_bytes() == before


def test_a_full_disk_under_tensorboard_is_told_with_the_folder(tmp_path, monkeypatch):
    log = TensorBoardLog(tmp_path, "", "tensorboard")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    with pytest.raises(Failure, match="cannot write .*tensorboard: No space left on device"):
        log.log_metrics({"train/loss": 2.0}, 1)
