"""The tags section of a bitstream: free text, or numbers of words in a vocabulary both sides have.

A set of n words out of V costs log2 C(V, n) bits, rounded up to bytes: the combinatorial rank of
the set, which is as short as any code that does not know how likely the words are. The contract is
schemas/bitstream.v1.md.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from dicmh_ray.errors import InvalidHeaderError

MAX_TAGS_BYTES = 4096
MAX_TAGS = 256
MAX_TAG_BYTES = 255
MAX_VOCABULARY_WORDS = 65_536

_FREE_TEXT, _VOCABULARY = 0, 1


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A fixed, ordered word list that both sides have, so that a stream names words by number.

    Raises ValueError for a word that could not be a tag, a repeated one, or over 65,536 of them.
    """

    words: tuple[str, ...]

    digest: str = field(init=False)
    """SHA-256 of the words joined by line feeds, 64 hex digits; the first 16 travel."""

    ids: dict[str, int] = field(init=False, repr=False, compare=False)
    """Position of each word in ``words``."""

    def __init__(self, words: Iterable[str]) -> None:
        words = tuple(words)
        if not 1 <= len(words) <= MAX_VOCABULARY_WORDS:
            raise ValueError(f"a vocabulary has 1..{MAX_VOCABULARY_WORDS} words, not {len(words)}")
        for word in words:
            _tag_bytes(word)
        ids = {word: i for i, word in enumerate(words)}
        if len(ids) != len(words):
            raise ValueError("a vocabulary has no word twice")
        object.__setattr__(self, "words", words)
        object.__setattr__(self, "digest", hashlib.sha256("\n".join(words).encode()).hexdigest())
        object.__setattr__(self, "ids", ids)


def encode_tags(tags: Sequence[str], vocabulary: Vocabulary | None = None) -> bytes:
    """The tags section: empty for no tags, else the shortest form the vocabulary allows.

    Raises:
        ValueError: a tag is empty, too long, repeated or has a control character, or they are too
            many. Check tags from untrusted metadata with this before they reach an encoder.
    """
    if not tags:
        return b""
    if len(tags) > MAX_TAGS:
        raise ValueError(f"{len(tags)} tags, at most {MAX_TAGS}")
    if len(set(tags)) != len(tags):
        raise ValueError("a tag appears twice")
    ids = sorted(vocabulary.ids[tag] for tag in tags if tag in vocabulary.ids) if vocabulary else []
    if vocabulary is None or not ids:
        section = bytes([_FREE_TEXT]) + _free_text(tags)
    else:
        size = len(vocabulary.words)
        section = b"".join(
            [
                bytes([_VOCABULARY]),
                bytes.fromhex(vocabulary.digest[:16]),
                _varint(size),
                _varint(len(ids)),
                rank_ids(ids).to_bytes(_rank_bytes(size, len(ids)), "big"),
                _free_text([tag for tag in tags if tag not in vocabulary.ids]),
            ]
        )
    if len(section) > MAX_TAGS_BYTES:
        raise ValueError(f"the tags need {len(section)} bytes, at most {MAX_TAGS_BYTES}")
    return section


def decode_tags(section: bytes, vocabulary: Vocabulary | None = None) -> tuple[str, ...]:
    """The tags of a section: those of the vocabulary by number, then free text as it was given.

    Raises:
        InvalidHeaderError: the section breaks a rule, or names a vocabulary that is not this one.
    """
    if not section:
        return ()
    tags: list[str] = []
    pos = 1
    if section[0] == _VOCABULARY:
        known, pos = _read_ids(section, vocabulary)
        tags += known
    elif section[0] != _FREE_TEXT:
        raise InvalidHeaderError("tags form", section[0], "0 (free text) or 1 (vocabulary)")
    num_free, pos = _read_varint(section, pos)
    if not 1 <= num_free + len(tags) <= MAX_TAGS:
        raise InvalidHeaderError("tag count", num_free + len(tags), f"1..{MAX_TAGS}")
    for _ in range(num_free):
        length, pos = _read_varint(section, pos)
        raw = section[pos : pos + length]
        if len(raw) != length:
            raise InvalidHeaderError("tag length", length, f"at most the {len(raw)} bytes left")
        try:
            tag = raw.decode()
            _tag_bytes(tag)
        except ValueError as exc:  # UnicodeDecodeError is one
            raise InvalidHeaderError("tag", raw, str(exc)) from exc
        if section[0] == _VOCABULARY and vocabulary is not None and tag in vocabulary.ids:
            raise InvalidHeaderError("tag", tag, "a number: it is a word of the vocabulary")
        tags.append(tag)
        pos += length
    if pos != len(section):
        raise InvalidHeaderError("tags length", len(section), f"{pos}: bytes follow the last tag")
    if len(set(tags)) != len(tags):
        raise InvalidHeaderError("tags", tuple(tags), "no tag twice")
    return tuple(tags)


def _read_ids(section: bytes, vocabulary: Vocabulary | None) -> tuple[list[str], int]:
    digest = section[1:9].hex()
    if vocabulary is None or vocabulary.digest[:16] != digest:
        given = f"vocabulary {vocabulary.digest[:16]} was" if vocabulary else "none was"
        raise InvalidHeaderError("tags vocabulary", digest, f"that vocabulary: {given} given")
    size, pos = _read_varint(section, 9)
    count, pos = _read_varint(section, pos)
    if size != len(vocabulary.words):
        raise InvalidHeaderError("tags vocabulary size", size, str(len(vocabulary.words)))
    if not 1 <= count <= min(MAX_TAGS, size):
        raise InvalidHeaderError("tags vocabulary count", count, f"1..{min(MAX_TAGS, size)}")
    end = pos + _rank_bytes(size, count)
    rank = int.from_bytes(section[pos:end], "big")
    if end > len(section) or rank >= math.comb(size, count):
        raise InvalidHeaderError("tags rank", rank, f"{end - pos} bytes, below C({size}, {count})")
    return [vocabulary.words[i] for i in unrank_ids(rank, size, count)], end


def rank_ids(ids: Sequence[int]) -> int:
    """Position of a strictly increasing id set among all sets of its size (colexicographic)."""
    return sum(math.comb(c, i) for i, c in enumerate(ids, start=1))


def unrank_ids(rank: int, size: int, count: int) -> list[int]:
    """The strictly increasing ``count`` ids below ``size`` that have this rank."""
    ids = []
    high = size
    for i in range(count, 0, -1):
        low = i - 1  # the largest c with C(c, i) <= rank is in [low, high)
        while high - low > 1:
            middle = (low + high) // 2
            if math.comb(middle, i) <= rank:
                low = middle
            else:
                high = middle
        rank -= math.comb(low, i)
        ids.append(low)
        high = low
    return ids[::-1]


def _rank_bytes(size: int, count: int) -> int:
    return ((math.comb(size, count) - 1).bit_length() + 7) // 8


def _free_text(tags: Sequence[str]) -> bytes:
    raws = [_tag_bytes(tag) for tag in tags]
    return _varint(len(raws)) + b"".join(_varint(len(raw)) + raw for raw in raws)


def _tag_bytes(tag: str) -> bytes:
    try:
        raw = tag.encode()
    except UnicodeEncodeError as exc:
        raise ValueError(f"tag {tag!r} is not valid Unicode") from exc
    if not 1 <= len(raw) <= MAX_TAG_BYTES:
        raise ValueError(f"tag {tag[:20]!r} has {len(raw)} bytes, wanted 1..{MAX_TAG_BYTES}")
    if any(ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0 for c in tag):
        raise ValueError(f"tag {tag!r} has a control character")
    return raw


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    out.append(n)
    return bytes(out)


def _read_varint(section: bytes, pos: int) -> tuple[int, int]:
    """A LEB128 number of at most 5 bytes, and where it ends; one spelling per number."""
    n = 0
    for i in range(5):
        if pos + i >= len(section):
            raise InvalidHeaderError("tags length", len(section), "more: a number is cut off")
        byte = section[pos + i]
        n |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            if byte == 0 and i > 0:
                break
            return n, pos + i + 1
    raise InvalidHeaderError("tags number", section[pos : pos + 5], "the shortest LEB128 form")
