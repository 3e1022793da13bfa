"""Large outputs: written tensor by tensor, and there when they are whole or not at all."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dicmh_ray.errors import WeightsError

ReportProgress = Callable[[str, int, int], None]
"""Called with what is being done, bytes done and bytes in all."""

_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
}


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    progress: Callable[[str, int], None],
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a ``.safetensors`` file tensor by tensor, sorted by name, and flush it to the disk.

    The library's own writer wants all of them in memory, in their final type, at once.

    Args:
        path: the file.
        tensors: may be views of mapped files.
        progress: called with ``"writing"`` and bytes written.
        dtype: type of the floating-point tensors in the file; None: that they have.

    Raises:
        WeightsError: a value is not finite, or is not in ``dtype``.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in sorted(tensors.items()):
        kind = _stored_type(tensor.dtype, dtype)
        size = tensor.numel() * kind.itemsize
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[kind],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in header:
            flat = tensors[name].to(_stored_type(tensors[name].dtype, dtype))
            # Not reshape: that leaves a single element the stride it has, which may be 0.
            flat = flat.contiguous().as_strided((flat.numel(),), (1,))
            if flat.is_floating_point() and not flat.isfinite().all():
                raise WeightsError(path.stem, f"{name!r} has values that {flat.dtype} has not")
            file.write(flat.view(torch.uint8).numpy().data)
            progress("writing", flat.nbytes)
        flush(file)


def _stored_type(found: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and found.is_floating_point else found


class ByteCount:
    """Sums bytes up for a :data:`ReportProgress`."""

    def __init__(self, report: ReportProgress, total: int) -> None:
        self._report, self._total, self._done = report, total, 0

    def __call__(self, doing: str, num_bytes: int) -> None:
        self._done += num_bytes
        self._report(doing, self._done, self._total)


def check_room(output: Path, num_bytes: int) -> None:
    """Raise a WeightsError unless so many bytes fit where ``output`` shall be."""
    free = shutil.disk_usage(output.absolute().parent).free
    if free < num_bytes:
        raise WeightsError(
            str(output), f"needs {num_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        )


@contextlib.contextmanager
def appears_whole(output: Path) -> Iterator[Path]:
    """A name beside ``output`` to write a file or folder under; takes its place at the end.

    Whatever goes wrong, an interruption included, nothing of it is left.
    """
    partial = output.absolute().with_name(f".{output.name}.{secrets.token_hex(4)}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        if output.exists():
            raise WeightsError(str(output), "appeared meanwhile; nothing was changed")
        partial.rename(output)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)


def flush(file: BinaryIO) -> None:
    """Get what was written onto the disk before the file gets its name."""
    file.flush()
    os.fsync(file.fileno())
