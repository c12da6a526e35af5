"""Cases: how to run one of our modules as a reference implementation was run when its digest was taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout

Outputs = Tensor | list[Tensor] | dict[str, Tensor]
Path = tuple[str, Callable[[Tensor], Tensor]]


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
    tap: Callable[[str], Path] | None = None
    grads_of: str | None = None

    def to_ours(self, key: str) -> str:
        """Our key within `module` for a key of the record."""
        ours = self.layout.to_ours(self.prefix + key)
        return ours.removeprefix(self.layout.to_ours(self.prefix.rstrip(".")) + ".") if self.prefix else ours

    def tap_path(self, path: str) -> Path:
        """Where to listen for the output at a path of the record, and how to lay it out."""
        return self.tap(path) if self.tap is not None else (self.to_ours(path), unchanged)


def translate_config(
    reference: Mapping[str, Any],
    target: Callable[..., Any],
    renamed: Mapping[str, str] | None = None,
    ignored: tuple[str, ...] = (),
) -> dict[str, Any] | None:
    """Arguments of `target` (our configuration, or a module) from the reference constructor's hyper-parameters.

    Args:
        reference: hyper-parameters in the reference's names.
        renamed: their name -> ours, where they differ.
        ignored: their names that change nothing in what is computed (an image size that only sizes a table).
    Returns:
        The arguments, with lists as tuples; None if `reference` holds a name that `target` does not know, because the
        record is then about something else.
    """
    names = {name: name for name in signature(target).parameters} | dict(renamed or {})
    if not set(reference) <= {*names, *ignored}:
        return None
    return {
        names[key]: tuple(value) if isinstance(value, list) else value
        for key, value in reference.items()
        if key not in ignored
    }
