"""The commands, in the order in which ``dicmh --help`` lists them."""

from dicmh_ray.cli.commands import archives  # isort: skip
from dicmh_ray.cli.commands import analysis, training, weights, measuring, kubernetes  # isort: skip

__all__ = ["analysis", "archives", "kubernetes", "measuring", "training", "weights"]
