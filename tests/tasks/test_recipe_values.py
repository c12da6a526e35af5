"""Whatever stands in a field of a recipe, it is accepted and reads back as itself, or refused in one line."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import yaml

from gatewise.errors import UserError
from gatewise.tasks import load_recipe, parse_recipe
from gatewise.tasks.recipe import deep_set
from tests.tasks.conftest import recall_content, text_content, tiny_content

MINIMAL = "{model: {name: focalnet_tiny_srf}, data: {name: digits}}"
OTHERS = [[], {"a": 1}, {1: 2}, "a text", float("nan"), -1, float("inf"), True, 10**400]


def fields(content: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of all sections and fields."""
    for key, value in content.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from fields(value, f"{prefix}{key}.")


def refusal(content: dict[str, Any]) -> str | None:
    """The message of the error, or None if the recipe is accepted and reads back as itself."""
    try:
        recipe = parse_recipe(content)
    except UserError as error:
        return str(error)
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())).to_dict() == recipe.to_dict()
    return None


@pytest.mark.parametrize(
    ("make", "sections"),
    [
        (tiny_content, ("task", "model", "data", "methods", "optim", "trainer", "seed", "output")),
        (text_content, ("task", "data")),
        (recall_content, ("data",)),
    ],
)
def test_no_value_of_any_field_is_an_error_of_a_parser(tmp_path, make, sections):
    whole = parse_recipe(make({"methods": [{"name": "freeze_batch_norm"}]}, tmp_path / "run")).to_dict()
    others = cycle(OTHERS)
    for name in fields({section: whole[section] for section in sections}):
        for value in (None, next(others)):
            content = yaml.safe_load(yaml.safe_dump(whole))
            deep_set(content, name, value)
            message = refusal(content) or ""
            assert "\n" not in message
            assert len(message) < 1000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer: {epochs: null}", "trainer.epochs must be int, not null"),
        ("trainer: {precision: null}", "trainer.precision must be Literal"),
        ("data: {name: digits, batch_size: null}", "data.batch_size must be int, not null"),
        ("data: {name: digits, augment: {hflip: null}}", "data.augment.hflip must be float, not null"),
        ("model: {name: focalnet_tiny_srf, depths: null}", "model.depths must be tuple"),
        ("task: {label_smoothing: null}", "task.label_smoothing must be float, not null"),
        ("methods: null", "methods must be list"),
        ("output: null", "output must be str, not null"),
        ("output: ''", "output must be the name of a folder"),
        ("trainer: null", "trainer must be a section with fields, not null"),
        ("trainer: [1]", "trainer must be a section with fields, not [1]"),
        ("optim: {options: {1: 2}}", "optim.options must have option names as keys, not 1"),
        ("1: 2", "unknown section of the recipe '1'"),
        ("optim: {lr: .nan}", "optim.lr must be finite, not nan"),
        ("optim: {lr: 1e400}", "optim.lr must be finite, not inf"),
        ("optim: {options: {eps: .inf}}", "optim.options must be finite, not inf"),
        ("seed: 1" + "0" * 30, "seed must be at most 9223372036854775807"),
        ("seed: 1" + "0" * 5000, "is not valid YAML"),
        ("seed: true", "seed must be int"),
        ("seed: [" + "[" * 100_000, "nested more than 50 levels"),
        ("model: {name: focalnet_tiny_srf, depths: '" + "[" * 100_000 + "'}", "model.depths must be"),
        ("seed: !!python/object/apply:os.getpid []", "is not valid YAML"),
    ],
)
def test_a_value_that_no_field_takes_is_named(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    content = yaml.safe_load(MINIMAL)
    rest = [f"{key}: {{name: {content[key]['name']}}}" for key in content if not text.startswith(f"{key}:")]
    path.write_text("\n".join([*rest, text]))
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainer.epochs", "null"], "trainer.epochs must be int"),
        (["--optim.lr", ".nan"], "optim.lr must be finite, not nan"),
        (["--optim.lr", "1" + "0" * 400], "optim.lr|too large"),
        (["--model.depths", "[" * 100_000], "model.depths must be"),
        (["--optim.options", "{1: 2}"], "optim.options must have option names"),
    ],
)
def test_a_value_on_the_command_line_is_read_as_carefully(tmp_path, words, message):
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(path, arguments=words)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_nested_aliases_are_refused_before_they_are_values(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"bomb\.yaml.*stands for more than 200,000 values"):
        load_recipe(path)


@pytest.mark.parametrize("name", ["a\0b.yaml", "x" * 5000 + ".yaml", "."])
def test_a_name_that_no_file_can_have_is_a_mistake_in_one_line(name):
    with pytest.raises(UserError):
        load_recipe(Path(name))
