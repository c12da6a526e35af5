"""A case: run one of our modules in the same way as the reference implementation that a digest was taken from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout

Outputs = Tensor | list[Tensor] | dict[str, Tensor]
Tap = tuple[str, Callable[[Tensor], Tensor]]
"""Path of one of our modules, and a function that brings its output into the reference's layout."""


def unchanged(output: Tensor) -> Tensor:
    """Return the output of a tap that already has the reference's layout."""
    return output


@dataclass(frozen=True)
class Case:
    """One digest record in our terms.

    Args:
        module: our module, built for the record's configuration.
        layout: key layout of the record.
        prefix: prefix missing from their keys if the record is about a part of a network.
        run: function that calls the module on the record's inputs, in order.
        tap: function from a module path of theirs to ours, with a function that brings its output into their layout.
        grads_of: which of several outputs the record's gradients belong to, if it does not say.
    """

    module: nn.Module
    layout: KeyLayout
    prefix: str = ""
    run: Callable[..., Outputs] = lambda module, *inputs: module(*inputs)
    tap: Callable[[str], Tap] | None = None
    grads_of: str | None = None

    def to_ours(self, key: str) -> str:
        """Return our key within `module` for a key of the record."""
        ours = self.layout.to_ours(self.prefix + key)
        return ours.removeprefix(self.layout.to_ours(self.prefix.rstrip(".")) + ".") if self.prefix else ours

    def tap_path(self, path: str) -> Tap:
        """Return our module path for a path of the record, and the function that converts its output's layout."""
        return self.tap(path) if self.tap is not None else (self.to_ours(path), unchanged)


Cases = Mapping[str, Sequence[Callable[[Mapping[str, Any]], Case | None]]]
"""Functions by a digest record's `system` that turn a record into a case, or return None if it is not theirs."""
