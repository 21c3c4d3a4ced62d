"""Where to write labels beside points so that nothing overlaps. Pure geometry, in any one unit."""

import math
from collections.abc import Sequence

Box = tuple[float, float, float, float]
"""left, bottom, right, top"""
Circle = tuple[float, float, float]
"""x, y, radius"""

_GAPS = (3.0, 9.0, 18.0, 30.0, 45.0, 65.0, 90.0, 120.0, 155.0, 195.0)
_ANGLES = 16


def place(
    points: Sequence[Circle], sizes: Sequence[tuple[float, float]], bounds: Box, keep_clear: Sequence[Box] = ()
) -> list[Box]:
    """A box for each label, as near to its point as room allows.

    `sizes` are `(width, height)`; `keep_clear` holds further boxes to avoid.
    Greedy: each label in turn takes the first place, by distance, that touches no point,
    no earlier label and no edge; where there is none, the place with the least overlap.
    """
    taken: list[Box] = [(x - radius, y - radius, x + radius, y + radius) for x, y, radius in points]
    taken += keep_clear
    placed: list[Box] = []
    for point, size in zip(points, sizes, strict=True):
        best = min(_candidates(point, size), key=lambda box: _conflict(box, taken, bounds))
        taken.append(best)
        placed.append(best)
    return placed


def _candidates(point: Circle, size: tuple[float, float]) -> list[Box]:
    """Boxes around a point, nearest first, to the right before elsewhere."""
    (x, y, radius), (width, height) = point, size
    turns = sorted(range(_ANGLES), key=lambda turn: min(turn, _ANGLES - turn))
    boxes = []
    for gap in _GAPS:
        for turn in turns:
            angle = 2 * math.pi * turn / _ANGLES
            across, up = math.cos(angle), math.sin(angle)
            middle_x = x + across * (radius + gap) + width / 2 * _towards(across)
            middle_y = y + up * (radius + gap) + height / 2 * _towards(up)
            boxes.append((middle_x - width / 2, middle_y - height / 2, middle_x + width / 2, middle_y + height / 2))
    return boxes


def _towards(component: float) -> float:
    """-1, 0 or 1, with room around 0 for rounding."""
    return 0.0 if abs(component) < 1e-9 else math.copysign(1.0, component)


def _conflict(box: Box, taken: Sequence[Box], bounds: Box) -> float:
    left, bottom, right, top = box
    inside = overlap(box, bounds)
    outside = (right - left) * (top - bottom) - inside
    return sum(overlap(box, other) for other in taken) + 4 * max(outside, 1e-6) - 4e-6


def overlap(one: Box, other: Box) -> float:
    """The area that two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return width * height if width > 0 and height > 0 else 0.0
