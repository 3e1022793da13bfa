"""An ImageCodec without torch: real bitstreams around zlib. State k adds four bits of every sample."""

import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dicmh_ray.bitstream import Header, State, crc32c, parse_bitstream, write_bitstream
from dicmh_ray.codec import Quality
from dicmh_ray.errors import CodecMismatchError, EncodeError, SymbolError

KEEP_BITS = (2, 4, 8)
POISON = 13
"""A picture whose every sample has this value cannot be encoded: it plays the codec's failure."""


class FakeCodec:
    """Counts its calls; fails on a poisoned picture; keeps 2, 4, then 8 bits of every sample."""

    def __init__(self, codec_id: str = "ab" * 32) -> None:
        self.codec_id = codec_id
        self.num_states = len(KEEP_BITS)
        self.latent_channels = 3
        self.views: tuple[str, ...] = ("machine", "human")
        self.num_encoded = 0
        self.num_decoded = 0

    def encode(
        self,
        images: Sequence[npt.NDArray[np.uint8]],
        *,
        tags: Sequence[Sequence[str]],
        exif_orientations: Sequence[int],
    ) -> list[bytes]:
        streams = []
        for image, image_tags, orientation in zip(images, tags, exif_orientations, strict=True):
            if (image == POISON).all():
                raise EncodeError("the latent is not finite")
            states = []
            seen_bits = 0
            for bits in KEEP_BITS:
                plane = (image >> (8 - bits)) & ((1 << (bits - seen_bits)) - 1)
                seen_bits = bits
                states.append(State(zlib.compress(plane.tobytes()), crc32c(plane.tobytes())))
            header = Header(
                codec_id=self.codec_id,
                width=image.shape[1],
                height=image.shape[0],
                exif_orientation=orientation,
                num_states=self.num_states,
            )
            streams.append(write_bitstream(header, image_tags, states))
            self.num_encoded += 1
        return streams

    def decode(
        self, bitstreams: Sequence[bytes], *, states: int | None = None, view: str = "machine"
    ) -> list[npt.NDArray[np.uint8]]:
        self.num_decoded += len(bitstreams)
        images = [self._decode_one(data, states) for data in bitstreams]
        return (
            [np.subtract(255, image, dtype=np.uint8) for image in images]
            if view == "human"
            else images
        )

    def decode_latent(
        self, bitstreams: Sequence[bytes], *, states: int | None = None
    ) -> list[npt.NDArray[np.float16]]:
        return [
            np.moveaxis(self._decode_one(data, states), 2, 0).astype(np.float16)
            for data in bitstreams
        ]

    def measure(
        self,
        originals: Sequence[npt.NDArray[np.uint8]],
        decoded: Sequence[npt.NDArray[np.uint8]],
    ) -> list[Quality]:
        qualities = []
        for a, b in zip(originals, decoded, strict=True):
            mse = float(np.mean((a.astype(np.float64) - b) ** 2))
            psnr = min(100.0, 10 * float(np.log10(255**2 / max(mse, 1e-9))))
            qualities.append(Quality(psnr, psnr, None))
        return qualities

    def _decode_one(self, data: bytes, states: int | None) -> npt.NDArray[np.uint8]:
        stream = parse_bitstream(data)
        if stream.header.codec_id != self.codec_id[:16]:
            raise CodecMismatchError(self.codec_id[:16], stream.header.codec_id)
        shape = (stream.header.height, stream.header.width, 3)
        image = np.zeros(shape, np.uint8)
        for k, state in enumerate(stream.states[:states]):
            plane = zlib.decompress(state.payload)
            if crc32c(plane) != state.symbol_crc:
                raise SymbolError(f"state {k}", "symbols do not match their checksum")
            bits = np.frombuffer(plane, np.uint8).reshape(shape)
            image |= np.left_shift(bits, 8 - KEEP_BITS[k], dtype=np.uint8)
        return image
