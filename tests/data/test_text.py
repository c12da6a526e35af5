"""A corpus from files to sequences."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewise.data.text import corpus as _corpus
from gatewise.data.text.corpus import documents, find_files, standard_library, standard_library_files
from gatewise.data.text.sequences import IGNORED
from gatewise.data.text.text import Text, cache_folder
from gatewise.data.text.tokenizers import ByteTokenizer
from gatewise.data.text.tokens import Extent, TokenFile, cut, tokenized
from gatewise.errors import Failure, UserError

WORDS = ["alpha", "beta", "gamma", "delta", "é"]


@pytest.fixture
def folder(tmp_path):
    """Twenty small documents."""
    root = tmp_path / "corpus"
    (root / "deep").mkdir(parents=True)
    for number in range(20):
        place = root / "deep" if number % 2 else root
        (place / f"{number:02}.txt").write_text(" ".join(WORDS * (1 + number % 3)) + f" {number}", encoding="utf-8")
    return root


@pytest.fixture
def make(folder, tmp_path):
    def build(root=folder, **fields) -> Text:
        arguments = {"context": 8, "batch_size": 2, "val_fraction": 0.2, "test_fraction": 0.2}
        data = Text(root, cache_dir=tmp_path / "cache", **{**arguments, **fields})
        data.setup()
        return data

    return build


def write_parquet(path, **columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)


# From files to documents


def test_files_of_a_folder_are_found_by_suffix_or_pattern(folder):
    (folder / "a.bin").write_text("x")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "b.txt").write_text("x")
    assert len(find_files(folder)) == 20
    assert len(find_files(folder, ["deep/*"])) == 10
    assert [path.name for path in find_files(folder, ["*.bin"])] == ["a.bin"]
    assert find_files(folder / "00.txt") == [folder / "00.txt"]


def test_a_folder_without_text_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no folder of text at"):
        find_files(tmp_path / "none")
    with pytest.raises(UserError, match=r"holds no file like \*\.txt or .* or \*\.parquet"):
        find_files(tmp_path)
    with pytest.raises(UserError, match=r"holds no file like \*\.c"):
        find_files(tmp_path, ["*.c"])


def test_the_standard_library_is_a_corpus_without_its_tests_and_without_what_is_installed():
    files = standard_library_files(standard_library())
    names = {path.name for path in files}
    assert {"ast.py", "argparse.py", "textwrap.py"} <= names
    assert not any(part in ("test", "tests", "site-packages") for path in files for part in path.parts[-3:-1])
    assert "def dedent(" in next(documents(next(path for path in files if path.name == "textwrap.py"), "text"))


def test_rows_of_parquet_are_documents_and_empty_ones_are_none(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, body=["one", None, "", "  \n", "two"], number=[1, 2, 3, 4, 5])
    assert list(documents(path, "body")) == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "message"), [(b"ab\xff", r"is not UTF-8 text \(byte 2\)"), (b"ab\0c", r"contains byte 0 \(at 2\)")]
)
def test_a_file_that_is_no_text_is_named(tmp_path, content, message):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(documents(path, "text"))


def test_an_unreadable_shard_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 and then nothing of the kind")
    with pytest.raises(UserError, match=r"shard .*a\.parquet cannot be read"):
        list(documents(path, "text"))
    write_parquet(path, text=["whole"] * 1000)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"shard .*a\.parquet cannot be read"):
        list(documents(path, "text"))


def test_damage_inside_a_parquet_file_is_told_in_one_line(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, text=[f"row {number} é" * 5 for number in range(300)])
    whole = path.read_bytes()
    expected = list(documents(path, "text"))
    draw = random.Random(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(draw.randrange(1, 20)):
            damaged[draw.randrange(4, len(whole) - 500)] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            found = list(documents(path, "text"))
        except UserError as error:
            refused += f"shard {path} cannot be read" in str(error) and "\n" not in str(error)
        else:
            assert len(found) <= len(expected)
    assert refused > 20


def test_text_that_parquet_calls_text_and_is_not_is_named(tmp_path):
    import pyarrow

    path = tmp_path / "a.parquet"
    offsets, content = pyarrow.py_buffer(np.array([0, 2], dtype=np.int32)), pyarrow.py_buffer(b"\xff\xfe")
    write_parquet(path, text=pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, content]))
    with pytest.raises(UserError, match=r"shard .*a\.parquet cannot be read \('utf-8' codec"):
        list(documents(path, "text"))


def test_two_columns_of_one_name_are_named(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table([["a"], ["b"]], names=["text", "text"]), path)
    with pytest.raises(UserError, match="several columns 'text'"):
        list(documents(path, "text"))


def test_a_text_file_that_is_too_large_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(_corpus, "LARGEST_DOCUMENT", 10)
    path = tmp_path / "a.txt"
    path.write_text("eleven char")
    with pytest.raises(UserError, match=r"a\.txt is too large: 11 bytes in one document, and at most 10 are read"):
        list(documents(path, "text"))


def test_what_is_no_regular_file_is_no_text(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(UserError, match="holds no file like"):
        find_files(tmp_path)
    for name in ("a.txt", "a.parquet"):
        (tmp_path / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match="it is not a regular file"):
            list(documents(tmp_path / name, "text"))


def test_a_folder_that_cannot_be_looked_into_is_named(folder, monkeypatch):
    original = os.scandir

    def scandir(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="folder .*deep cannot be read: Permission denied"):
        find_files(folder)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_a_name_that_cannot_be_is_no_folder(name):
    with pytest.raises(UserError, match="no folder of text at"):
        find_files(Path(name))


def test_a_column_that_is_not_there_or_no_text_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, body=["one"], number=[1])
    with pytest.raises(UserError, match="no column 'text', only body, number; set text_column"):
        list(documents(path, "text"))
    with pytest.raises(UserError, match="column 'number' of shard .* holds int64, not text"):
        list(documents(path, "number"))


# The cache


def test_tokens_are_all_documents_each_with_its_end(folder, tmp_path):
    files = find_files(folder)
    found = tokenized(files, ByteTokenizer(), "text", tmp_path)
    whole = b"".join(path.read_bytes() + b"\0" for path in files)
    assert bytes(found.tokens.tolist()) == whole
    assert found.bytes.tolist() == [path.stat().st_size for path in files]
    assert found.starts[-1] == len(whole)


def test_tokens_are_made_once_and_again_only_when_something_has_changed(folder, tmp_path, monkeypatch):
    made = []
    original = ByteTokenizer.encode
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, texts: made.append(1) or original(self, texts))
    files = find_files(folder)
    first = tokenized(files, ByteTokenizer(), "text", tmp_path)
    again = tokenized(files, ByteTokenizer(), "text", tmp_path)
    assert len(made) == 1
    assert again.folder == first.folder
    files[0].write_text("something longer than before")
    assert tokenized(files, ByteTokenizer(), "text", tmp_path).folder != first.folder
    assert len(made) == 2


def test_a_failure_leaves_no_half_of_a_cache(folder, tmp_path):
    (folder / "zz.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"zz\.txt is not UTF-8"):
        tokenized(find_files(folder), ByteTokenizer(), "text", tmp_path / "cache")
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_a_failure(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Failure, match=r"cannot write .*/file/tokens/\w+: Not a directory"):
        tokenized(find_files(folder), ByteTokenizer(), "text", tmp_path / "file")


def test_a_corpus_without_text_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text(" \n\n ")
    with pytest.raises(UserError, match="there is no text in the 1 files of the corpus"):
        tokenized(find_files(tmp_path), ByteTokenizer(), "text", tmp_path / "cache")


def test_mapped_tokens_travel_to_workers_by_name_only(folder, tmp_path):
    found = tokenized(find_files(folder), ByteTokenizer(), "text", tmp_path)
    expected = found.tokens.tolist()
    packed = pickle.dumps(found)
    assert len(packed) < 3000
    assert pickle.loads(packed).tokens.tolist() == expected


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.randoms(), st.data())
def test_a_stream_reads_any_part_of_documents_in_any_order(lengths, shuffle, data):
    """Against Python's slices of the same documents put together."""

    class InMemory(TokenFile):
        def __init__(self) -> None:
            self.starts = np.cumsum([0, *lengths])
            self.bytes = np.array(lengths) * 2
            self._mapped = np.arange(sum(lengths), dtype=np.uint16)

    file = InMemory()
    order = list(range(len(lengths)))
    shuffle.shuffle(order)
    whole = [token for index in order for token in range(file.starts[index], file.starts[index + 1])]
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start + 1, len(whole)))
    stream = cut(file, np.array(order), Extent(start, stop))
    expected = whole[start:stop]
    assert len(stream) == len(expected)
    low = data.draw(st.integers(0, len(expected) - 1))
    high = data.draw(st.integers(low, len(expected)))
    assert stream.read(low, high).tolist() == expected[low:high]
    assert stream.bytes() == pytest.approx(2 * len(expected))


# From documents to sequences


def test_the_target_of_a_token_is_the_one_that_follows(make):
    tokens, targets = make().parts["train"].batch([0, 1])
    assert tokens.shape == targets.shape == (2, 8)
    assert tokens.dtype == targets.dtype == torch.long
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert targets[0, -1] == tokens[1, 0]


def test_parts_share_all_tokens_but_those_that_fill_no_sequence(make, folder):
    data = make()
    total = sum(path.stat().st_size + 1 for path in find_files(folder))
    streams = [data.parts[part].stream for part in ("train", "val", "test")]
    assert sum(len(stream) for stream in streams) == total
    assert [round(len(stream) / total, 2) for stream in streams] == [0.6, 0.2, 0.2]
    text = "".join(data.tokenizer.decode(stream.read(0, len(stream)).tolist()) for stream in streams)
    assert sorted(text) == sorted("".join(path.read_text() for path in find_files(folder)))


def test_parts_follow_the_seed(make):
    first, again, other = (make(seed=seed).parts["val"].batch([0])[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_parts_can_be_named_by_files(make, folder):
    data = make(val_pattern="deep/0*.txt", test_pattern="deep/1*.txt")
    numbers = {part: len(source.stream._ends) for part, source in data.parts.items()}
    assert numbers == {"train": 10, "val": 5, "test": 5}


def test_what_validates_tests_where_nothing_else_does(make):
    data = make(val_pattern="deep/*.txt")
    assert data.parts["test"] is data.parts["val"]
    data = make(test_fraction=0.0)
    assert data.parts["test"] is data.parts["val"]


def test_one_large_file_is_divided_too(make, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("all of it in one file " * 50)
    data = make(path)
    assert {part: len(source) for part, source in data.parts.items()} == {"train": 82, "val": 27, "test": 27}


def test_parquet_and_text_stand_together(make, folder):
    write_parquet(folder / "more.parquet", text=["row " * 10] * 30)
    data = make()
    assert sum(len(source.stream._ends) for source in data.parts.values()) >= 50


def test_documents_are_kept_apart_where_asked(make):
    data = make(packing="documents", context=64)
    tokens, targets = data.parts["train"].batch([0, 1])
    ends = tokens == 0
    assert ends.any()
    assert (targets[ends] == IGNORED).all()
    assert (targets[~ends] != IGNORED).all()
    bounds = data.boundaries(tokens)
    flat = tokens.flatten()
    begins = {0, 64} | {place + 1 for place in range(127) if flat[place] == 0}
    assert bounds.tolist() == [*sorted(begins), 128]
    assert make().boundaries(tokens) is None


def test_bytes_per_token_count_the_ends_of_documents(make, folder):
    data = make(val_pattern="deep/*.txt")
    files = find_files(folder, ["deep/*.txt"])
    size = sum(path.stat().st_size for path in files)
    assert data.bytes_per_token("val") == pytest.approx(size / (size + len(files)))


def test_the_network_is_told_the_vocabulary_and_the_checkpoint_the_tokenizer(make):
    data = make()
    assert data.model_fields == {"vocab_size": 256}
    assert data.describe() == {"input_size": [8], "tokenizer": {"kind": "bytes"}}


def test_batches_repeat_by_seed_and_epoch(make):
    first, second = make().train_dataloader(), make().train_dataloader()
    for loader in (first, second):
        loader.set_epoch(3)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"context": 0}, "context must be at least 1, not 0"),
        ({"context": 5000}, "part 'train' has .* tokens, and a sequence of context 5000 takes 5001"),
        ({"val_fraction": 1.0}, "val_fraction must be at least 0 and below 1"),
        ({"val_fraction": 0.6, "test_fraction": 0.4}, "must leave a part to train on"),
        ({"val_fraction": 0.0}, "val_fraction must be above 0 unless val_pattern"),
        ({"test_pattern": "*.txt"}, "test_pattern requires val_pattern"),
        ({"val_pattern": "*"}, "holds no files to train on"),
        ({"root": None, "pattern": "*.py"}, "set root to the folder"),
        ({"batch_size": 1000}, "do not fill one batch of 1000"),
    ],
)
def test_what_cannot_be_is_refused(make, fields, message):
    with pytest.raises(UserError, match=message):
        make(**fields).train_dataloader()


def test_a_token_outside_the_vocabulary_is_named_with_its_cache(make, monkeypatch):
    data = make()
    monkeypatch.setattr(data.parts["train"], "_vocab_size", 100)
    with pytest.raises(UserError, match=r"the token cache .* holds token 1\d\d, outside the vocabulary of 100"):
        next(iter(data.train_dataloader()))


def test_the_cache_can_be_placed_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("GATEWISE_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("GATEWISE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "gatewise"


def no_home() -> None:
    raise RuntimeError("Could not determine home directory.")


def test_without_a_home_folder_the_cache_wants_a_place(monkeypatch):
    monkeypatch.delenv("GATEWISE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(UserError, match="set the environment variable GATEWISE_CACHE to a folder"):
        cache_folder()


@pytest.mark.parametrize("fields", [{"root": "~nobody-has-this-name/a"}, {"cache_dir": "~nobody-has-this-name/a"}])
def test_the_home_of_nobody_is_a_users_mistake(fields):
    with pytest.raises(UserError, match="'~nobody-has-this-name/a' names a home folder, but there is none here"):
        Text(**fields)
