"""Vocabularies from files: what is taken, and how a fault is told."""

import json
from pathlib import Path

import pytest

from dicmh_ray.codec.icmh.official import pack_tag_ids
from dicmh_ray.codec.vocabularies import (
    MAX_FILE_BYTES,
    VOCABULARY_FILE,
    load_vocabulary,
    parse_vocabulary,
    save_vocabulary,
    word_ids,
    words_of_ids,
)
from dicmh_ray.errors import InvalidHeaderError, VocabularyError
from dicmh_ray.tags import Vocabulary

WORDS = ("dog", "Border collie", "größe", "# no comment", "t-shirt")


@pytest.mark.parametrize(
    "data",
    [
        "\n".join(WORDS).encode(),
        "\n".join([*WORDS, ""]).encode(),
        "\r\n".join(WORDS).encode(),
        "\n".join(WORDS).encode("utf-8-sig"),
    ],
    ids=["plain", "last line ended", "Windows", "byte order mark"],
)
def test_one_word_a_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes(data)
    assert load_vocabulary(path) == Vocabulary(WORDS)
    assert load_vocabulary(str(path)).digest == Vocabulary(WORDS).digest


def test_a_json_list_and_a_checkpoint_directory_hold_vocabularies(tmp_path: Path) -> None:
    path = tmp_path / "words.json"
    path.write_text(json.dumps(WORDS))
    assert load_vocabulary(path).words == WORDS
    save_vocabulary(Vocabulary(WORDS), tmp_path / VOCABULARY_FILE)
    assert load_vocabulary(tmp_path).words == WORDS


@pytest.mark.parametrize(
    ("data", "line", "reason"),
    [
        (b"dog\ncat\ndog\n", 3, "'dog' is in line 1 already"),
        (b"dog\n\ncat", 2, "empty"),
        (b"dog\ncat\n\n", 3, "empty"),
        (b"dog\n" + b"x" * 256, 2, "has 256 bytes"),
        (b"dog\nc\tat", 2, "control character"),
        (b"dog\n\xc2\x85x", 2, "control character"),
        (b"dog \ncat", 1, "space at an end"),
        (b"dog\nc\xffat", 2, "not UTF-8"),
        (b"", 0, "0 words"),
        (b"\n".join(b"%d" % n for n in range(65_537)), 0, "65537 words"),
    ],
)
def test_a_fault_is_told_with_its_line(tmp_path: Path, data: bytes, line: int, reason: str) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes(data)
    with pytest.raises(VocabularyError) as caught:
        load_vocabulary(path)
    assert caught.value.line == line
    assert reason in caught.value.reason
    assert str(path) in str(caught.value)
    assert (f"line {line}" in str(caught.value)) == (line > 0)


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("{", 0, "not JSON"),
        ('{"dog": 1}', 0, "a JSON dict"),
        ('["dog", 3]', 2, "3 is no text"),
        ('["dog", "dog"]', 2, "already"),
        ('["dog", "\\ud800"]', 2, "not valid Unicode"),
        ('["a\\nb"]', 1, "control character"),
        ("[" * 100_000, 0, "not JSON"),
    ],
)
def test_a_fault_in_json_is_told_with_its_entry(
    tmp_path: Path, text: str, line: int, reason: str
) -> None:
    path = tmp_path / "words.json"
    path.write_text(text)
    with pytest.raises(VocabularyError, match=reason) as caught:
        load_vocabulary(path)
    assert caught.value.line == line


def test_what_is_not_there_or_far_too_large_is_told(tmp_path: Path) -> None:
    with pytest.raises(VocabularyError, match="No such file"):
        load_vocabulary(tmp_path / "nothing.txt")
    with pytest.raises(VocabularyError, match=VOCABULARY_FILE):
        load_vocabulary(tmp_path)
    with open(tmp_path / "large.txt", "wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(VocabularyError, match="bytes, at most"):
        load_vocabulary(tmp_path / "large.txt")


def test_only_line_feeds_end_a_word() -> None:
    """What ``str.splitlines`` takes for line ends may be part of a word."""
    words = ("one\u2028two", "three")
    assert parse_vocabulary("\n".join(words).encode()).words == words
    with pytest.raises(VocabularyError, match=r"vocabulary\.txt, line 2: empty"):
        parse_vocabulary(b"dog\n\ncat")


def test_the_official_13_bits_reach_the_last_word_and_no_further() -> None:
    vocabulary = Vocabulary(f"word {n}" for n in range(4585))
    ids = word_ids(["word 4584", "word 0", "word 77"], vocabulary)
    assert ids == (0, 77, 4584)
    assert words_of_ids(ids, vocabulary) == ("word 0", "word 77", "word 4584")
    assert len(pack_tag_ids(ids)) == 5
    with pytest.raises(ValueError, match=r"4585, the vocabulary has 0\.\.4584"):
        words_of_ids([3, 4585], vocabulary)
    with pytest.raises(InvalidHeaderError, match="4585"):
        pack_tag_ids([4585])
    with pytest.raises(ValueError, match="'word 4585' is not in the vocabulary"):
        word_ids(["word 1", "word 4585"], vocabulary)
    with pytest.raises(ValueError, match="twice"):
        word_ids(["word 1", "word 1"], vocabulary)
