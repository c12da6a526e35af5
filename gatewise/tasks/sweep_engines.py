"""Running the cells of a sweep, in processes on this machine or with Ray.

A process runs many cells one by one, because starting it takes seconds. If a process dies (out of memory, driver
fault), its cell fails and the process is replaced.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from gatewise.errors import MissingExtraError, UserError
from gatewise.files import FolderInUseError, read_json, write_text
from gatewise.tasks.interruption import Interruption

CELL_FILE = "cell.json"
"""File with the outcome and recipe of a cell, in its run folder."""
LOG_FILE = "log.txt"
"""File with the output that a cell prints."""

Status = Literal["finished", "failed", "interrupted"]


@dataclass(frozen=True)
class Outcome:
    """Outcome of a cell.

    Attributes:
        metrics: metrics of the best epoch, and its number under "epoch".
        error: reason of a failure, in one line.
    """

    status: Status
    metrics: Mapping[str, float] = field(default_factory=dict)
    parameters: int | None = None
    state_bytes: int | None = None
    epochs: int | None = None
    steps: int | None = None
    seconds: float | None = None
    error: str = ""


class CellLike(Protocol):
    """Interface of a cell for the engines."""

    @property
    def folder(self) -> Path: ...

    @property
    def content(self) -> dict[str, Any]: ...


Report = Callable[[Any, Outcome], None]


def run_cell(content: Mapping[str, Any]) -> Outcome:
    """Train a recipe or resume an earlier attempt, and write the outcome into the run folder."""
    from gatewise.tasks.reading import parse_recipe
    from gatewise.tasks.training import train

    folder = Path(content["output"])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG_FILE).open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            resume = (folder / "last.ckpt").exists()
            result = train(parse_recipe(content), resume=resume, overwrite=not resume)
        except KeyboardInterrupt:
            return Outcome("interrupted")
        except FolderInUseError as error:
            # The folder belongs to another process, so nothing is written.
            return Outcome("failed", error=str(error))
        # The sweep continues without a failed cell and reports it at the end.
        except Exception as error:
            traceback.print_exc()
            told = " ".join(str(error).split()) or type(error).__name__
            outcome = Outcome("failed", error=told)
        else:
            outcome = Outcome(
                "finished",
                result.metrics,
                result.parameters,
                result.state_bytes,
                result.epochs,
                result.steps,
                result.seconds,
            )
    write_outcome(folder, content, outcome)
    return outcome


def write_outcome(folder: Path, content: Mapping[str, Any], outcome: Outcome) -> None:
    """Write the outcome of a recipe into its folder."""
    write_text(folder / CELL_FILE, json.dumps({"outcome": asdict(outcome), "recipe": content}, indent=2) + "\n")


def read_outcome(folder: Path) -> tuple[Outcome, dict[str, Any]] | None:
    """Return the outcome in a cell's folder and its recipe, or None if there is none yet.

    Raises:
        UserError: if the file is damaged or not the file of a cell.
    """
    path = folder / CELL_FILE
    if not path.exists():
        return None
    # A loss may be NaN.
    content = read_json(path, "cell", allow_nonfinite=True)
    if not isinstance(content, dict) or not isinstance(content.get("recipe"), dict):
        raise UserError(f"{path} is not the file of a cell: expected outcome and recipe; move it away to continue")
    outcome = content.get("outcome")
    if not isinstance(outcome, dict) or not _is_outcome(outcome):
        raise UserError(f"{path} is damaged: its outcome is not that of a cell; move it away to train the cell again")
    return Outcome(**outcome), content["recipe"]


def _is_outcome(outcome: Mapping[str, Any]) -> bool:
    if not set(outcome) <= {field.name for field in fields(Outcome)}:
        return False
    metrics = outcome.get("metrics", {})
    counts = [outcome.get(name) for name in ("parameters", "state_bytes", "epochs", "steps", "seconds")]
    return (
        outcome.get("status") in get_args(Status)
        and isinstance(outcome.get("error", ""), str)
        and isinstance(metrics, dict)
        and all(_is_number(value) for value in metrics.values())
        and all(count is None or _is_number(count) for count in counts)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def run_locally(cells: Sequence[CellLike], jobs: int, log: Path, report: Report) -> None:
    """Run cells in `jobs` processes, which share the cores and are assigned to the accelerators in turn.

    Raises:
        KeyboardInterrupt: after an interruption, once the processes have saved their state.
    """
    # An equal share of the cores, unless the user has set a number.
    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, (os.cpu_count() or 1) // jobs)
    waiting: queue.SimpleQueue[CellLike] = queue.SimpleQueue()
    for cell in cells:
        waiting.put(cell)
    done: queue.SimpleQueue[tuple[CellLike, Outcome]] = queue.SimpleQueue()
    devices: list[str | None] = [*_devices()] or [None]
    slots = [Slot(devices[number % len(devices)], threads, log) for number in range(min(jobs, len(cells)))]
    serving = [threading.Thread(target=slot.serve, args=(waiting, done), daemon=True) for slot in slots]
    with Interruption():
        for thread in serving:
            thread.start()
        try:
            for _ in cells:
                report(*done.get())
        except KeyboardInterrupt:
            _empty(waiting)
            for slot in slots:
                slot.interrupt()
            for thread in serving:
                thread.join()
            raise
        finally:
            for slot in slots:
                slot.close()


class Slot:
    """Worker that runs cells in one process at a time.

    Args:
        device: GPU of the process; None if there is none.
        threads: number of threads per operator.
        log: file for what the process prints outside its cells.
    """

    def __init__(self, device: str | None, threads: int, log: Path) -> None:
        self._arguments = (device, threads, str(log))
        self._process: Any = None
        self._connection: Connection | None = None
        self._interrupted = False

    def serve(self, waiting: queue.SimpleQueue[CellLike], done: queue.SimpleQueue[tuple[CellLike, Outcome]]) -> None:
        """Run cells until none is left."""
        while True:
            try:
                cell = waiting.get_nowait()
            except queue.Empty:
                return
            done.put((cell, self._run(cell)))

    def _run(self, cell: CellLike) -> Outcome:
        if self._connection is None:
            context = get_context("spawn")
            self._connection, other = context.Pipe()
            # Not a daemon, so that it may start data-loading processes.
            self._process = context.Process(target=_work, args=(other, *self._arguments))
            self._process.start()
            other.close()
        try:
            self._connection.send(cell.content)
            return self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            self._connection.close()
            self._connection = None
            if self._interrupted:
                # It had not begun to train, so there is nothing to save.
                return Outcome("interrupted")
            outcome = Outcome("failed", error=f"its process died ({_exit_words(self._process.exitcode)})")
            write_outcome(cell.folder, cell.content, outcome)
            return outcome

    def interrupt(self) -> None:
        """Make the process save its state and stop."""
        self._interrupted = True
        if self._process is not None and self._process.is_alive():
            os.kill(self._process.pid, signal.SIGTERM)

    def close(self) -> None:
        """End the process."""
        if self._connection is not None:
            self._connection.close()
            self._process.join(timeout=5)
            self._process.kill()
            self._process.join()


def _work(connection: Connection, device: str | None, threads: int, log: str) -> None:
    """Main function of a slot's process: receive recipes and send outcomes until the connection closes."""
    # Its own process group: an interrupt at the terminal reaches only the sweep, which passes it on once.
    os.setpgid(0, 0)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    import torch

    torch.set_num_threads(threads)
    while True:
        try:
            content = connection.recv()
        except EOFError:
            return
        connection.send(run_cell(content))


def _end_with_parent() -> None:
    """Kill this process and its data-loading processes when the sweep is gone.

    They end at once: what they have written is complete, and a restarted sweep needs their folders.
    """
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)


def _devices() -> list[str]:
    """Return the names of this machine's GPUs, in the form of CUDA_VISIBLE_DEVICES."""
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(index) for index in range(count)]


def run_with_ray(cells: Sequence[CellLike], jobs: int | None, report: Report) -> None:
    """Run cells as tasks of an existing Ray cluster (`RAY_ADDRESS`, or one on this machine), else of a new local one.

    Each task takes a core, and an accelerator if the cluster has any. The folders must be on storage that all machines
    share.

    Args:
        jobs: maximum number of tasks at once; None: as many as fit.
    Raises:
        MissingExtraError: if Ray is not installed.
        KeyboardInterrupt: after an interruption, once the tasks have been told to save and stop.
    """
    try:
        ray = import_module("ray")
    except ModuleNotFoundError as error:
        raise MissingExtraError("--engine ray needs Ray: pip install 'gatewise[sweep]'") from error
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, include_dashboard=False)
    accelerators = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
    task = ray.remote(num_cpus=1, num_gpus=accelerators, max_retries=0)(run_cell)
    waiting = list(reversed(cells))
    running: dict[Any, CellLike] = {}
    try:
        while waiting or running:
            while waiting and (jobs is None or len(running) < jobs):
                cell = waiting.pop()
                running[task.remote(cell.content)] = cell
            [first], _ = ray.wait(list(running), num_returns=1)
            cell = running.pop(first)
            try:
                outcome = ray.get(first)
            except ray.exceptions.RayError as error:
                outcome = Outcome("failed", error=(str(error).strip().splitlines() or [type(error).__name__])[-1])
                write_outcome(cell.folder, cell.content, outcome)
            report(cell, outcome)
    except KeyboardInterrupt:
        for reference in running:
            ray.cancel(reference)
        ray.wait(list(running), num_returns=len(running), timeout=60)
        raise
    finally:
        if started:
            ray.shutdown()


def _empty(waiting: queue.SimpleQueue[Any]) -> None:
    while not waiting.empty():
        waiting.get()


def _exit_words(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit status {code}"
