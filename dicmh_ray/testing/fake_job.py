"""The job that is killed: a collection to an archive with the codec that needs no torch.

python -m dicmh_ray.testing.fake_job shards/*.tar archive/ --workers 2 --pace-ms 5
"""

import argparse
import functools
import sys
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dicmh_ray.ray_plugin import RayOptions, compress
from dicmh_ray.testing.fake_codec import FakeCodec


class PacedCodec(FakeCodec):
    """Takes its time, so that a job of a few pictures lives long enough to be killed.

    Args:
        pace_s: seconds for each picture.
    """

    def __init__(self, pace_s: float = 0.0) -> None:
        super().__init__()
        self._pace_s = pace_s

    def encode(
        self,
        images: Sequence[npt.NDArray[np.uint8]],
        *,
        tags: Sequence[Sequence[str]],
        exif_orientations: Sequence[int],
    ) -> list[bytes]:
        time.sleep(self._pace_s * len(images))
        return super().encode(images, tags=tags, exif_orientations=exif_orientations)


def main() -> int:
    """Run the job; exit code 0 when the archive is complete."""
    parser = argparse.ArgumentParser(description="A collection to an archive, without torch.")
    parser.add_argument("sources", nargs="+")
    parser.add_argument("archive")
    parser.add_argument("--runtime", choices=["ray", "local"], default="ray")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pace-ms", type=float, default=0.0)
    options = parser.parse_args()
    report = compress(
        options.sources,
        options.archive,
        codec=functools.partial(PacedCodec, options.pace_ms / 1000),
        runtime=options.runtime,
        ray_options=RayOptions(workers=options.workers),
    )
    return 0 if report.manifest is not None else 1


if __name__ == "__main__":
    sys.exit(main())
