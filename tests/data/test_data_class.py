"""Data modules by name."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
from jsonargparse import ArgumentParser

import gatewise.data
from gatewise.data import DATA_CLASSES, data_class
from gatewise.data.images.transforms import Augmentation
from gatewise.errors import UnknownNameError


@pytest.mark.parametrize("name", sorted(DATA_CLASSES))
def test_every_name_is_a_documented_data_module(name):
    found = data_class(name)
    assert issubclass(found, gatewise.data.DataModule)
    assert getattr(gatewise.data, found.__name__) is found
    for parameter in list(inspect.signature(found.__init__).parameters)[1:]:
        assert f"        {parameter}: " in inspect.getdoc(found).replace("\n    ", "\n        "), parameter


@pytest.mark.parametrize("name", sorted(DATA_CLASSES))
def test_every_data_module_can_be_built_from_a_recipe(name):
    required = {
        "hf": {"path": "somewhere"},
        "image_folder": {"root": "somewhere"},
        "mqar": {"train_segments": [[2, 8, 20]], "val_segments": [[2, 8, 10]]},
        "webdataset": {"train_shards": "a.tar", "val_shards": ["b.tar"], "num_classes": 2},
    }
    fields = {"batch_size": 6, "seed": 3}
    if issubclass(data_class(name), gatewise.data.ImageData):
        fields |= {"augment": {"random_erasing": 0.25}, "evaluation": {"crop_pct": 0.9}}
    parser = ArgumentParser()
    parser.add_class_arguments(data_class(name), "data")
    parsed = parser.parse_object({"data": {**required.get(name, {}), **fields}})
    module = parser.instantiate(parsed).data
    assert (module.batch_size, module.eval_batch_size, module.seed) == (6, 6, 3)


def test_a_recipe_keeps_the_augmentation_that_it_does_not_set():
    parser = ArgumentParser()
    parser.add_class_arguments(data_class("digits"), "data", instantiate=False)
    parsed = parser.parse_args(["--data.augment.random_erasing", "0.25"])
    assert parser.instantiate(parsed).data.augment == Augmentation(
        crop="pad", crop_padding=2, hflip=0.0, random_erasing=0.25
    )


def test_an_unknown_name_suggests_the_closest():
    with pytest.raises(UnknownNameError, match="unknown data 'fashoin'; did you mean 'fashion'"):
        data_class("fashoin")


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Imagenet'"):
        gatewise.data.Imagenet  # noqa: B018


def test_the_table_loads_no_heavy_package():
    heavy = "{'torch', 'lightning', 'timm', 'torchvision', 'datasets', 'webdataset'}"
    command = f"import sys, gatewise.data; print(sorted({heavy} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", command], check=True, capture_output=True, text=True).stdout
    assert loaded.strip() == "[]"
