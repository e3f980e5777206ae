"""The embedded set: ten outlines, drawn in any number and size. No torch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# The signed distance of points (x, y) to an outline of radius about 1, negative inside; y points down.
Outline = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _bar(x: np.ndarray, y: np.ndarray, length: float = 1.0, width: float = 0.3) -> np.ndarray:
    return np.maximum(np.abs(x) - length, np.abs(y) - width)


def _stroke(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _bar(x, y, width=0.1)


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A square on its corner, with a half disc on each of its upper sides."""
    u, v = (x - y + 0.2) * np.sqrt(0.5), (-x - y + 0.2) * np.sqrt(0.5)
    return np.minimum.reduce(
        [_bar(u, v, 0.55, 0.55), np.hypot(u - 0.55, v) - 0.55, np.hypot(u, v - 0.55) - 0.55]
    )


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five points at radius 1, notches at radius 0.42."""
    sector = 2 * np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)  # folded onto half a point
    radius = np.hypot(x, y)
    notch_x, notch_y = 0.42 * np.cos(sector / 2), 0.42 * np.sin(sector / 2)
    edge = np.hypot(1 - notch_x, notch_y)
    return ((radius * np.cos(angle) - 1) * notch_y + radius * np.sin(angle) * (1 - notch_x)) / edge


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    sides = [x * np.cos(a) + y * np.sin(a) for a in (0, 2 * np.pi / 3, 4 * np.pi / 3)]
    return np.maximum.reduce(sides) - 0.5


SHAPES: dict[str, Outline] = {
    "bar": _bar,
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 1, 0.85 - np.hypot(x - 0.55, y)),
    "cross": lambda x, y: np.minimum(_bar(x, y), _bar(y, x)),
    "disc": lambda x, y: np.hypot(x, y) - 0.85,
    "frame": lambda x, y: np.abs(np.maximum(np.abs(x), np.abs(y)) - 0.62) - 0.17,
    "heart": _heart,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.74) - 0.2,
    "square": lambda x, y: _bar(x, y, 0.76, 0.76),
    "star": _star,
    "triangle": _triangle,
}


def draw_shapes(n: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 (n, 3, size, size), of the ten SHAPES, equally often, in random order; and their labels,
    int64 (n,).

    A shape at random position, angle, scale and stretch, on a darker gradient crossed by two strokes of any
    colour, under noise. The class is in the outline alone: colours, pose and clutter tell nothing of it.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    labels = rng.permutation(np.arange(n) % len(SHAPES))
    images = np.empty((n, 3, size, size), np.uint8)
    for label, outline in enumerate(SHAPES.values()):
        members = np.flatnonzero(labels == label)
        images[members] = _draw(outline, len(members), size, rng)
    return images, labels


def _draw(outline: Outline, n: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """`n` images of one shape, uint8 (n, 3, size, size)."""
    pixels = (np.arange(size, dtype=np.float32) * 2 + 1) / size - 1  # centres, in [-1, 1]

    def uniform(low: float, high: float, channels: int = 1) -> np.ndarray:
        return rng.uniform(low, high, (n, channels, 1, 1)).astype(np.float32)

    def coverage(outline: Outline, *, spread, scales, turn, stretch) -> np.ndarray:
        """The part of each pixel, (n, 1, size, size), that a copy of the outline in a random pose covers."""
        x, y = pixels - uniform(-spread, spread), pixels[:, None] - uniform(-spread, spread)
        angle, scale, aspect = uniform(-turn, turn), uniform(*scales), uniform(1 / stretch, stretch)
        cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
        pixels_outside = outline((x * cos + y * sin) * aspect, y * cos - x * sin) * scale * size / 2
        return np.clip(0.5 - pixels_outside, 0, 1)

    def paint(canvas: np.ndarray, colour: np.ndarray, part: np.ndarray) -> np.ndarray:
        return canvas + (colour - canvas) * part

    background, angle = uniform(0.1, 0.45, 3), uniform(-np.pi, np.pi)
    slope = np.cos(angle) * pixels + np.sin(angle) * pixels[:, None]
    canvas = background + uniform(-0.2, 0.2, 3) * slope  # (n, 3, size, size)
    for _ in range(2):
        stroke = coverage(_stroke, spread=1, scales=(0.3, 0.8), turn=np.pi, stretch=1)
        canvas = paint(canvas, uniform(0, 1, 3), stroke)
    colour = background + uniform(0.25, 0.55, 3)
    shape = coverage(outline, spread=0.25, scales=(0.5, 0.8), turn=np.pi / 4, stretch=1.25)
    canvas = paint(canvas, colour, shape)
    canvas += uniform(0.02, 0.1) * rng.standard_normal(canvas.shape, np.float32)
    return np.rint(np.clip(canvas, 0, 1) * 255).astype(np.uint8)
