"""What a row of an archive can become, on first touch: tags, latent, pixels, thumbnail, original.

    open_archive ─> Archive ── iterate, archive[key] ──> ImageView
                      │                                   .tags .metadata .psnr ...  no blob is read
                      │                                   .latent(states)            entropy decode
                      │                                   .pixels(view, states)      the picture
                      │                                   .thumbnail() .save(file)
                      │                                   .original                  where it was kept
                      └─ iter(where, view=..., shuffle=..., rank=...) ─> the same, decoded in batches

Nothing is decoded, and no codec loaded, before a view asks for it. A codec is loaded once for each
process, from the installed package when the archive was written with its checkpoint, otherwise
from the archive, which carries its own.
"""

from dicmh_ray.views.archive import Archive, ViewIterator, open_archive
from dicmh_ray.views.codecs import codec_of
from dicmh_ray.views.decode import VIEWS, View, decode_views
from dicmh_ray.views.image import ImageView
from dicmh_ray.views.pictures import picture_of
from dicmh_ray.views.saving import PictureMark, mark_of, read_mark, save_picture

__all__ = [
    "VIEWS",
    "Archive",
    "ImageView",
    "PictureMark",
    "View",
    "ViewIterator",
    "codec_of",
    "decode_views",
    "mark_of",
    "open_archive",
    "picture_of",
    "read_mark",
    "save_picture",
]
