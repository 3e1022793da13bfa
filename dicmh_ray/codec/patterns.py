"""Drawn patterns: the fine regular textures and letters that few training photographs have.

Cloth of fine lines, fences, halftones, facades, pages of text: a codec that has never seen them takes
them for noise and drops them. They are drawn at random and laid over parts of photographs, under the
photograph's own light.
"""

import string
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

MIN_PERIOD, MAX_PERIOD = 2.2, 16.0
"""Of gratings, in pixels, drawn evenly by their logarithm."""

OVERSAMPLING = 2
"""Samples a pixel and axis that a pattern is drawn with: pixels see its mean, as a camera's do."""

MAX_FOLD = 6.0
"""Pixels that folds of a cloth displace its pattern by."""

FONT_SIZES = (7, 26)
"""Least and greatest size of letters, in pixels."""

Plane = npt.NDArray[np.float32]
"""One value a place, ``[S, S]``."""


def lay_pattern(crop: npt.NDArray[np.uint8], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """A crop, uint8 ``[S, S, 3]``, with a pattern of two colours on a part of it or on all of it."""
    size = len(crop)
    pattern = _PATTERNS[int(rng.integers(len(_PATTERNS)))](size, rng)
    colours = _two_colours(rng)
    drawn = colours[0] + (colours[1] - colours[0]) * pattern[..., None]
    light = crop.astype(np.float32)
    if rng.random() < 0.7:
        blurred = _blurred(light.mean(2), size // 16)
        drawn = drawn * (blurred / max(float(blurred.mean()), 1.0))[..., None]
    cover = _cover(size, rng)[..., None]
    mixed = light + cover * (drawn - light)
    clipped: npt.NDArray[np.uint8] = np.clip(mixed + 0.5, 0, 255).astype(np.uint8)
    return clipped


def _two_colours(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Mostly light and dark of about one hue, as of cloth, walls and pages; ``[2, 3]``."""
    if rng.random() < 0.2:
        return rng.uniform(0, 255, (2, 3))
    return rng.uniform(0, 255, (2, 1)) + rng.normal(0, 25, 3) + rng.normal(0, 10, (2, 3))


def _gratings(size: int, rng: np.random.Generator) -> Plane:
    """Lines, or two families of them crossed: stripes, checks, weaves, dots."""
    first = _wave(size, rng)
    if rng.random() < 0.5:
        return _pixels(first.samples)
    second = _wave(size, rng, across=first)
    join: Callable[[Plane, Plane], Plane] = (np.multiply, np.maximum, _exclusive)[rng.integers(3)]
    return _pixels(join(first.samples, second.samples))


class _Wave(NamedTuple):
    """A grating: its samples, oversampled and 0..1, and what a second one must know to cross it."""

    samples: Plane

    angle: float
    """Of its normal, radians."""

    period: float
    """Pixels."""

    fold: Plane
    """Pixels that each sample is displaced by."""


def _wave(size: int, rng: np.random.Generator, across: _Wave | None = None) -> _Wave:
    span = size * OVERSAMPLING
    if across is None:
        period = float(np.exp(rng.uniform(np.log(MIN_PERIOD), np.log(MAX_PERIOD))))
        angle = float(rng.uniform(0, np.pi)) if rng.random() < 0.6 else np.pi / 2 * rng.integers(2)
        folds = rng.normal(size=(4, 4)) * rng.uniform(0, MAX_FOLD) * (rng.random() < 0.6)
        fold = _enlarged(folds.astype(np.float32), span)
    else:
        period = across.period * (1.0 if rng.random() < 0.7 else float(rng.uniform(1, 3)))
        angle, fold = across.angle + np.pi / 2, across.fold
    y, x = np.mgrid[:span, :span].astype(np.float32) / OVERSAMPLING
    phase = (x * np.cos(angle) + y * np.sin(angle) + fold) / period + rng.random()
    wave = 0.5 + 0.5 * np.sin(2 * np.pi * phase)
    if rng.random() < 0.6:
        wave = (wave > rng.uniform(0.25, 0.75)).astype(np.float32)
    return _Wave(wave.astype(np.float32), angle, period, fold)


def _exclusive(a: Plane, b: Plane) -> Plane:
    """Chequers: one or the other, not both."""
    return a + b - 2 * a * b


def _letters(size: int, rng: np.random.Generator) -> Plane:
    """Lines of random words."""
    font_size = int(rng.integers(*FONT_SIZES))
    page = Image.new("L", (size, size))
    draw = ImageDraw.Draw(page)
    signs = np.array(
        [*(string.ascii_lowercase * 4 + string.ascii_uppercase + string.digits + ".,-")]
    )
    spacing = font_size * rng.uniform(1.0, 1.6)
    for y in np.arange(-rng.uniform(0, spacing), size, spacing):
        lengths = rng.integers(1, 10, size=1 + 3 * size // font_size)
        words = ["".join(rng.choice(signs, n)) for n in lengths]
        left = -rng.uniform(0, 4 * font_size)
        draw.text((left, float(y)), " ".join(words), fill=255, font=_font(font_size))
    return np.asarray(page, np.float32) / 255


_PATTERNS = (_gratings, _gratings, _gratings, _letters)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _cover(size: int, rng: np.random.Generator) -> Plane:
    """Where the pattern lies, 0..1: everywhere, on one side of a line, or on patches."""
    kind = rng.random()
    if kind < 0.3:
        return np.ones((size, size), np.float32)
    if kind < 0.6:
        y, x = np.mgrid[:size, :size].astype(np.float32) / size - rng.uniform(0.2, 0.8, (2, 1, 1))
        angle = rng.uniform(0, 2 * np.pi)
        level = (x * np.cos(angle) + y * np.sin(angle)) * size
    else:
        level = _enlarged(rng.normal(size=(5, 5)).astype(np.float32), size) * size / 4
    return np.clip(level.astype(np.float32) + 0.5, 0, 1)


def _enlarged(values: Plane, size: int) -> Plane:
    return np.asarray(Image.fromarray(values).resize((size, size), Image.Resampling.BICUBIC))


def _blurred(plane: Plane, cells: int) -> Plane:
    size = len(plane)
    few = Image.fromarray(plane).resize((size // cells, size // cells), Image.Resampling.BOX)
    return np.asarray(few.resize((size, size), Image.Resampling.BICUBIC))


def _pixels(samples: Plane) -> Plane:
    size = len(samples) // OVERSAMPLING
    cells = samples.reshape(size, OVERSAMPLING, size, OVERSAMPLING)
    return np.asarray(cells.mean((1, 3)), np.float32)
