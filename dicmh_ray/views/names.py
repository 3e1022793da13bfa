"""File names of keys: keys are data, never paths."""

import hashlib
import re
from itertools import count

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_UNSAFE_OR_DOT = re.compile(r"[^A-Za-z0-9_-]+")
_MAX_STEM = 100


class FileNames:
    """Turns keys into file names: safe on every file system, unique, the same every time."""

    def __init__(self, *, dots: bool = True) -> None:
        """
        Args:
            dots: whether a stem may have dots; in WebDataset's tars the first one ends it.
        """
        self._taken: set[str] = set()
        self._unsafe = _UNSAFE if dots else _UNSAFE_OR_DOT

    def claim(self, key: str, suffix: str) -> str:
        """A name for the key's file.

        A key that is no plain name, or whose name is taken but for case, gets eight hex digits of
        its SHA-256 behind it; where that is taken too, as by an equal key, the next gets ``-2``.
        """
        stem = self._unsafe.sub("_", key).strip("._-")[:_MAX_STEM]
        if not stem or stem != key or stem.lower() in self._taken:
            stem = f"{stem or 'image'}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
        tries = (stem if number == 1 else f"{stem}-{number}" for number in count(1))
        stem = next(name for name in tries if name.lower() not in self._taken)
        self._taken.add(stem.lower())
        return stem + suffix
