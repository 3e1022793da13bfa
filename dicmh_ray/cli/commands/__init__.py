"""The commands, in the order in which ``dicmh --help`` lists them.

Each imports its body when it is called: the help must not wait for it.
"""

from dicmh_ray.cli.commands import compressing, archives, reading  # isort: skip
from dicmh_ray.cli.commands import analysis, training, weights, measuring, kubernetes  # isort: skip

__all__ = [
    "analysis",
    "archives",
    "compressing",
    "kubernetes",
    "measuring",
    "reading",
    "training",
    "weights",
]
