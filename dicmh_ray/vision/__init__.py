"""Small ONNX nets that look at pictures: what is read off them, and how well.

    find_nets(folder) ─> NetSpec ─> load_task ─> NetTask.read(picture) ─> class, boxes, mask, points
                                                        .compare, .score   against labels

Evaluation judges decoded pictures with them, analysis runs them over archives. Nets run on the CPU,
on the thread that calls; they need onnxruntime.
"""

from dicmh_ray.vision.boxes import Detections, Objects, mean_average_precision
from dicmh_ray.vision.labels import Labels, find_labels
from dicmh_ray.vision.nets import NetSpec, find_nets, net_from_argument
from dicmh_ray.vision.onnx_net import OnnxNet, Picture
from dicmh_ray.vision.tasks import NetTask, load_task

__all__ = [
    "Detections",
    "Labels",
    "NetSpec",
    "NetTask",
    "Objects",
    "OnnxNet",
    "Picture",
    "find_labels",
    "find_nets",
    "load_task",
    "mean_average_precision",
    "net_from_argument",
]
