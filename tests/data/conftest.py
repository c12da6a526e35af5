"""Tiny folders of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def class_folders(tmp_path: Path) -> Callable[..., Path]:
    """Makes `root/<class>/<number>.png`, with as many images per class as asked for; every image of another gray."""

    def make(counts: Mapping[str, int], root: Path = tmp_path / "images") -> Path:
        for place, (name, count) in enumerate(counts.items()):
            (root / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (12, 10), (40 * place + number,) * 3).save(root / name / f"{number:03}.png")
        return root

    return make
