"""Hugging Face data sets, all of them local."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from gatewise.data.hf import HuggingFace
from gatewise.errors import Failure, UserError


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (value,) * 3).save(file, "PNG")
    return file.getvalue()


def table(
    size: int = 12, kind: object = None, labels: list | None = None, images: list | None = None
) -> datasets.Dataset:
    """Images of one value each; two classes in turn, unless labels of another kind are given."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": kind or datasets.ClassLabel(names=["cat", "dog"])}
    )
    content = {
        "image": images or [{"bytes": png(10 * row), "path": None} for row in range(size)],
        "label": labels or [row % 2 for row in range(size)],
    }
    return datasets.Dataset.from_dict(content, features=features)


def module(path: Path | str, **fields) -> HuggingFace:
    defaults = {"image_size": 8, "batch_size": 4, "num_workers": 0}
    found = HuggingFace(str(path), **{**defaults, **fields})
    found.setup()
    return found


def saved(folder: Path, **splits: datasets.Dataset) -> Path:
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_keep_the_contract(tmp_path, workers):
    data = module(saved(tmp_path / "d", train=table(), validation=table(4), test=table(6)), num_workers=workers)
    assert data.class_names == ["cat", "dog"]
    assert [len(part) for part in (data.parts.train, data.parts.val, data.parts.test)] == [12, 4, 6]
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 8, 8)
    assert labels.shape == (4,)
    assert sorted(label for _, batch in data.val_dataloader() for label in batch.tolist()) == [0, 0, 1, 1]


def test_images_and_labels_stay_together(tmp_path):
    train = module(saved(tmp_path / "d", train=table(), validation=table(2))).parts.train
    for row in range(12):
        assert np.asarray(train.image(row))[0, 0, 0] == 10 * row
        assert train.labels[row] == row % 2


def test_a_single_table_is_the_training_split(tmp_path):
    table(20).save_to_disk(str(tmp_path / "d"))
    parts = module(tmp_path / "d", val_fraction=0.2).parts
    assert [len(part) for part in (parts.train, parts.val, parts.test)] == [16, 4, 4]
    assert np.bincount(parts.val.labels).tolist() == [2, 2]


@pytest.mark.parametrize("as_folder", [True, False])
def test_parquet_files_are_read(tmp_path, as_folder):
    (tmp_path / "d").mkdir()
    table().to_parquet(str(tmp_path / "d" / "train-00000.parquet"))
    path = tmp_path / "d" if as_folder else tmp_path / "d" / "train-00000.parquet"
    data = module(path, cache_dir=tmp_path / "cache", val_fraction=0.0)
    assert data.class_names == ["cat", "dog"]
    assert len(data.parts.train) == 12


def test_an_imagefolder_is_read(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        for name in ("bee", "ant"):
            (tmp_path / "d" / split / name).mkdir(parents=True)
            for number in range(count):
                (tmp_path / "d" / split / name / f"{number}.png").write_bytes(png(number))
    data = module(tmp_path / "d", cache_dir=tmp_path / "cache", val_fraction=0.0)
    assert data.class_names == ["ant", "bee"]
    assert np.bincount(data.parts.train.labels).tolist() == [3, 3]
    assert len(data.parts.test) == 4


def test_columns_are_found_by_their_types(tmp_path):
    columns = table().rename_columns({"image": "img", "label": "kind"})
    assert module(saved(tmp_path / "d", train=columns)).class_names == ["cat", "dog"]


@pytest.mark.parametrize(
    ("values", "kind", "names"),
    [([7, 3] * 6, "int64", ["3", "7"]), (["wolf", "ant"] * 6, "string", ["ant", "wolf"])],
)
def test_labels_without_class_names_are_put_in_order(tmp_path, values, kind, names):
    data = module(saved(tmp_path / "d", train=table(kind=datasets.Value(kind), labels=values)), val_fraction=0.0)
    assert data.class_names == names
    assert data.parts.train.labels.tolist() == [1, 0] * 6


def test_of_several_class_columns_the_usual_name_is_taken(tmp_path):
    fine = table().rename_column("label", "fine_label")
    both = fine.add_column("coarse", [0] * 12).cast_column("coarse", datasets.ClassLabel(names=["animal"]))
    assert module(saved(tmp_path / "d", train=both)).class_names == ["cat", "dog"]
    assert module(tmp_path / "d", label_column="coarse").class_names == ["animal"]


def test_a_test_split_without_labels_is_passed_over(tmp_path):
    unlabelled = table(4, labels=[-1] * 4)
    path = saved(tmp_path / "d", train=table(), validation=table(6), test=unlabelled)
    assert len(module(path).parts.test) == 6
    with pytest.raises(UserError, match="split 'test' has label -1 in 'label', which is no class"):
        module(path, test_split="test")


def test_broken_and_missing_images_are_skipped(tmp_path):
    images = [{"bytes": png(row), "path": None} for row in range(12)]
    images[3], images[5] = {"bytes": b"torn", "path": None}, None
    data = module(saved(tmp_path / "d", train=table(), validation=table(images=images)))
    assert sum(len(labels) for _, labels in data.val_dataloader()) == 10
    assert data.unreadable == ["validation image 3", "validation image 5"]


def test_a_balanced_epoch_draws_rare_classes_more_often(tmp_path):
    skewed = table(12, labels=[0] * 10 + [1] * 2)
    data = module(saved(tmp_path / "d", train=skewed), class_balanced=True, val_fraction=0.0)
    labels = [label for _, batch in data.train_dataloader() for label in batch.tolist()]
    assert np.bincount(labels).tolist() == [6, 6]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_split": "training"}, "has no split 'training', only train; name one of these"),
        ({"val_split": "dev"}, "has no split 'dev'"),
        ({"image_column": "picture"}, "image_column 'picture' is no column of the data set, which has image, label"),
        ({"label_column": "kind"}, "label_column 'kind' is no column"),
        ({"val_fraction": 1.0}, "val_fraction must be"),
    ],
)
def test_names_that_do_not_exist_are_refused(tmp_path, fields, message):
    path = saved(tmp_path / "d", train=table())
    with pytest.raises(UserError, match=message):
        module(path, **fields)


def test_a_data_set_without_images_is_refused(tmp_path):
    with pytest.raises(UserError, match="set image_column: among the columns label there is no clear one .*found none"):
        module(saved(tmp_path / "d", train=table().remove_columns("image")))


def test_a_data_set_without_labels_is_refused(tmp_path):
    with pytest.raises(UserError, match="set label_column: among the columns image there is no clear one"):
        module(saved(tmp_path / "d", train=table().remove_columns("label")))


def test_several_image_columns_want_a_choice(tmp_path):
    twice = datasets.concatenate_datasets(
        [table(), table().select_columns(["image"]).rename_column("image", "mask")], axis=1
    )
    with pytest.raises(UserError, match="found several: image, mask"):
        module(saved(tmp_path / "d", train=twice))
    assert len(module(tmp_path / "d", image_column="mask", val_fraction=0.0).parts.train) == 12


def test_labels_that_are_no_classes_are_refused(tmp_path):
    floats = table(kind=datasets.Value("float32"), labels=[0.5] * 12)
    with pytest.raises(UserError, match="expected classes, integers or strings"):
        module(saved(tmp_path / "d", train=floats))


def test_a_label_that_training_does_not_have_is_refused(tmp_path):
    train, val = (table(kind=datasets.Value("string"), labels=[name] * 12) for name in ("cat", "dog"))
    with pytest.raises(UserError, match="split 'validation' has label 'dog' in 'label'"):
        module(saved(tmp_path / "d", train=train, validation=val))


def test_a_folder_that_is_no_data_set_is_refused(tmp_path):
    (tmp_path / "d").mkdir()
    with pytest.raises(UserError, match="cannot load data set"):
        module(tmp_path / "d", cache_dir=tmp_path / "cache")


def test_an_unreachable_hub_is_a_failure(monkeypatch):
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(Failure, match="cannot reach the hub for data set 'somebody/something': no route to host"):
        module("somebody/something")
