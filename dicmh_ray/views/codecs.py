"""The codec of an archive: loaded when it is first wanted, once for each process."""

import atexit
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path

from dicmh_ray.archive import Snapshot
from dicmh_ray.codec import ImageCodec, load_codec, read_checkpoint
from dicmh_ray.errors import CodecMismatchError, WeightsError

_loaded_codecs: dict[tuple[str, str], ImageCodec] = {}
_codec_lock = threading.RLock()

_codec_folders = ExitStack()
"""Checkpoints taken out of archives. A codec reads some files only when they are needed."""

atexit.register(_codec_folders.close)


def codec_of(snapshot: Snapshot, *, device: str = "auto", threads: int | None = None) -> ImageCodec:
    """The codec of an archive: one for each checkpoint and device in a process.

    Args:
        snapshot: of the archive.
        device: where it runs; see :func:`dicmh_ray.codec.load_codec`.
        threads: CPU threads of torch and numpy in this process; counts when the codec is first loaded.

    Raises:
        WeightsError: the archive's checkpoint is missing or damaged.
        CodecMismatchError: it is not the one its name says.
    """
    with _codec_lock:
        cached = _loaded_codecs.get((snapshot.codec_id, device))
        if cached is not None:
            return cached
        if _packaged_codec_id() == snapshot.codec_id:
            codec = load_codec(device=device, threads=threads)
        else:
            folder = _codec_folders.enter_context(
                tempfile.TemporaryDirectory(prefix="dicmh-codec-")
            )
            for name, content in snapshot.codec_files().items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            codec = load_codec(folder, device=device, threads=threads)
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
