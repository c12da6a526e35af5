from __future__ import annotations

from gatewise.tasks.logs import CsvLog, read_log


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
