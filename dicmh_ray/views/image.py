"""One image of an archive, and what it can become."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from dicmh_ray.archive import EncodedImage
from dicmh_ray.errors import UnsupportedImageError
from dicmh_ray.views.decode import (
    THUMBNAIL_SIDE,
    THUMBNAIL_STATES,
    decode_views,
    is_generated,
)
from dicmh_ray.views.saving import PictureMark, mark_of, save_picture

if TYPE_CHECKING:
    from dicmh_ray.views.archive import Archive


class ImageView:
    """One image of an archive, and what it can become.

    The facts are those of :class:`~dicmh_ray.archive.EncodedImage`; a blob is read when it is first
    needed, and only as far as the states asked for.
    """

    def __init__(
        self, archive: "Archive", row: EncodedImage, number: int, *, is_whole: bool = True
    ) -> None:
        """
        Args:
            archive: it belongs to.
            row: with or without blobs.
            number: of the row.
            is_whole: whether the row has every small column, not only those of the index.
        """
        self.number = number
        """Place of the row in storage order, from 0: what is read later is read by it, since two
        rows may have one key."""
        self._archive = archive
        self._row = row
        self._is_whole = is_whole
        self._stream = row.base + row.detail
        self._original: bytes | None = row.original or None
        self._views: dict[tuple[str, int | None], Any] = {}

    def __repr__(self) -> str:
        size = f"{self.width}x{self.height}" if self.width else "size unknown"
        return f"ImageView({self.key!r}, {self.status}, {size})"

    @property
    def row(self) -> EncodedImage:
        """Every small column; read now, if only the index was known. Blobs may be empty."""
        if not self._is_whole:
            self._row = self._archive.reader.read_row(self.number, blobs=())
            self._is_whole = True
        return self._row

    @property
    def key(self) -> str:
        """Identity in the collection."""
        return self._row.key

    @property
    def status(self) -> str:
        """``ok``, ``kept_original`` or ``failed``."""
        return self._row.status

    @property
    def error(self) -> str | None:
        """Why the status is not ``ok``."""
        return self.row.error

    @property
    def tags(self) -> tuple[str, ...]:
        """Main tag first."""
        return self._row.tags

    @property
    def metadata(self) -> dict[str, Any]:
        """The source's other fields."""
        return cast("dict[str, Any]", json.loads(self.row.metadata))

    @property
    def width(self) -> int | None:
        """Pixels, upright."""
        return self._row.width

    @property
    def height(self) -> int | None:
        """Pixels, upright."""
        return self._row.height

    @property
    def bpp(self) -> float | None:
        """Bits per pixel of the whole stream."""
        return self._row.bpp

    @property
    def tier(self) -> str:
        """What the picture may be called: ``faithful``, ``generative``, ``original``, ``none``."""
        return self.row.tier

    @property
    def psnr(self) -> float | None:
        """dB of the machine view, measured when it was written."""
        return self.row.psnr

    @property
    def num_states(self) -> int:
        """States in the stream; 0 without one."""
        return self._row.num_states or 0

    @property
    def original(self) -> bytes:
        """The source's bytes, untouched; ``b""`` where policy did not keep them."""
        if self._original is None:
            row = self._archive.reader.read_row(self.number, blobs=("original",))
            self._original = row.original
        return self._original

    def bitstream(self, states: int | None = None) -> bytes:
        """The stream, or the prefix of it that holds the first ``states`` states.

        Raises:
            UnsupportedImageError: the row has no stream; ``pixels`` and ``original`` still work
                where the original was kept.
            ValueError: ``states`` is below 1 or more than there are.
        """
        ends = self._row.prefix_bytes
        if not ends:
            raise UnsupportedImageError(
                f"{self.key!r} has no bitstream, its status is {self.status}: {self.error}"
            )
        wanted = len(ends) if states is None else states
        if not 1 <= wanted <= len(ends):
            raise ValueError(f"states is {states}, {self.key!r} has 1 to {len(ends)}")
        if len(self._stream) < ends[wanted - 1]:
            row = self._archive.reader.read_row(
                self.number, blobs=("base", "detail"), states=wanted, columns="index"
            )
            self._stream = row.base + row.detail
        return self._stream[: ends[wanted - 1]]

    def latent(self, states: int | None = None) -> npt.NDArray[np.float16]:
        """The latent, float16 ``[C, h, w]``: entropy decode only. Raises as :meth:`bitstream`."""
        held = self._views.get(("latent", states))
        if held is not None:
            return cast("npt.NDArray[np.float16]", held)
        return self._archive.codec.decode_latent([self.bitstream(states)])[0]

    def pixels(self, view: str = "machine", states: int | None = None) -> npt.NDArray[np.uint8]:
        """The picture, uint8 ``[H, W, 3]`` RGB, upright.

        Of a row that kept its original it is the original's picture whatever the arguments say. For
        kinds the codec does not serve it is converted for display: transparency over white, the
        first frame of several, the upper eight of sixteen bits.

        Args:
            view: ``"machine"``: the faithful decode; ``"human"``: detail that the stream does not
                hold is generated, so the picture is for looking at, never evidence or data.
            states: decode from the first ones only; None means all.

        Raises:
            UnreadableImageError: the source could not be read, so there is no picture.
            BitstreamError: the stream is damaged.
            ViewError: the archive's checkpoint does not draw this view.
        """
        held = self._views.get((view, states))
        if held is not None:
            return cast("npt.NDArray[np.uint8]", held)
        if self._row.prefix_bytes:
            return self._archive.codec.decode([self.bitstream(states)], view=view)[0]
        return self._from_original(view)

    def thumbnail(
        self, max_side: int = THUMBNAIL_SIDE, states: int | None = None
    ) -> npt.NDArray[np.uint8]:
        """A small machine view, uint8 ``[h, w, 3]``, no side above ``max_side``.

        It is decoded from the first ``states`` states, None being the first alone, and reads no
        other bytes. Raises as :meth:`pixels`.
        """
        held = self._views.get(("thumbnail", states))
        if held is not None and max_side == THUMBNAIL_SIDE:
            return cast("npt.NDArray[np.uint8]", held)
        if not self._row.prefix_bytes:
            return self._from_original("thumbnail", max_side)
        wanted = THUMBNAIL_STATES if states is None else states
        row = replace(self._row, base=self.bitstream(wanted), detail=b"")
        codec = self._archive.codec
        picture = decode_views([row], "thumbnail", wanted, codec, max_side=max_side)[0]
        return cast("npt.NDArray[np.uint8]", picture)

    def is_generated(self, view: str = "human") -> bool:
        """Whether this picture shows detail that was generated: never evidence or data."""
        return is_generated(self._row, view)

    def mark(self, view: str = "machine") -> PictureMark:
        """What :meth:`save` writes into the metadata of the file."""
        return mark_of(self.row, view)

    def save(
        self,
        file: str | Path | BinaryIO,
        view: str = "machine",
        *,
        states: int | None = None,
        format: str | None = None,
    ) -> PictureMark:
        """Write a picture as PNG, JPEG or WebP. A human view says in its metadata what it is.

        Args:
            file: a path, or a file open for binary writing.
            view: as :meth:`pixels`, or ``"thumbnail"``.
            states: decode from the first ones only; None means all, of a thumbnail the first.
            format: ``png``, ``jpg`` or ``webp``; None takes it from the path's suffix.

        Returns:
            What the file says of itself.

        Raises:
            UnsupportedImageError: the picture is larger than the format can hold.
        """
        image = self.thumbnail(states=states) if view == "thumbnail" else self.pixels(view, states)
        mark = self.mark(view)
        save_picture(file, image, mark, format=format)
        return mark

    def hold(self, view: str, states: int | None, result: Any) -> None:
        """Keep a view that was decoded in a batch: touching it costs nothing then."""
        self._views[view, states] = result

    def _from_original(self, view: str, max_side: int = THUMBNAIL_SIDE) -> npt.NDArray[np.uint8]:
        row = replace(self.row, base=b"", detail=b"", original=self.original)
        picture = decode_views([row], view, max_side=max_side)[0]
        return cast("npt.NDArray[np.uint8]", picture)
