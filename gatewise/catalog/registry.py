"""The registry of networks.

A network file ends with `register(...)`: the network class, its paper, its variants and its checkpoint layouts. Names
are read from those calls in the source, so that listing them imports neither torch nor the networks; the file itself
is imported when one of its names is used.
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
    """A published checkpoint: where it is, under which license, and what it scores."""

    source: str
    license: str
    score: str = "not published"
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    num_classes: int | None = None
    """Classes of the published head, where they are not those of the variant's configuration."""


@dataclass(frozen=True)
class Variant:
    """One registered name: its configuration, its usual input, and the weights published for it.

    `input_size` is the shape of one sample: (channels, height, width) of an image, (channels, time, height, width) of a
    clip, (time,) of a sequence.
    """

    config: Any
    input_size: tuple[int, ...] = (3, 224, 224)
    weights: Weights | None = None


@dataclass(frozen=True)
class Family:
    """A network class and everything that is registered with it."""

    network: type[Any]
    paper: str
    variants: Mapping[str, Variant]
    layouts: Callable[[Any], Sequence[KeyLayout]]
    fresh_with_head: tuple[str, ...]


@dataclass(frozen=True)
class RegisteredName:
    """A registered name as the source states it, before anything is imported."""

    name: str
    paper: str
    module: str


@dataclass(frozen=True)
class Implemented:
    """What of a paper is in the library."""

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
    """Make the variants of a network known by name.

    Args:
        network: the class; it is built with a configuration as its only argument.
        paper: the paper's id in `papers.toml`.
        variants: name -> variant; names are written as literals (they are read from the source).
        layouts: the checkpoint layouts that a configuration can be loaded from, the reference's own first.
        fresh_with_head: prefixes of our keys that may stay as initialized when a checkpoint's head is replaced.
    """
    known = {name for family in _families for name in family.variants}
    if clash := known & set(variants):
        raise ValueError(f"registered twice: {', '.join(sorted(clash))}")
    _families.append(Family(network, paper, variants, layouts, fresh_with_head))


@cache
def registered_names() -> dict[str, RegisteredName]:
    """All registered names, read from the source of `gatewise.networks`; imports no network."""
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
    """Registered names that match a shell-style pattern, sorted (`focalnet_*`)."""
    return sorted(name for name in registered_names() if fnmatchcase(name, pattern))


def family_of(name: str) -> Family:
    """The family of a registered name; imports its file.

    Raises:
        UnknownNameError: if there is no such name; suggests the closest.
    """
    names = registered_names()
    if name not in names:
        raise unknown_name("model", name, names)
    import_module(names[name].module)
    return next(family for family in _families if name in family.variants)


def family_of_network(network: type[Any]) -> Family | None:
    """The family that registered this class, or None."""
    return next((family for family in _families if family.network is network), None)


def registered_config(name: str) -> Any | None:
    """The configuration registered under `name` by a file that is already imported, or None."""
    return next((family.variants[name].config for family in _families if name in family.variants), None)


def families() -> list[Family]:
    """All families, in the order of their files; imports every network file."""
    for module in dict.fromkeys(registered.module for registered in registered_names().values()):
        import_module(module)
    return sorted(_families, key=lambda family: family.network.__module__)


def implemented(paper: str) -> Implemented:
    """What of the paper with this id is in the library."""
    networks = tuple(sorted(name for name, found in registered_names().items() if found.paper == paper))
    claim = _PACKAGE / "claims" / paper
    return Implemented(networks, claim.is_dir() or claim.with_suffix(".py").is_file())
