"""Kill gatewise without warning while it trains, sweeps, saves and exports, and see what is left.

    python -m tests.stress.kill --kills 50 --output kills.json

After each kill the file that was being replaced must be whole, and the next start must finish with the result of an
uninterrupted run, bit by bit, and leave no temporary file behind.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from gatewise.files import write_json, write_text

STARTED_S = 120.0
"""Seconds within which a started process must show what it is waited for."""

WORKERS_END_S = 10.0
"""Seconds within which the workers of a killed sweep must have ended."""


class Finding(Exception):  # noqa: N818 (what the harness looks for)
    """Something was lost, damaged or left behind."""


def start(*words: str) -> subprocess.Popen[str]:
    """Start a Python module in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def kill(process: subprocess.Popen[str]) -> None:
    """End the process as a power cut would; its children live on."""
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def finish(*words: str) -> str:
    """Run to the end; returns what was printed."""
    done = subprocess.run(
        [sys.executable, "-m", *words],
        capture_output=True,
        text=True,
        timeout=STARTED_S,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if done.returncode != 0:
        raise Finding(f"{' '.join(words)}: exit status {done.returncode}: {(done.stdout + done.stderr).strip()[-500:]}")
    return done.stdout


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise Finding(f"{what} took more than {seconds:g} s")
        time.sleep(0.002)


def leftovers(folder: Path) -> list[str]:
    """Temporary files in a folder and below it."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.endswith(".tmp")]


def write_recipe(path: Path, output: Path, **fields: Any) -> Path:
    """Write a recipe that trains for a second or two and checkpoints after every update."""
    from tests.stress.kinds.base import TINY_MODEL

    content = {
        "model": TINY_MODEL,
        "data": {"name": "digits", "batch_size": 16, "num_workers": 0},
        "trainer": {
            "epochs": 3,
            "accelerator": "cpu",
            "progress": False,
            "log_every": 1,
            "checkpoint_every": 1,
            "limit_train_batches": 12,
            "limit_val_batches": 2,
            "ema": 0.9,
        },
        "output": str(output),
        **fields,
    }
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def weights(path: Path) -> dict[str, bytes]:
    """The tensors of a checkpoint as bytes."""
    import torch

    content = torch.load(path, weights_only=True)
    states = {**content["state_dict"], **{f"ema.{k}": v for k, v in content["state_dict_ema"].items()}}
    return {key: tensor.contiguous().numpy().tobytes() for key, tensor in states.items()}


def steps(path: Path) -> list[int]:
    """The steps whose training loss a log holds."""
    with path.open(newline="", encoding="utf-8") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row.get("train/loss")]


class Training:
    """Kills a run, once or several times, and resumes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        finish("gatewise", "train", str(write_recipe(folder / "whole.yaml", folder / "whole")))
        self.expected = weights(folder / "whole" / "last.ckpt")
        self.steps = steps(folder / "whole" / "metrics.csv")

    def round(self, rng: random.Random, number: int) -> int:
        run = self.folder / f"run{number}"
        recipe = write_recipe(self.folder / f"run{number}.yaml", run)
        kills = rng.choice((1, 1, 2, 3))
        for attempt in range(kills):
            process = start("gatewise", "train", str(recipe), *(["--resume"] if attempt else []))
            before = (run / "last.ckpt").stat().st_mtime_ns if (run / "last.ckpt").exists() else 0
            wait_for(
                lambda before=before, process=process: (
                    process.poll() is not None
                    or ((run / "last.ckpt").exists() and (run / "last.ckpt").stat().st_mtime_ns > before)
                ),
                STARTED_S,
                "the first checkpoint",
            )
            time.sleep(rng.uniform(0, 0.4))
            kill(process)
        finish("gatewise", "train", str(recipe), "--resume")
        if weights(run / "last.ckpt") != self.expected:
            raise Finding("other weights than an uninterrupted run's")
        if steps(run / "metrics.csv") != self.steps:
            raise Finding(f"the log has steps {steps(run / 'metrics.csv')}")
        if left := leftovers(run):
            raise Finding(f"left behind: {left}")
        return kills


class Sweeping:
    """Kills the process that a sweep was started with, and starts the sweep again."""

    AXES = ("--axis", "optim.lr=0.001,0.01", "--axis", "seed=0,1")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = write_recipe(folder / "sweep.yaml", folder / "unused")
        finish("gatewise", "sweep", str(self.recipe), *self.AXES, "--output", str(folder / "whole"), "--jobs", "2")
        self.expected = self._scores(folder / "whole")

    def round(self, rng: random.Random, number: int) -> int:
        import psutil

        output = self.folder / f"sweep{number}"
        words = ("gatewise", "sweep", str(self.recipe), *self.AXES, "--output", str(output), "--jobs", "2")
        process = start(*words)
        wait_for(lambda: any(output.glob("cells/*/last.ckpt")), STARTED_S, "the first checkpoint of a cell")
        time.sleep(rng.uniform(0, 1.0))
        workers = psutil.Process(process.pid).children(recursive=True)
        kill(process)
        wait_for(
            lambda: not any(worker.is_running() and worker.status() != "zombie" for worker in workers),
            WORKERS_END_S,
            "the end of the workers",
        )
        finish(*words)
        if self._scores(output) != self.expected:
            raise Finding("other scores than an uninterrupted sweep's")
        if left := leftovers(output):
            raise Finding(f"left behind: {left}")
        return 1

    @staticmethod
    def _scores(folder: Path) -> list[str]:
        with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        timed = ("seconds", "started", "folder")
        return [json.dumps({key: value for key, value in row.items() if key not in timed}) for row in rows]


class Writing:
    """Kills a process that replaces a file again and again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def round(self, rng: random.Random, number: int) -> int:
        from tests.stress.writers import WRITERS

        name = rng.choice(sorted(WRITERS))
        path = self.folder / f"{name}{WRITERS[name].suffix}"
        process = start("tests.stress.writers", name, str(path))
        assert process.stdout is not None
        if process.stdout.readline() != "written\n":
            raise Finding(f"{name}: {process.stdout.read()[-500:]}")
        time.sleep(rng.uniform(0, 0.3))
        kill(process)
        WRITERS[name].check(path)
        finish("tests.stress.writers", name, str(path), "--once")
        WRITERS[name].check(path)
        if left := leftovers(self.folder):
            raise Finding(f"{name} left behind: {left}")
        return 1


PARTS = {"training": (Training, 24), "sweep": (Sweeping, 8), "save and export": (Writing, 18)}
"""What is killed, and its share of fifty kills."""


def page(content: dict[str, Any]) -> str:
    """Return the results as a page of the documentation."""
    rows = [
        f"| {part['part']} | {part['kills']} | {part['rounds']} | {part.get('good', 0)} | {len(part['findings'])} |"
        for part in content["parts"]
    ]
    return "\n".join(
        [
            "# Killed processes",
            "",
            f"`python -m tests.stress.kill`, {content['date']}. A round is good if the files were whole after each",
            "kill, the next start came to the result of an uninterrupted run, and nothing was left behind.",
            "",
            "| killed in | kills | rounds | good | findings |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="number of kills (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the moments (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file for the results")
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(prefix="gatewise-kill-") as folder:
        for name, (part, share) in PARTS.items():
            place = Path(folder, name)
            place.mkdir()
            counts: Counter[str] = Counter()
            findings: list[str] = []
            rng = random.Random(f"{name} {args.seed}")
            wanted = max(1, round(args.kills * share / sum(share for _, share in PARTS.values())))
            subject = part(place)
            while counts["kills"] < wanted:
                counts["rounds"] += 1
                try:
                    counts["kills"] += subject.round(rng, counts["rounds"])
                    counts["good"] += 1
                except Finding as finding:
                    counts["kills"] += 1
                    findings.append(str(finding))
            results.append({"part": name, **counts, "findings": findings})
            print(
                f"{name:<18}{counts['kills']:>4} kills{counts['rounds']:>4} rounds{counts['good']:>4} good", flush=True
            )
            for text in findings:
                print(f"    {text}", flush=True)
    if args.output is not None:
        content = {"date": time.strftime("%Y-%m-%d"), "seed": args.seed, "parts": results}
        write_json(args.output, content)
        write_text(args.output.with_suffix(".md"), page(content))
    return 1 if any(result["findings"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
