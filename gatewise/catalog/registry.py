"""The registry of networks.

A network file ends with `register(...)`: the network class, its paper, its variants and its checkpoint layouts. Names
are read from those calls in the source, so that listing them imports neither torch nor the networks. A file is imported
only when one of its names is used.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatewise.errors import unknown_name

if TYPE_CHECKING:
    from gatewise.catalog.keys import KeyLayout

_PACKAGE = Path(__file__).parents[1]
_REGISTER_CALL = re.compile(r"^register\(.*?^\)", re.MULTILINE | re.DOTALL)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Weights:
    """A published checkpoint: its location, license and score."""

    source: str
    license: str
    score: str = "not published"
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    num_classes: int | None = None
    """Number of classes of the published head, if it differs from the variant's configuration."""


@dataclass(frozen=True)
class Variant:
    """One registered name: its configuration, its usual input, and its published weights.

    `input_size` is the shape of one sample: (channels, height, width) for an image, (channels, time, height, width) for
    a clip, (time,) for a sequence.
    """

    config: Any
    input_size: tuple[int, ...] = (3, 224, 224)
    weights: Weights | None = None


@dataclass(frozen=True)
class Family:
    """A network class and everything registered with it."""

    network: type[Any]
    paper: str
    variants: Mapping[str, Variant]
    layouts: Callable[[Any], Sequence[KeyLayout]]
    fresh_with_head: tuple[str, ...]


@dataclass(frozen=True)
class RegisteredName:
    """A registered name as read from the source, before anything is imported."""

    name: str
    paper: str
    module: str


@dataclass(frozen=True)
class Implemented:
    """The parts of a paper that are in the library."""

    networks: tuple[str, ...]
    claim: bool


_families: list[Family] = []


def register(
    network: type[Any],
    *,
    paper: str,
    variants: Mapping[str, Variant],
    layouts: Callable[[Any], Sequence[KeyLayout]],
    fresh_with_head: tuple[str, ...] = ("head",),
) -> None:
    """Register the variants of a network by name.

    Args:
        network: network class; it is built with a configuration as its only argument.
        paper: id of the paper in `papers.toml`.
        variants: variants by name; the names must be literals, since they are read from the source.
        layouts: function from a configuration to its checkpoint layouts, the reference's own first.
        fresh_with_head: prefixes of our keys that may stay as initialized when a checkpoint's head is replaced.
    """
    known = {name for family in _families for name in family.variants}
    if clash := known & set(variants):
        raise ValueError(f"registered twice: {', '.join(sorted(clash))}")
    _families.append(Family(network, paper, variants, layouts, fresh_with_head))


@cache
def registered_names() -> dict[str, RegisteredName]:
    """Read all registered names from the source of `gatewise.networks`, without importing a network."""
    found: dict[str, RegisteredName] = {}
    for path in sorted((_PACKAGE / "networks").rglob("*.py")):
        module = "gatewise." + ".".join(path.relative_to(_PACKAGE).with_suffix("").parts)
        for match in _REGISTER_CALL.finditer(path.read_text(encoding="utf-8")):
            paper, names = _read_register_call(match.group(), module)
            found.update({name: RegisteredName(name, paper, module) for name in names})
    return found


def _read_register_call(source: str, module: str) -> tuple[str, list[str]]:
    call = ast.parse(source, mode="eval").body
    if not isinstance(call, ast.Call):
        raise TypeError(f"{module}: register(...) must be a plain call")
    arguments = {keyword.arg: keyword.value for keyword in call.keywords}
    variants = arguments["variants"]
    if not isinstance(variants, ast.Dict):
        raise TypeError(f"{module}: the variants of register(...) must be a dictionary display")
    return ast.literal_eval(arguments["paper"]), [ast.literal_eval(key) for key in variants.keys if key is not None]


def list_models(pattern: str = "*") -> list[str]:
    """Return registered names that match a shell-style pattern (`focalnet_*`), sorted."""
    return sorted(name for name in registered_names() if fnmatchcase(name, pattern))


def family_of(name: str) -> Family:
    """Return the family of a registered name, and import its file.

    Raises:
        UnknownNameError: if the name is unknown. The message suggests the closest one.
    """
    names = registered_names()
    if name not in names:
        raise unknown_name("model", name, names)
    import_module(names[name].module)
    return next(family for family in _families if name in family.variants)


def family_of_network(network: type[Any]) -> Family | None:
    """Return the family that registered this class, or None."""
    return next((family for family in _families if family.network is network), None)


def registered_config(name: str) -> Any | None:
    """Return the configuration that an already imported file registered under `name`, or None."""
    return next((family.variants[name].config for family in _families if name in family.variants), None)


def families() -> list[Family]:
    """Return all families in the order of their files. Imports every network file."""
    for module in dict.fromkeys(registered.module for registered in registered_names().values()):
        import_module(module)
    return sorted(_families, key=lambda family: family.network.__module__)


def implemented(paper: str) -> Implemented:
    """Return which parts of the paper with this id are in the library."""
    networks = tuple(sorted(name for name, found in registered_names().items() if found.paper == paper))
    claim = _PACKAGE / "claims" / paper
    return Implemented(networks, (claim / "__init__.py").is_file() or claim.with_suffix(".py").is_file())
