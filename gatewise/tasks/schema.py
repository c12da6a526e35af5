"""Fields of a recipe and their types.

Sections that choose by name (task, model, data, methods) get their fields from what they choose: a network's
configuration, a data module's constructor, a method's keyword arguments. jsonargparse reads the types from those
signatures, converts the values, prints the help and parses the command line. This file combines the pieces and
writes the error messages.
"""

from __future__ import annotations

import inspect
import math
import re
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from importlib import import_module
from itertools import zip_longest
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, set_loader

from gatewise.catalog.factory import override
from gatewise.catalog.registry import family_of
from gatewise.data import data_class
from gatewise.data.text.sequences import SequenceData
from gatewise.errors import UserError, unknown_name
from gatewise.files import parse_yaml
from gatewise.methods import Method, find_method
from gatewise.tasks.optim import check_optimizer
from gatewise.tasks.recipe import ModelPart, OptimRecipe, Part, Recipe, TrainerRecipe

# Taken from the data where the recipe does not set them.
FROM_DATA = ("num_classes", "in_chans", "vocab_size")
_TASKS = {
    "associative_recall": "gatewise.tasks.associative_recall:AssociativeRecall",
    "classification": "gatewise.tasks.classification:ImageClassification",
    "language_modeling": "gatewise.tasks.language_modeling:LanguageModeling",
}

# Strings that are parsed as values, in a recipe or on the command line, have limits on nesting and aliases.
_MODE = "gatewise"
set_loader(_MODE, lambda text: parse_yaml(text, "the value"), exceptions=(UserError, yaml.YAMLError))
_LARGEST_INTEGER = 2**63 - 1
_LONGEST_SHOWN = 100


def resolve(content: Mapping[str, Any], arguments: Sequence[str] = ()) -> Recipe:
    """Return the recipe with every field checked, converted and, if missing, set to its default.

    Args:
        content: the recipe's sections.
        arguments: command-line words such as `--optim.lr 1e-3`, which override `content`.
    Raises:
        UserError: if a field is unknown, missing or of the wrong type. The message names the field and the rule.
    """
    names = {section: _name_of(section, content, arguments) for section in ("model", "data")}
    names["task"] = _name_of("task", content, arguments, default_task(names["data"]))
    schema = Schema("gatewise train RECIPE")
    schema.add_name("task", names["task"])
    schema.add_fields("task", task_class(names["task"]).settings)
    _add_model(schema, names["model"])
    schema.add_name("data", names["data"])
    schema.add_fields("data", data_class(names["data"]))
    schema.parser.set_defaults({"data.seed": None})
    schema.add_value("methods", list[dict[str, Any]], [], "list of methods, each with its name and fields")
    schema.add_fields("optim", OptimRecipe)
    schema.add_fields("trainer", TrainerRecipe)
    schema.add_value("seed", int, 0, "random seed of initial weights, sample order, augmentation and drop path")
    schema.add_value("output", str, "runs/run", "folder of the run")
    values = schema.parse(content, arguments)
    if values["data"]["seed"] is None:
        values["data"]["seed"] = values["seed"]
    recipe = Recipe(
        task=_checked_part("task", task_class(names["task"]).settings, values["task"]),
        model=_model_part(values["model"]),
        data=_checked_part("data", data_class(names["data"]), values["data"]),
        methods=tuple(_method_part(index, entry) for index, entry in enumerate(values["methods"])),
        optim=_section("optim", OptimRecipe, values["optim"]),
        trainer=_section("trainer", TrainerRecipe, values["trainer"]),
        seed=values["seed"],
        output=values["output"],
    )
    _check_together(recipe)
    return recipe


class Schema:
    """Typed fields in sections, and a parser for them.

    Args:
        command: command line that the help shows before the fields.
        what: name of the parsed object in error messages.
    """

    def __init__(self, command: str, what: str = "the recipe") -> None:
        self.what = what
        self.parser = ArgumentParser(prog=command, exit_on_error=False, parser_mode=_MODE)
        self._types: dict[str, Any] = {}

    def add_name(self, section: str, name: str) -> None:
        """Add the `name` field by which a section chooses."""
        self.add_value(f"{section}.name", str, name, f"name of the {section}")

    def add_value(self, name: str, kind: Any, default: Any, summary: str) -> None:
        """Add one field."""
        self._types[name] = kind
        self.parser.add_argument(f"--{name}", type=kind, default=default, help=summary)

    def add_fields(
        self, section: str | None, source: Callable[..., Any], skip: Sequence[str] = (), defaults: Any = None
    ) -> None:
        """Add the parameters of a class or function as fields. An instance as `defaults` replaces the default values.

        An optional part of a configuration (`Gate | None`) becomes one field, a mapping of the fields of the part.
        """
        self._types.update(_types_of(source, f"{section}." if section else ""))
        optional = _optional_parts(source) if defaults is not None else set()
        if inspect.isclass(source):
            left_out = {*skip, *optional}
            self.parser.add_class_arguments(source, section, skip=left_out, fail_untyped=False, instantiate=False)
        else:
            self.parser.add_function_arguments(source, section, skip=set(skip), fail_untyped=False)
        if defaults is None:
            return
        named = {name: getattr(defaults, name) for name in inspect.signature(source).parameters if name not in skip}
        for name in optional:
            value = named.pop(name)
            plain_value = None if value is None else asdict(value)
            self.add_value(
                f"{section}.{name}", dict[str, Any] | None, plain_value, "fields of this part; null: leave it out"
            )
        self.parser.set_defaults({f"{section}.{name}": value for name, value in named.items()})

    def parse(self, content: Mapping[str, Any], arguments: Sequence[str] = ()) -> dict[str, Any]:
        """Return the values of all fields as nested plain dictionaries.

        Raises:
            UserError: for an unknown field or a value of the wrong type.
        """
        known = list(self.parser.get_defaults().keys())
        for name in _leaves(content, known, self.what):
            self._require_known(name, known)
            # Checked before any conversion.
            _require_numbers(_dotted(content, name), self.what, name)
        for word in arguments:
            if word.startswith("--") and word != "--help":
                self._require_known(word[2:].partition("=")[0].removesuffix("+"), known)
        try:
            values = self.parser.parse_object(dict(content))
            if arguments:
                values = self.parser.parse_args(list(arguments), namespace=values)
        except ArgumentError as error:
            raise UserError(f"{self.what}: {_wording(str(error))}") from error
        except OverflowError as error:
            raise UserError(f"{self.what}: a number is too large for its field") from error
        found = _as_dict(values)
        for name in known:
            self._require_value(name, _dotted(found, name))
        return found

    def _require_value(self, name: str, value: Any) -> None:
        """Reject null where the type of the field has no None, because jsonargparse accepts it for any type."""
        kind = self._types.get(name, Any)
        if value is None and self.parser.get_default(name) is not None and not _takes_null(kind):
            raise UserError(f"{self.what}: {name} must be {_type_words(kind)}, not null")
        _require_numbers(value, self.what, name)

    def _require_known(self, name: str, known: Sequence[str]) -> None:
        if name in known:
            return
        if any(candidate.startswith(f"{name}.") for candidate in known):
            raise UserError(f"{self.what}: {name} is a section; set one of its fields, such as {name}.FIELD")
        section, _, last = name.rpartition(".")
        if any(candidate.startswith(f"{section}.") for candidate in known):
            siblings = [k.removeprefix(f"{section}.") for k in known if section and k.startswith(f"{section}.")]
            raise unknown_name(f"field of {section} in {self.what}", last, siblings)
        raise unknown_name(f"section of {self.what}", name, {candidate.partition(".")[0] for candidate in known})


def _types_of(source: Callable[..., Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield dotted name and type of every parameter of a class or function, including those of nested dataclasses."""
    for name, kind in _hints(source).items():
        if is_dataclass(kind) and isinstance(kind, type):
            yield from _types_of(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", kind


def _hints(source: Callable[..., Any]) -> dict[str, Any]:
    if not inspect.isclass(source) or is_dataclass(source):
        return get_type_hints(source)
    # A constructor passes the arguments that it does not name to the constructor of its base.
    constructors = [vars(base)["__init__"] for base in reversed(source.__mro__) if "__init__" in vars(base)]
    return {name: kind for constructor in constructors for name, kind in get_type_hints(constructor).items()}


def _takes_null(kind: Any) -> bool:
    return kind in (Any, object, None, type(None)) or type(None) in get_args(kind)


def _type_words(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")


def _dotted(content: Mapping[str, Any], name: str) -> Any:
    inner: Any = content
    for key in name.split("."):
        inner = inner.get(key) if isinstance(inner, Mapping) else None
    return inner


def _require_numbers(value: Any, what: str, name: str) -> None:
    for number in _numbers(value):
        if isinstance(number, float) and not math.isfinite(number):
            raise UserError(f"{what}: {name} must be finite, not {number}")
        if abs(number) > _LARGEST_INTEGER and not isinstance(number, float):
            raise UserError(
                f"{what}: {name} must be at most {_LARGEST_INTEGER}, not an integer of {number.bit_length()} bits"
            )


def _numbers(value: Any) -> Iterator[int | float]:
    """Yield the numbers in nested mappings and sequences."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _numbers(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield value


def _optional_parts(config: Callable[..., Any]) -> set[str]:
    """Return the names of the fields of a dataclass whose type is another dataclass or None."""
    if not is_dataclass(config):
        return set()
    options = {name: get_args(annotation) for name, annotation in get_type_hints(config).items()}
    return {name for name, found in options.items() if type(None) in found and any(is_dataclass(one) for one in found)}


def arguments_of(source: Callable[..., Any], fields: Mapping[str, Any], skip: Sequence[str] = ()) -> dict[str, Any]:
    """Return fields as keyword arguments of a class or function, with nested sections as the dataclasses it expects."""
    schema = Schema("")
    schema.add_fields("it", source, skip)
    parsed = schema.parser.parse_object({"it": dict(fields)})
    return dict(vars(schema.parser.instantiate(parsed).get("it", Namespace())))


def method_arguments(method: Method, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of a method, without its first argument, the network."""
    return arguments_of(method.build, fields, skip=[_network_parameter(method)])


def task_class(name: str) -> Any:
    """Return the class of a task by its name in recipes."""
    if name not in _TASKS:
        raise unknown_name("task", name, _TASKS)
    module, attribute = _TASKS[name].split(":")
    return getattr(import_module(module), attribute)


def default_task(data: str) -> str:
    """Return the name of the default task for a kind of data."""
    return next(name for name in _TASKS if issubclass(data_class(data), task_class(name).takes))


def _add_model(schema: Schema, name: str) -> None:
    config = family_of(name).variants[name].config
    schema.add_name("model", name)
    schema.add_value(
        "model.pretrained", bool, False, "start from the published weights, with a new head if the classes differ"
    )
    schema.add_value("model.checkpoint", str | None, None, "weights to start from: path, URL or hub id")
    schema.add_value("model.replace_head", bool, False, "keep a new head if the classes of the checkpoint differ")
    for field_name in FROM_DATA:
        if hasattr(config, field_name):
            schema.add_value(f"model.{field_name}", int | None, None, "default: the value of the data")
    schema.add_fields("model", type(config), skip=FROM_DATA, defaults=config)


def _name_of(section: str, content: Mapping[str, Any], arguments: Sequence[str], default: str | None = None) -> str:
    """Return the name that a section chooses, from the command line or else from the recipe."""
    option = f"--{section}.name"
    for word, following in zip_longest(arguments, arguments[1:]):
        if word == option and following is not None:
            return following
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    part = content.get(section, {})
    if not isinstance(part, Mapping):
        raise UserError(f"the recipe's {section} must be a section such as {{name: ...}}, not {_shown(part)}")
    name = part.get("name", default)
    if not isinstance(name, str):
        raise UserError(f"the recipe names no {section}: add `{section}: {{name: ...}}`")
    return name


def _leaves(content: Mapping[str, Any], known: Sequence[str], what: str, prefix: str = "") -> Iterator[str]:
    """Yield dotted names of the values in nested sections. A known name is a leaf even if its value is a mapping."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        is_section = any(candidate.startswith(f"{name}.") for candidate in known)
        if name not in known and is_section:
            if not isinstance(value, Mapping):
                raise UserError(f"{what}: {name} must be a section with fields, not {_shown(value)}")
            yield from _leaves(value, known, what, f"{name}.")
        else:
            yield name


def _shown(value: Any) -> str:
    """Return a value as it is written in a recipe, cut to one line for an error message."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _wording(message: str) -> str:
    """Return jsonargparse's error in one line: the field, what was expected and what was given."""
    match = re.match(r'Parser key "(?P<key>[^"]+)":\s*(?P<rest>.*)', message, re.DOTALL)
    if match is None:
        return _short(message)
    rest = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", match["rest"]).replace("typing.", "")
    came = re.search(r"(?:Got|Given) value: (?P<value>.*)\Z", rest, re.DOTALL)
    union = re.search(r"Subtypes: \[(.*?)\]\n", rest)
    single = re.search(r"Expected an? ([^\n]*?)\. Got", rest)
    if came is None or (union is None and single is None):
        return f"{match['key']}: {_short(rest)}"
    types = union[1].replace("NoneType", "null").replace(", ", " or ") if union else single[1] if single else ""
    return f"{match['key']} must be {types}, not {_shown(came['value'].strip())}"


def _short(message: str) -> str:
    line = " ".join(message.split())
    return line if len(line) <= 5 * _LONGEST_SHOWN else f"{line[: 5 * _LONGEST_SHOWN]}..."


def _as_dict(values: Namespace) -> dict[str, Any]:
    return {key: _as_dict(value) if isinstance(value, Namespace) else value for key, value in vars(values).items()}


def _checked_part(section: str, source: Callable[..., Any], values: Mapping[str, Any]) -> Part:
    fields = {key: value for key, value in values.items() if key != "name"}
    try:
        arguments = arguments_of(source, fields)
        if is_dataclass(source):
            source(**arguments)
    except ValueError as error:
        raise UserError(f"the recipe's {section} is refused: {error}") from error
    return Part(values["name"], fields)


def _model_part(values: Mapping[str, Any]) -> ModelPart:
    own = {"name", "pretrained", "checkpoint", "replace_head"}
    given = {key: value for key, value in values.items() if key not in own and not (key in FROM_DATA and value is None)}
    try:
        override(family_of(values["name"]).variants[values["name"]].config, given)
    except (ValueError, TypeError) as error:
        raise UserError(f"the recipe's model is refused: {error}") from error
    return ModelPart(values["name"], given, values["pretrained"], values["checkpoint"], values["replace_head"])


def _method_part(index: int, entry: Mapping[str, Any]) -> Part:
    what = f"methods[{index}] in the recipe"
    if not isinstance(entry.get("name"), str):
        raise UserError(f"{what} has no name: write {{name: ..., field: value}}")
    method = find_method(entry["name"])
    schema = Schema(method.name, what)
    schema.add_fields(None, method.build, skip=[_network_parameter(method)])
    return Part(method.name, schema.parse({key: value for key, value in entry.items() if key != "name"}))


def _network_parameter(method: Method) -> str:
    return next(iter(inspect.signature(method.build).parameters))


def _section(name: str, kind: type[Any], values: Mapping[str, Any]) -> Any:
    return kind(**{field.name: values[field.name] for field in fields(kind)})


def _check_together(recipe: Recipe) -> None:
    """Check rules that involve more than one section."""
    check_optimizer(recipe.optim)
    task, data = task_class(recipe.task.name), data_class(recipe.data.name)
    if not issubclass(data, task.takes):
        raise UserError(
            f"task {recipe.task.name} does not fit the data {recipe.data.name!r}, which are for "
            f"{default_task(recipe.data.name)}"
        )
    config = family_of(recipe.model.name).variants[recipe.model.name].config
    if hasattr(config, "vocab_size") != issubclass(data, SequenceData):
        takes = "tokens" if hasattr(config, "vocab_size") else "images"
        raise UserError(f"model {recipe.model.name} takes {takes}, which the data {recipe.data.name!r} does not give")
    kinds = [find_method(method.name).kind for method in recipe.methods]
    if kinds.count("step procedure") > 1:
        raise UserError("the recipe's methods include more than one step procedure; a step can follow only one")
    if "step procedure" in kinds and recipe.trainer.accumulate > 1:
        raise UserError("trainer.accumulate must be 1 with a step procedure, which does its own updates")
