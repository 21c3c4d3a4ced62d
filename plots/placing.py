"""Where to write labels beside points so that each is read as its own point's. Pure geometry, in any one unit."""

import itertools
import math
from collections.abc import Sequence

Box = tuple[float, float, float, float]
"""left, bottom, right, top"""
Circle = tuple[float, float, float]
"""x, y, radius"""
Spot = tuple[float, float]

_GAPS = (3.0, 9.0, 18.0, 30.0, 45.0, 65.0, 90.0, 120.0, 155.0, 195.0)
_ANGLES = 16
_COVERED, _CROSSED, _NEARER_TO_ANOTHER = 1e4, 2.0, 1.5
"""What an area that two share costs, a leader across another's, a label or a point, a label nearer to another point."""
_ROUNDS = 4


def place(
    points: Sequence[Circle], sizes: Sequence[tuple[float, float]], bounds: Box, keep_clear: Sequence[Box] = ()
) -> list[Box]:
    """A box for each label, as near to its point as room allows.

    `sizes` are `(width, height)`; `keep_clear` holds further boxes to avoid. Each label in turn takes the cheapest
    place, the nearest of these: one that touches no point, no label and no edge, that stands nearest to its own
    point, and whose leader crosses nothing. What was placed first did not know the later ones, so all choose again,
    and where leaders still cross, the two labels choose anew in the other order.
    """
    labels = _Labels(points, sizes, bounds, keep_clear)
    for index in range(len(points)):
        labels.choose(index)
    for _ in range(_ROUNDS):
        before = list(labels.placed)
        for index in range(len(points)):
            labels.choose(index)
        for one, other in itertools.combinations(range(len(points)), 2):
            labels.untangle(one, other)
        if labels.placed == before:
            break
    return [box for box in labels.placed if box is not None]


class _Labels:
    """The labels placed so far."""

    def __init__(
        self, points: Sequence[Circle], sizes: Sequence[tuple[float, float]], bounds: Box, keep_clear: Sequence[Box]
    ):
        self.points, self.bounds = points, bounds
        self.fixed = [(x - radius, y - radius, x + radius, y + radius) for x, y, radius in points] + [*keep_clear]
        self.candidates = [_candidates(point, size) for point, size in zip(points, sizes, strict=True)]
        self.placed: list[Box | None] = [None] * len(points)

    def choose(self, index: int) -> None:
        """Take the cheapest place."""
        self.placed[index] = None
        best, least = self.candidates[index][0], math.inf
        for box in self.candidates[index]:
            cost = self.cost(index, box, least)
            if cost < least:
                best, least = box, cost
            if cost <= 0:
                break
        self.placed[index] = best

    def untangle(self, one: int, other: int) -> None:
        """Where two leaders cross, let both choose again, the later one first; keep what is cheaper."""
        first, second = self.placed[one], self.placed[other]
        if first is None or second is None:
            return
        if not _cross(leader(self.points[one], first), leader(self.points[other], second)):
            return
        before = self.cost(one, first) + self.cost(other, second)
        self.placed[one] = None
        self.choose(other)
        self.choose(one)
        if sum(self.cost(index, box) for index in (one, other) if (box := self.placed[index])) >= before:
            self.placed[one], self.placed[other] = first, second

    def cost(self, index: int, box: Box, enough: float = math.inf) -> float:
        """What speaks against a place; not told further once it is `enough`."""
        others = [placed for at, placed in enumerate(self.placed) if placed is not None and at != index]
        cost = _COVERED * _conflict(box, [*self.fixed, *others], self.bounds)
        if cost >= enough:
            return cost
        point = self.points[index]
        own = gap(box, point)
        cost += _NEARER_TO_ANOTHER * any(
            gap(box, other) <= own for at, other in enumerate(self.points) if at != index and other[:2] != point[:2]
        )
        line = leader(point, box)
        cost += _CROSSED * sum(_meets(line, other) for other in others)
        for at, (other, placed) in enumerate(zip(self.points, self.placed, strict=True)):
            if at != index:
                cost += _CROSSED * (_distance(other[:2], line) < other[2] and other[:2] != point[:2])
                if placed is not None:
                    theirs = leader(other, placed)
                    cost += _CROSSED * (_cross(line, theirs) + _meets(theirs, box))
        return cost


def leader(point: Circle, box: Box) -> tuple[Spot, Spot]:
    """From a point to the nearest place of its label."""
    x, y, _ = point
    return (x, y), (min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3]))


def gap(box: Box, circle: Circle) -> float:
    """How far a label stands from a point's edge."""
    (x, y), (end_x, end_y) = leader(circle, box)
    return math.hypot(end_x - x, end_y - y) - circle[2]


def _cross(one: tuple[Spot, Spot], other: tuple[Spot, Spot]) -> bool:
    """Whether two lines pass through each other."""

    def side(line: tuple[Spot, Spot], spot: Spot) -> float:
        (x, y), (to_x, to_y) = line
        return (to_x - x) * (spot[1] - y) - (to_y - y) * (spot[0] - x)

    return side(one, other[0]) * side(one, other[1]) < 0 and side(other, one[0]) * side(other, one[1]) < 0


def _meets(line: tuple[Spot, Spot], box: Box) -> bool:
    """Whether a line runs through a box."""
    left, bottom, right, top = box
    diagonals = (((left, bottom), (right, top)), ((left, top), (right, bottom)))
    return any(_cross(line, diagonal) for diagonal in diagonals)


def _distance(spot: Spot, line: tuple[Spot, Spot]) -> float:
    (x, y), (to_x, to_y) = line
    across, up = to_x - x, to_y - y
    long = across**2 + up**2
    along = min(max(((spot[0] - x) * across + (spot[1] - y) * up) / long, 0), 1) if long else 0
    return math.hypot(spot[0] - x - along * across, spot[1] - y - along * up)


def _candidates(point: Circle, size: tuple[float, float]) -> list[Box]:
    """Boxes around a point, nearest first, to the right before elsewhere."""
    (x, y, radius), (width, height) = point, size
    turns = sorted(range(_ANGLES), key=lambda turn: min(turn, _ANGLES - turn))
    boxes = []
    for space in _GAPS:
        for turn in turns:
            angle = 2 * math.pi * turn / _ANGLES
            across, up = math.cos(angle), math.sin(angle)
            middle_x = x + across * (radius + space) + width / 2 * _towards(across)
            middle_y = y + up * (radius + space) + height / 2 * _towards(up)
            boxes.append((middle_x - width / 2, middle_y - height / 2, middle_x + width / 2, middle_y + height / 2))
    return boxes


def _towards(component: float) -> float:
    """-1, 0 or 1, with room around 0 for rounding."""
    return 0.0 if abs(component) < 1e-9 else math.copysign(1.0, component)


def _conflict(box: Box, taken: Sequence[Box], bounds: Box) -> float:
    left, bottom, right, top = box
    inside = overlap(box, bounds)
    outside = (right - left) * (top - bottom) - inside
    return sum(overlap(box, other) for other in taken) + 4 * max(outside - 1e-6, 0.0)


def overlap(one: Box, other: Box) -> float:
    """The area that two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return width * height if width > 0 and height > 0 else 0.0
