"""Official streams <-> the latents that our own streams carry.

An official file decodes in floating point to y and z; our exact model codes the same symbols again
around its own means. So a picture of the official program becomes one of this package without being
decoded to pixels: what is lost is at most the difference of the two means, a fixed-point step or
few, except where that carries a value over the middle between two symbols.

The direction back goes through floating point as well, and the file decodes in the official program
under its conditions (spec 0.7).
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dicmh_ray.codec.icmh.lfgcm import LatentCoder
from dicmh_ray.codec.icmh.official import OfficialStream
from dicmh_ray.codec.icmh.official_coder import OfficialCoder


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
