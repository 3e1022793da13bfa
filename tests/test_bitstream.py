"""Bitstream v1: what is written is read back, and whatever else is read has a name for its fault."""

import itertools
import math
import random
import re
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dicmh_ray import bitstream, tags
from dicmh_ray.bitstream import (
    Header,
    State,
    Vocabulary,
    crc32c,
    parse_bitstream,
    prefix_bytes,
    write_bitstream,
)
from dicmh_ray.checksum import crc32c_numpy
from dicmh_ray.errors import (
    BitstreamError,
    ChecksumError,
    InvalidHeaderError,
    NotABitstreamError,
    TruncatedBitstreamError,
    UnsupportedVersionError,
)

SCHEMA = Path(__file__).parents[1] / "schemas" / "bitstream.v1.md"

GOLDEN = bytes.fromhex(
    "4449434d"  # magic
    "01"  # version
    "0d"  # orientation 6 (5), applied (8)
    "0011223344556677"  # codec_id
    "8002e001"  # 640, 480
    "02"  # 2 states
    "0e00"  # 14 bytes of tags:
    "000203646f67076772c3b6c39f65"  # free text, two: "dog", "größe"
    "f21a5180"  # header CRC
    "03000000616263efbeadde1962fb61"  # state 0: "abc", its symbol CRC, CRC
    "00000000000000008ab61583"  # state 1: nothing, symbol CRC, CRC
)
GOLDEN_HEADER_BYTES = 39
GOLDEN_ENDS = (54, 66)

WORDS = Vocabulary(f"word {i}" for i in range(1000))


def a_header(**changes):
    fields = {"codec_id": "00112233445566778899aabbccddeeff" * 2, "width": 64, "height": 48}
    return Header(**{**fields, "num_states": 3, **changes})


tag_texts = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=60).filter(
    lambda text: len(text.encode()) <= 255
)
tag_lists = st.lists(tag_texts, unique=True, max_size=12)
crcs = st.integers(0, 2**32 - 1)
state_lists = st.lists(st.builds(State, st.binary(max_size=300), crcs), min_size=1, max_size=16)


@st.composite
def headers(draw, num_states):
    width = draw(st.integers(1, 65_535))
    return Header(
        codec_id=draw(st.binary(min_size=32, max_size=32)).hex(),
        width=width,
        height=draw(st.integers(1, min(65_535, bitstream.MAX_AREA_PX // width))),
        exif_orientation=draw(st.integers(1, 8)),
        orientation_applied=draw(st.booleans()),
        is_grey=draw(st.booleans()),
        num_states=draw(st.integers(num_states, 16)),
    )


def header_fields(header):
    return {name: getattr(header, name) for name in Header.__slots__ if name != "codec_id"}


# Framing


@given(st.data(), tag_lists, state_lists)
def test_what_is_written_is_read_back(data, tag_list, states):
    header = data.draw(headers(len(states)))
    stream = write_bitstream(header, tag_list, states)
    found = parse_bitstream(stream)
    assert found.header.codec_id == header.codec_id[:16]
    assert header_fields(found.header) == header_fields(header)
    assert found.tags == tuple(tag_list)
    assert found.states == tuple(states)
    assert found.prefix_bytes == prefix_bytes(stream)
    assert found.prefix_bytes[-1] == len(stream)
    assert write_bitstream(found.header, found.tags, found.states) == stream


@given(st.data(), tag_lists, state_lists)
def test_every_prefix_is_the_stream_of_its_states(data, tag_list, states):
    header = data.draw(headers(len(states)))
    stream = write_bitstream(header, tag_list, states)
    for k, end in enumerate(prefix_bytes(stream)):
        assert stream[:end] == write_bitstream(header, tag_list, states[: k + 1])


def test_the_golden_stream_is_written_and_read_as_documented():
    header = Header(
        codec_id="0011223344556677", width=640, height=480, exif_orientation=6, num_states=2
    )
    states = (State(b"abc", 0xDEADBEEF), State(b"", 0))
    assert write_bitstream(header, ["dog", "größe"], states) == GOLDEN
    found = parse_bitstream(GOLDEN)
    assert found.header == header
    assert found.tags == ("dog", "größe")
    assert found.states == states
    assert found.prefix_bytes == GOLDEN_ENDS


def test_the_golden_stream_is_the_example_of_the_schema():
    example = SCHEMA.read_text().partition("## A stream, byte by byte")[2]
    lines = re.findall(r"^    ((?:[0-9A-F]{2} {1,2})+)", example, flags=re.MULTILINE)
    assert bytes.fromhex("".join(lines)) == GOLDEN


def test_a_cut_at_any_byte_is_truncation_except_after_a_state():
    for n in range(len(GOLDEN)):
        if n in GOLDEN_ENDS:
            assert len(parse_bitstream(GOLDEN[:n]).states) == GOLDEN_ENDS.index(n) + 1
            continue
        with pytest.raises(TruncatedBitstreamError) as caught:
            parse_bitstream(GOLDEN[:n])
        section = "header" if n < GOLDEN_HEADER_BYTES else "state 0" if n < 54 else "state 1"
        assert caught.value.section == section
        assert caught.value.found_bytes < caught.value.needed_bytes


def test_a_cut_state_can_be_dropped_but_not_the_first():
    for n in range(GOLDEN_ENDS[0], GOLDEN_ENDS[1]):
        assert len(parse_bitstream(GOLDEN[:n], drop_cut_state=True).states) == 1
    with pytest.raises(TruncatedBitstreamError):
        parse_bitstream(GOLDEN[: GOLDEN_ENDS[0] - 1], drop_cut_state=True)
    changed = GOLDEN[:-1] + b"\0"
    with pytest.raises(ChecksumError):
        parse_bitstream(changed, drop_cut_state=True)


def test_every_flipped_bit_is_noticed():
    for bit in range(8 * len(GOLDEN)):
        changed = bytearray(GOLDEN)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError):
            parse_bitstream(bytes(changed))


@given(st.data(), tag_lists, state_lists)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_damage_to_any_stream_is_noticed(data, tag_list, states):
    stream = write_bitstream(a_header(num_states=16), tag_list, states)
    at = data.draw(st.integers(0, len(stream) - 1))
    to = data.draw(st.integers(0, 255).filter(lambda byte: byte != stream[at]))
    with pytest.raises(BitstreamError):
        parse_bitstream(stream[:at] + bytes([to]) + stream[at + 1 :])


@given(st.binary(max_size=400), st.booleans())
def test_random_bytes_are_a_bitstream_error(data, with_magic):
    data = (GOLDEN[:5] if with_magic else b"") + data
    with pytest.raises(BitstreamError):
        parse_bitstream(data)
    with pytest.raises(BitstreamError):
        prefix_bytes(data)


def test_each_fault_has_its_name():
    with pytest.raises(NotABitstreamError):
        parse_bitstream(b"\xff\xd8\xff\xe0 a JPEG")
    with pytest.raises(NotABitstreamError):
        parse_bitstream(b"x")
    with pytest.raises(TruncatedBitstreamError):
        parse_bitstream(b"")
    with pytest.raises(UnsupportedVersionError):
        parse_bitstream(b"DICM\x02")
    with pytest.raises(ChecksumError) as caught:
        parse_bitstream(GOLDEN[:-14] + b"\0\0" + GOLDEN[-12:])
    assert caught.value.section == "state 0"
    with pytest.raises(InvalidHeaderError, match="trailing bytes"):
        parse_bitstream(GOLDEN + b"\0")


def test_states_of_two_streams_cannot_be_exchanged():
    states = [State(b"one", 1), State(b"two", 2), State(b"six", 3)]
    stream = write_bitstream(a_header(), [], states)
    other = write_bitstream(a_header(width=65), [], states)
    head, first, second, _ = 25, *prefix_bytes(stream)
    assert stream[head:] != other[head:]
    for mixed in (
        other[:head] + stream[head:],
        stream[:head] + stream[first:second] + stream[head:first],
        stream[:first] + stream[second:],
        stream[:first] + stream[head:first] + stream[second:],
    ):
        with pytest.raises(ChecksumError):
            parse_bitstream(mixed)


def sealed(header, payload=b"abc"):
    """A stream of one state with right checksums, so that only the header's content is wrong."""
    state = len(payload).to_bytes(4, "little") + payload + bytes(4)
    crc = crc32c(header)
    sums = [value.to_bytes(4, "little") for value in (crc, crc32c(state, crc))]
    return header + sums[0] + state + sums[1]


@pytest.mark.parametrize(
    ("offset", "value", "field"),
    [
        (5, b"\x20", "flags"),
        (14, b"\0\0", "width"),
        (16, b"\0\0", "height"),
        (14, b"\xff\xff\xff\xff", "area"),
        (18, b"\0", "num_states"),
        (18, b"\x11", "num_states"),
        (19, b"\x01\x10", "tags length"),
    ],
)
def test_a_field_outside_its_range_is_named_though_the_checksum_is_right(offset, value, field):
    header = bytearray(GOLDEN[: GOLDEN_HEADER_BYTES - 4])
    header[offset : offset + len(value)] = value
    with pytest.raises(InvalidHeaderError) as caught:
        parse_bitstream(sealed(bytes(header)))
    assert caught.value.field == field


def test_a_length_is_checked_before_it_is_believed():
    head = GOLDEN[:GOLDEN_HEADER_BYTES]
    with pytest.raises(InvalidHeaderError, match="state 0 length"):
        parse_bitstream(head + (64 * 2**20 + 1).to_bytes(4, "little"))
    with pytest.raises(TruncatedBitstreamError) as caught:
        parse_bitstream(head + (64 * 2**20).to_bytes(4, "little"))
    assert caught.value.needed_bytes == 64 * 2**20 + 8


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 0},
        {"height": 65_536},
        {"width": 32_768, "height": 8_193},
        {"num_states": 0},
        {"num_states": 17},
        {"exif_orientation": 0},
        {"exif_orientation": 9},
        {"codec_id": "AB" * 32},
        {"codec_id": "ab"},
    ],
)
def test_a_header_outside_its_range_cannot_be_made(changes):
    with pytest.raises(ValueError, match="wanted"):
        a_header(**changes)


@pytest.mark.parametrize(
    "states",
    [
        [],
        [State(b"", 0)] * 4,
        [State(b"", -1)],
        [State(b"", 2**32)],
        [State(bytes(64 * 2**20 + 1), 0)],
    ],
    ids=["none", "too many", "negative", "too wide", "too long"],
)
def test_states_outside_their_range_cannot_be_written(states):
    with pytest.raises(ValueError, match="state"):
        write_bitstream(a_header(), [], states)


# Tags


@given(tag_lists, st.sets(st.integers(0, 999), max_size=30))
def test_tags_with_a_vocabulary_come_back_words_first(tag_list, ids):
    words = [WORDS.words[i] for i in ids]
    free = [tag for tag in tag_list if tag not in WORDS.ids]
    given_tags = [*free, *words]
    random.Random(0).shuffle(given_tags)
    section = tags.encode_tags(given_tags, WORDS)
    in_order = [tag for tag in given_tags if tag not in WORDS.ids]
    assert tags.decode_tags(section, WORDS) == (*(WORDS.words[i] for i in sorted(ids)), *in_order)


def test_tags_of_a_vocabulary_cost_their_combinatorial_size():
    section = tags.encode_tags([WORDS.words[i] for i in (5, 17, 400, 401, 999)], WORDS)
    rank_bytes = math.ceil(math.log2(math.comb(1000, 5)) / 8)
    assert len(section) == 1 + 8 + 2 + 1 + rank_bytes + 1


@given(st.integers(1, 300), st.data())
def test_rank_and_unrank_are_inverse(size, data):
    count = data.draw(st.integers(1, min(size, 40)))
    ids = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=count, max_size=count)))
    rank = tags.rank_ids(ids)
    assert 0 <= rank < math.comb(size, count)
    assert tags.unrank_ids(rank, size, count) == ids


def test_ranks_are_a_bijection():
    found = [tags.unrank_ids(rank, 8, 3) for rank in range(math.comb(8, 3))]
    assert len({tuple(ids) for ids in found}) == 56
    assert [tags.rank_ids(ids) for ids in found] == list(range(56))


def test_the_largest_tag_sets_round_trip():
    huge = Vocabulary(f"w{i}" for i in range(65_536))
    words = [huge.words[i] for i in range(0, 65_536, 256)]
    stream = write_bitstream(a_header(), words, [State(b"", 0)], vocabulary=huge)
    assert parse_bitstream(stream, vocabulary=huge).tags == tuple(words)
    letters = Vocabulary("abc")
    assert tags.decode_tags(tags.encode_tags("abc", letters), letters) == ("a", "b", "c")
    assert tags.decode_tags(tags.encode_tags(words)) == tuple(words)


def test_a_missing_or_wrong_vocabulary_is_named():
    stream = write_bitstream(a_header(), ["word 7"], [State(b"", 0)], vocabulary=WORDS)
    assert parse_bitstream(stream, vocabulary=WORDS).tags == ("word 7",)
    assert prefix_bytes(stream) == (len(stream),)
    for other in (None, Vocabulary(["word 7"])):
        with pytest.raises(InvalidHeaderError, match=WORDS.digest[:16]):
            parse_bitstream(stream, vocabulary=other)


@pytest.mark.parametrize(
    "bad",
    [
        [""],
        ["x" * 256],
        ["ä" * 128],
        ["a\nb"],
        ["a\x7f"],
        ["a\x85"],
        ["\ud800"],
        ["same", "same"],
        [str(i) for i in range(257)],
        [f"{i:0250}" for i in range(17)],
    ],
)
def test_tags_outside_their_limits_cannot_be_written(bad):
    with pytest.raises(ValueError, match="tag"):
        write_bitstream(a_header(), bad, [State(b"", 0)])


@pytest.mark.parametrize("words", [[], ["a", "a"], ["a\nb"], [""], map(str, range(65_537))])
def test_a_vocabulary_outside_its_limits_cannot_be_made(words):
    with pytest.raises(ValueError, match=r"vocabulary|tag"):
        Vocabulary(words)


@pytest.mark.parametrize(
    "section",
    [
        b"\x02",  # an unknown form
        b"\x00",  # no count
        b"\x00\x00",  # no tags, said the long way
        b"\x00\x80\x00",  # zero, said the long way
        b"\x00\x81\x00\x01a",  # one, said the long way
        b"\x00\xff\xff\xff\xff\xff\x01",  # a number of six bytes
        b"\x00\xff\xff\xff\xff\x7f",  # more tags than there may be
        b"\x00\x01\xff\xff\xff\xff\x7f",  # a tag longer than all there is
        b"\x00\x01\x00",  # an empty tag
        b"\x00\x01\x02a",  # a cut tag
        b"\x00\x01\x01ab",  # more bytes than tags
        b"\x00\x01\x01\xff",  # not UTF-8
        b"\x00\x01\x03\xed\xa0\x80",  # a surrogate
        b"\x00\x01\x01\n",  # a control character
        b"\x00\x02\x01a\x01a",  # the same twice
        b"\x01",  # no vocabulary digest
    ],
)
def test_a_section_that_breaks_a_rule_is_an_invalid_header(section):
    with pytest.raises(InvalidHeaderError):
        tags.decode_tags(section)
    header = GOLDEN[:19] + len(section).to_bytes(2, "little") + section
    with pytest.raises(InvalidHeaderError):
        parse_bitstream(sealed(header))


@given(st.binary(max_size=60))
def test_any_vocabulary_section_is_tags_or_an_invalid_header(tail):
    letters = Vocabulary("abcdefghij")
    section = b"\x01" + bytes.fromhex(letters.digest[:16]) + tail
    try:
        found = tags.decode_tags(section, letters)
    except InvalidHeaderError:
        return
    assert tags.encode_tags(found, letters) == section


@pytest.mark.parametrize(
    "tail",
    [
        b"\x0b\x01\x00\x00",  # another size
        b"\x0a\x00\x00",  # no word
        b"\x0a\x0b\x00\x00",  # more words than there are
        b"\x0a\x01\x0a\x00",  # a rank too high
        b"\x0a\x01",  # no rank
        b"\x0a\x01\x00",  # no count of free text
        b"\x0a\x01\x00\x01\x01a",  # a word as free text
    ],
)
def test_a_vocabulary_section_that_breaks_a_rule_is_an_invalid_header(tail):
    letters = Vocabulary("abcdefghij")
    with pytest.raises(InvalidHeaderError):
        tags.decode_tags(b"\x01" + bytes.fromhex(letters.digest[:16]) + tail, letters)


# CRC-32C


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),  # the vectors of RFC 3720, B.4
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_crc32c_gives_the_published_values(data, expected):
    assert crc32c(data) == crc32c_numpy(data) == expected


def crc32c_by_definition(data, value=0):
    register = value ^ 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ 0x82F63B78 * (register & 1)
    return register ^ 0xFFFFFFFF


@pytest.mark.parametrize("size", [2047, 2048, 2049, 2051, 4095, 5000, 2**18 + 2051])
def test_crc32c_of_long_input_is_that_of_the_definition(size):
    data = random.Random(size).randbytes(size)
    for value in (0, 0x12345678):
        expected = crc32c_by_definition(data, value)
        assert crc32c(data, value) == crc32c_numpy(data, value) == expected


@given(st.integers(0, 9000), st.lists(st.integers(0, 9000), max_size=4))
@settings(max_examples=40)
def test_crc32c_in_chunks_is_crc32c_of_the_whole(size, cuts):
    data = random.Random(size).randbytes(size)
    value = reference = 0
    edges = sorted({0, size, *(cut for cut in cuts if cut < size)})
    for start, stop in itertools.pairwise(edges):
        value = crc32c_numpy(data[start:stop], value)
        reference = zlib.crc32(data[start:stop], reference)
    assert value == crc32c(data)
    assert reference == zlib.crc32(data)


def test_crc32c_of_a_long_input(benchmark):
    data = bytes(2**21)
    assert benchmark(crc32c_numpy, data) == 0x6CDF7ABE
