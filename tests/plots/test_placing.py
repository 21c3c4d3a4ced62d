"""Label placing: pure geometry."""

import itertools
import random

import pytest

from plots.placing import gap, leader, overlap, place


@pytest.mark.parametrize("count", [1, 2, 7, 20])
@pytest.mark.parametrize("spread", [0.0, 30.0, 300.0])
def test_labels_touch_neither_points_nor_edges_nor_each_other(count, spread):
    draw = random.Random(count)
    points = [
        (300 + spread * draw.random(), 150 + spread / 3 * draw.random(), 4 + 3 * draw.random()) for _ in range(count)
    ]
    sizes = [(60 + 50 * draw.random(), 11.0) for _ in range(count)]
    boxes = place(points, sizes, (0, 0, 640, 320), keep_clear=[(0, 170, 640, 172)])
    for box, (width, height) in zip(boxes, sizes, strict=True):
        assert (box[2] - box[0], box[3] - box[1]) == pytest.approx((width, height))
        assert box[0] >= 0 and box[1] >= 0 and box[2] <= 640 and box[3] <= 320
        assert overlap(box, (0, 170, 640, 172)) == 0
        assert all(overlap(box, (x - r, y - r, x + r, y + r)) == 0 for x, y, r in points)
    assert all(overlap(one, other) == 0 for one, other in itertools.combinations(boxes, 2))


def crossing(one, other) -> bool:
    """By solving for where the two lines meet."""
    (ax, ay), (bx, by) = one
    (cx, cy), (dx, dy) = other
    scale = (bx - ax) * (dy - cy) - (by - ay) * (dx - cx)
    if abs(scale) < 1e-12:
        return False
    along = ((cx - ax) * (dy - cy) - (cy - ay) * (dx - cx)) / scale
    beside = ((cx - ax) * (by - ay) - (cy - ay) * (bx - ax)) / scale
    return 1e-9 < along < 1 - 1e-9 and 1e-9 < beside < 1 - 1e-9


@pytest.mark.parametrize("seed", range(12))
def test_near_points_keep_their_own_labels(seed):
    """Leaders do not cross; a label stands nearest to its own point, or, within a cluster, all but so."""
    draw = random.Random(seed)
    points = [(300 + 25 * draw.random(), 150 + 25 * draw.random(), 4 + 4 * draw.random()) for _ in range(2 + seed % 5)]
    boxes = place(points, [(70.0, 11.0)] * len(points), (0, 0, 640, 320))
    leaders = [leader(point, box) for point, box in zip(points, boxes, strict=True)]
    assert not any(crossing(one, other) for one, other in itertools.combinations(leaders, 2))
    for index, box in enumerate(boxes):
        gaps = [gap(box, point) for point in points]
        assert gaps[index] <= min(gaps) + (0.5 if len(points) < 4 else 2)


def test_a_lone_label_stands_to_the_right_of_its_point():
    ((left, bottom, _, top),) = place([(50, 50, 5)], [(40, 10)], (0, 0, 200, 100))
    assert left == pytest.approx(58)
    assert (bottom + top) / 2 == pytest.approx(50)


def test_a_label_at_the_right_edge_turns_to_the_left():
    ((_, _, right, _),) = place([(190, 50, 5)], [(40, 10)], (0, 0, 200, 100))
    assert right < 190


def test_no_room_still_gives_a_place():
    boxes = place([(5, 5, 3)] * 4, [(30, 10)] * 4, (0, 0, 12, 12))
    assert len(boxes) == 4


def test_overlap_is_an_area():
    assert overlap((0, 0, 4, 3), (2, 1, 9, 9)) == 4
    assert overlap((0, 0, 1, 1), (1, 0, 2, 1)) == 0
