"""Augmentation: hand-placed points move where they should, and left stays left."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from medm.imaging import Augment
from medm.imaging.augment import augment

ALL = {"rotate": 20.0, "scale": 0.2, "shift": 0.1, "brightness": 0.2, "contrast": 0.2, "gamma": 0.3}


class Drawn:
    """A generator whose draws are written down."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def uniform(self, low: float, high: float) -> float:
        assert low <= self.values[0] <= high
        return self.values.pop(0)

    def random(self) -> float:
        return self.values.pop(0)


def changed(options: dict[str, Any], pixels: np.ndarray, *draws: float) -> np.ndarray:
    generator: Any = Drawn(*draws)
    # Without validation: the arithmetic is shown best on quarter turns, which a recipe may not ask
    # for.
    return augment(Augment.model_construct(**options), pixels, generator)


GRID = np.arange(24, dtype=np.float32).reshape(1, 4, 6)


@pytest.mark.parametrize(
    ("options", "draws", "expected"),
    [
        # rotate, scale, shift of each axis
        ({"rotate": 180}, [180, 0, 0, 0], GRID[:, ::-1, ::-1]),
        (
            {"shift": 0.5},
            [0, 0, 0.25, 0],
            np.concatenate([np.zeros((1, 1, 6)), GRID[:, :3]], axis=1),
        ),
        (
            {"shift": 0.5},
            [0, 0, 0, -1 / 6],
            np.concatenate([GRID[:, :, 1:], np.zeros((1, 4, 1))], axis=2),
        ),
        ({"mirror": True}, [0, 0, 0, 0, 0.1], GRID[:, :, ::-1]),
        ({"mirror": True}, [0, 0, 0, 0, 0.9], GRID),
    ],
)
def test_points_move_where_they_should(
    options: dict[str, Any], draws: list[float], expected: np.ndarray
) -> None:
    np.testing.assert_allclose(changed(options, GRID, *draws), expected, atol=1e-4)


def test_a_quarter_turn_keeps_shapes_in_a_rectangle() -> None:
    """Rotation is in pixels, not in fractions of unequal sides: the square of four stays one."""
    pixels = np.zeros((1, 8, 12), dtype=np.float32)
    pixels[0, 3:5, 5:7] = 1
    pixels[0, 1, 6] = 5
    turned = changed({"rotate": 90}, pixels, 90, 0, 0, 0)
    expected = np.zeros_like(pixels)
    expected[0, 3:5, 5:7] = 1
    expected[0, 3, 3] = 5  # above the centre and right of it, now left of the centre and above it
    np.testing.assert_allclose(turned, expected, atol=1e-4)


def test_intensities_by_hand() -> None:
    pixels = np.array([[[-1.0, 0.0, 1.0]]], dtype=np.float32)  # 0, 0.5, 1 of its range; mean 0.5
    options = {"brightness": 0.5, "contrast": 0.5, "gamma": 0.5}
    # (v - 0.5) * 0.5 + 0.5 + 0.25 = 0.5, 0.75, 1, then to the power 1.5
    expected = np.array([0.5, 0.75, 1.0]) ** 1.5 * 2 - 1
    np.testing.assert_allclose(changed(options, pixels, 0.25, -0.5, 0.5)[0, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 16, 20), (2, 6, 16, 20)])
def test_same_seed_same_change_and_any_number_of_axes(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    first, second, other = (
        augment(Augment(**ALL), pixels, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - other).mean() > 0.01
    assert first.shape == shape
    assert first.dtype == np.float32
    assert first.min() >= pixels.min() - 1e-5
    assert first.max() <= pixels.max() + 1e-5


def test_all_off_changes_nothing() -> None:
    assert augment(Augment(), GRID, np.random.default_rng(0)) is GRID


@pytest.mark.parametrize("shape", [(1, 32, 32), (1, 8, 32, 32)])
def test_left_stays_left(shape: tuple[int, ...]) -> None:
    """A bright spot far on one side never changes sides, in 200 draws of everything but
    mirroring."""
    pixels = np.zeros(shape, dtype=np.float32)
    pixels[..., 14:18, 26:29] = 1
    generator = np.random.default_rng(3)
    for _ in range(200):
        moved = augment(Augment(**ALL), pixels, generator)
        bright = moved - moved.min()
        assert bright.sum(axis=tuple(range(moved.ndim - 1))).argmax() > 16


def test_a_recipe_cannot_turn_left_to_right() -> None:
    Augment(rotate=45)
    for angle in (46, 180):
        with pytest.raises(ValidationError, match="less than or equal to 45"):
            Augment(rotate=angle)


def test_mirroring_is_off_and_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert Augment().mirror is False
        assert not caplog.text
        Augment(mirror=True)
    assert "left and right" in caplog.text


def test_a_constant_array_stays_constant() -> None:
    pixels = np.full((1, 4, 4), 3.0, dtype=np.float32)
    np.testing.assert_allclose(
        augment(Augment(**ALL), pixels, np.random.default_rng(0)), pixels, atol=1e-5
    )
