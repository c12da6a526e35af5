"""Images in shards: order, resuming, sharing out, and what can be wrong with them."""

from __future__ import annotations

import http.server
import io
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from gatewise.data.images.shards import count_samples, expand_shards, shard_samples
from gatewise.data.images.webdataset import WebDataset
from gatewise.data.loading import Share
from gatewise.errors import UserError

PER_SHARD = 6


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4), value).save(file, "PNG")
    return file.getvalue()


def write_shard(path: Path, samples: list[dict[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples):
            for extension, content in sample.items():
                member = tarfile.TarInfo(f"{number:04}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path: Path) -> Callable[..., str]:
    """Writes shards of six samples whose labels count up, and returns the pattern that names them."""

    def write(count: int, folder: str = "train") -> str:
        for shard in range(count):
            labels = range(PER_SHARD * shard, PER_SHARD * (shard + 1))
            samples = [{"png": png(label), "cls": str(label).encode()} for label in labels]
            write_shard(tmp_path / folder / f"{shard}.tar", samples)
        return str(tmp_path / folder / f"{{0..{count - 1}}}.tar")

    return write


def module(train: str | list[str], val: str | list[str] | None = None, **fields) -> WebDataset:
    defaults = {"num_classes": 100, "image_size": 8, "batch_size": 4, "num_workers": 0, "shuffle_buffer": 5}
    found = WebDataset(train, val or train, **{**defaults, **fields})
    found.setup()
    return found


def on_rank(data: WebDataset, rank: int, world_size: int) -> WebDataset:
    data._share = lambda: Share(rank, world_size)  # what a trainer with so many processes would tell
    return data


def epoch(loader, number: int = 0) -> list[tuple[bytes, list[int]]]:
    loader.set_epoch(number)
    return [(images.numpy().tobytes(), labels.tolist()) for images, labels in loader]


def labels_of(batches) -> list[int]:
    return [label for _, labels in batches for label in labels]


def test_batches_keep_the_contract(shards):
    data = module(shards(2), class_names=[f"class {label}" for label in range(12)], num_classes=None)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, *data.input_size) == (4, 3, 8, 8)
    assert labels.shape == (4,)
    assert (data.num_classes, data.class_names[3]) == (12, "class 3")


def test_an_epoch_on_one_stream_has_every_sample_once(shards):
    data = module(shards(4))
    loader = data.train_dataloader()
    assert len(loader) == 6
    assert sorted(labels_of(epoch(loader))) == list(range(24))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_a_function_of_seed_and_number(shards, workers):
    pattern = shards(4)
    loader = module(pattern, num_workers=workers).train_dataloader()
    first, second = epoch(loader, 0), epoch(loader, 1)
    assert labels_of(first) != labels_of(second)
    assert first == epoch(module(pattern, num_workers=workers).train_dataloader(), 0)
    assert first != epoch(module(pattern, num_workers=workers, seed=1).train_dataloader(), 0)


def test_streams_of_processes_and_workers_share_the_shards(shards):
    pattern = shards(4)
    batches = [
        epoch(on_rank(module(pattern, batch_size=3, num_workers=2), rank, 2).train_dataloader()) for rank in range(2)
    ]
    assert sorted(labels_of(batches[0]) + labels_of(batches[1])) == list(range(24))


def test_a_stream_begins_again_when_it_has_too_few(shards):
    counts = Counter(labels_of(epoch(module(shards(1), train_samples=24).train_dataloader())))
    assert set(counts) == set(range(6))
    assert sum(counts.values()) == 24


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 4, 5])
def test_resuming_is_bit_identical(shards, workers, stop):
    pattern = shards(6)
    # Longer than the shards: two streams go over their shards again.
    fields = {"num_workers": workers, "train_samples": 48}
    whole = epoch(module(pattern, **fields).train_dataloader(), 3)
    interrupted = module(pattern, **fields).train_dataloader()
    interrupted.set_epoch(3)
    batches = iter(interrupted)
    for _ in range(stop):
        next(batches)
    resumed = module(pattern, **fields).train_dataloader()
    resumed.load_state_dict(interrupted.state_dict())
    assert epoch(resumed, 3) == whole[stop:]


def test_resuming_with_other_workers_is_refused(shards):
    pattern = shards(4)
    state = module(pattern, num_workers=1).train_dataloader().state_dict()
    with pytest.raises(UserError, match="num_workers was 1 and is 2"):
        module(pattern, num_workers=2).train_dataloader().load_state_dict(state)


def test_resuming_is_bit_identical_past_a_broken_image(shards, tmp_path):
    pattern = shards(2)
    samples = [{"png": b"torn" if label == 2 else png(label), "cls": str(label).encode()} for label in range(6)]
    write_shard(tmp_path / "train" / "0.tar", samples)
    whole_module = module(pattern)
    whole = epoch(whole_module.train_dataloader())
    assert 2 not in labels_of(whole)
    assert len(labels_of(whole)) == 12
    assert whole_module.unreadable == [f"{tmp_path}/train/0.tar:0002.png"]
    for stop in range(4):
        resumed = module(pattern).train_dataloader()
        resumed.load_state_dict({**resumed.state_dict(), "batches": stop})
        assert epoch(resumed) == whole[stop:]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_counts_every_sample_once(shards, workers, world_size):
    pattern = shards(3, "val")
    batches = [
        [
            labels.tolist()
            for _, labels in on_rank(module(pattern, num_workers=workers), rank, world_size).val_dataloader()
        ]
        for rank in range(world_size)
    ]
    assert sorted(label for part in batches for labels in part for label in labels) == list(range(18))
    assert len({len(part) for part in batches}) == 1


def test_a_broken_image_is_left_out_of_the_evaluation(tmp_path):
    write_shard(tmp_path / "a.tar", [{"png": png(1), "cls": b"1"}, {"png": b"torn", "cls": b"2"}])
    data = module(str(tmp_path / "a.tar"), batch_size=2)
    assert [labels.tolist() for _, labels in data.val_dataloader()] == [[1]]
    assert len(data.unreadable) == 1


def test_validation_shards_test_where_there_are_no_others(shards):
    data = module(shards(1), shards(2, "val"))
    assert len(labels_of((None, labels.tolist()) for _, labels in data.test_dataloader())) == 12
    data = module(shards(1), shards(2, "val"), test_shards=shards(3, "test"))
    assert len(labels_of((None, labels.tolist()) for _, labels in data.test_dataloader())) == 18


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The folder's address on a web server of this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_remote_shards_are_streamed(shards, served):
    local = shards(2)
    remote = f"{served}/train/{{0..1}}.tar"
    found = module(remote, train_samples=12, val_samples=12)
    assert labels_of(epoch(found.train_dataloader())) == labels_of(epoch(module(local).train_dataloader()))
    assert len(labels_of((None, labels.tolist()) for _, labels in found.val_dataloader())) == 12


def test_a_missing_remote_shard_is_named(served):
    found = module(f"{served}/nowhere.tar", train_samples=12, val_samples=12)
    with pytest.raises(UserError, match=r"shard http://.*/nowhere\.tar cannot be read"):
        epoch(found.train_dataloader())


def test_remote_shards_want_to_be_counted_by_the_user():
    with pytest.raises(UserError, match="train_samples is required for remote shards"):
        module("https://example.org/{0..3}.tar")


@pytest.mark.parametrize(("told", "problem"), [(13, "fewer"), (11, "more")])
def test_a_wrong_number_of_validation_samples_is_found_out(shards, told, problem):
    data = module(shards(2), val_samples=told, batch_size=3)
    with pytest.raises(UserError, match=f"hold {problem} than the expected {told} samples"):
        list(data.val_dataloader())


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"png": png(1)}, r"sample .*0\.tar:000\d has no cls, only png; set label_key"),
        ({"tif": png(1), "cls": b"1"}, r"has none of jpg, jpeg, png, webp, only tif, cls; set image_keys"),
        ({"png": png(1), "cls": b"cat"}, "the cls of sample .* is not a decimal integer"),
        ({"png": png(1), "cls": b"100"}, "has label 100, but there are 100 classes, from 0"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_is_not_as_it_must_be_is_named(tmp_path, sample, message, workers):
    write_shard(tmp_path / "0.tar", [sample] * 4)
    data = module(str(tmp_path / "0.tar"), num_workers=workers)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        with pytest.raises(UserError, match=message) as caught:
            list(loader)
        assert "Traceback" not in str(caught.value)


def test_other_keys_can_be_named(tmp_path):
    write_shard(tmp_path / "0.tar", [{"tif": png(label), "target.txt": b"%d" % label} for label in range(4)])
    data = module(str(tmp_path / "0.tar"), image_keys=("tif",), label_key="target.txt")
    assert sorted(labels_of(epoch(data.train_dataloader()))) == [0, 1, 2, 3]


@pytest.mark.parametrize("content", [b"no tar file", b""])
def test_a_damaged_shard_is_named(shards, tmp_path, content):
    pattern = shards(2)
    (tmp_path / "train" / "1.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"1\.tar cannot be read \(.*\); replace it or take it out"):
        module(pattern)
    with pytest.raises(UserError, match=r"1\.tar cannot be read"):
        epoch(module(pattern, train_samples=12, val_samples=12).train_dataloader())


def test_a_truncated_shard_is_named(shards, tmp_path):
    pattern = shards(1)
    path = tmp_path / "train" / "0.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UserError, match=r"0\.tar cannot be read \(unexpected end of data"):
        list(shard_samples(str(path)))
    with pytest.raises(UserError, match=r"0\.tar cannot be read"):
        epoch(module(pattern, train_samples=12, val_samples=12).train_dataloader())


def test_shards_without_samples_do_not_spin(tmp_path):
    write_shard(tmp_path / "0.tar", [])
    with pytest.raises(UserError, match="shards without samples"):
        epoch(module(str(tmp_path / "0.tar"), train_samples=4, val_samples=4).train_dataloader())


def test_patterns_stand_for_many_shards(shards, tmp_path):
    pattern = shards(3)
    expected = [str(tmp_path / "train" / f"{shard}.tar") for shard in range(3)]
    assert expand_shards(pattern) == expected
    assert expand_shards(str(tmp_path / "train" / "*.tar")) == expected
    assert expand_shards(expected[:2]) == expected[:2]
    assert count_samples(expected[0]) == PER_SHARD


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("/nowhere/{0..2}.tar", r"3 of 3 shards are missing, the first: /nowhere/0\.tar"),
        ("/nowhere/*.tar", r"no shards match '/nowhere/\*\.tar'"),
        ("{0..2.tar", "unbalanced braces"),
        ("pipe:cat secrets.tar", "is a shell command, which is not run"),
        ("s4://bucket/0.tar", "has an unknown scheme; expected a path, or one of .*https"),
    ],
)
def test_patterns_that_stand_for_nothing_are_refused(pattern, message):
    with pytest.raises(UserError, match=message):
        expand_shards(pattern)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_classes": None}, "give num_classes or class_names"),
        ({"class_names": ["a"]}, "num_classes is 100, but class_names holds 1 names"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"shuffle_buffer": 0}, "shuffle_buffer must be at least 1"),
        ({"train_samples": 0}, "train_samples must be at least 1"),
    ],
)
def test_fields_out_of_range_are_refused(shards, fields, message):
    with pytest.raises(UserError, match=message):
        module(shards(1), **fields)


def test_too_few_shards_for_the_workers_are_refused(shards):
    with pytest.raises(UserError, match="2 training shards cannot feed 1 processes with 3 workers"):
        module(shards(2), num_workers=3).train_dataloader()


def test_too_few_samples_for_a_batch_are_refused(shards):
    with pytest.raises(UserError, match="6 training samples do not fill one batch of 8"):
        module(shards(1), batch_size=8).train_dataloader()
