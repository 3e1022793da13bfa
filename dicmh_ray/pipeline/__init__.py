"""Source images -> encoded rows -> committed units, as plain generators and one loop.

``encode`` turns images into rows; ``job`` runs a plan's units with it, ``monitor`` counts what comes
of them and tells observers. Knows codecs only as the :class:`~dicmh_ray.codec.ImageCodec` protocol,
and nothing of Ray.
"""

from dicmh_ray.pipeline.checkpoint import Checkpoint
from dicmh_ray.pipeline.encode import EncodeOptions, EncodePolicy, KeepOriginal, encode_images
from dicmh_ray.pipeline.job import Job, compress_local, plan_job
from dicmh_ray.pipeline.monitor import JobMonitor
from dicmh_ray.pipeline.observer import JobObserver, Progress
from dicmh_ray.pipeline.report import JobReport, Tally, UnitResult
from dicmh_ray.pipeline.units_queue import UnitsQueue

__all__ = [
    "Checkpoint",
    "EncodeOptions",
    "EncodePolicy",
    "Job",
    "JobMonitor",
    "JobObserver",
    "JobReport",
    "KeepOriginal",
    "Progress",
    "Tally",
    "UnitResult",
    "UnitsQueue",
    "compress_local",
    "encode_images",
    "plan_job",
]
