"""`gatewise waterline`: tables, files and times, of our networks and of others."""

from __future__ import annotations

import csv
from importlib import import_module

import pytest

from gatewise.cli import main

BY_HAND = ["--device-peak", "989.5", "--bandwidth", "4800", "--device-name", "H200 SXM"]


def test_a_network_is_held_against_another_device(capsys, tmp_path):
    plot, page, table = (tmp_path / name for name in ("waterline.png", "waterline.html", "kernels.csv"))
    files = ["--plot", str(plot), "--html", str(page), "--csv", str(table)]
    network = ["mobilenetv2_035", "--input", "4,3,64,64", "--dtype", "bf16", "--rows", "5"]
    assert main(["waterline", *network, *BY_HAND, *files]) == 0
    out = capsys.readouterr().out
    assert "mobilenetv2_035, input (4, 3, 64, 64), bfloat16 on H200 SXM: ridge 206.1 op:byte" in out
    assert "e_max" in out
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    with open(table, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["level"] for row in rows} == {"operators", "epilogues", "blocks"}


def test_networks_of_other_packages_and_levels_can_be_asked_for(capsys):
    network = ["torchvision.models:resnet18", "--input", "1,3,32,32", "--level", "blocks"]
    assert main(["waterline", *network, *BY_HAND, "--no-fold", "--blocks", "layer1", "layer2.0"]) == 0
    out = capsys.readouterr().out
    assert "layer1 " in out
    assert "layer2.0 " in out
    assert "layer1.0 " not in out


@pytest.mark.filterwarnings("ignore:the machine was busy")
def test_operators_are_timed_against_the_limits_of_this_machine(capsys, monkeypatch, tmp_path):
    module = import_module("gatewise.efficiency.bounds.device")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in {"SECONDS": 0.02, "SMALLEST_COPY": 2**22, "LARGEST_COPY": 2**22}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "LARGEST", {"cpu": 256})
    network = ["mobilenetv2_035", "--image-size", "32", "32", "--num-classes", "2", "--rows", "3"]
    assert main(["waterline", *network, "--measure", "--seconds", "0.01"]) == 0
    assert "rank correlation of measured efficiency" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mobilenetv2_035", "--device-peak", "4"], "--device-peak and --bandwidth must be given together"),
        (["mobilenetv2_035", *BY_HAND, "--measure"], "leave out --device-peak and --bandwidth"),
        (["mobilenetv2_035", *BY_HAND, "--input", "1,3,x"], "--input takes positive sizes"),
        (["mobilenetv2_035", *BY_HAND, "--input", "1,4,64,64"], "cannot run|channels"),
        (["mobilenetv2_035", *BY_HAND, "--dtype", "int4"], "dtype must be one of"),
        (["mobilenetv2_035", *BY_HAND, "--blocks", "nowhere"], "no module at 'nowhere' ran"),
        (["mobilenetv2_035", *BY_HAND, "--rows", "0"], "--rows must be 1 or more, not 0"),
        (["torchvision.models:resnet18", *BY_HAND], "has no input size of its own: give --input"),
        (["torchvision.models:nothing", *BY_HAND, "--input", "1,3"], "there is no 'nothing' to import"),
        (["builtins:dict", *BY_HAND, "--input", "1,3"], "must make a torch.nn.Module, not dict"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    assert main(["waterline", *arguments]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert any(part in error for part in message.split("|"))
