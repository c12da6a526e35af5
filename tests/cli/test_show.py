"""`gatewise show`: card and stages, for networks of any size."""

from __future__ import annotations

from gatewise.cli import main


def test_the_card_and_the_cost_of_each_stage_are_shown(capsys):
    assert main(["show", "focalnet_huge_fl4"]) == 0
    text = capsys.readouterr().out
    for expected in ("Focal Modulation Networks", "stages.3", "689,277,664", "118,762,609,152", "7 x 7 x 2816"):
        assert expected in text


def test_size_and_classes_can_be_chosen(capsys):
    assert main(["show", "mobilenetv2_100", "--image-size", "128", "128", "--num-classes", "10"]) == 0
    text = capsys.readouterr().out
    # The published MACs at 128, less 990 classes.
    assert f"{99_074_048 - 990 * 1280:,}" in text
    assert "cost of one sample of 3 x 128 x 128" in text


def test_mistakes_are_one_line(capsys):
    assert main(["show", "mobilenetv2_10"]) == 2
    assert "'mobilenetv2_100'?" in capsys.readouterr().err
    assert main(["show", "focalnet_tiny_srf", "--image-size", "16", "64"]) == 2
    assert "at least 32, not 16 x 64" in capsys.readouterr().err
    assert main(["show", "focalnet_tiny_srf", "--image-size", "0", "64"]) == 2
    assert "two positive numbers, not 0 64" in capsys.readouterr().err
