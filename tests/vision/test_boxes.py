"""Average precision against cases worked out by hand."""

import numpy as np
import pytest

from dicmh_ray.vision.boxes import (
    COCO_OVERLAPS,
    Detections,
    Objects,
    mean_average_precision,
    overlaps,
    without_repeats,
)

LEFT, RIGHT, FAR = (0.0, 0.0, 0.2, 0.2), (0.5, 0.0, 0.7, 0.2), (0.0, 0.7, 0.1, 0.9)


def found(*rows):
    """Detections from ``(box, score, class)``, sorted by score."""
    rows = sorted(rows, key=lambda row: -row[1])
    return Detections(
        boxes=np.array([row[0] for row in rows], float).reshape(-1, 4),
        scores=np.array([row[1] for row in rows], float),
        classes=np.array([row[2] for row in rows], int),
    )


def there(*rows):
    """Objects from ``(box, class)``."""
    return Objects(
        boxes=np.array([row[0] for row in rows], float).reshape(-1, 4),
        classes=np.array([row[1] for row in rows], int),
    )


def ap(detections, objects, least=0.5):
    return mean_average_precision([detections], [objects], min_overlaps=[least])


def test_overlap_of_a_box_shifted_by_half_its_width_is_a_third():
    shifted = np.array([[0.1, 0, 0.3, 0.2]])
    assert overlaps(np.array([LEFT]), shifted)[0, 0] == pytest.approx(1 / 3)
    assert overlaps(np.array([LEFT]), np.array([RIGHT]))[0, 0] == 0
    assert overlaps(np.zeros((0, 4)), shifted).shape == (0, 1)


def test_all_found_and_nothing_else_is_one():
    assert ap(found((LEFT, 0.9, 3), (RIGHT, 0.2, 3)), there((LEFT, 3), (RIGHT, 3))) == 1


def test_a_false_alarm_counts_only_if_it_is_surer_than_a_hit():
    objects = there((LEFT, 0))
    assert ap(found((LEFT, 0.9, 0), (FAR, 0.5, 0)), objects) == 1
    assert ap(found((LEFT, 0.5, 0), (FAR, 0.9, 0)), objects) == pytest.approx(0.5)


def test_half_of_the_objects_found_gives_the_recalls_up_to_a_half():
    # Precision 1 at the 51 recalls 0, 0.01, ... 0.5 of 101, else 0.
    assert ap(found((LEFT, 0.9, 0)), there((LEFT, 0), (RIGHT, 0))) == pytest.approx(51 / 101)


def test_precision_is_the_best_at_this_recall_or_higher():
    # Hit, miss, hit: precision 1 up to recall 1/2, then 2/3.
    detections = found((LEFT, 0.9, 0), (FAR, 0.8, 0), (RIGHT, 0.7, 0))
    expected = (51 * 1 + 50 * 2 / 3) / 101
    assert ap(detections, there((LEFT, 0), (RIGHT, 0))) == pytest.approx(expected)


def test_an_object_is_claimed_once():
    twice = found((LEFT, 0.9, 0), (LEFT, 0.8, 0), (RIGHT, 0.7, 0))
    expected = (51 * 1 + 50 * 2 / 3) / 101
    assert ap(twice, there((LEFT, 0), (RIGHT, 0))) == pytest.approx(expected)


def test_classes_are_apart_and_averaged_over_those_that_are_there():
    objects = there((LEFT, 0), (RIGHT, 1))
    assert ap(found((LEFT, 0.9, 0), (RIGHT, 0.9, 0), (FAR, 0.9, 7)), objects) == pytest.approx(0.5)


def test_pictures_share_one_ranking():
    detections = [found((LEFT, 0.5, 0)), found((FAR, 0.9, 0))]
    objects = [there((LEFT, 0)), there()]
    assert mean_average_precision(detections, objects, min_overlaps=[0.5]) == pytest.approx(0.5)


def test_stricter_overlaps_lower_the_score():
    loose = found(((0.0, 0.0, 0.2, 0.17), 0.9, 0))  # overlap 0.85
    objects = there((LEFT, 0))
    assert ap(loose, objects) == 1
    score = mean_average_precision([loose], [objects], min_overlaps=COCO_OVERLAPS)
    assert score in (pytest.approx(0.7), pytest.approx(0.8))  # 0.85 itself is a rounding matter


def test_nothing_there_is_no_score_and_nothing_found_is_zero():
    assert ap(found((LEFT, 0.9, 0)), there()) is None
    assert ap(found(), there((LEFT, 0))) == 0


def test_repeats_go_within_a_class_only():
    boxes = np.array([LEFT, (0.01, 0, 0.2, 0.2), LEFT, RIGHT])
    kept = without_repeats(
        boxes, np.array([0.5, 0.9, 0.4, 0.3]), np.array([0, 0, 1, 0]), max_overlap=0.45
    )
    assert kept.scores.tolist() == [0.9, 0.4, 0.3]
    assert kept.classes.tolist() == [0, 1, 0]
    empty = without_repeats(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int), max_overlap=0.5)
    assert empty.boxes.shape == (0, 4)
