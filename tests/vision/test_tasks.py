"""Tasks: what is read off a picture, and how agreement with original and labels is scored."""

import numpy as np
import pytest
from PIL import Image

from dicmh_ray import bench
from dicmh_ray.errors import NetError, SourceFormatError
from dicmh_ray.vision.boxes import Objects
from dicmh_ray.vision.labels import Labels, find_labels
from dicmh_ray.vision.nets import NetSpec
from dicmh_ray.vision.tasks import ClassEvidence, SegmentationReading, confusion, mean_iou
from tests.bench.tiny import a_picture, save_constant, save_feature_net, save_segmenter

NOTHING = Labels()


def task(file, kind, **fields):
    return bench.load_task(NetSpec(name="Tiny", file=file, task=kind, **fields))


def test_agreement_is_with_the_original_and_accuracy_with_labels(tmp_path):
    net = task(save_feature_net(tmp_path / "net.onnx"), "classification")
    reading = net.read(a_picture())
    assert 0 <= reading < 5
    assert net.compare(reading, reading, NOTHING) == ClassEvidence(True, None)
    other = (reading + 1) % 5
    assert net.compare(reading, other, Labels(class_index=reading)) == ClassEvidence(False, True)
    scores = net.score([ClassEvidence(True, None), ClassEvidence(False, True)])
    assert scores == {"top-1 agreement": 0.5, "top-1 accuracy": 1.0}
    assert net.score([ClassEvidence(True, None)])["top-1 accuracy"] is None


def test_mean_iou_by_hand():
    true = np.array([[0, 0, 1, 1]], np.uint8)
    found = np.array([[0, 1, 1, 1]], np.uint8)
    counts = confusion(true, found, 3)
    assert counts.tolist() == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]
    assert mean_iou(counts) == pytest.approx((1 / 2 + 2 / 3) / 2)  # class 2 is not there
    assert mean_iou(np.zeros((3, 3), int)) is None


def test_unlabelled_pixels_do_not_count():
    true = np.array([[255, 255, 1, 1]], np.uint8)
    assert mean_iou(confusion(true, np.array([[0, 1, 1, 1]], np.uint8), 2)) == 1


def test_a_segmenter_is_scored_against_labels_of_other_values(tmp_path):
    net = task(save_segmenter(tmp_path / "net.onnx"), "segmentation", label_values={"7": 1})
    image = np.zeros((16, 32, 3), np.uint8)
    image[:, 16:] = 255
    reading = net.read(image)
    assert reading.num_classes == 2
    assert reading.classes.shape == (16, 32)
    assert (reading.classes[:, :14] == 0).all()
    assert (reading.classes[:, 18:] == 1).all()
    semantic = np.full((16, 32), 9, np.uint8)  # a value that is not mapped is background
    semantic[:, 16:] = 7
    semantic[:, 14:18] = 0
    evidence = net.compare(reading, reading, Labels(semantic=semantic))
    assert net.score([evidence]) == {"mIoU": 1.0, "mIoU with the original's": 1.0}
    flipped = SegmentationReading(1 - reading.classes, 2)
    assert net.score([net.compare(flipped, reading, NOTHING)]) == {
        "mIoU": None,
        "mIoU with the original's": 0.0,
    }
    with pytest.raises(NetError, match="labels are"):
        net.compare(reading, reading, Labels(semantic=semantic[:8]))


def a_grid():
    """FestestDet's map of 2x2 cells and 3 classes: one sure object in the cell at the top right."""
    grid = np.zeros((1, 8, 2, 2))
    grid[0, 0, 0, 1] = 0.9
    grid[0, 7, 0, 1] = 0.8
    grid[0, 3:5, 0, 1] = -np.log(4 - 1)  # sigmoid of it is a quarter
    return grid


def test_a_grid_of_cells_becomes_boxes(tmp_path):
    net = task(save_constant(tmp_path / "net.onnx", {"map": a_grid()}), "detection")
    found = net.read(a_picture())
    assert found.classes.tolist() == [2]
    assert found.scores[0] == pytest.approx(0.9**0.6 * 0.8**0.4)
    # Centre at cell column 1 of 2 and row 0, offsets of zero: (0.5, 0), a quarter wide and high.
    assert found.boxes[0] == pytest.approx([0.375, -0.125, 0.625, 0.125])


def test_detections_are_scored_against_labels_and_against_the_original(tmp_path):
    net = task(save_constant(tmp_path / "net.onnx", {"map": a_grid()}), "detection")
    found = net.read(a_picture())
    objects = Objects(boxes=found.boxes, classes=np.array([2]))
    scores = net.score([net.compare(found, found, Labels(objects=objects))])
    assert scores == {"AP50": 1.0, "AP50-95": 1.0, "AP50 of the original's": 1.0}
    assert net.score([net.compare(found, found, NOTHING)])["AP50"] is None


def test_faces_of_the_original_are_looked_for(tmp_path):
    scores = np.array([[[0.1, 0.9], [0.2, 0.8], [0.9, 0.1]]])
    boxes = np.array([[[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.48], [0.5, 0.5, 1, 1]]])
    file = save_constant(tmp_path / "net.onnx", {"scores": scores, "boxes": boxes})
    net = task(file, "faces", layout="boxes")
    found = net.read(a_picture())
    assert len(found.boxes) == 1  # the second repeats the first, the third is not sure
    assert net.compare(found, found, NOTHING) == [1.0]
    assert net.score([[1.0, 0.4], []]) == {"faces found": 0.5, "face box IoU": 0.7}
    assert net.score([[]]) == {"faces found": None, "face box IoU": None}


def test_a_net_of_the_wrong_shape_is_named(tmp_path):
    classifier = save_feature_net(tmp_path / "net.onnx")
    with pytest.raises(NetError, match="wanted one map"):
        task(classifier, "detection").read(a_picture())
    with pytest.raises(NetError, match="wanted scores"):
        task(classifier, "faces").read(a_picture())
    with pytest.raises(NetError, match="wanted logits"):
        task(classifier, "segmentation").read(a_picture())
    with pytest.raises(NetError, match="no task"):
        task(classifier, "none", taps=("deep",))


def test_labels_lie_beside_the_pictures(tmp_path):
    picture = tmp_path / "images" / "a.jpg"
    assert find_labels(picture) == Labels()
    for name in ("labels_yolo", "semantic"):
        (tmp_path / name).mkdir()
    (tmp_path / "labels_yolo" / "a.txt").write_text("3 0.5 0.5 0.5 0.2\n")
    Image.fromarray(np.full((4, 5), 7, np.uint8)).save(tmp_path / "semantic" / "a.png")
    (tmp_path / "classes.csv").write_text("b.jpg,1\na.jpg,12\n")
    labels = find_labels(picture)
    assert labels.objects.boxes[0] == pytest.approx([0.25, 0.4, 0.75, 0.6])
    assert labels.objects.classes.tolist() == [3]
    assert (labels.semantic == 7).all()
    assert labels.class_index == 12
    (tmp_path / "labels_yolo" / "a.txt").write_text("")
    assert find_labels(picture).objects.boxes.shape == (0, 4)


def test_bad_labels_are_named(tmp_path):
    (tmp_path / "labels_yolo").mkdir()
    (tmp_path / "labels_yolo" / "a.txt").write_text("3 0.5\n")
    with pytest.raises(SourceFormatError, match="five numbers"):
        find_labels(tmp_path / "a.jpg")
    (tmp_path / "classes.csv").write_text("b.jpg,dog\n")
    with pytest.raises(SourceFormatError, match="no class index"):
        find_labels(tmp_path / "b.jpg")


def test_points_are_compared_with_those_of_the_original(tmp_path):
    points = np.array([[[0.25, 0.5], [0.75, 0.5]]])
    net = task(save_constant(tmp_path / "net.onnx", {"points": points}), "landmarks")
    reading = net.read(a_picture())
    assert reading == pytest.approx(points[0])
    moved = reading + np.array([[0.003, 0.004], [0, 0.2]])
    distances = net.compare(reading, moved, NOTHING)
    assert distances == pytest.approx([0.005, 0.2])
    assert net.score([distances]) == {"points found": pytest.approx(0.5)}
    odd = task(save_constant(tmp_path / "odd.onnx", {"points": np.zeros((1, 3))}), "landmarks")
    with pytest.raises(NetError, match="N x 2"):
        odd.read(a_picture())
