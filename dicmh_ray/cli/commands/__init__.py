"""The commands, in the order in which ``dicmh --help`` lists them."""

from dicmh_ray.cli.commands import archives, training, weights, measuring, kubernetes  # isort: skip

__all__ = ["archives", "kubernetes", "measuring", "training", "weights"]
