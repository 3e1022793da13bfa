"""Tags of a vocabulary as large as that of the official codec: 4,585 words, 13 bits a number there."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicmh_ray.bitstream import Header, State, parse_bitstream, write_bitstream
from dicmh_ray.errors import InvalidHeaderError
from dicmh_ray.tags import MAX_TAGS, Vocabulary, decode_tags, encode_tags

VOCABULARY = Vocabulary(f"word {n}" for n in range(4585))
FIXED_BYTES = 1 + 8 + 2 + 1 + 1
"""Form, digest of the vocabulary, its size, how many words of it, how many free ones."""

id_sets = st.sets(st.integers(0, 4584), max_size=MAX_TAGS)
free_texts = st.sets(
    st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=8),
    max_size=6,
)


@given(id_sets)
def test_any_set_of_words_comes_back_in_the_order_of_the_vocabulary(ids: set[int]) -> None:
    words = [VOCABULARY.words[i] for i in ids]
    section = encode_tags(words, VOCABULARY)
    assert decode_tags(section, VOCABULARY) == tuple(VOCABULARY.words[i] for i in sorted(ids))
    assert encode_tags(words[::-1], VOCABULARY) == section, "order of the words is not coded"
    assert (section == b"") == (not ids)


@given(st.sets(st.integers(0, 4584), max_size=40), free_texts, st.randoms())
def test_words_and_free_text_mix(ids: set[int], free: set[str], random) -> None:
    words, others = [VOCABULARY.words[i] for i in sorted(ids)], sorted(free)
    mixed = [*words, *others]
    random.shuffle(mixed)
    found = decode_tags(encode_tags(mixed, VOCABULARY), VOCABULARY)
    in_order = [tag for tag in mixed if tag in free]
    assert found == (*words, *in_order)


@settings(deadline=None)
@given(st.sets(st.integers(0, 4584), min_size=1, max_size=60))
def test_a_set_costs_its_combinations_and_never_more_than_13_bits_a_word(ids: set[int]) -> None:
    n = len(ids)
    found = len(encode_tags([VOCABULARY.words[i] for i in ids], VOCABULARY)) - FIXED_BYTES
    assert found == math.ceil((math.comb(4585, n) - 1).bit_length() / 8)
    assert found <= math.ceil(13 * n / 8)
    if n >= 4:  # below, whole bytes hide it
        assert 8 * found < 13 * n


@pytest.mark.parametrize(
    ("count", "combinatorial", "packed"), [(1, 2, 2), (5, 7, 9), (8, 11, 13), (20, 23, 33)]
)
def test_bytes_of_typical_sets(count: int, combinatorial: int, packed: int) -> None:
    """The table of docs/tags.md."""
    words = VOCABULARY.words[7 :: 4585 // count][:count]
    assert len(encode_tags(words, VOCABULARY)) - FIXED_BYTES == combinatorial
    assert math.ceil(13 * count / 8) == packed


def test_a_stream_carries_them_and_names_its_vocabulary() -> None:
    header = Header(codec_id="ab" * 32, width=8, height=8, num_states=1)
    words = (*VOCABULARY.words[10:14], "free text")
    stream = write_bitstream(header, words, [State(b"x", 0)], vocabulary=VOCABULARY)
    assert parse_bitstream(stream, vocabulary=VOCABULARY).tags == words
    with pytest.raises(InvalidHeaderError, match="vocabulary"):
        parse_bitstream(stream)
    with pytest.raises(InvalidHeaderError, match="vocabulary"):
        parse_bitstream(stream, vocabulary=Vocabulary(reversed(VOCABULARY.words)))
