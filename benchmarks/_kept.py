"""What a benchmark has measured stays in a file of its own, so that it can be stopped and go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def kept(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the file holds; measured and written first if there is none."""
    if not path.exists():
        content = json.dumps(measure())
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.unfinished")
        unfinished.write_text(content + "\n", encoding="utf-8")
        unfinished.replace(path)
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record
