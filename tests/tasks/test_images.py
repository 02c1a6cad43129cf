"""Images are rows of pixels with the class behind them, at any resolution."""

import dataclasses

import numpy as np
import pytest
import torch

from goatviz.tasks import Images


def arrays(count=6, side=8, channels=None):
    """Images whose pixels count up, and classes 0, 1, 2, 0, ..."""
    shape = (count, side, side) if channels is None else (count, side, side, channels)
    pixels = (np.arange(np.prod(shape)) % 251).astype(np.uint8).reshape(shape)
    return {"x_train": pixels, "y_train": np.arange(count) % 3}


@pytest.fixture
def images(tmp_path):
    """A task on arrays of train and other ones of test."""

    def make(side=8, channels=None, **options):
        given = arrays(side=side, channels=channels)
        test = {"x_test9": 255 - given["x_train"][:2], "y_test9": given["y_train"][:2]}
        path = tmp_path / "images.npz"
        np.savez(path, **given, **test)
        return Images(str(path), **{"side": side, "channels": channels or 1, **options})

    return make


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("channels", [None, 1, 3])
def test_a_sequence_is_the_pixels_of_an_image_and_its_class(images, channels):
    task = images(channels=channels)
    ids = task.sample(50, generator=seeded())
    given = arrays(channels=channels)
    rows = torch.from_numpy(given["x_train"].astype(int)).flatten(1)
    known = torch.cat([rows, torch.from_numpy(given["y_train"])[:, None]], dim=1)
    found = (ids[:, None] == known).all(-1)
    assert bool((found.sum(1) == 1).all()) and bool(found.any(0).all())
    assert torch.equal(ids, task.sample(50, generator=seeded()))


def test_held_out_images_are_those_of_test(images):
    task = images()
    ids = task.held_out().sample(20, generator=seeded())
    assert set(ids[:, 0].tolist()) <= {255, 255 - 64}
    assert task.held_out().held_out() == task.held_out()


@pytest.mark.parametrize("channels", [None, 3])
def test_another_length_is_the_same_image_resized(images, channels):
    task = images(channels=channels)
    small = task.sample(4, generator=seeded())
    large = task.at_length(1 + 4 * 4).sample(4, generator=seeded())
    assert large.shape == (4, 16 * 16 * (channels or 1) + 1)
    assert torch.equal(large[:, -1], small[:, -1])
    pixels = small[:, :-1].reshape(4, 8, 8, -1).permute(0, 3, 1, 2).float()
    wanted = torch.nn.functional.interpolate(pixels, size=16, mode="bilinear").round()
    found = large[:, :-1].reshape(4, 16, 16, -1).permute(0, 3, 1, 2).float()
    assert float((found - wanted).abs().max()) <= 1


def test_the_class_is_what_is_predicted(images):
    task = images()
    assert task.length == 1 + 2 * 2 and task.predicted == task.answer_length == 1
    assert task.chance == task.strict_chance == 0.1
    assert task.vocab_size == 256 and Images(classes=1000).vocab_size == 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"side": 30}, "side must be a multiple of patch=4, got 30"),
        ({"side": 0}, "side must be an integer of at least 1, got 0"),
        ({"part": "valid"}, "part must be one of train, test; got 'valid'"),
        ({"classes": 1}, "classes must be an integer of at least 2, got 1"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Images(**options)
    with pytest.raises(TypeError, match="source must be text"):
        Images(source=3)
    for length in (1, 49, 51):
        with pytest.raises(ValueError, match=f"length must be 1 \\+ n x n tokens, .* got {length}"):
            Images().at_length(length)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": None}, "must hold one array x_train and one y_train, got y_train"),
        ({"x_train": np.zeros((6, 8, 8))}, "images as uint8 .* got float64 of shape"),
        ({"x_train": np.zeros((6, 64), np.uint8)}, "got uint8 of shape \\(6, 64\\)"),
        ({"x_train": np.zeros((6, 8, 4), np.uint8)}, "got uint8 of shape \\(6, 8, 4\\)"),
        ({"y_train": np.arange(5)}, "a class from 0 for each of 6 images, got int64"),
        ({"y_train": np.arange(6) - 1}, "a class from 0"),
        ({"y_train": np.arange(6) + 9}, "classes must exceed the largest .*, 14, got 10"),
        ({"x_train": np.zeros((6, 8, 8, 3), np.uint8)}, "channels must be the 3 of"),
    ],
)
def test_sources_that_hold_something_else(tmp_path, changes, message):
    held = {name: value for name, value in (arrays() | changes).items() if value is not None}
    np.savez(tmp_path / "a.npz", **held)
    with pytest.raises(ValueError, match=message):
        Images(str(tmp_path / "a.npz"), side=8).sample(1, generator=seeded())


def test_sources_that_cannot_be_read(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"no archive")
    for source, message in [
        ("", "images needs source"),
        (str(tmp_path / "b.npz"), "source must be an existing file"),
        (str(tmp_path / "a.npz"), "is not a readable .npz file"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(Images(), source=source).sample(1, generator=seeded())
