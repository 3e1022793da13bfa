"""Word lists that both sides of a stream have: read from a file, or from a checkpoint.

With a vocabulary a stream names its tags by number (:mod:`dicmh_ray.tags`), and a zero-shot tagger
knows what to look for. None is shipped: the 4,585 words of RAM++ that official Diff-ICMH streams
count by come with that project, one word a line, and its file is read here as it is.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from dicmh_ray.errors import VocabularyError
from dicmh_ray.tags import MAX_VOCABULARY_WORDS, Vocabulary

VOCABULARY_FILE = "vocabulary.txt"
"""Of a checkpoint directory that has a vocabulary. Its order is part of every stream."""

MAX_FILE_BYTES = 32 * 2**20


def load_vocabulary(path: str | Path) -> Vocabulary:
    """Read a vocabulary.

    Args:
        path: a text file in UTF-8 with one word a line, or a ``.json`` file with a list of words, or
            a checkpoint directory, whose ``vocabulary.txt`` it is. Line ends may be those of Windows,
            the last may be missing. There are no comments: every line is a word.

    Raises:
        VocabularyError: the file is missing or not of that form; with the number of the line (in
            JSON: of the entry), from 1. A word is 1..255 bytes, has no control characters and no
            space at its ends, and stands there once; there are 1..65,536 of them.
    """
    path = Path(path)
    if path.is_dir():
        path = path / VOCABULARY_FILE
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= MAX_FILE_BYTES else b""
    except OSError as exc:
        raise VocabularyError(str(path), 0, exc.strerror or str(exc)) from exc
    if size > MAX_FILE_BYTES:
        raise VocabularyError(str(path), 0, f"{size} bytes, at most {MAX_FILE_BYTES}")
    if path.suffix == ".json":
        return _checked(_json_words(data, path), path)
    return parse_vocabulary(data, path)


def parse_vocabulary(data: bytes, path: str | Path = VOCABULARY_FILE) -> Vocabulary:
    """The vocabulary that the content of a text file is; see :func:`load_vocabulary`.

    Args:
        data: as a :class:`~dicmh_ray.codec.Checkpoint` has it among its files.
        path: for messages.

    Raises:
        VocabularyError: it is none.
    """
    return _checked(_lines(data, Path(path)), Path(path))


def save_vocabulary(vocabulary: Vocabulary, path: Path) -> None:
    """Write one word a line; :func:`load_vocabulary` gives the same vocabulary back."""
    path.write_bytes("".join(f"{word}\n" for word in vocabulary.words).encode())


def word_ids(words: Iterable[str], vocabulary: Vocabulary) -> tuple[int, ...]:
    """Numbers of words, ascending: what the official container stores in 13 bits each.

    Raises:
        ValueError: a word is not in the vocabulary, or given twice.
    """
    words = list(words)
    if unknown := [word for word in words if word not in vocabulary.ids]:
        raise ValueError(
            f"{unknown[0]!r} is not in the vocabulary of {len(vocabulary.words)} words"
        )
    ids = sorted({vocabulary.ids[word] for word in words})
    if len(ids) != len(words):
        raise ValueError("a word is given twice")
    return tuple(ids)


def words_of_ids(ids: Sequence[int], vocabulary: Vocabulary) -> tuple[str, ...]:
    """The words with these numbers, in their order. Raises ValueError for a number there is not."""
    last = len(vocabulary.words) - 1
    if wrong := [i for i in ids if not 0 <= i <= last]:
        raise ValueError(f"word number {wrong[0]}, the vocabulary has 0..{last}")
    return tuple(vocabulary.words[i] for i in ids)


def _lines(data: bytes, path: Path) -> list[str]:
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    words = []
    for number, line in enumerate(lines, start=1):
        try:
            words.append(line.removesuffix(b"\r").decode())
        except UnicodeDecodeError as exc:
            raise VocabularyError(str(path), number, f"not UTF-8: {exc.reason}") from exc
    return words


def _json_words(data: bytes, path: Path) -> list[str]:
    try:
        words = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise VocabularyError(str(path), 0, f"not JSON: {exc}") from exc
    if not isinstance(words, list):
        raise VocabularyError(
            str(path), 0, f"a JSON {type(words).__name__}, wanted a list of words"
        )
    for number, word in enumerate(words, start=1):
        if not isinstance(word, str):
            raise VocabularyError(str(path), number, f"{word!r} is no text")
    return words


def _checked(words: list[str], path: Path) -> Vocabulary:
    """The vocabulary; each word is tried alone first, so that a fault has a line."""
    if not 1 <= len(words) <= MAX_VOCABULARY_WORDS:
        reason = f"{len(words)} words, wanted 1..{MAX_VOCABULARY_WORDS}"
        raise VocabularyError(str(path), 0, reason)
    seen: dict[str, int] = {}
    for number, word in enumerate(words, start=1):
        if not word:
            raise VocabularyError(str(path), number, "empty")
        if word in seen:
            raise VocabularyError(str(path), number, f"{word!r} is in line {seen[word]} already")
        seen[word] = number
        try:
            Vocabulary([word])
        except ValueError as exc:
            raise VocabularyError(str(path), number, str(exc)) from exc
        if word != word.strip():
            raise VocabularyError(str(path), number, f"{word!r} has a space at an end")
    return Vocabulary(words)
