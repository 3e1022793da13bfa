"""IcmhCodec: the networks and the exact symbol coder of Diff-ICMH in encode and decode order.

    image ──VAE──> z ──lfgcm──> y, hyper z ──ExactEntropyModel──> one state ──frame──> bitstream
    bitstream ──ExactEntropyModel──> y ──lfgcm──> c ──VAE──> machine view
                                                  └─control, U-Net(tags), noise(stream)──> human view

Large pictures are cut twice: y and the hyper latent into tiles of 1024 pixels that are coded on their
own, and the networks' work into overlapping windows, so that memory is bounded by a window's.

Shape suffixes: B images, C channels of the VAE's latent, M N channels of y and the hyper latent,
i j the grid of y (1/16), k l that of the hyper latent (1/64), h w that of the VAE's latent (1/8).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dicmh_ray.bitstream import (
    Bitstream,
    Header,
    State,
    parse_bitstream,
    read_header,
    write_bitstream,
)
from dicmh_ray.checksum import crc32c
from dicmh_ray.codec import Quality
from dicmh_ray.codec.checkpoint import Checkpoint
from dicmh_ray.codec.device import find_device, use_threads
from dicmh_ray.codec.framing import Image, framed, header_of
from dicmh_ray.codec.icmh.control import ControlledUNet
from dicmh_ray.codec.icmh.lfgcm import LatentCoder
from dicmh_ray.codec.icmh.noise import StreamNoise
from dicmh_ray.codec.icmh.official import OfficialStream, write_official
from dicmh_ray.codec.icmh.parts import (
    Parts,
    has_human_view,
    load_human_parts,
    load_machine_parts,
    load_sampler,
    load_tables,
    load_vocabulary,
)
from dicmh_ray.codec.icmh.text import TextEncoder, tags_text
from dicmh_ray.codec.icmh.tiling import TiledUNet, decode_tiled
from dicmh_ray.codec.icmh.transcode import (
    Latents,
    latents_of_official,
    official_of_latents,
    official_of_tags,
    tags_of_official,
)
from dicmh_ray.codec.quality import measure
from dicmh_ray.codec.tiles import join_tiles, split_tiles, tiles, windows
from dicmh_ray.errors import (
    CodecMismatchError,
    EncodeError,
    InvalidHeaderError,
    SymbolError,
    ViewError,
)

ALIGNMENT = 64
"""Pictures are padded to multiples of this many pixels: one cell of the hyper latent."""

TILE = 16
"""Hyper cells per side of a tile of symbols: 1024 pixels."""

WINDOW = 32
"""Hyper cells per side of a window of the latent coder's networks: 2048 pixels."""

ENCODE_MARGIN = 2
"""Hyper cells around a window that its analysis sees. Any symbols decode, so this needs not be exact."""

DECODE_MARGIN = 6
"""Hyper cells around a window of y that its estimate depends on: the networks' reach is below five."""

MAX_REMEMBERED = 16_777_216
"""Pixels of a picture whose latents are kept between ``encode`` and the decode that measures it."""

MAX_ROUNDING = 0.51
"""Between a latent and the nearest symbol's value, fixed-point steps of means included."""


class _Coded(NamedTuple):
    """A stream, and what it was found to decode to."""

    data: bytes
    latents: Latents


class IcmhCodec:
    """Diff-ICMH. See :class:`dicmh_ray.codec.ImageCodec` for the contract.

    A stream has one state. Its latent is y, dequantised; what the VAE decodes is estimated from it.
    """

    def __init__(self, checkpoint: Checkpoint, parts: Parts, device: torch.device) -> None:
        self.codec_id = checkpoint.codec_id
        self.num_states = 1
        self.latent_channels = parts.config.latent_coder.y_channels
        self.views: tuple[str, ...] = (
            ("machine", "human") if has_human_view(checkpoint) else ("machine",)
        )
        self._checkpoint = checkpoint
        self._parts = parts
        self._device = device
        for module in parts.modules().values():
            module.to(self._device)
        self._exact, self._normals = load_tables(checkpoint, parts.config)
        self._vocabulary = load_vocabulary(checkpoint)
        self._sampler = load_sampler(checkpoint, parts.config)
        self._has_official_tables = False
        self._verified: list[tuple[bytes, Latents]] = []

    def encode(
        self,
        images: Sequence[Image],
        *,
        tags: Sequence[Sequence[str]],
        exif_orientations: Sequence[int],
    ) -> list[bytes]:
        self._verified.clear()
        return [
            self._encode_one(image, own, orientation)
            for image, own, orientation in zip(images, tags, exif_orientations, strict=True)
        ]

    def decode(
        self, bitstreams: Sequence[bytes], *, states: int | None = None, view: str = "machine"
    ) -> list[Image]:
        if view not in self.views:
            raise ViewError(view, ", ".join(self.views))
        images = []
        for data in bitstreams:
            stream, latents = self._decode_latents(data, states)
            with torch.inference_mode(), torch.autocast(self._device.type, enabled=False):
                c_BChw = self._estimate(latents)
                if view == "human":
                    c_BChw = self._restore(c_BChw, stream)
                image = self._pixels(c_BChw)
            images.append(framed(image, stream.header))
        return images

    def decode_latent(
        self, bitstreams: Sequence[bytes], *, states: int | None = None
    ) -> list[npt.NDArray[np.float16]]:
        return [
            self._decode_latents(data, states)[1].y_MIJ.astype(np.float16) for data in bitstreams
        ]

    def measure(self, originals: Sequence[Image], decoded: Sequence[Image]) -> list[Quality]:
        return measure(originals, decoded)

    def encode_latents(
        self,
        latents: Latents,
        *,
        width: int,
        height: int,
        tags: Sequence[str] = (),
        exif_orientation: int = 1,
        is_grey: bool = False,
    ) -> bytes:
        """The stream of a picture of which only the latents are there.

        Args:
            latents: of the whole picture, padded to cells of 64 pixels; rounded or not.
            width: pixels without the padding.
            height: the same.
            tags: as in :meth:`encode`, like the others.
            exif_orientation: of the source.
            is_grey: whether the source had one channel.

        Raises:
            EncodeError: a latent is not finite or is beyond what symbols reach, or the stream does
                not decode to what was encoded.
            ValueError: the latents are of another size, or a tag is not fit for a stream.
        """
        header = Header(
            codec_id=self.codec_id,
            width=width,
            height=height,
            exif_orientation=exif_orientation,
            is_grey=is_grey,
            num_states=1,
        )
        cells = (-(-height // ALIGNMENT), -(-width // ALIGNMENT))
        if latents.z_NKL.shape[1:] != cells:
            found = latents.z_NKL.shape[1:]
            raise ValueError(f"{found} cells for {width}x{height} pixels, wanted {cells}")
        coded = self._encode_latents(latents, header, tags)
        for given, kept in zip(latents, coded.latents, strict=True):
            if np.abs(given - kept).max() > MAX_ROUNDING:
                raise EncodeError("a latent is beyond the symbols of a stream")
        return coded.data

    def import_official(self, stream: OfficialStream, *, width: int, height: int) -> bytes:
        """Our stream of the picture that a file of the official program holds.

        The symbols are decoded with the official float path and coded again with the exact one; no
        picture is drawn. The tags are the words of the checkpoint's vocabulary with these numbers.

        Args:
            stream: as :func:`~dicmh_ray.codec.icmh.official.parse_official` gives it.
            width: pixels of the picture; the file knows them rounded up to multiples of 64.
            height: the same.

        Raises:
            InvalidHeaderError: a picture of this size has a stream of another.
            TagsError: a tag's number is not in the vocabulary, given twice, or there are too many.
            TruncatedBitstreamError, SymbolError: a string is damaged, or was written by other
                weights, or where scales came out otherwise.
            EncodeError: a symbol is beyond what our streams hold.
        """
        stream.check_size(width, height)
        tags = tags_of_official(stream.tag_ids, self._vocabulary)
        with torch.autocast(self._device.type, enabled=False):
            latents = latents_of_official(stream, self._official_coder())
        return self.encode_latents(latents, width=width, height=height, tags=tags)

    def export_official(self, data: bytes) -> bytes:
        """The file of the official program for one of our streams.

        It holds the padded picture, with neither its size nor its orientation. A stream without tags
        gives a file without a tag part: the official program fails on an empty one.

        Raises:
            BitstreamError: the stream is damaged.
            CodecMismatchError: another checkpoint wrote it.
            TagsError: a tag has no number in the official list; it is named.
            EncodeError: a symbol is too large for the official coder, or they are too few.
        """
        stream, latents = self._decode_latents(data, None)
        tag_ids = official_of_tags(stream.tags, self._vocabulary)
        with torch.autocast(self._device.type, enabled=False):
            official = official_of_latents(latents, self._official_coder(), tag_ids=tag_ids)
        return write_official(official)

    def _official_coder(self) -> LatentCoder:
        """The latent coder with compressai's tables, built when they are first wanted."""
        if not self._has_official_tables:
            self._parts.latent_coder.update_tables()
            self._has_official_tables = True
        return self._parts.latent_coder

    def _encode_one(self, image: Image, tags: Sequence[str], exif_orientation: int) -> bytes:
        """Code a picture's latents, and decode them again to be sure."""
        header = header_of(
            image, codec_id=self.codec_id, exif_orientation=exif_orientation, num_states=1
        )
        coded = self._encode_latents(self._analyse(image), header, tags)
        if image.shape[0] * image.shape[1] <= MAX_REMEMBERED:
            self._verified.append((coded.data, coded.latents))
        return coded.data

    def _encode_latents(self, latents: Latents, header: Header, tags: Sequence[str]) -> _Coded:
        """Code latents, rounded or not, and decode them again to be sure."""
        y_MIJ, z_NKL = latents
        places = list(tiles(z_NKL.shape[1:], size=TILE))
        coded = [
            self._exact.encode(
                np.ascontiguousarray(y_MIJ[:, _times4(rows), _times4(columns)]),
                np.ascontiguousarray(z_NKL[:, rows, columns]),
            )
            for rows, columns in places
        ]
        state = State(
            join_tiles([tile.payload for tile in coded]),
            _join_crcs([tile.symbol_crc for tile in coded]),
        )
        data = write_bitstream(header, tags, [state], vocabulary=self._vocabulary)
        _, decoded = self._decode_latents(data, None)
        for tile, (rows, columns) in zip(coded, places, strict=True):
            decoded_y = decoded.y_MIJ[:, _times4(rows), _times4(columns)]
            decoded_z = decoded.z_NKL[:, rows, columns]
            if not (
                np.array_equal(decoded_y, tile.y_hat) and np.array_equal(decoded_z, tile.z_hat)
            ):
                raise EncodeError("the stream does not decode to the latents that were encoded")
        return _Coded(data, decoded)

    def _analyse(self, image: Image) -> Latents:
        """Latents of a picture before they are rounded."""
        config = self._parts.config.latent_coder
        rows, columns = (-(-side // ALIGNMENT) for side in image.shape[:2])
        bottom, right = rows * ALIGNMENT - image.shape[0], columns * ALIGNMENT - image.shape[1]
        y_MIJ = np.empty((config.y_channels, 4 * rows, 4 * columns), np.float32)
        z_NKL = np.empty((config.z_channels, rows, columns), np.float32)
        padded = np.pad(image, ((0, bottom), (0, right), (0, 0)), "edge")
        with torch.inference_mode(), torch.autocast(self._device.type, enabled=False):
            for down in windows(rows, size=WINDOW, margin=ENCODE_MARGIN):
                for across in windows(columns, size=WINDOW, margin=ENCODE_MARGIN):
                    region = padded[down.outer(ALIGNMENT), across.outer(ALIGNMENT)]
                    x = torch.from_numpy(np.ascontiguousarray(region)).to(self._device)
                    x_B3HW = x.permute(2, 0, 1)[None].float() / 255
                    ref_BChw = self._parts.vae.encode(2 * x_B3HW - 1)
                    y_BMij, z_BNkl = self._parts.latent_coder.analyse(x_B3HW, ref_BChw)
                    y = y_BMij[0, :, down.inner(4), across.inner(4)]
                    z = z_BNkl[0, :, down.inner(1), across.inner(1)]
                    y_MIJ[:, down.whole(4), across.whole(4)] = y.cpu().numpy()
                    z_NKL[:, down.whole(1), across.whole(1)] = z.cpu().numpy()
        return Latents(y_MIJ, z_NKL)

    def _decode_latents(self, data: bytes, states: int | None) -> tuple[Bitstream, Latents]:
        """The parsed stream, and its latents: those remembered, or decoded now."""
        header = read_header(data)  # before the tags: another checkpoint has other words
        if header.codec_id != self.codec_id[:16]:
            raise CodecMismatchError(self.codec_id[:16], header.codec_id)
        if header.num_states != 1:
            raise InvalidHeaderError("state count", header.num_states, "1")
        if states is not None and states < 1:
            raise ValueError(f"states is {states}, wanted 1 or more")
        stream = parse_bitstream(data, vocabulary=self._vocabulary)
        for whole, latents in self._verified:
            if whole == data:
                return stream, latents
        config = self._parts.config.latent_coder
        shape = (-(-header.height // ALIGNMENT), -(-header.width // ALIGNMENT))
        places = list(tiles(shape, size=TILE))
        payloads = split_tiles(stream.states[0].payload, len(places), "state 0")
        y_MIJ = np.empty((config.y_channels, 4 * shape[0], 4 * shape[1]), np.float32)
        z_NKL = np.empty((config.z_channels, *shape), np.float32)
        crcs = []
        for payload, (rows, columns) in zip(payloads, places, strict=True):
            grid = (4 * (rows.stop - rows.start), 4 * (columns.stop - columns.start))
            decoded = self._exact.decode(payload, grid)
            y_MIJ[:, _times4(rows), _times4(columns)] = decoded.y_hat
            z_NKL[:, rows, columns] = decoded.z_hat
            crcs.append(decoded.symbol_crc)
        if _join_crcs(crcs) != stream.states[0].symbol_crc:
            raise SymbolError("state 0", "symbols do not match their checksum")
        return stream, Latents(y_MIJ, z_NKL)

    def _estimate(self, latents: Latents) -> Tensor:
        """The estimate of the scaled VAE latent, ``[1, C, h, w]``."""
        config = self._parts.config.latent_coder
        rows, columns = latents.z_NKL.shape[1:]
        c_BChw = torch.empty(1, config.latent_channels, 8 * rows, 8 * columns, device=self._device)
        for down in windows(rows, size=WINDOW, margin=DECODE_MARGIN):
            for across in windows(columns, size=WINDOW, margin=DECODE_MARGIN):
                y = torch.from_numpy(latents.y_MIJ[:, down.outer(4), across.outer(4)])
                z = torch.from_numpy(latents.z_NKL[:, down.outer(1), across.outer(1)])
                found = self._parts.latent_coder.estimate(
                    y[None].to(self._device), z[None].to(self._device)
                )
                c_BChw[..., down.whole(8), across.whole(8)] = found[
                    ..., down.inner(8), across.inner(8)
                ]
        return c_BChw

    def _restore(self, c_BChw: Tensor, stream: Bitstream) -> Tensor:
        """The diffusion sampler's latent, guided by the decoded one and the tags."""
        restorer, text = self._human_parts()
        texts = [tags_text(stream.tags), ""]
        context_BTD, empty_BTD = text.embed(texts).chunk(2)
        return self._sampler.draw(
            TiledUNet(restorer),
            shape=tuple(c_BChw.shape),
            context_BTD=context_BTD,
            empty_context_BTD=empty_BTD,
            hint_BChw=c_BChw,
            noise=StreamNoise(
                [stream.states[0].payload], c_BChw.shape[1], self._normals, self._device
            ),
        )

    def _human_parts(self) -> tuple[ControlledUNet, TextEncoder]:
        """Restorer and text encoder, read when they are first wanted: they are the largest parts."""
        if self._parts.restorer is None:
            load_human_parts(self._checkpoint, self._parts)
            for module in self._parts.modules().values():
                module.to(self._device)
        return self._parts.generative()

    def _pixels(self, z_BChw: Tensor) -> Image:
        """A scaled latent -> uint8 ``[H, W, 3]``, padding included."""
        x_B3HW = decode_tiled(self._parts.vae, z_BChw)
        samples = ((x_B3HW[0] + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
        image: Image = samples.permute(1, 2, 0).cpu().numpy()
        return image


def load_icmh_codec(
    content: Checkpoint, *, device: str = "auto", threads: int | None = None
) -> IcmhCodec:
    """Load a checkpoint's networks and tables. Else as ``load_codec``."""
    use_threads(threads)
    found = find_device(device)
    return IcmhCodec(content, load_machine_parts(content), found)


def _times4(cells: slice) -> slice:
    """Hyper cells -> cells of y."""
    return slice(4 * cells.start, 4 * cells.stop)


def _join_crcs(crcs: Sequence[int]) -> int:
    """One checksum of the symbols of all tiles."""
    return crc32c(b"".join(crc.to_bytes(4, "little") for crc in crcs))
