"""Hugging Face data sets, all of them local."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from gatewise.data.images.hf import HuggingFace
from gatewise.data.images.reading import UnreadableImageError
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


def by_path(path: Path, size: int = 12) -> list[dict[str, object]]:
    return [{"bytes": None, "path": str(path)} for _ in range(size)]


def stored(folder: Path, train: datasets.Dataset, how: str) -> Path:
    """Where the table is on disk as it is: writers of `datasets` put the content of files that are named into it."""
    if how == "saved":
        path = saved(folder, train=table())
        [file] = (path / "train").glob("*.arrow")
        with pyarrow.ipc.new_stream(file, train.data.table.schema) as out:
            out.write_table(train.data.table)
        return path
    folder.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(train.data.table, folder / "train.parquet")
    return folder if how == "parquet folder" else folder / "train.parquet"


@pytest.mark.parametrize("how", ["parquet file", "parquet folder", "saved"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_table_that_names_files_does_not_have_them_opened(tmp_path, how, inside):
    (tmp_path / "d").mkdir()
    secret = (tmp_path / "d" if inside else tmp_path) / "secret.jpg"
    secret.write_bytes(png(1))
    path = stored(tmp_path / "d", table(images=by_path(secret)), how)
    if how == "parquet folder" and inside:
        secret.rename(tmp_path / "d" / "secret.unknown")  # `datasets` would take the folder for an imagefolder
    data = module(path, cache_dir=tmp_path / "cache", val_fraction=0.0)
    with pytest.raises(UnreadableImageError, match=r"train image 0 cannot .*its row names the file '.*secret\.jpg'"):
        data.parts.train.image(0)
    with pytest.raises(UserError, match="12 images in a row cannot be read"):
        next(iter(data.train_dataloader()))


@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
def test_a_card_may_name_tables_of_its_folder_only(tmp_path, card):
    for folder in ("mine", "other"):
        (tmp_path / folder).mkdir()
        table().to_parquet(str(tmp_path / folder / "a.parquet"))
    for named, accepted in (("a.parquet", True), ("../other/a.parquet", False), (tmp_path / "other/a.parquet", False)):
        text = f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {named}\n"
        (tmp_path / "mine" / card).write_text(f"---\n{text}---\n" if card == "README.md" else text)
        if accepted:
            assert len(module(tmp_path / "mine", cache_dir=tmp_path / "cache", val_fraction=0.0).parts.train) == 12
        else:
            with pytest.raises(UserError, match="its card names '.*other/a.parquet', which is not in the folder"):
                module(tmp_path / "mine", cache_dir=tmp_path / "cache")


def test_a_column_of_paths_does_not_have_them_opened(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(png(1))
    named = table().remove_columns("image").add_column("file", [str(tmp_path / "secret.jpg")] * 12)
    data = module(saved(tmp_path / "d", train=named), image_column="file", val_fraction=0.0)
    with pytest.raises(UnreadableImageError, match="its row names the file"):
        data.parts.train.image(0)


def test_the_bytes_of_a_row_are_taken_whatever_path_it_names(tmp_path):
    images = [{"bytes": png(7), "path": "/nowhere/b.png"} for _ in range(12)]
    data = module(stored(tmp_path / "d", table(images=images), "saved"), val_fraction=0.0)
    assert np.asarray(data.parts.train.image(0))[0, 0, 0] == 7


def test_a_link_out_of_an_imagefolder_is_not_followed(tmp_path):
    (tmp_path / "secret.png").write_bytes(png(1))
    (tmp_path / "d" / "train" / "a").mkdir(parents=True)
    (tmp_path / "d" / "train" / "b").mkdir()
    (tmp_path / "d" / "train" / "a" / "0.png").write_bytes(png(2))
    (tmp_path / "d" / "train" / "b" / "0.png").symlink_to(tmp_path / "secret.png")
    train = module(tmp_path / "d", cache_dir=tmp_path / "cache", val_fraction=0.0).parts.train
    assert np.asarray(train.image(0))[0, 0, 0] == 2
    with pytest.raises(UnreadableImageError, match="only files of an imagefolder, inside it, are opened"):
        train.image(1)


def test_an_imagefolder_may_be_reached_by_a_link(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "d" / "train" / name).mkdir(parents=True)
        (tmp_path / "d" / "train" / name / "0.png").write_bytes(png(3))
    (tmp_path / "link").symlink_to(tmp_path / "d")
    train = module(tmp_path / "link", cache_dir=tmp_path / "cache", val_fraction=0.0).parts.train
    assert np.asarray(train.image(1))[0, 0, 0] == 3


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
    unlabeled = table(4, labels=[-1] * 4)
    path = saved(tmp_path / "d", train=table(), validation=table(6), test=unlabeled)
    assert len(module(path).parts.test) == 6
    with pytest.raises(UserError, match="split 'test' has label -1 in 'label', which is not a class"):
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
        ({"image_column": "picture"}, "image_column 'picture' is not a column of the data set, which has image, label"),
        ({"label_column": "kind"}, "label_column 'kind' is not a column"),
        ({"val_fraction": 1.0}, "val_fraction must be"),
    ],
)
def test_names_that_do_not_exist_are_refused(tmp_path, fields, message):
    path = saved(tmp_path / "d", train=table())
    with pytest.raises(UserError, match=message):
        module(path, **fields)


def test_a_data_set_without_images_is_refused(tmp_path):
    with pytest.raises(UserError, match="set image_column: the columns label leave no clear choice .*found none"):
        module(saved(tmp_path / "d", train=table().remove_columns("image")))


def test_a_data_set_without_labels_is_refused(tmp_path):
    with pytest.raises(UserError, match="set label_column: the columns image leave no clear choice"):
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


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        (datasets.List(datasets.Value("int64")), [[0, 1]] * 12),
        (datasets.Value("float64"), [float("nan")] * 12),
        (datasets.Value("bool"), [True, False] * 6),
        (datasets.Value("string"), ["a", None] * 6),
    ],
)
def test_labels_of_other_kinds_are_refused(tmp_path, kind, labels):
    path = saved(tmp_path / "d", train=table(kind=kind, labels=labels))
    with pytest.raises(UserError, match="label column 'label' holds .*; expected classes, integers or strings"):
        module(path)


def test_labels_of_another_kind_than_those_of_training_are_refused(tmp_path):
    train = table(kind=datasets.Value("int64"), labels=[0, 1] * 6)
    for number, (kind, label) in enumerate(
        [
            (datasets.Value("float64"), 1.0),
            (datasets.List(datasets.Value("int64")), [1]),
            (datasets.Value("bool"), True),
        ]
    ):
        path = saved(tmp_path / str(number), train=train, validation=table(kind=kind, labels=[label] * 12))
        with pytest.raises(UserError, match=r"split 'validation' has label (1\.0|\[1\]|True) in 'label'"):
            module(path)


@pytest.mark.parametrize("column", ["label", "number"])
def test_a_column_that_holds_no_images_is_refused(tmp_path, column):
    path = saved(tmp_path / "d", train=table().add_column("number", [0.5] * 12))
    with pytest.raises(UserError, match=f"image column '{column}' holds .*, not images; set image_column"):
        module(path, image_column=column, val_fraction=0.0)


def test_a_label_that_training_does_not_have_is_refused(tmp_path):
    train, val = (table(kind=datasets.Value("string"), labels=[name] * 12) for name in ("cat", "dog"))
    with pytest.raises(UserError, match="split 'validation' has label 'dog' in 'label'"):
        module(saved(tmp_path / "d", train=train, validation=val))


def test_a_folder_that_is_no_data_set_is_refused(tmp_path):
    (tmp_path / "d").mkdir()
    with pytest.raises(UserError, match="cannot load data set"):
        module(tmp_path / "d", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("file", ["dataset_info.json", "state.json", "data-00000-of-00001.arrow"])
def test_a_damaged_data_set_is_refused_in_one_line(tmp_path, file):
    path = saved(tmp_path / "d", train=table())
    whole = (path / "train" / file).read_bytes()
    refused = 0
    for damaged in (b"", whole[: len(whole) // 2], b"[]", b'{"features": 3}', b'{"_data_files": 3}'):
        (path / "train" / file).write_bytes(damaged)
        try:
            data = module(path)
        except UserError as error:
            refused += "\n" not in str(error)
        else:
            # The description may be missing: the table itself says what is in it.
            assert data.class_names == ["cat", "dog"]
    assert refused >= 4


def test_an_unreachable_hub_is_a_failure(monkeypatch):
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(Failure, match="cannot reach the hub for data set 'somebody/something': no route to host"):
        module("somebody/something")
