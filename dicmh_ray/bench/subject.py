"""The picture under test, with everything that is made of it kept until all have looked at it."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dicmh_ray.bench.matching import PeerFiles
from dicmh_ray.bench.peers import Peer
from dicmh_ray.bitstream import prefix_bytes
from dicmh_ray.codec import ImageCodec
from dicmh_ray.errors import (
    EncodeError,
    SourceFormatError,
    SourceImageError,
    SourceNotFoundError,
)
from dicmh_ray.source import load_pixels
from dicmh_ray.vision.onnx_net import Picture

SUFFIXES = (".avif", ".bmp", ".jpeg", ".jpg", ".jxl", ".png", ".ppm", ".tif", ".tiff", ".webp")

Progress = Callable[[int, int, str], None]
"""Called as ``progress(images done, images in all, name of the image just done)``."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """What a reader gets for a number of bytes."""

    image: Picture
    """uint8 ``[H, W, 3]``."""

    num_bytes: int
    encode_s: float
    """For a state, the time of the full stream: the codec writes all states at once."""

    decode_s: float


class Subject:
    """One picture, our stream of it and the peers' files, each made once. For one thread."""

    def __init__(
        self,
        name: str,
        path: Path,
        codec: ImageCodec,
        *,
        peers: Sequence[Peer],
        codec_lock: threading.Lock,
    ) -> None:
        """Read a picture and encode it with our codec.

        Raises:
            SourceImageError: the picture cannot be read.
            EncodeError: our codec cannot encode it.
        """
        self.name, self.path = name, path
        self.num_file_bytes = path.stat().st_size
        self.image = load_pixels(path.read_bytes()).image
        self.peer_files = {peer.name: PeerFiles(peer, self.image) for peer in peers}
        self.metrics: dict[tuple[str, str], dict[str, float]] = {}
        """By method and setting, what was measured already."""

        self._codec, self._codec_lock = codec, codec_lock
        self._views: dict[tuple[int, str], Decoded] = {}
        with codec_lock:
            start = time.perf_counter()
            (self.stream,) = codec.encode([self.image], tags=[()], exif_orientations=[1])
            self.encode_s = time.perf_counter() - start
        self.prefix_bytes = prefix_bytes(self.stream)

    @property
    def num_pixels(self) -> int:
        """H x W of the unpadded picture."""
        return self.image.shape[0] * self.image.shape[1]

    def bpp(self, num_bytes: int) -> float:
        """Bits per pixel."""
        return 8 * num_bytes / self.num_pixels

    def ours(self, state: int, view: str) -> Decoded:
        """What the first ``state`` states show."""
        if (state, view) not in self._views:
            end = self.prefix_bytes[state - 1]
            with self._codec_lock:
                # Nothing: a codec may remember the symbols of what it has just encoded, and a
                # reader, whose time this is, has only the bytes.
                self._codec.encode([], tags=[], exif_orientations=[])
                start = time.perf_counter()
                (image,) = self._codec.decode([self.stream[:end]], view=view)
                decode_s = time.perf_counter() - start
            self._views[state, view] = Decoded(
                image=image, num_bytes=end, encode_s=self.encode_s, decode_s=decode_s
            )
        return self._views[state, view]

    def peer(self, name: str, quality: int) -> Decoded:
        """What a peer shows at a quality."""
        file = self.peer_files[name].file(quality)
        image, decode_s = file.decoded
        return Decoded(
            image=image, num_bytes=len(file.data), encode_s=file.encode_s, decode_s=decode_s
        )

    def peer_match(self, name: str, num_bytes: int) -> tuple[int, bool]:
        """The quality at which a peer costs what ours does, and whether it is over that."""
        match = self.peer_files[name].match(num_bytes)
        return match.file.quality, match.is_over


def find_images(sources: Sequence[str | Path]) -> list[tuple[str, Path]]:
    """The image files named, and those below the folders named, in order of name, each once.

    Returns:
        For each a name of its own (its path inside the folder; its whole path where several
        folders have that) and its path.

    Raises:
        SourceNotFoundError: one of the sources is no image file and holds none.
    """
    found: dict[Path, str] = {}
    for source in map(Path, sources):
        named = {source: source.name} if source.is_file() else {}
        for path in source.rglob("*"):
            if path.suffix.lower() in SUFFIXES and path.is_file():
                named[path] = path.relative_to(source).as_posix()
        if not named:
            raise SourceNotFoundError(str(source))
        found = named | found
    times = Counter(found.values())
    return sorted(
        (name if times[name] == 1 and Path(name) not in found else str(path), path)
        for path, name in found.items()
    )


def can_be_read(path: Path) -> bool:
    """Whether a file is a picture of a kind that codecs are measured on."""
    try:
        load_pixels(path.read_bytes())
    except SourceImageError:
        return False
    return True


def none_coded(skipped: Sequence[tuple[str, str]]) -> SourceFormatError:
    """The error of a set of which nothing is left, with the first one's reason."""
    name, reason = skipped[0]
    return SourceFormatError(
        "pictures", f"none of {len(skipped)} can be coded by every method; {name}: {reason}"
    )


def set_name(sources: Sequence[str | Path]) -> str:
    """What to call a set of pictures: its folder's name, without a last part ``images``."""
    path = Path(sources[0]).resolve()
    path = path.parent if path.is_file() else path
    return path.parent.name if path.name == "images" else path.name


def for_each_picture(
    pictures: Sequence[tuple[str, Path]],
    codec: ImageCodec,
    work: Callable[[Subject], T],
    *,
    peers: Sequence[Peer],
    threads: int,
    progress: Progress | None = None,
) -> tuple[list[T], tuple[tuple[str, str], ...]]:
    """Do some work on every picture, on several at once.

    The codec encodes and decodes for one of them at a time; Pillow's and the nets' libraries run
    beside it, as they let other threads on while they work.

    Returns:
        The results in the order of the pictures, and the pictures that cannot be coded, each with
        its reason.
    """
    codec_lock = threading.Lock()

    def one(name: str, path: Path) -> T:
        return work(Subject(name, path, codec, peers=peers, codec_lock=codec_lock))

    results: dict[str, T] = {}
    skipped: dict[str, str] = {}
    with ThreadPoolExecutor(threads) as pool:
        futures = {pool.submit(one, name, path): name for name, path in pictures}
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                name = futures[future]
                try:
                    results[name] = future.result()
                except (SourceImageError, EncodeError) as exc:
                    skipped[name] = str(exc)
                if progress is not None:
                    progress(done, len(pictures), name)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    in_order = [results[name] for name, _ in pictures if name in results]
    return in_order, tuple((name, skipped[name]) for name, _ in pictures if name in skipped)
