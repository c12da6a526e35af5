"""Fashion-MNIST: what comes with the package, and the original files."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import lzma
import tracemalloc
from importlib.resources import files
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gatewise.data.images import fashion
from gatewise.data.images.fashion import MEAN, STD, Fashion, load_subset
from gatewise.errors import Failure, UserError


@pytest.fixture
def no_debian_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fashion, "DEBIAN_FOLDER", tmp_path / "nowhere")


@pytest.fixture
def few_originals(monkeypatch: pytest.MonkeyPatch):
    """Writes a folder of files in the original format, with 40 and 20 images in place of 60,000 and 10,000."""
    counts = {"train": 40, "test": 20}
    monkeypatch.setattr(fashion, "_FILES", {part: (*names[:2], counts[part]) for part, names in fashion._FILES.items()})

    def write(folder: Path, zipped: bool = True) -> Path:
        folder.mkdir(parents=True)
        for part, (images, labels, count) in fashion._FILES.items():
            pixels = np.full((count, 28, 28), 200 if part == "train" else 100, dtype=np.uint8)
            classes = np.arange(count, dtype=np.uint8) % 10
            for name, array in ((images, pixels), (labels, classes)):
                header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
                content = header + array.tobytes()
                path = folder / (f"{name}.gz" if zipped else name)
                path.write_bytes(gzip.compress(content) if zipped else content)
        return folder

    return write


def module(**fields) -> Fashion:
    found = Fashion(num_workers=0, **fields)
    found.prepare_data()
    found.setup()
    return found


def test_the_subset_is_the_one_that_was_drawn():
    train, test = load_subset()
    digest = hashlib.sha256(b"".join(array.tobytes() for array in (*train, *test))).hexdigest()
    assert digest == "b469d2b6d59101c9c6a8a1fd575251cdc36c881417271d03959f11ffa0bfeb59"


def test_the_subset_is_even_and_has_no_image_twice():
    for part, count in zip(load_subset(), (1000, 200), strict=True):
        assert part.images.shape == (10 * count, 28, 28)
        assert part.images.dtype == np.uint8
        assert np.bincount(part.labels).tolist() == [count] * 10
        # Fashion-MNIST itself holds a few copies.
        assert len({image.tobytes() for image in part.images}) >= 10 * count - 5


def test_the_subset_comes_from_the_originals():
    if fashion.find_originals(fashion.DEBIAN_FOLDER) is None:
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    packed = files("gatewise.data").joinpath("assets", fashion.SUBSET_FILE)
    with np.load(BytesIO(lzma.decompress(packed.read_bytes()))) as arrays:
        for part in ("train", "test"):
            original = fashion.load_originals(fashion.DEBIAN_FOLDER, part)
            indices = arrays[f"{part}_indices"]
            assert np.array_equal(original.images[indices], arrays[f"{part}_images"])
            assert np.array_equal(original.labels[indices], arrays[f"{part}_labels"])


def test_the_license_lies_beside_the_subset():
    license = files("gatewise.data").joinpath("assets", "fashion_mnist_LICENSE.txt").read_text()
    assert "Zalando" in license
    assert "The above copyright notice and this permission notice shall be included" in license


def test_the_subset_is_used_where_there_is_nothing_else(no_debian_package):
    parts = module().parts
    assert (len(parts.train), len(parts.val), len(parts.test)) == (9000, 1000, 2000)
    assert np.bincount(parts.val.labels).tolist() == [100] * 10
    assert parts.class_names[9] == "Ankle boot"


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_framed_and_normalized(no_debian_package, channels):
    found = module(channels=channels, batch_size=16)
    images, _ = next(iter(found.test_dataloader()))
    assert images.shape == (16, channels, 32, 32)
    original = torch.from_numpy(np.asarray(found.parts.test.image(3)).copy()).float() / 255
    for channel in range(channels):
        torch.testing.assert_close(images[3, channel, 2:-2, 2:-2], (original - MEAN) / STD)
        torch.testing.assert_close(images[3, channel, :2], torch.full((2, 32), -MEAN / STD))


def test_a_picture_of_any_kind_becomes_gray_and_small():
    pixels = Fashion().transform_for_eval()(Image.new("RGB", (300, 200), "red"))
    assert pixels.shape == (3, 32, 32)
    assert torch.equal(pixels[0], pixels[1])


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("below", ["", "FashionMNIST/raw"])
def test_originals_in_a_folder_of_the_users_are_used(few_originals, tmp_path, zipped, below):
    few_originals(tmp_path / "data" / below, zipped)
    parts = module(root=tmp_path / "data", val_fraction=0.25).parts
    assert (len(parts.train), len(parts.val), len(parts.test)) == (30, 10, 20)
    assert np.asarray(parts.train.image(0))[0, 0] == 200


def test_originals_of_the_debian_package_are_used(few_originals, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion, "DEBIAN_FOLDER", few_originals(tmp_path / "debian"))
    assert len(module().parts.test) == 20
    assert len(module(source="full").parts.test) == 20
    assert len(module(source="subset").parts.test) == 2000


def test_a_folder_without_the_originals_is_refused(no_debian_package, tmp_path):
    with pytest.raises(UserError, match="does not hold Fashion-MNIST") as caught:
        module(root=tmp_path)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(UserError, match="set download to true, or source to 'subset'"):
        module(source="full")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "subset", "root": "here"}, "leave out root and download"),
        ({"download": True}, "download needs root"),
        ({"val_fraction": 1.5}, "val_fraction must be"),
    ],
)
def test_fields_that_contradict_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Fashion(**fields)


def test_damaged_originals_are_named(few_originals, tmp_path):
    folder = few_originals(tmp_path / "data")
    path = folder / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz is damaged"):
        module(root=folder)
    path.write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    with pytest.raises(UserError, match=r"is not Fashion-MNIST's train-images-idx3-ubyte of shape \(40, 28, 28\)"):
        module(root=folder)


def test_a_label_that_is_no_class_is_named(few_originals, tmp_path):
    folder = few_originals(tmp_path / "data", zipped=False)
    path = folder / "t10k-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\x0a")
    with pytest.raises(
        UserError, match=r"t10k-labels-idx1-ubyte is damaged: it has label 10, and there are 10 classes"
    ):
        module(root=folder)


def test_a_file_that_unpacks_to_too_much_is_not_unpacked(few_originals, tmp_path):
    folder = few_originals(tmp_path / "data")
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(50_000_000)))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="is not Fashion-MNIST's train-labels-idx1-ubyte"):
            module(root=folder)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_a_download_happens_once_and_on_request_alone(few_originals, tmp_path, monkeypatch):
    fetched = []

    def fetch(root: str, download: bool) -> None:
        fetched.append(root)
        few_originals(Path(root) / "FashionMNIST" / "raw")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", fetch)
    for _ in range(2):
        assert len(module(root=tmp_path / "data", download=True).parts.test) == 20
    assert fetched == [str(tmp_path / "data")]


@pytest.mark.parametrize("kind", [OSError, EOFError, http.client.HTTPException, RuntimeError])
def test_a_download_that_fails_is_a_failure(tmp_path, monkeypatch, kind):
    def fetch(root: str, download: bool) -> None:
        raise kind("no route to host\nand more")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", fetch)
    with pytest.raises(Failure, match="cannot download Fashion-MNIST into .*: no route to host$"):
        module(root=tmp_path / "data", download=True)


def test_normalization_constants_fit_the_subset():
    pixels = load_subset()[0].images / 255
    # They are those of all 60,000 images, of which these are a sixth.
    np.testing.assert_allclose((pixels.mean(), pixels.std()), (MEAN, STD), atol=2e-3)
