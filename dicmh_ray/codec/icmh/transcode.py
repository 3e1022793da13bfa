"""Official streams <-> the latents that our own streams carry.

An official file decodes in floating point to y and z; our exact model codes the same symbols again
around its own means. So a picture of the official program becomes one of this package without being
decoded to pixels. What changes is the latents: by the difference of the two means (fixed-point steps,
more at the edges of the tiles that large pictures are cut into), and by half a symbol's step at most.

The direction back goes through floating point as well, and the file decodes in the official program
where scales come out as they did here. A decoded latent is the middle of its symbol's interval, and
half a step does not leave it: so there and back gives all symbols again, and the same strings where
floating point is what it was when they were written. That holds for either beginning.

The official tags are numbers of words; ours are words, and the two meet in the vocabulary of the
checkpoint.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dicmh_ray.codec.icmh.lfgcm import LatentCoder
from dicmh_ray.codec.icmh.official import NUM_TAGS, OfficialStream
from dicmh_ray.codec.icmh.official_coder import OfficialCoder
from dicmh_ray.codec.vocabularies import word_ids, words_of_ids
from dicmh_ray.errors import TagsError
from dicmh_ray.tags import Vocabulary, encode_tags


class Latents(NamedTuple):
    """The latents of one picture, padded to whole cells of z."""

    y_MIJ: npt.NDArray[np.float32]
    z_NKL: npt.NDArray[np.float32]


def latents_of_official(stream: OfficialStream, coder: LatentCoder) -> Latents:
    """Decode the strings of an official stream.

    Args:
        stream: of a picture whose size the caller has checked (:meth:`OfficialStream.check_size`).
        coder: the official weights, with tables: its ``update_tables`` has been called.

    Raises:
        TruncatedBitstreamError: a string ends too early.
        SymbolError: a string is damaged, or was written by other weights, or by kernels that
            rounded a scale otherwise.
    """
    found = OfficialCoder(coder).decode(stream.y_string, stream.z_string, stream.z_shape)
    return Latents(found.y_hat[0].cpu().numpy(), found.z_hat[0].cpu().numpy())


def official_of_latents(
    latents: Latents, coder: LatentCoder, *, tag_ids: tuple[int, ...] | None
) -> OfficialStream:
    """The inverse: latents, rounded or not, as an official stream.

    Raises:
        EncodeError: a latent is not finite or too large.
        InvalidHeaderError: a tag id is outside the official list, or the picture too large.
    """
    device = next(coder.parameters()).device
    y_1Mij, z_1Nkl = (torch.from_numpy(array)[None].to(device) for array in latents)
    coded = OfficialCoder(coder).encode(y_1Mij, z_1Nkl)
    rows, columns = latents.z_NKL.shape[1:]
    return OfficialStream(
        z_shape=(rows, columns), y_string=coded.y_string, z_string=coded.z_string, tag_ids=tag_ids
    )


def tags_of_official(
    tag_ids: Sequence[int] | None, vocabulary: Vocabulary | None
) -> tuple[str, ...]:
    """The words that an official file names by number.

    Raises:
        TagsError: there is no vocabulary, it has no word of a number, or a stream of ours cannot hold
            them: one is given twice, or they are too many.
    """
    if not tag_ids:
        return ()
    if vocabulary is None:
        raise TagsError("tags are given by number, and the checkpoint has no vocabulary")
    try:
        words = words_of_ids(tag_ids, vocabulary)
        encode_tags(words, vocabulary)
    except ValueError as exc:
        raise TagsError(str(exc)) from exc
    return words


def official_of_tags(tags: Sequence[str], vocabulary: Vocabulary | None) -> tuple[int, ...] | None:
    """The numbers of words, ascending; None for no tags: the official program fails on a part of none.

    Raises:
        TagsError: words have no number in the official list; all are named.
    """
    if not tags:
        return None
    ids = {} if vocabulary is None else vocabulary.ids
    if free := [tag for tag in tags if ids.get(tag, NUM_TAGS) >= NUM_TAGS]:
        raise TagsError(f"no number in the official list: {', '.join(map(repr, free))}")
    return None if vocabulary is None else word_ids(tags, vocabulary)
