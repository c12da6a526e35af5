"""A checkpoint's places are used only where the user's own words say the same."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from PIL import Image

from gatewise.cli import main
from gatewise.data import DATA_CLASSES, data_class
from gatewise.data.images.base import ImageData
from gatewise.errors import CheckpointError
from gatewise.tasks import load_trained, parse_recipe, train
from gatewise.tasks._places import PLACES
from gatewise.tasks.sources import image_preparation, open_source
from tests.tasks.conftest import text_content, tiny_content

SHORT = {"trainer.epochs": 1, "trainer.limit_train_batches": 2}
NAMES_ONLY = {
    "config",
    "end_of_text",
    "image_column",
    "image_keys",
    "label_column",
    "label_key",
    "class_names",
    "packing",
    "revision",
    "source",
    "test_split",
    "text_column",
    "train_split",
    "val_split",
}
"""Texts among the fields of data that lead nowhere."""


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A run on a corpus with a cache of its own."""
    return train(parse_recipe(text_content(SHORT, tmp_path_factory.mktemp("writer") / "run"))).best


@pytest.fixture
def foreign(writer, tmp_path):
    """The run's checkpoint alone, as one receives it."""
    return Path(shutil.copy(writer, tmp_path / "received.ckpt"))


def corpus_of(checkpoint):
    return load_trained(checkpoint).recipe.data.fields["root"]


def test_every_text_and_path_of_a_data_section_is_classified():
    for name in DATA_CLASSES:
        hints = get_type_hints(data_class(name).__init__)
        parameters = inspect.signature(data_class(name)).parameters
        texts = {field for field in parameters if {str, Path} & set(flat(hints.get(field)))}
        assert texts - NAMES_ONLY <= set(PLACES[name]), name
        assert set(PLACES[name]) <= set(parameters)


def flat(hint):
    return [hint, *(part for inner in get_args(hint) for part in flat(inner))]


def test_ones_own_run_needs_no_permission(writer):
    _, data = open_source(checkpoint=writer)
    assert str(data.root) == corpus_of(writer)
    assert data.cache.name == "cache"


def test_a_received_checkpoint_is_refused_with_the_places_that_it_names(foreign):
    with pytest.raises(
        CheckpointError, match=r"received.ckpt names places .*: data.root='/.*corpus'; set your own"
    ) as told:
        open_source(checkpoint=foreign)
    assert "--trust-paths" in str(told.value)
    assert "cache" not in str(told.value)


def test_a_place_of_ones_own_goes_before_the_checkpoints(foreign, tmp_path, monkeypatch):
    monkeypatch.setenv("GATEWISE_CACHE", str(tmp_path / "default"))
    _, data = open_source(checkpoint=foreign, assignments=[f"data.root={tmp_path}"])
    assert data.root == tmp_path
    assert data.cache == tmp_path / "default"


def test_places_are_used_with_permission_but_not_the_cache(foreign, tmp_path, monkeypatch):
    monkeypatch.setenv("GATEWISE_CACHE", str(tmp_path / "default"))
    _, data = open_source(checkpoint=foreign, trust_paths=True)
    assert str(data.root) == corpus_of(foreign)
    assert data.cache == tmp_path / "default"


def test_a_recipe_beside_it_that_says_otherwise_confirms_nothing(writer, foreign):
    beside = foreign.with_name("recipe.yaml")
    text = writer.with_name("recipe.yaml").read_text()
    beside.write_text(text)
    open_source(checkpoint=foreign)
    for other in (text.replace("/corpus", "/elsewhere"), "model: [", ""):
        beside.write_text(other)
        with pytest.raises(CheckpointError, match="no recipe.yaml beside it confirms"):
            open_source(checkpoint=foreign)


@pytest.mark.parametrize(("pattern", "refused"), [("*.txt", False), ("../*", True), ("/etc/*", True)])
def test_a_pattern_that_leaves_the_folder_is_a_place(foreign, tmp_path, pattern, refused):
    content = torch.load(foreign, weights_only=True)
    content["gatewise"]["recipe"]["data"]["pattern"] = pattern
    torch.save(content, foreign)
    arguments = {"checkpoint": foreign, "assignments": [f"data.root={tmp_path}"]}
    if refused:
        with pytest.raises(CheckpointError, match="data.pattern="):
            open_source(**arguments)
    else:
        open_source(**arguments)


def test_the_command_reads_and_writes_nothing_that_a_received_checkpoint_names(foreign, tmp_path, capsys):
    content = torch.load(foreign, weights_only=True)
    content["gatewise"]["recipe"]["data"]["cache_dir"] = str(tmp_path / "planted")
    torch.save(content, foreign)
    assert main(["evaluate", "--checkpoint", str(foreign), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "data.root=" in error
    assert error.count("\n") == 1
    assert main(["evaluate", "--checkpoint", str(foreign), "--device", "cpu", "--trust-paths", "--split", "val"]) == 0
    assert not (tmp_path / "planted").exists()


def test_built_in_data_need_no_permission(tmp_path):
    best = train(parse_recipe(tiny_content(SHORT, tmp_path / "run"))).best
    shutil.copy(best, tmp_path / "received.ckpt")
    open_source(checkpoint=tmp_path / "received.ckpt")


IMAGE_SECTIONS = {
    "fashion": {"root": "/nowhere", "source": "full", "download": True},
    "hf": {"path": "somebody/flowers", "cache_dir": "/nowhere", "image_size": 32},
    "image_folder": {"root": "~nobody-at-all/flowers", "image_size": 32},
    "webdataset": {"train_shards": "pipe:x", "val_shards": ["/nowhere/*"], "num_classes": 10, "image_size": 32},
    "digits": {},
}


@pytest.mark.parametrize("name", [name for name in DATA_CLASSES if issubclass(data_class(name), ImageData)])
def test_images_are_prepared_without_the_places(name, tmp_path):
    best = train(parse_recipe(tiny_content(SHORT, tmp_path / "run"))).best
    content = torch.load(best, weights_only=True)
    content["gatewise"]["recipe"]["data"] = {"name": name, **IMAGE_SECTIONS[name]}
    torch.save(content, best)
    prepared = image_preparation(load_trained(best))(Image.new("RGB", (40, 50)))
    assert prepared.shape == (3, 32, 32)
