"""What is taken from compressai, imported in one place.

compressai pulls in torch_geometric, which warns of torch's own plans when it is imported: nothing
that a user of this package can act on.
"""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from compressai.ans import BufferedRansEncoder, RansDecoder
    from compressai.entropy_models import EntropyBottleneck, EntropyModel, GaussianConditional
    from compressai.layers import conv1x1, conv3x3
    from compressai.models.base import get_scale_table
    from compressai.models.utils import conv, deconv

__all__ = [
    "BufferedRansEncoder",
    "EntropyBottleneck",
    "EntropyModel",
    "GaussianConditional",
    "RansDecoder",
    "conv",
    "conv1x1",
    "conv3x3",
    "deconv",
    "get_scale_table",
]
