"""Sound, video and time series as images."""

from __future__ import annotations

import pytest
import torch

from gatewise.networks.image.unireplknet import (
    frames_to_image_by_memory,
    frames_to_mosaic,
    series_to_image,
    spectrogram_to_image,
)
from tests.conftest import small_model


def test_time_runs_from_left_to_right():
    x = torch.randn(2, 7, 5)
    image = spectrogram_to_image(x)
    assert image.shape == (2, 1, 5, 7)
    assert torch.equal(image[1, 0, 3], x[1, :, 3])


def test_a_mosaic_keeps_frames_whole():
    video = torch.randn(2, 3, 6, 4, 5)
    image = frames_to_mosaic(video, columns=3)
    assert image.shape == (2, 3, 8, 15)
    assert torch.equal(image[:, :, 4:8, 5:10], video[:, :, 4])


def test_the_published_layout_follows_memory():
    video = torch.randn(2, 3, 16, 4, 5)
    image = frames_to_image_by_memory(video, columns=4)
    assert image.shape == frames_to_mosaic(video, columns=4).shape == (2, 3, 16, 20)
    assert torch.equal(image[:, :, 0], video[:, :, 0].flatten(2))
    assert torch.equal(image.flatten(2), video.flatten(2))


def test_a_series_fills_a_square():
    series = torch.randn(2, 48, 768)
    image = series_to_image(series, side=192)
    assert image.shape == (2, 1, 192, 192)
    assert torch.equal(image[0, 0].flatten()[768:1536], series[0, 1])


def test_the_network_reads_them():
    model = small_model("unireplknet_a", in_chans=1)
    assert model(spectrogram_to_image(torch.randn(2, 64, 40))).shape == (2, 5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="6 frames must fill rows of 4"):
        frames_to_mosaic(torch.zeros(1, 3, 6, 2, 2), columns=4)
    with pytest.raises(ValueError, match="6 frames must fill rows of 4"):
        frames_to_image_by_memory(torch.zeros(1, 3, 6, 2, 2), columns=4)
    with pytest.raises(ValueError, match="they are 96 values, not 100"):
        series_to_image(torch.zeros(1, 12, 8), side=10)
