"""dicmh_ray: learned image archives on Ray.

Compress a collection once; read it back lazily, only as far as the reader needs::

    from dicmh_ray import compress, open_archive

    compress(["photos/*.tar"], "s3://bucket/archive")
    for view in open_archive("s3://bucket/archive"):
        view.tags, view.latent(states=2), view.pixels()

``import dicmh_ray`` loads nothing heavy: a name below is imported when it is first used, so that
listing or verifying an archive never waits for torch, and decoding never waits for Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dicmh_ray.archive import EncodedImage
    from dicmh_ray.codec import ImageCodec, load_codec
    from dicmh_ray.errors import ArchiveError, BitstreamError, CodecError, DicmhError, SourceError
    from dicmh_ray.pipeline import EncodePolicy, JobReport
    from dicmh_ray.ray_plugin import compress
    from dicmh_ray.ray_plugin.datasink import write_archive
    from dicmh_ray.ray_plugin.datasource import read_archive
    from dicmh_ray.ray_plugin.decode import Decode
    from dicmh_ray.source import SourceImage, SourceOptions, load_pixels
    from dicmh_ray.views import Archive, ImageView, open_archive

__version__ = "0.2.0.dev0"

__all__ = [
    "Archive",
    "ArchiveError",
    "BitstreamError",
    "CodecError",
    "Decode",
    "DicmhError",
    "EncodePolicy",
    "EncodedImage",
    "ImageCodec",
    "ImageView",
    "JobReport",
    "SourceError",
    "SourceImage",
    "SourceOptions",
    "__version__",
    "compress",
    "load_codec",
    "load_pixels",
    "open_archive",
    "read_archive",
    "write_archive",
]

_HOMES = {
    "Archive": "dicmh_ray.views",
    "ArchiveError": "dicmh_ray.errors",
    "BitstreamError": "dicmh_ray.errors",
    "CodecError": "dicmh_ray.errors",
    "Decode": "dicmh_ray.ray_plugin.decode",
    "DicmhError": "dicmh_ray.errors",
    "EncodePolicy": "dicmh_ray.pipeline",
    "EncodedImage": "dicmh_ray.archive",
    "ImageCodec": "dicmh_ray.codec",
    "ImageView": "dicmh_ray.views",
    "JobReport": "dicmh_ray.pipeline",
    "SourceError": "dicmh_ray.errors",
    "SourceImage": "dicmh_ray.source",
    "SourceOptions": "dicmh_ray.source",
    "compress": "dicmh_ray.ray_plugin",
    "load_codec": "dicmh_ray.codec",
    "load_pixels": "dicmh_ray.source",
    "open_archive": "dicmh_ray.views",
    "read_archive": "dicmh_ray.ray_plugin.datasource",
    "write_archive": "dicmh_ray.ray_plugin.datasink",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
