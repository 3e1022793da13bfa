"""Image <-> bitstream: the protocol, and how to get an implementation.

Importing this module costs nothing: torch is loaded by :func:`load_codec`, when a codec is really
wanted. Everything above this layer knows codecs only as :class:`ImageCodec`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from dicmh_ray.codec.checkpoint import (
    DEFAULT_CHECKPOINT,
    DIFF_ICMH,
    Checkpoint,
    read_checkpoint,
)

__all__ = [
    "DEFAULT_CHECKPOINT",
    "Checkpoint",
    "ImageCodec",
    "ImageTagger",
    "Precision",
    "Quality",
    "ReducingCodec",
    "TagScore",
    "TagSuggester",
    "TaggedStream",
    "load_codec",
    "read_checkpoint",
]

Precision = Literal["auto", "float32"]
"""What networks compute in; see :func:`load_codec`."""


class Quality(NamedTuple):
    """How close a decoded picture is to its source."""

    psnr: float
    """dB over all RGB samples of the unpadded picture; at most 100."""

    worst_tile_psnr: float
    """dB of the worst 64x64 tile (tiles at the right and bottom edge may be smaller); at most 100."""

    ms_ssim: float | None
    """Multi-scale SSIM of the luma, 0..1; None where a side is below 176 pixels."""


class TagScore(NamedTuple):
    """A word and how sure a tagger is of it."""

    tag: str

    score: float
    """0..1. A codec's own tagger gives a probability, calibrated on its labelled photographs: it
    holds for their like. Others say what theirs mean."""


class TaggedStream(NamedTuple):
    """A stream, and the tags in it that its codec suggested."""

    stream: bytes

    suggested: tuple[TagScore, ...]
    """They follow the picture's own tags in the stream, the most probable first."""


class ImageCodec(Protocol):
    """What encodes and decodes images. Implementations are safe to use from one thread at a time."""

    codec_id: str
    """SHA-256 of the checkpoint, 64 hex digits."""

    num_states: int
    """States of a full stream, K."""

    latent_channels: int
    """C of the decoded latent."""

    views: tuple[str, ...]
    """What ``decode`` can draw: ``"machine"``, the faithful estimate, and with some checkpoints
    ``"human"``, a picture whose detail is generated."""

    def encode(
        self,
        images: Sequence[npt.NDArray[np.uint8]],
        *,
        tags: Sequence[Sequence[str]],
        exif_orientations: Sequence[int],
    ) -> list[bytes]:
        """Encode pictures of any sizes to full streams of K states.

        Every stream has been decoded again and compared symbol by symbol before it is returned.

        Args:
            images: each uint8 ``[H, W, 3]``, RGB, upright, ``1 <= H, W <= 65535``.
            tags: for each image the tags its stream carries.
            exif_orientations: for each image the EXIF orientation (1..8) its source had.

        Raises:
            EncodeError: a picture is larger than a stream can say (a side above 65535 pixels, or
                268,435,456 in all), a latent is not finite, or a stream does not verify.
        """

    def decode(
        self, bitstreams: Sequence[bytes], *, states: int | None = None, view: str = "machine"
    ) -> list[npt.NDArray[np.uint8]]:
        """Decode streams to uint8 ``[H, W, 3]`` RGB pictures, from their first ``states`` states.

        Raises:
            BitstreamError: the bytes are bad.
            ViewError: ``view`` is not one of :attr:`views`.
            CodecMismatchError: another checkpoint wrote them.
        """

    def decode_latent(
        self, bitstreams: Sequence[bytes], *, states: int | None = None
    ) -> list[npt.NDArray[np.float16]]:
        """Entropy-decode only: float16 ``[C, h, w]`` dequantised latents. Raises as ``decode``."""

    def measure(
        self,
        originals: Sequence[npt.NDArray[np.uint8]],
        decoded: Sequence[npt.NDArray[np.uint8]],
    ) -> list[Quality]:
        """Compare pairs of uint8 ``[H, W, 3]`` pictures of equal shape."""


@runtime_checkable
class ReducingCodec(Protocol):
    """What some codecs can do besides :class:`ImageCodec`: draw a picture small from the start."""

    def decode_reduced(
        self, bitstreams: Sequence[bytes], reductions: Sequence[int], *, states: int | None = None
    ) -> list[npt.NDArray[np.uint8]]:
        """Machine views, each reduced on both sides by its own factor; nothing larger is made.

        Args:
            bitstreams: of the pictures, or prefixes.
            reductions: for each, r of 1, 2, 4 or 8.
            states: decode from the first ones only; None is all.

        Returns:
            For each a uint8 ``[ceil(H / r), ceil(W / r), 3]`` RGB picture of the means of r x r
            pixels. Raises as :meth:`ImageCodec.decode`.
        """


class ImageTagger(Protocol):
    """What says which words fit a picture: a zero-shot model, or code of the user's.

    :func:`dicmh_ray.codec.image_taggers.load_image_tagger` makes one of a description.
    """

    def tag(self, images: Sequence[npt.NDArray[np.uint8]]) -> list[tuple[TagScore, ...]]:
        """Tags of pictures, the surest first; each word once.

        Args:
            images: each uint8 ``[H, W, 3]``, RGB, upright, of any sizes.
        """


@runtime_checkable
class TagSuggester(Protocol):
    """What some codecs can do besides :class:`ImageCodec`: say what a picture shows.

    Every method raises WeightsError where the checkpoint has no tagger, or one of another checkpoint.
    """

    def encode_with_suggestions(
        self,
        images: Sequence[npt.NDArray[np.uint8]],
        *,
        tags: Sequence[Sequence[str]],
        exif_orientations: Sequence[int],
    ) -> list[TaggedStream]:
        """As :meth:`ImageCodec.encode`, with the words that the tagger suggests among the tags.

        A picture is analysed once. Words that are among its own tags already are left out, and
        suggestions never crowd out own tags where a stream has no room for both.
        """

    def suggest_tags(self, bitstreams: Sequence[bytes]) -> list[tuple[TagScore, ...]]:
        """Suggested words of streams, the most probable first. No picture is decoded.

        The tagger was fitted to full streams; of a prefix it sees less, and says less.
        """

    def tag_probabilities(self, bitstreams: Sequence[bytes]) -> list[list[TagScore]]:
        """Every word that the tagger knows, suggested or not, the most probable first."""


def load_codec(
    checkpoint: str | Path = DEFAULT_CHECKPOINT,
    *,
    device: str = "auto",
    threads: int | None = None,
    precision: Precision = "auto",
) -> ImageCodec:
    """Load a codec: its networks, tables and verified weights.

    Args:
        checkpoint: ``"default"`` for the one in the package, or a checkpoint directory.
        device: a torch device, or ``"auto"`` for CUDA where there is one and the CPU otherwise.
        threads: CPU threads that torch and the matrix products of numpy have in this process from
            now on; None leaves their choice, but for workers of a DataLoader, which have one.
        precision: what the default codec's networks compute in. ``"auto"`` is bfloat16 where the
            device multiplies it natively and float32 elsewhere; ``"float32"`` everywhere. Streams
            are read alike: a few of a hundred decoded samples are one level apart.

    Raises:
        WeightsError: the checkpoint is missing, incomplete or damaged.
        DeviceError: torch knows no such device, or cannot use it on this machine.
        MissingExtraError: torch or another library of the ``codec`` extra is not installed.
    """
    content = read_checkpoint(checkpoint)
    if content.codec == DIFF_ICMH:
        from dicmh_ray.codec.icmh.icmh_codec import load_icmh_codec

        return load_icmh_codec(content, device=device, threads=threads)
    from dicmh_ray.codec.layered_codec import load_layered_codec

    return load_layered_codec(content, device=device, threads=threads, precision=precision)
