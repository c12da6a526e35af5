"""A case: how to run one of our modules as a reference implementation was run when its digest was taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout

Outputs = Tensor | list[Tensor] | dict[str, Tensor]
Tap = tuple[str, Callable[[Tensor], Tensor]]
"""The path of one of our modules, and what lays its output out as the reference's."""


def unchanged(output: Tensor) -> Tensor:
    """The output of a tap that is laid out as the reference's."""
    return output


@dataclass(frozen=True)
class Case:
    """One digest record in our terms.

    Args:
        module: our module, built for the record's configuration.
        layout: names the record's keys.
        prefix: what their keys lack in front when the record is about a part of a network.
        run: calls the module on the record's inputs, in their order.
        tap: our module path for a path of theirs, and what brings its output into their layout.
        grads_of: which of several outputs the record's gradients are of, where it does not say.
    """

    module: nn.Module
    layout: KeyLayout
    prefix: str = ""
    run: Callable[..., Outputs] = lambda module, *inputs: module(*inputs)
    tap: Callable[[str], Tap] | None = None
    grads_of: str | None = None

    def to_ours(self, key: str) -> str:
        """Our key within `module` for a key of the record."""
        ours = self.layout.to_ours(self.prefix + key)
        return ours.removeprefix(self.layout.to_ours(self.prefix.rstrip(".")) + ".") if self.prefix else ours

    def tap_path(self, path: str) -> Tap:
        """Where to listen for the output at a path of the record, and how to lay it out."""
        return self.tap(path) if self.tap is not None else (self.to_ours(path), unchanged)


Cases = Mapping[str, Sequence[Callable[[Mapping[str, Any]], Case | None]]]
"""For each `system` of digest records, functions that turn a record into a case, or give None if it is not theirs."""
