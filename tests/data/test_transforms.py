"""What is done to an image before a network sees it."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from timm.data.transforms_factory import create_transform

from gatewise.data.images.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augmentation,
    BatchMixing,
    Evaluation,
    create_mixup,
    eval_transform,
    train_transform,
)
from gatewise.data.randomness import seed_global_streams
from gatewise.errors import UserError

# The ImageNet-1K recipe of FocalNet and InceptionNeXt.
IMAGENET_RECIPE = Augmentation(
    auto_augment="rand-m9-mstd0.5-inc1",
    color_jitter=0.4,
    random_erasing=0.25,
    random_erasing_mode="pixel",
    interpolation="random",
)


def photo(width: int = 60, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.RandomState(0).randint(0, 255, (height, width, 3), dtype=np.uint8))


def augmented(augmentation: Augmentation, seed: int, image: Image.Image | None = None, size=(32, 32)) -> torch.Tensor:
    seed_global_streams("augment", seed)
    return train_transform(augmentation, size, IMAGENET_MEAN, IMAGENET_STD)(image or photo())


@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "augmentation",
    [
        IMAGENET_RECIPE,
        Augmentation(crop="pad"),
        Augmentation(crop="pad", auto_augment="rand-m5-inc1-mstd101", vflip=0.5),
        Augmentation(auto_augment="augmix-m5-w4-d2"),
        Augmentation(auto_augment="original", random_erasing=1.0, random_erasing_mode="const"),
        Augmentation(color_jitter=(0.4, 0.4, 0.4, 0.1), interpolation="bilinear"),
    ],
)
def test_every_augmentation_gives_a_normalized_image_of_the_size(augmentation, channels, size):
    transform = train_transform(augmentation, size, IMAGENET_MEAN[:channels], IMAGENET_STD[:channels])
    for image in (photo(), photo(7, 90), Image.new("L", (32, 32)), Image.new("RGBA", (5, 5))):
        seed_global_streams("augment", 0)
        result = transform(image)
        assert result.shape == (channels, *size)
        assert result.dtype == torch.float32
        assert result.isfinite().all()


def test_augmentation_depends_on_the_seed_alone():
    torch.testing.assert_close(augmented(IMAGENET_RECIPE, 5), augmented(IMAGENET_RECIPE, 5), rtol=0, atol=0)
    assert not torch.equal(augmented(IMAGENET_RECIPE, 5), augmented(IMAGENET_RECIPE, 6))


def test_evaluation_is_what_timm_does():
    for settings in ({"crop_pct": 0.9}, {"crop_pct": 1.0, "crop_mode": "squash"}, {"crop_mode": "border"}):
        for size in ((32, 32), (24, 48)):
            ours = eval_transform(Evaluation(**settings), size, IMAGENET_MEAN, IMAGENET_STD)
            timms = create_transform((3, *size), interpolation="bicubic", **{"crop_pct": 0.875, **settings})
            torch.testing.assert_close(ours(photo()), timms(photo()), rtol=0, atol=0)


def test_evaluation_of_a_gray_network_takes_the_brightness():
    transform = eval_transform(Evaluation(crop_pct=1.0), (8, 8), (0.5,), (0.5,))
    assert transform(Image.new("RGB", (8, 8), "white")).unique().tolist() == [1.0]


def test_padding_moves_the_image_by_up_to_the_padding():
    image = Image.new("RGB", (8, 8), "white")
    transform = train_transform(Augmentation(crop="pad", crop_padding=2, hflip=0.0), (8, 8), (0.0,) * 3, (1.0,) * 3)
    margins = set()
    for seed in range(40):
        seed_global_streams("augment", seed)
        margins.add(int((transform(image)[0] == 0).all(dim=1).sum()))
    assert margins == {0, 1, 2}


def test_flips_happen_with_their_probability():
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    still = Augmentation(crop="pad", crop_padding=0, hflip=0.0)
    flipped = Augmentation(crop="pad", crop_padding=0, hflip=1.0, vflip=1.0)
    torch.testing.assert_close(
        augmented(flipped, 0, image, (8, 8)), augmented(still, 0, image, (8, 8)).flip(1, 2), rtol=0, atol=0
    )


def test_erasing_leaves_noise_of_the_asked_kind():
    plain = augmented(Augmentation(crop="pad", crop_padding=0, hflip=0.0), 0)
    erased = augmented(Augmentation(crop="pad", crop_padding=0, hflip=0.0, random_erasing=1.0), 0)
    changed = (plain != erased).any(dim=0)
    # timm erases between 2 % and a third of the image.
    assert 0.01 < changed.float().mean() < 0.4


def test_transforms_can_be_sent_to_a_spawned_worker():
    transform = pickle.loads(pickle.dumps(train_transform(IMAGENET_RECIPE, (32, 32), IMAGENET_MEAN, IMAGENET_STD)))
    assert transform(photo()).shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hflip": 1.5}, "hflip must be a probability between 0 and 1, not 1.5"),
        ({"random_erasing": -0.1}, "random_erasing must be a probability"),
        ({"scale": (0.5, 0.2)}, r"scale must be \(smallest, largest\)"),
        ({"scale": (0.0, 1.0)}, "scale must be"),
        ({"ratio": (-1.0, 2.0)}, "ratio must be"),
        ({"crop_padding": -1}, "crop_padding must be 0 or more"),
        ({"color_jitter": (0.1, 0.2)}, "color_jitter must be one number, three or four"),
        ({"auto_augment": "randm9"}, "'randm9' is not a timm policy"),
        ({"auto_augment": "rand-q9"}, "'rand-q9' is not a timm policy"),
        ({"auto_augment": "rand-m9x"}, "'rand-m9x' is not a timm policy"),
    ],
)
def test_a_wrong_augmentation_is_refused_at_once(fields, message):
    with pytest.raises(UserError, match=message):
        Augmentation(**fields)


def test_a_wrong_crop_fraction_is_refused():
    with pytest.raises(UserError, match="crop_pct must be above 0 and at most 1, not 1.2"):
        Evaluation(crop_pct=1.2)


def test_mixup_is_nothing_when_off():
    assert create_mixup(BatchMixing(), num_classes=10, batch_size=7) is None


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_mixup_gives_soft_labels_that_sum_to_one(mode):
    mixup = create_mixup(BatchMixing(mixup_alpha=0.8, cutmix_alpha=1.0, mode=mode), 5, 4, label_smoothing=0.1)
    images, labels = mixup(torch.rand(4, 3, 8, 8), torch.arange(4))
    assert images.shape == (4, 3, 8, 8)
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(4))
    # A tenth is spread over the five classes.
    assert labels.min() >= 0.1 / 5 - 1e-6


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"mixup_alpha": -1.0}, "mixup_alpha must be 0"), ({"prob": 2.0}, "prob must be a probability")],
)
def test_wrong_mixing_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        BatchMixing(**fields)


def test_mixup_of_an_odd_batch_is_refused():
    with pytest.raises(UserError, match="batch_size must be even, not 7"):
        create_mixup(BatchMixing(mixup_alpha=0.2), num_classes=10, batch_size=7)


def test_a_recipe_can_set_one_field_and_keep_the_others():
    parser = ArgumentParser()
    parser.add_argument("--augment", type=Augmentation, default=Augmentation(crop="pad", crop_padding=2))
    values = parser.instantiate(parser.parse_object({"augment": {"random_erasing": 0.25}}))
    assert values.augment == Augmentation(crop="pad", crop_padding=2, random_erasing=0.25)


@pytest.mark.parametrize("policy", ["rand-m10-n4-inc1", "original", "augmix-m5-w4-d2"])
def test_policies_run_at_every_magnitude_of_posterizing(policy):
    transform = train_transform(Augmentation(auto_augment=policy), (16, 16), (0.5,) * 3, (0.5,) * 3)
    image = Image.new("RGB", (16, 16), "red")
    for seed in range(60):
        random.seed(seed)
        np.random.seed(seed)
        assert transform(image).shape == (3, 16, 16)


def test_posterizing_to_no_bit_is_black():
    transform = train_transform(Augmentation(auto_augment="rand-m10-inc1"), (8, 8), (0.5,) * 3, (0.5,) * 3)
    policy = next(part for part in transform.transforms if hasattr(part, "ops"))
    posterize = next(operation for operation in policy.ops if operation.name == "PosterizeIncreasing")
    assert posterize.aug_fn(Image.new("RGB", (2, 2), "white"), 0).getextrema() == ((0, 0),) * 3


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000)])
def test_a_line_of_pixels_is_not_blown_up(size, monkeypatch):
    largest = 10_000_000
    original = Image.Image.resize

    def resize(self, size, *args, **options):
        assert size[0] * size[1] < largest, f"resized to {size}"
        return original(self, size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", resize)
    line = Image.new("RGB", size, (255, 0, 0))
    assert eval_transform(Evaluation(), (224, 224), IMAGENET_MEAN, IMAGENET_STD)(line).shape == (3, 224, 224)


def test_the_middle_of_a_line_is_what_is_evaluated():
    line = Image.new("RGB", (60_000, 1))
    line.paste((255, 255, 255), (29_900, 0, 30_100, 1))
    fitted = eval_transform(Evaluation(), (32, 32), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))(line)
    assert fitted.min() > 0.99
