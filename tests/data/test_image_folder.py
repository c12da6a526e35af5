"""Folders of class folders, tidy and untidy."""

from __future__ import annotations

import logging
import os
import warnings

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from gatewise.data.images.handover import UnreadableImagesWarning
from gatewise.data.images.image_folder import ImageFolder, scan
from gatewise.errors import UserError


def module(root, **fields) -> ImageFolder:
    found = ImageFolder(root, **{"image_size": 16, "batch_size": 4, "num_workers": 0, **fields})
    found.setup()
    return found


def names(part) -> list[str]:
    return ["/".join(part.name(index).split("/")[-3:]) for index in range(len(part))]


def test_class_folders_are_split_evenly(class_folders):
    found = module(class_folders({"cat": 20, "dog": 10}), val_fraction=0.1, test_fraction=0.2)
    assert found.class_names == ["cat", "dog"]
    assert found.num_classes == 2
    parts = found.parts
    assert [np.bincount(part.labels).tolist() for part in (parts.train, parts.val, parts.test)] == [
        [14, 7],
        [2, 1],
        [4, 2],
    ]
    assert len({*names(parts.train), *names(parts.val), *names(parts.test)}) == 30


def test_the_split_is_a_function_of_the_seed(class_folders):
    root = class_folders({"cat": 20, "dog": 20})
    assert names(module(root).parts.val) == names(module(root).parts.val)
    assert names(module(root).parts.val) != names(module(root, seed=1).parts.val)


@pytest.mark.parametrize("folders", [("train", "val", "test"), ("Training", "VALID", "Testing")])
def test_folders_for_the_parts_are_used(class_folders, folders):
    for place, folder in enumerate(folders):
        root = class_folders({"cat": 4 + place, "dog": 4}, class_folders({}) / folder).parent
    parts = module(root).parts
    assert [len(part) for part in (parts.train, parts.val, parts.test)] == [8, 9, 10]
    assert all(name.startswith(folders[1]) for name in names(parts.val))


def test_validation_images_test_where_there_is_no_test_folder(class_folders):
    root = class_folders({"cat": 4}, class_folders({}) / "train").parent
    class_folders({"cat": 3}, root / "val")
    parts = module(root).parts
    assert names(parts.test) == names(parts.val)


def test_a_part_of_training_validates_where_there_is_no_folder_for_it(class_folders):
    root = class_folders({"cat": 10, "dog": 10}, class_folders({}) / "train").parent
    class_folders({"cat": 3}, root / "test")
    parts = module(root, val_fraction=0.2).parts
    assert [len(part) for part in (parts.train, parts.val, parts.test)] == [16, 4, 3]


def test_labels_of_other_parts_are_those_of_training(class_folders):
    root = class_folders({"ant": 4, "bee": 4, "cat": 4}, class_folders({}) / "train").parent
    class_folders({"cat": 2}, root / "val")
    assert module(root).parts.val.labels.tolist() == [2, 2]


@pytest.mark.parametrize("size", [16, (16, 24)])
def test_images_are_brought_to_the_size(class_folders, size):
    found = module(class_folders({"cat": 10}), image_size=size)
    height, width = (16, 16) if size == 16 else size
    assert found.input_size == (3, height, width)
    for loader in (found.train_dataloader(), found.val_dataloader(), found.test_dataloader()):
        assert next(iter(loader))[0].shape[1:] == (3, height, width)


def test_names_in_any_script_and_nested_folders_are_found(class_folders):
    root = class_folders({"Käse": 2, "猫": 2})
    class_folders({"Schätze": 2}, root / "猫" / "ältere")
    found = module(root, val_fraction=0.0, test_fraction=0.0, batch_size=6)
    assert found.class_names == ["Käse", "猫"]
    assert found.parts.train.labels.tolist() == [0, 0, 1, 1, 1, 1]
    assert len(next(iter(found.train_dataloader()))[0]) == 6


def test_hidden_and_other_files_are_passed_over(class_folders):
    root = class_folders({"cat": 2, ".cache": 2})
    (root / "cat" / "._000.png").write_bytes(b"resource fork")
    (root / "cat" / "notes.txt").write_text("not an image")
    assert scan(root).class_names == ["cat"]
    assert len(scan(root).source) == 2


def test_images_of_every_mode_make_one_batch(class_folders):
    root = class_folders({"mixed": 0})
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"):
        image = Image.fromarray(np.zeros((9, 9), np.uint16)) if mode == "I;16" else Image.new(mode, (9, 9))
        image.save(root / "mixed" / f"{mode.replace(';', '')}.{'jpg' if mode == 'CMYK' else 'png'}")
    found = module(root, val_fraction=0.0, test_fraction=0.0, batch_size=8)
    assert next(iter(found.train_dataloader()))[0].shape == (8, 3, 16, 16)
    assert found.unreadable == []


def test_a_balanced_epoch_draws_rare_classes_more_often(class_folders):
    found = module(class_folders({"often": 30, "rare": 6}), val_fraction=0.0, test_fraction=0.0, class_balanced=True)
    labels = torch.cat([labels for _, labels in found.train_dataloader()])
    assert labels.bincount().tolist() == [18, 18]


class Trainee(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, _):
        return self.weight * batch[0].mean()

    def validation_step(self, batch, _):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("epochs", [1, 3])
def test_broken_images_are_skipped_named_once_and_counted_at_the_end(class_folders, caplog, workers, epochs):
    root = class_folders({"cat": 10, "dog": 10})
    broken = [root / "cat" / "003.png", root / "cat" / "004.png", root / "dog" / "009.png"]
    broken[0].write_bytes(b"")
    broken[1].write_bytes(broken[1].read_bytes()[:45])
    broken[2].write_text("<html>not found</html>")
    found = ImageFolder(
        root, image_size=16, batch_size=7, num_workers=workers, val_fraction=0.3, test_fraction=0.0, seed=0
    )
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.WARNING, "gatewise.data"):
        warnings.simplefilter("always")
        trainer.fit(Trainee(), found)
    found_warnings = [str(one.message) for one in caught if one.category is UnreadableImagesWarning]
    assert len(found_warnings) == 1
    assert found_warnings[0].startswith("skipped 3 images that cannot be read: ")
    assert all(str(path) in found_warnings[0] for path in broken)
    assert "not an image" in found_warnings[0]
    told = [record.message for record in caplog.records if record.name == "gatewise.data"]
    assert told == ["in total, 3 images skipped that cannot be read"]
    assert found.unreadable == sorted(map(str, broken))


def test_many_broken_images_are_not_all_named(class_folders):
    root = class_folders({"cat": 40})
    for number in range(30):
        (root / "cat" / f"{number:03}.png").write_bytes(b"")
    found = module(root, val_fraction=0.0, test_fraction=0.0)
    list(found.train_dataloader())
    with pytest.warns(UnreadableImagesWarning, match=r"skipped 30 images .*, and 10 more$"):
        found.teardown("fit")


def test_a_folder_whose_images_are_all_broken_stops_training(class_folders):
    root = class_folders({"cat": 8})
    for path in (root / "cat").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="8 images in a row cannot be read, the first: .*png cannot be read"):
        list(module(root, val_fraction=0.0, test_fraction=0.0).train_dataloader())


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a folder"):
        module(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "message"),
    [("x" * 5000, "is not a folder"), ("~nobody-has-this-name", "names a home folder, but there is")],
)
def test_a_name_that_cannot_be_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        module(name)


def test_links_that_lead_in_a_circle_are_passed_over(class_folders):
    root = class_folders({"a": 4, "b": 4})
    (root / "circle").symlink_to(root / "circle")
    (root / "a" / "back").symlink_to(root)
    assert len(scan(root).source) == 8


@pytest.mark.parametrize("name", ["images", "inner"])
def test_a_folder_that_cannot_be_looked_into_is_named(class_folders, monkeypatch, name):
    root = class_folders({"a": 4, "b": 4})
    (root / "a" / "inner").mkdir()

    def refusing(original):
        def look(path="."):
            if os.fspath(path).endswith(name):
                raise PermissionError(13, "Permission denied", os.fspath(path))
            return original(path)

        return look

    # The tests may run as root, whom no permission holds back.
    monkeypatch.setattr(os, "scandir", refusing(os.scandir))
    monkeypatch.setattr(os, "listdir", refusing(os.listdir))
    with pytest.raises(UserError, match=f"folder .*{name} cannot be read: Permission denied"):
        scan(root)


def test_a_folder_without_class_folders_is_refused(class_folders):
    root = class_folders({})
    root.mkdir()
    Image.new("L", (2, 2)).save(root / "stray.png")
    with pytest.raises(UserError, match="has no class folders; expected .*<class>"):
        module(root)


def test_an_empty_class_is_refused_and_named(class_folders):
    root = class_folders({"cat": 3, "dog": 0})
    (root / "dog" / "readme.txt").write_text("coming soon")
    with pytest.raises(UserError, match="class folders without images in .*: dog; add images"):
        module(root)


def test_class_folders_without_any_image_are_refused(class_folders):
    with pytest.raises(UserError, match=r"holds no images \(looked for \.jpg, .* in 2 class folders\)"):
        module(class_folders({"cat": 0, "dog": 0}))


def test_a_class_that_training_does_not_know_is_refused(class_folders):
    root = class_folders({"cat": 3}, class_folders({}) / "train").parent
    class_folders({"cat": 1, "dgo": 1}, root / "val")
    with pytest.raises(UserError, match="val has classes that training does not: dgo"):
        module(root)


def test_a_part_without_a_training_folder_is_refused(class_folders):
    root = class_folders({"cat": 3}, class_folders({}) / "val").parent
    with pytest.raises(UserError, match="has a folder 'val' but no 'train'"):
        module(root)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 0}, "image_size must be at least 1, not 0"),
        ({"image_size": (16, 0)}, "image_size must be at least 1"),
        ({"mean": (0.5, 0.5)}, "mean and std take one number each"),
        ({"mean": (float("nan"),) * 3}, "mean and std take .* all finite"),
        ({"std": (float("inf"),) * 3}, "mean and std take .* all finite"),
        ({"batch_size": float("nan")}, "batch_size must be at least 1, not nan"),
        ({"std": (1.0, 1.0, 0.0)}, "std above 0"),
    ],
)
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        ImageFolder("anywhere", **fields)
