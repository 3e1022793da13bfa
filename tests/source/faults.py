"""A filesystem with weather: local files behind connections that break at chosen bytes."""

from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem


class _BreakingFile:
    """Reads until a scheduled byte, then raises, once for each scheduled byte."""

    def __init__(self, file: Any, fs: "type[FaultyFileSystem]") -> None:
        self._file, self._fs = file, fs

    def read(self, size: int = -1) -> bytes:
        fs = self._fs
        start = self._file.tell()
        due = [at for at in fs.break_at if start <= at < start + size]
        if not due:
            return self._file.read(min(size, fs.max_read_bytes))
        if due[0] > start:
            return self._file.read(due[0] - start)
        fs.num_breaks += 1
        if not fs.is_permanent:
            fs.break_at.remove(due[0])
        if fs.breaks_silently:
            return b""
        raise fs.error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _UnseekableFile(_BreakingFile):
    def seekable(self) -> bool:
        return False

    def seek(self, *_: Any) -> int:
        raise OSError("not seekable")


class FaultyFileSystem(LocalFileSystem):
    """``faulty:///path``; set the class attributes before use, :meth:`calm` resets them."""

    protocol = ("faulty",)
    cachable = False

    break_at: list[int] = []  # noqa: RUF012  # shared on purpose: the code opens its own instances
    num_breaks = 0
    num_opens = 0
    is_permanent = False
    breaks_silently = False
    is_seekable = True
    max_read_bytes = 2**40
    error: Exception = ConnectionResetError("connection reset by peer")

    @classmethod
    def calm(cls) -> None:
        cls.break_at, cls.num_breaks, cls.num_opens = [], 0, 0
        cls.is_permanent = cls.breaks_silently = False
        cls.is_seekable = True
        cls.max_read_bytes = 2**40
        cls.error = ConnectionResetError("connection reset by peer")

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("faulty://"))

    def unstrip_protocol(self, name: str) -> str:
        return f"faulty://{name}"

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        type(self).num_opens += 1
        wrapper = _BreakingFile if self.is_seekable else _UnseekableFile
        return wrapper(super()._open(path, mode, **kwargs), type(self))

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        return self._open(self._strip_protocol(path), mode)


fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
