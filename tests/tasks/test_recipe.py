from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

import gatewise
from gatewise.errors import UnknownNameError, UserError
from gatewise.tasks import load_recipe, parse_recipe
from tests.tasks.conftest import tiny_content

MINIMAL = """
model: {name: focalnet_tiny_srf}
data: {name: digits}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


def test_everything_left_out_has_its_default(recipe_file):
    recipe = load_recipe(recipe_file)
    assert recipe.task.name == "classification"
    assert recipe.model.fields["embed_dim"] == 96
    assert recipe.data.fields["batch_size"] == 64
    assert recipe.optim.name == "adamw"
    assert recipe.trainer.epochs == 10
    assert recipe.output == "runs/minimal"


def test_classes_and_channels_stay_open_until_the_data_is_known(recipe_file):
    assert not {"num_classes", "in_chans"} & set(load_recipe(recipe_file).model.fields)


def test_numbers_may_be_written_as_powers_of_ten(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(MINIMAL + "optim: {lr: 5e-4}\n")
    assert load_recipe(path).optim.lr == 5e-4


def test_command_line_goes_before_overrides_and_those_before_the_file(recipe_file):
    recipe_file.write_text(MINIMAL + "optim: {lr: 1.0, weight_decay: 1.0, min_lr: 1.0}\n")
    overrides = {"optim.lr": 2.0, "optim.weight_decay": 2.0}
    recipe = load_recipe(recipe_file, overrides, ["--optim.lr", "3.0"])
    assert (recipe.optim.lr, recipe.optim.weight_decay, recipe.optim.min_lr) == (3.0, 2.0, 1.0)


@pytest.mark.parametrize("words", [["--model.name", "mobilenetv2_100"], ["--model.name=mobilenetv2_100"]])
def test_a_part_can_be_chosen_on_the_command_line(recipe_file, words):
    recipe = load_recipe(recipe_file, arguments=[*words, "--model.width_mult", "0.5"])
    assert recipe.model.name == "mobilenetv2_100"
    assert recipe.model.fields["width_mult"] == 0.5


def test_nested_fields_and_lists_are_converted(recipe_file):
    words = ["--data.augment.hflip=0.5", "--model.depths=[1,1,2,1]", "--optim.options", "{betas: [0.9, 0.95]}"]
    recipe = load_recipe(recipe_file, arguments=words)
    assert recipe.data.fields["augment"]["hflip"] == 0.5
    assert recipe.model.fields["depths"] == (1, 1, 2, 1)
    assert recipe.optim.options == {"betas": [0.9, 0.95]}


def test_the_resolved_recipe_reads_back_as_itself(tmp_path):
    recipe = parse_recipe(tiny_content({"methods": [{"name": "freeze_batch_norm"}]}, tmp_path))
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == parse_recipe(recipe.to_dict())
    assert parse_recipe(recipe.to_dict()).to_dict() == recipe.to_dict()


def test_data_follow_the_recipes_seed_unless_they_have_their_own(recipe_file):
    assert load_recipe(recipe_file, {"seed": 7}).data.fields["seed"] == 7
    assert load_recipe(recipe_file, {"seed": 7, "data.seed": 1}).data.fields["seed"] == 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("optim.lrr", 1, "unknown field of optim in the recipe 'lrr'; did you mean 'lr'"),
        ("optimizer.lr", 1, "unknown section of the recipe 'optimizer'; did you mean 'optim'"),
        ("model.drop_path", 0.1, "'drop_path'; did you mean 'drop_path_rate'"),
        ("model.name", "focalnet_tinny_srf", "did you mean 'focalnet_tiny_srf'"),
        ("data.bach_size", 1, "unknown field of data in the recipe 'bach_size'; did you mean 'batch_size'"),
        ("data.augment.hflp", 1, "did you mean 'hflip'"),
        ("data.name", "digit", "did you mean 'digits'"),
        ("task.name", "clasification", "did you mean 'classification'"),
        ("task.name", "language_model", "did you mean 'language_modeling'"),
        ("optim.name", "adamww", "did you mean 'adamw'"),
        ("optim.options", {"beta": 1}, "unknown option of adamw 'beta'; did you mean 'betas'"),
        ("methods", [{"name": "freeze_batchnorm"}], "did you mean 'freeze_batch_norm'"),
        ("methods", [{"name": "freeze_batch_norm", "afine": 1}], "methods[0]"),
    ],
)
def test_an_unknown_name_is_answered_with_the_closest(recipe_file, field, value, message):
    with pytest.raises(UnknownNameError) as caught:
        load_recipe(recipe_file, {field: value})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("trainer.epochs", "three", "trainer.epochs must be int, not 'three'"),
        ("trainer.epochs", 0, "trainer.epochs must be at least 1, not 0"),
        ("trainer.clip_grad", "x", "trainer.clip_grad must be float or null, not 'x'"),
        ("trainer.precision", "bf61", "trainer.precision must be Literal['32', 'bf16-mixed', '16-mixed'], not 'bf61'"),
        ("trainer.ema", 1.5, "trainer.ema must be from 0 to below 1"),
        ("trainer", 3, "trainer must be a section with fields, not 3"),
        ("optim.lr", -1.0, "optim.lr must be positive, not -1.0"),
        ("model.depths", "deep", "model.depths must be"),
        ("model.focal_windows", [3, 3, 3, 4], "focal windows must be odd"),
        ("data.augment.hflip", 3, "hflip must be a probability"),
        ("data", "digits", "data must be a section such as {name: ...}, not 'digits'"),
        ("task.label_smoothing", 2.0, "task.label_smoothing must be from 0 to below 1"),
        ("methods", [{"train_affine": True}], "methods[0] in the recipe has no name"),
        ("methods", {"name": "freeze_batch_norm"}, "methods must be list"),
        ("seed", -1, "seed must be at least 0, not -1"),
        ("trainer.steps", 0, "trainer.steps must be at least 1, not 0"),
        ("optim.warmup_steps", -1, "optim.warmup_steps must be at least 0, not -1"),
        (
            "task.name",
            "language_modeling",
            "language_modeling does not fit the data 'digits', which are for class",
        ),
        ("data.name", "text", "model focalnet_tiny_srf takes images, which the data 'text' does not give"),
        ("model.name", "gla_tiny", "model gla_tiny takes tokens, which the data 'digits' does not give"),
    ],
)
def test_a_wrong_value_is_named_with_what_it_should_be(recipe_file, field, value, message):
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_file, {field: value})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("section", ["model", "data"])
def test_model_and_data_must_be_named(tmp_path, section):
    content = tiny_content(None, tmp_path)
    del content[section]["name"]
    with pytest.raises(UserError, match=f"the recipe names no {section}"):
        parse_recipe(content)


def test_a_required_field_of_the_data_is_asked_for(recipe_file):
    with pytest.raises(UserError, match=r"data\.root"):
        load_recipe(recipe_file, {"data.name": "image_folder"})


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--optim.lrr", "did you mean 'lr'"),
        ("--optim", "optim is a section; set one of its fields"),
        ("optim.lr", "unrecognized arguments: optim.lr"),
    ],
)
def test_a_wrong_command_line_word_is_named(recipe_file, word, message):
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_file, arguments=[word, "3"] if word.startswith("--") else [word])
    assert message in str(caught.value)


def test_a_missing_file_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no recipe at"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize("text", ["model: [1\n", "- 1\n- 2\n", "just text"])
def test_a_file_that_is_no_recipe_is_a_users_mistake(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml"):
        load_recipe(path)


def test_a_run_starts_from_one_set_of_weights(recipe_file):
    with pytest.raises(UserError, match=r"model\.pretrained and model\.checkpoint both"):
        load_recipe(recipe_file, {"model.pretrained": True, "model.checkpoint": "w.pth"})


def test_averaged_weights_cannot_be_sharded(recipe_file):
    with pytest.raises(UserError, match=r"trainer\.ema"):
        load_recipe(recipe_file, {"trainer.ema": 0.9, "trainer.strategy": "fsdp"})


def test_help_lists_the_fields_of_what_the_recipe_names(recipe_file, capsys):
    with pytest.raises(SystemExit):
        load_recipe(recipe_file, arguments=["--help"])
    printed = capsys.readouterr().out
    for name in ("--model.focal_windows", "--data.augment.hflip", "--task.mixing.cutmix_alpha", "--trainer.ema"):
        assert name in printed


@pytest.mark.parametrize(
    ("data", "fields", "task"),
    [
        ("text", {}, "language_modeling"),
        ("mqar", {"data.train_segments": [[2, 8, 8]], "data.val_segments": [[2, 8, 8]]}, "associative_recall"),
    ],
)
def test_a_task_that_is_not_named_is_the_one_that_the_data_are_for(recipe_file, data, fields, task):
    recipe = load_recipe(recipe_file, {"data.name": data, "model.name": "gla_tiny", **fields})
    assert recipe.task.name == task
    assert "vocab_size" not in recipe.model.fields


def test_a_warm_up_is_stated_once(recipe_file):
    with pytest.raises(UserError, match=r"optim\.warmup_epochs and optim\.warmup_steps both set"):
        load_recipe(recipe_file, {"optim.warmup_epochs": 1, "optim.warmup_steps": 5})


def nested(gate) -> dict:
    model = {"name": "gated_attention_tiny_elementwise", "gate": gate}
    return {"task": {"name": "language_modeling"}, "model": model, "data": {"name": "text"}}


def test_a_part_of_a_configuration_is_a_mapping_of_its_own_fields():
    recipe = parse_recipe(nested({"granularity": "headwise"}))
    assert parse_recipe(recipe.to_dict()) == recipe
    with torch.device("meta"):
        model = gatewise.create_model(recipe.model.name, **recipe.model.fields, vocab_size=8)
    assert model.config.gate.granularity == "headwise"
    assert parse_recipe(nested(None)).model.fields["gate"] is None


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ({"granularity": "rowwise"}, "must be one of elementwise, headwise, not 'rowwise'"),
        ({"granulariti": "headwise"}, "unknown field of Gate 'granulariti'; did you mean 'granularity'"),
        (3, "model.gate must be .* or null, not '3'"),
    ],
)
def test_a_wrong_part_of_a_configuration_is_told(gate, message):
    with pytest.raises(UserError, match=message):
        parse_recipe(nested(gate))
