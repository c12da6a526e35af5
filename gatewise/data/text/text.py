"""Text for language models: a folder of text or Parquet files, or Python's own source.

All documents of a part stand one after the other, each closed by its end-of-text token, and are cut into sequences of
one length; the target of a token is the one that follows. Packing "stream" lets a sequence look across the ends of
documents; packing "documents" lets each document of a sequence start from nothing.
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
    """Sequences of tokens of a corpus.

    Args:
        root: a folder of text files (UTF-8, a document each) and Parquet files (a document per row), or one such file;
            the source of Python's standard library if not given, which differs a little between versions of Python.
        pattern: which files of the folder, shell-style ("*.c", "train/*.parquet"); all text and Parquet if not given.
        val_pattern: files that validate; if not given, a part of the documents.
        test_pattern: files that test; if not given, a part of the documents, or what validates if `val_pattern` is.
        text_column: the column of Parquet files that holds the text.
        tokenizer: "bytes"; a `tokenizer.json` or a folder with one; or a name on the hub.
        end_of_text: the tokenizer's token that ends a document; found by the usual names if not given.
        val_fraction: part of the tokens that validates, in whole documents but for the last, drawn by `seed`.
        test_fraction: part that tests, drawn likewise; if 0, what validates tests.
        context: tokens of a sequence.
        packing: "stream", or "documents": nothing is seen of, and predicted for, other documents of a sequence.
        cache_dir: where the tokens are kept; `$GATEWISE_CACHE` or `~/.cache/gatewise` if not given.
        batch_size: sequences per training batch and process.
        eval_batch_size: the same for validation and test; `batch_size` if not given.
        num_workers: loading processes.
        seed: of order and splits.
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
            raise UserError("val_fraction must be above 0 unless val_pattern names what validates")
        if root is None and (pattern, val_pattern, test_pattern) != (None, None, None):
            raise UserError("patterns choose files of a folder: name it as root")
        if test_pattern is not None and val_pattern is None:
            raise UserError("test_pattern needs val_pattern: either files are named for both, or for neither")
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
        """Tokens of a sequence."""
        return self.input_size[0]

    @property
    def tokenizer(self) -> Tokenizer:
        """Opened when it is first asked for, unless it was set."""
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
        """Turn the files into tokens, if that has not been done."""
        for files in self._files().values():
            tokenized(files, self.tokenizer, self.text_column, self.cache)

    def bytes_per_token(self, part: str) -> float:
        """Bytes of UTF-8 per token of a part's text, ends of documents counted as tokens."""
        source = self.parts[part]
        assert isinstance(source, WindowSource)
        return source.stream.bytes() / len(source.stream)

    def boundaries(self, tokens: Tensor) -> Tensor | None:
        """Where documents begin in tokens (B, T) laid out as one row, and B * T; None with packing "stream"."""
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
        """The files of each part that has its own."""
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
    """The sequences that a stream of tokens is cut into.

    Args:
        cut_documents: whether the token after the end of a document is left unpredicted.
    Raises:
        UserError: if there are not enough tokens for one.
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
    """Return where what can be made again is kept: `$GATEWISE_CACHE`, or `~/.cache/gatewise`.

    Raises:
        UserError: if neither is there.
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
