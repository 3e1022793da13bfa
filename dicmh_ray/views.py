"""What a row of an archive can become, on first touch: tags, latent, pixels, original.

    open_archive ─> Archive ── iterate, archive[key] ──> ImageView
                                                          .tags .metadata .psnr ...  no blob is read
                                                          .latent(states)            entropy decode only
                                                          .pixels(view, states)      the picture
                                                          .original                  where it was kept

Nothing is decoded, and no codec loaded, before a view asks for it. A codec is loaded once for each
process, from the installed package when the archive was written with its checkpoint, otherwise
from the archive, which carries its own.
"""

import atexit
import io
import json
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from dicmh_ray.archive import EncodedImage, Snapshot, open_snapshot
from dicmh_ray.codec import ImageCodec, load_codec, read_checkpoint
from dicmh_ray.errors import (
    CodecMismatchError,
    UnreadableImageError,
    UnsupportedImageError,
    WeightsError,
)
from dicmh_ray.reader import ArchiveReader
from dicmh_ray.source import load_pixels

_loaded_codecs: dict[tuple[str, str], ImageCodec] = {}
_codec_lock = threading.RLock()

_codec_folders = ExitStack()
"""Checkpoints taken out of archives. A codec reads some files only when they are needed."""

atexit.register(_codec_folders.close)


def open_archive(
    uri: str,
    *,
    version: int | None = None,
    codec: ImageCodec | None = None,
    device: str = "auto",
    storage_options: Mapping[str, Any] | None = None,
) -> "Archive":
    """Open an archive for reading, finished or not. Reads what lists its parts, nothing else.

    Args:
        uri: its address on any fsspec store.
        version: of the manifest; None is the newest, or the commits of an unfinished archive.
        codec: decodes the streams; None loads the right one when the first picture is wanted.
        device: where that one runs.
        storage_options: passed to fsspec.

    Raises:
        ArchiveNotFoundError: there is no archive there.
        CodecMismatchError: ``codec`` is not the one the archive was written with.
    """
    snapshot = open_snapshot(uri, version=version, storage_options=storage_options)
    if codec is not None and codec.codec_id != snapshot.codec_id:
        raise CodecMismatchError(snapshot.codec_id, codec.codec_id)
    return Archive(snapshot, codec=codec, device=device)


class Archive:
    """A lazy sequence of images.

    ``archive["key"]`` finds one by its key, ``archive[3]`` the fourth in storage order; a loop
    streams all of them in storage order.
    """

    def __init__(
        self, snapshot: Snapshot, *, codec: ImageCodec | None = None, device: str = "auto"
    ) -> None:
        self.reader = ArchiveReader(snapshot)
        self._snapshot = snapshot
        self._codec = codec
        self._device = device
        self._keys: list[str] | None = None

    @property
    def codec_id(self) -> str:
        """SHA-256 of the checkpoint that every stream was written with."""
        return self._snapshot.codec_id

    @property
    def codec(self) -> ImageCodec:
        """The codec, loaded at the first use.

        Raises:
            WeightsError: the archive's checkpoint is missing or damaged.
            CodecMismatchError: it is not the one its name says.
        """
        if self._codec is None:
            self._codec = _load_codec_of(self._snapshot, self._device)
        return self._codec

    def __len__(self) -> int:
        return len(self.reader)

    def __iter__(self) -> Iterator["ImageView"]:
        return self.views()

    def __getitem__(self, key: str | int) -> "ImageView":
        """The image with a key, or at a position.

        Raises:
            RowNotFoundError: no row has this key; it is a KeyError.
            IndexError: the position is beyond the end.
        """
        if isinstance(key, int):
            if self._keys is None:
                self._keys = list(self.reader.keys())
            key = self._keys[key]
        return ImageView(self, self.reader.get(key, blobs=()))

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, str):
            return False
        try:
            self.reader.get(key, blobs=())
        except KeyError:
            return False
        return True

    def keys(self) -> Iterator[str]:
        """All keys, in storage order."""
        return iter(self.reader.keys())

    def views(self, where: str | None = None) -> Iterator["ImageView"]:
        """The images that a filter selects, as :func:`dicmh_ray.reader.parse_where` reads it.

        Raises:
            WhereError: the filter cannot be understood.
        """
        for row in self.reader.rows(where=where, blobs=()):
            yield ImageView(self, row)


class ImageView:
    """One image of an archive, and what it can become.

    The facts are those of :class:`~dicmh_ray.archive.EncodedImage`; a blob is read when it is first
    needed, and only as far as the states asked for.
    """

    def __init__(self, archive: Archive, row: EncodedImage) -> None:
        self._archive = archive
        self.row = row
        """The row without its blobs."""

        self._stream = b""
        self._original: bytes | None = None

    def __repr__(self) -> str:
        size = f"{self.width}x{self.height}" if self.width else "size unknown"
        return f"ImageView({self.key!r}, {self.status}, {size})"

    @property
    def key(self) -> str:
        """Identity in the collection."""
        return self.row.key

    @property
    def status(self) -> str:
        """``ok``, ``kept_original`` or ``failed``."""
        return self.row.status

    @property
    def error(self) -> str | None:
        """Why the status is not ``ok``."""
        return self.row.error

    @property
    def tags(self) -> tuple[str, ...]:
        """Main tag first."""
        return self.row.tags

    @property
    def metadata(self) -> dict[str, Any]:
        """The source's other fields."""
        return cast("dict[str, Any]", json.loads(self.row.metadata))

    @property
    def width(self) -> int | None:
        """Pixels, upright."""
        return self.row.width

    @property
    def height(self) -> int | None:
        """Pixels, upright."""
        return self.row.height

    @property
    def bpp(self) -> float | None:
        """Bits per pixel of the whole stream."""
        return self.row.bpp

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
        return self.row.num_states or 0

    @property
    def original(self) -> bytes:
        """The source's bytes, untouched; ``b""`` where policy did not keep them."""
        if self._original is None:
            self._original = self._archive.reader.get(self.key, blobs=("original",)).original
        return self._original

    def bitstream(self, states: int | None = None) -> bytes:
        """The stream, or the prefix of it that holds the first ``states`` states.

        Raises:
            UnsupportedImageError: the row has no stream; ``pixels`` and ``original`` still work
                where the original was kept.
            ValueError: ``states`` is below 1 or more than there are.
        """
        ends = self.row.prefix_bytes
        if not ends:
            raise UnsupportedImageError(
                f"{self.key!r} has no bitstream, its status is {self.status}: {self.error}"
            )
        wanted = len(ends) if states is None else states
        if not 1 <= wanted <= len(ends):
            raise ValueError(f"states is {states}, {self.key!r} has 1 to {len(ends)}")
        if len(self._stream) < ends[wanted - 1]:
            self._stream = self._archive.reader.bitstream(self.key, wanted)
        return self._stream[: ends[wanted - 1]]

    def latent(self, states: int | None = None) -> npt.NDArray[np.float16]:
        """The latent, float16 ``[C, h, w]``: entropy decode only. Raises as :meth:`bitstream`."""
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
        if self.row.prefix_bytes:
            return self._archive.codec.decode([self.bitstream(states)], view=view)[0]
        if not self.original:
            raise UnreadableImageError(f"{self.key!r} holds no picture: {self.error}")
        return picture_of(self.original)


def picture_of(data: bytes) -> npt.NDArray[np.uint8]:
    """An original as an upright uint8 ``[H, W, 3]`` RGB picture, whatever its kind.

    Raises:
        UnreadableImageError: the bytes are damaged, or no image.
    """
    try:
        return load_pixels(data).image
    except UnsupportedImageError:
        pass  # a sound picture of another kind: it can be shown, only not coded
    try:
        with Image.open(io.BytesIO(data)) as opened:
            return _shown(ImageOps.exif_transpose(opened))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as exc:
        raise UnreadableImageError(f"original cannot be shown: {exc}") from exc


def _shown(image: Image.Image) -> npt.NDArray[np.uint8]:
    if image.mode.startswith("I") or image.mode == "F":
        samples = np.asarray(image, np.float64)
        scale = 1 / 257 if samples.max(initial=0) > 255 else 1
        grey = np.clip(np.rint(samples * scale), 0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _load_codec_of(snapshot: Snapshot, device: str) -> ImageCodec:
    """The codec of an archive: one for each checkpoint and device in a process."""
    with _codec_lock:
        cached = _loaded_codecs.get((snapshot.codec_id, device))
        if cached is not None:
            return cached
        if _packaged_codec_id() == snapshot.codec_id:
            codec = load_codec(device=device)
        else:
            folder = _codec_folders.enter_context(
                tempfile.TemporaryDirectory(prefix="dicmh-codec-")
            )
            for name, content in snapshot.codec_files().items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            codec = load_codec(folder, device=device)
        if codec.codec_id != snapshot.codec_id:
            raise CodecMismatchError(snapshot.codec_id, codec.codec_id)
        _loaded_codecs[snapshot.codec_id, device] = codec
        return codec


def _packaged_codec_id() -> str | None:
    """Of the checkpoint in the package; None in an installation that carries none."""
    try:
        return read_checkpoint().codec_id
    except WeightsError:
        return None
