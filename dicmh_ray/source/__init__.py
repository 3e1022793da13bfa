"""A collection of images -> units of work -> undecoded images -> pixels.

    plan_units ──> Unit ──> read_unit ──> SourceImage ──> load_pixels ──> Pixels

Hides fsspec, tar, webdataset's conventions, Parquet and Pillow. Whatever a source holds, each of its
images comes out once: as bytes, or as a row that says why there are none.
"""

from dicmh_ray.source.expand import Target
from dicmh_ray.source.image import SourceImage
from dicmh_ray.source.options import SourceOptions
from dicmh_ray.source.pixels import Pixels, load_pixels, stated_pixels
from dicmh_ray.source.plan import Unit, plan_units, read_unit

__all__ = [
    "Pixels",
    "SourceImage",
    "SourceOptions",
    "Target",
    "Unit",
    "load_pixels",
    "plan_units",
    "read_unit",
    "stated_pixels",
]
