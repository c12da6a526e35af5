"""Our networks give the reference implementations' outputs, and `verify` would notice if they did not."""

from __future__ import annotations

import json
import os

import pytest

from gatewise.cli import main
from gatewise.errors import UserError
from gatewise.fidelity.verify import build_case, verify
from tests.conftest import FINGERPRINTS

FILES = sorted(path for path in FINGERPRINTS.rglob("*.json"))
DETECTION_AND_SEGMENTATION = {
    "mobile_deeplabv3_os16_129",
    "ssdlite_extra_block",
    "ssdlite_head_small",
    "ssdlite_mobilenetv2_320",
}

READ_BY_OTHER_TESTS = {"mobilenetv2-weights"}
"""What came out after weights were quantized: a method's digest, not a network's."""


@pytest.mark.filterwarnings("ignore:width_mult 0.25 is below")
@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_reference_outputs_gradients_and_parameters(path):
    result = verify(path).results[0]
    record = json.loads(path.read_text())
    is_run_in_eval_mode = record.get("mode") == "eval" and "keys" in record
    not_verified = DETECTION_AND_SEGMENTATION | READ_BY_OTHER_TESTS
    expected = "passed" if is_run_in_eval_mode and path.stem not in not_verified else "skipped"
    assert result.status == expected, str(result)


@pytest.fixture
def record():
    return json.loads((FINGERPRINTS / "inceptionnext" / "op_inception_dwconv.json").read_text())


def written(tmp_path, record):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record))
    return path


def test_a_changed_output_fails(tmp_path, record):
    record["outputs"]["output"]["sample"][5] += 0.01
    result = verify(written(tmp_path, record)).results[0]
    assert result.status == "failed"
    assert result.errors["output"] > 1e-3
    assert result.errors["grad x"] < 1e-5


def test_a_changed_moment_fails(tmp_path, record):
    record["outputs"]["output"]["mean"] += 0.01
    assert verify(written(tmp_path, record)).results[0].status == "failed"


def test_a_changed_gradient_fails(tmp_path, record):
    record["grads"]["x"]["sample"][0] += 1.0
    assert verify(written(tmp_path, record)).results[0].status == "failed"


def test_another_number_of_parameters_fails(tmp_path, record):
    record["params"] += 1
    result = verify(written(tmp_path, record)).results[0]
    assert result.status == "failed"
    assert "parameters 136, not 137" in str(result)


def test_a_changed_tap_fails(tmp_path):
    record = json.loads((FINGERPRINTS / "mobilenetv2" / "tv_1_0.json").read_text())
    record["taps"]["features.7"]["sample"][0] += 1.0
    result = verify(written(tmp_path, record)).results[0]
    assert result.status == "failed"
    assert [name for name, error in result.errors.items() if error > 1e-3] == ["tap features.7"]


def test_a_missing_key_fails_and_says_which(tmp_path, record):
    del record["keys"]["dwconv_w.bias"]
    result = verify(written(tmp_path, record)).results[0]
    assert result.status == "failed"
    assert "convs.row.bias" in result.reason


def test_an_unknown_system_or_config_is_skipped(tmp_path, record):
    assert build_case(record | {"system": "resnet"}) is None
    assert build_case(record | {"config": {"depth": 3}}) is None
    report = verify(written(tmp_path, record | {"system": "resnet"}))
    assert report.count("skipped") == 1
    assert not report.ok


def test_worked_examples_are_skipped(tmp_path):
    report = verify(written(tmp_path, {"system": "focalnet", "cases": []}))
    assert report.results[0].status == "skipped"
    assert "worked examples" in report.results[0].reason


def test_a_registered_variant_without_a_full_config_is_built_by_name(tmp_path):
    record = json.loads((FINGERPRINTS / "focalnet" / "focalnet_tiny_srf.json").read_text())
    case = build_case(record | {"config": {}, "variant": "focalnet_tiny_srf"})
    assert case.module.config.depths == (2, 2, 6, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not valid JSON"), ("[1]", "not a digest record"), ('{"a": 1}', "not a digest record")],
)
def test_a_file_that_is_no_record_is_a_users_mistake(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        verify(path)


def test_the_command_counts_and_tells_by_its_exit_status(tmp_path, record, capsys):
    good = written(tmp_path, record)
    skipped = tmp_path / "skipped.json"
    skipped.write_text(json.dumps(record | {"system": "resnet"}))
    assert main(["verify", str(good), str(skipped)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 passed, 0 failed, 1 skipped"
    assert main(["verify", str(skipped)]) == 1
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(record | {"params": 1}))
    assert main(["verify", str(good), str(bad)]) == 1
    assert main(["verify", str(tmp_path / "missing.json")]) == 2


BROKEN = {
    "keys": ([], "its keys must be an object"),
    "keys.dwconv_hw.weight": ([2, "x"], "its keys.dwconv_hw.weight must be a list of sizes"),
    "keys.dwconv_hw.bias": ([10**10], "its keys would take 40,000,000"),
    "config": ([1], "its config must be an object, not 1 values"),
    "params": ("many", "its params must be an integer, not 'many'"),
    "mode": (3, "its mode must be a text"),
    "variant": ([], "its variant must be a text"),
    "inputs.x": (None, "its inputs.x must be an object with name, shape and kind, not None"),
    "inputs.x.shape": ([10**6, 10**6], "its inputs would take 8,000,000,000,000 bytes"),
    "inputs.x.kind": ("magic", "its inputs.x.kind must be 'normal' or 'uniform' or 'int', not 'magic'"),
    "inputs.x.name": (7, "its inputs.x.name must be a text"),
    "inputs.x.high": (-1, "its inputs.x.high must be a positive integer"),
    "outputs.output": (3.0, "its outputs.output must be an object with shape, mean, std and sample"),
    "outputs.output.mean": ("x", "its outputs.output.mean must be a number"),
    "outputs.output.shape": ([1, -2], "its outputs.output.shape must be a list of sizes"),
    "outputs.output.sample": ([0.0], "its outputs.output.sample must be 64 numbers, not 1 values"),
    "taps": (3, "its taps must be an object, not 3"),
    "grads.x.std": (None, "its grads.x.std must be a number"),
}


@pytest.mark.parametrize("field", BROKEN)
def test_a_field_that_is_not_what_it_should_be_is_named(tmp_path, record, field):
    value, message = BROKEN[field]
    place, *rest = field.split(".", 2) if field.startswith(("inputs", "outputs", "grads")) else field.split(".", 1)
    inner = record
    for name in [place, *rest][:-1]:
        inner = inner[name]
    inner[[place, *rest][-1]] = value
    with pytest.raises(UserError, match=message) as told:
        verify(written(tmp_path, record))
    assert "record.json" in str(told.value)
    assert "\n" not in str(told.value)


def test_a_config_of_any_size_is_not_built(tmp_path):
    record = json.loads((FINGERPRINTS / "focalnet" / "focalnet_tiny_srf.json").read_text())
    record["config"]["embed_dim"] = 10**6
    with pytest.raises(UserError, match="its config describes a network of .* bytes"):
        verify(written(tmp_path, record))


def test_a_pipe_and_deep_nesting_are_told(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UserError, match="not a regular file"):
        verify(tmp_path / "pipe.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested more than"):
        verify(tmp_path / "deep.json")


@pytest.mark.parametrize("name", ["tolerance", "gradient_tolerance"])
def test_a_tolerance_is_a_finite_number(tmp_path, record, name):
    with pytest.raises(UserError, match=f"{name} must be a finite number of at least 0, not nan"):
        verify(written(tmp_path, record), **{name: float("nan")})
