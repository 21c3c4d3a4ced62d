"""Label placing: pure geometry."""

import itertools
import random

import pytest

from plots.placing import overlap, place


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
