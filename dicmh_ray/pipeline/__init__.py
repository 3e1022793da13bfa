"""Source images -> encoded rows -> committed units, as plain generators and one loop.

``encode`` turns images into rows; ``job`` runs a plan's units with it and reports. Knows codecs only
as the :class:`~dicmh_ray.codec.ImageCodec` protocol, and nothing of Ray.
"""

from dicmh_ray.pipeline.encode import EncodeOptions, EncodePolicy, KeepOriginal, encode_images
from dicmh_ray.pipeline.job import (
    Checkpoint,
    Job,
    JobMonitor,
    JobReport,
    Progress,
    Tally,
    UnitResult,
    compress_local,
    plan_job,
)

__all__ = [
    "Checkpoint",
    "EncodeOptions",
    "EncodePolicy",
    "Job",
    "JobMonitor",
    "JobReport",
    "KeepOriginal",
    "Progress",
    "Tally",
    "UnitResult",
    "compress_local",
    "encode_images",
    "plan_job",
]
