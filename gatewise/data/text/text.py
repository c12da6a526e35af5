"""Text for language models: a folder of text or Parquet files, or Python's own source.

All documents of a part are concatenated, each followed by an end-of-text token, and cut into sequences of equal length.
The target of a token is the next token. With packing "stream", a sequence attends across document boundaries. With
packing "documents", each document in a sequence starts from an empty context.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gatewise.data.loading import Batch
from gatewise.data.module import expanded, require_at_least, require_fraction
from gatewise.data.randomness import frozen_generator
from gatewise.data.text.corpus import find_files, standard_library, standard_library_files
from gatewise.data.text.sequences import IGNORED, SequenceData, SequenceSource
from gatewise.data.text.tokenizers import BYTES, Tokenizer, open_tokenizer
from gatewise.data.text.tokens import Extent, TokenFile, TokenStream, cut, tokenized
from gatewise.errors import UserError


class Text(SequenceData):
    """Token sequences from a corpus.

    Args:
        root: folder of text files (UTF-8, one document each) and Parquet files (one document per row), or one such
            file. None: the source of Python's standard library, which differs slightly between Python versions.
        pattern: shell-style pattern of the files to use ("*.c", "train/*.parquet"); None: all text and Parquet files.
        val_pattern: pattern of the validation files; None: validate on a part of the documents.
        test_pattern: pattern of the test files; None: test on a part of the documents, or on the validation files if
            `val_pattern` is given.
        text_column: column of Parquet files with the text.
        tokenizer: "bytes", path of a `tokenizer.json` or of a folder with one, or name on the hub.
        end_of_text: token that ends a document; None: found by its usual names.
        val_fraction: fraction of the tokens to validate on, in whole documents except the last, drawn by `seed`.
        test_fraction: fraction of the tokens to test on, drawn likewise; 0: test on the validation part.
        context: number of tokens per sequence.
        packing: treatment of document boundaries. "stream" ignores them; "documents" keeps the documents of a sequence
            separate, in context and in prediction.
        cache_dir: folder of the token cache; None: `$GATEWISE_CACHE` or `~/.cache/gatewise`.
        batch_size: number of sequences per training batch and process.
        eval_batch_size: batch size for validation and test; None: `batch_size`.
        num_workers: number of data-loading processes; 0 loads in the training process.
        seed: random seed of order and splits.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        *,
        pattern: str | None = None,
        val_pattern: str | None = None,
        test_pattern: str | None = None,
        text_column: str = "text",
        tokenizer: str = BYTES,
        end_of_text: str | None = None,
        val_fraction: float = 0.02,
        test_fraction: float = 0.02,
        context: int = 256,
        packing: Literal["stream", "documents"] = "stream",
        cache_dir: str | Path | None = None,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers, seed=seed)
        require_at_least("context", 1, context)
        require_fraction("val_fraction", val_fraction)
        require_fraction("test_fraction", test_fraction)
        if val_fraction + test_fraction >= 1:
            raise UserError(
                f"val_fraction and test_fraction must leave a part to train on, not {val_fraction} and {test_fraction}"
            )
        if val_fraction == 0 and val_pattern is None:
            raise UserError("val_fraction must be above 0 unless val_pattern is given")
        if root is None and (pattern, val_pattern, test_pattern) != (None, None, None):
            raise UserError("patterns select files of a folder: set root to the folder")
        if test_pattern is not None and val_pattern is None:
            raise UserError("test_pattern requires val_pattern: give both or neither")
        self.root = None if root is None else expanded(root)
        self.pattern, self.val_pattern, self.test_pattern = pattern, val_pattern, test_pattern
        self.text_column = text_column
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.packing = packing
        self.cache = cache_folder() if cache_dir is None else expanded(cache_dir)
        self.input_size = (context,)
        self._tokenizer: Tokenizer | None = None
        self._tokenizer_name, self._end_of_text = tokenizer, end_of_text

    @property
    def context(self) -> int:
        """Number of tokens per sequence."""
        return self.input_size[0]

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer, which is opened on first use unless it was set."""
        if self._tokenizer is None:
            self._tokenizer = open_tokenizer(self._tokenizer_name, self._end_of_text)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @property
    def vocab_size(self) -> int:  # type: ignore[override]  # read-only: it is the tokenizer's
        return self.tokenizer.vocab_size

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "tokenizer": self.tokenizer.describe()}

    def prepare_data(self) -> None:
        """Tokenize the files unless that has been done."""
        for files in self._files().values():
            tokenized(files, self.tokenizer, self.text_column, self.cache)

    def bytes_per_token(self, part: str) -> float:
        """Return the mean bytes of UTF-8 per token in a part, counting end-of-text tokens."""
        source = self.parts[part]
        assert isinstance(source, WindowSource)
        return source.stream.bytes() / len(source.stream)

    def boundaries(self, tokens: Tensor) -> Tensor | None:
        """Return the document starts in tokens (B, T) flattened to one row, then B * T; None with packing "stream"."""
        if self.packing == "stream":
            return None
        begins = torch.zeros_like(tokens, dtype=torch.bool)
        begins[:, 0] = True
        begins[:, 1:] = tokens[:, :-1] == self.tokenizer.end_of_text
        places = begins.flatten().nonzero()[:, 0]
        return torch.cat([places, places.new_tensor([tokens.numel()])])

    def _load(self) -> dict[str, SequenceSource]:
        found = {
            part: tokenized(files, self.tokenizer, self.text_column, self.cache)
            for part, files in self._files().items()
        }
        streams = self._split(found)
        sources: dict[str, SequenceSource] = {
            part: WindowSource(stream, part, self.context, self.tokenizer, self.packing == "documents")
            for part, stream in streams.items()
        }
        return {"test": sources["val"], **sources}

    def _files(self) -> dict[str, list[Path]]:
        """Return the files of each part that has its own files."""
        if self.root is None:
            return {"train": standard_library_files(standard_library())}
        found = {"train": find_files(self.root, [] if self.pattern is None else [self.pattern])}
        for part, pattern in (("val", self.val_pattern), ("test", self.test_pattern)):
            if pattern is not None:
                found[part] = find_files(self.root, [pattern])
        others = {path for part, files in found.items() if part != "train" for path in files}
        found["train"] = [path for path in found["train"] if path not in others]
        if not found["train"]:
            raise UserError(f"{self.root} holds no files to train on: all of them validate or test")
        return found

    def _split(self, found: dict[str, TokenFile]) -> dict[str, TokenStream]:
        if "val" in found:
            return {part: _whole(file) for part, file in found.items()}
        file = found["train"]
        total = int(file.starts[-1])
        order = frozen_generator("split", self.seed).permutation(len(file.starts) - 1)
        test_end = round(self.test_fraction * total)
        val_end = test_end + round(self.val_fraction * total)
        extents = {"train": Extent(val_end, total), "val": Extent(test_end, val_end)}
        if test_end:
            extents["test"] = Extent(0, test_end)
        return {part: cut(file, order, extent) for part, extent in extents.items()}


class WindowSource(SequenceSource):
    """Sequences of equal length, cut from a stream of tokens.

    Args:
        cut_documents: exclude the first token of a document from prediction.
    Raises:
        UserError: if there are not enough tokens for one sequence.
    """

    def __init__(self, stream: TokenStream, part: str, context: int, tokenizer: Tokenizer, cut_documents: bool) -> None:
        self.stream = stream
        self._context = context
        self._vocab_size = tokenizer.vocab_size
        self._end_of_text = tokenizer.end_of_text if cut_documents else None
        if len(self) == 0:
            raise UserError(
                f"the text of part {part!r} has {len(stream)} tokens, and a sequence of context {context} takes "
                f"{context + 1}; lower context, or give more text"
            )

    def __len__(self) -> int:
        return max(0, len(self.stream) - 1) // self._context

    def batch(self, indices: Sequence[int]) -> Batch:
        places = [index * self._context for index in indices]
        rows = np.stack([self.stream.read(place, place + self._context + 1) for place in places])
        if rows.max() >= self._vocab_size:
            raise UserError(
                f"the token cache {self.stream.name} holds token {rows.max()}, outside the vocabulary of "
                f"{self._vocab_size}; delete it"
            )
        tokens, targets = rows[:, :-1], rows[:, 1:].copy()
        if self._end_of_text is not None:
            targets[tokens == self._end_of_text] = IGNORED
        return torch.from_numpy(np.ascontiguousarray(tokens)), torch.from_numpy(targets)


def cache_folder() -> Path:
    """Return the cache folder: `$GATEWISE_CACHE`, or `~/.cache/gatewise`.

    Raises:
        UserError: if neither the variable nor a home folder exists.
    """
    named = os.environ.get("GATEWISE_CACHE")
    if named:
        return expanded(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gatewise"
    except RuntimeError as error:
        raise UserError(
            "there is no home folder to keep a cache in; set the environment variable GATEWISE_CACHE to a folder"
        ) from error


def _whole(file: TokenFile) -> TokenStream:
    return cut(file, np.arange(len(file.starts) - 1), Extent(0, int(file.starts[-1])))
