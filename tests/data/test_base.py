"""What all image data modules share, seen through the smallest of them."""

from __future__ import annotations

import multiprocessing
import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from gatewise.data import data_class
from gatewise.data.images.digits import Digits
from gatewise.data.images.transforms import Evaluation
from gatewise.errors import MissingExtraError, UserError


def digits(**fields) -> Digits:
    module = Digits(**fields)
    module.setup()
    return module


@pytest.mark.parametrize("channels", [1, 3])
def test_batches_keep_the_contract(channels):
    module = digits(channels=channels, batch_size=8, eval_batch_size=16)
    for loader, size in ((module.train_dataloader(), 8), (module.val_dataloader(), 16), (module.test_dataloader(), 16)):
        images, labels = next(iter(loader))
        assert images.shape == (size, *module.input_size)
        assert images.dtype == torch.float32
        assert images.is_contiguous()
        assert labels.shape == (size,)
        assert labels.dtype == torch.int64
    assert module.input_size == (channels, 32, 32)
    assert len(module.mean) == len(module.std) == channels
    assert module.num_classes == len(module.class_names) == 10


def test_lengths_of_loaders_are_their_batches():
    module = digits(batch_size=100)
    for loader in (module.train_dataloader(), module.val_dataloader(), module.test_dataloader()):
        assert len(list(loader)) == len(loader)


def test_the_evaluation_transform_needs_no_data():
    transform = Digits().transform_for_eval()
    assert transform(Image.new("RGBA", (50, 20), "red")).shape == (3, 32, 32)


def test_the_evaluation_transform_is_the_one_of_the_validation_batches():
    module = digits(batch_size=4)
    images, _ = next(iter(module.val_dataloader()))
    transformed = torch.stack([module.transform_for_eval()(module.parts.val.image(index)) for index in range(4)])
    assert torch.equal(images, transformed)


def test_denormalizing_gives_the_pixels_back():
    module = digits(batch_size=4)
    images, _ = next(iter(module.val_dataloader()))
    pixels = module.denormalize(images)
    original = np.asarray(module.parts.val.image(0).resize((32, 32), Image.Resampling.BICUBIC)) / 255
    torch.testing.assert_close(pixels[0, 0], torch.from_numpy(original).float())


def test_setting_up_twice_keeps_the_split():
    module = digits()
    parts = module.parts
    module.setup("test")
    assert module.parts is parts


def test_asking_for_images_too_early_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"call Digits\.setup\(\) before"):
        _ = Digits().parts


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"eval_batch_size": 0}, "eval_batch_size must be at least 1, not 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, not -1"),
        ({"seed": -3}, "seed must be at least 0, not -3"),
        ({"val_fraction": 1.0}, r"val_fraction must be at least 0 and below 1, not 1\.0"),
        ({"test_fraction": -0.1}, "test_fraction must be at least 0"),
    ],
)
def test_numbers_out_of_range_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Digits(**fields)


def test_a_batch_larger_than_the_training_part_is_refused():
    with pytest.raises(UserError, match="1295 training images do not fill one batch of 5000"):
        digits(batch_size=5000).train_dataloader()


@pytest.mark.parametrize("end", [lambda module: module.teardown("fit"), lambda module: module.on_exception(OSError())])
def test_loading_processes_end_with_the_run(end):
    module = digits(batch_size=100, num_workers=2)
    loaders = [module.train_dataloader(), module.val_dataloader()]
    for loader in loaders:
        next(iter(loader))
    assert len(multiprocessing.active_children()) == 4
    end(module)
    assert multiprocessing.active_children() == []
    assert [len(list(loader)) for loader in loaders] == [len(loader) for loader in loaders]
    end(module)


def test_a_data_module_can_be_sent_to_spawned_processes():
    module = pickle.loads(pickle.dumps(Digits(batch_size=8)))
    module.setup()
    assert len(next(iter(module.train_dataloader()))[1]) == 8


@pytest.mark.parametrize(("name", "package"), [("webdataset", "webdataset"), ("hf", "datasets")])
def test_a_missing_package_names_what_to_install(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    fields = {"webdataset": {"train_shards": "a.tar", "val_shards": "a.tar", "num_classes": 2}, "hf": {"path": "a"}}
    with pytest.raises(MissingExtraError, match=rf"{package} is not installed; pip install 'gatewise\[data\]'"):
        data_class(name)(**fields[name]).setup()


def test_evaluation_settings_reach_the_transform():
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (32, 32), dtype=np.uint8))
    whole, cut = Digits(), Digits(evaluation=Evaluation(crop_pct=0.5))
    assert not torch.equal(whole.transform_for_eval()(image), cut.transform_for_eval()(image))
