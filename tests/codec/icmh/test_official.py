"""The official container: the reference's bytes, every cut, every odd field."""

import contextlib
import dataclasses
import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dicmh_ray.codec.icmh.exact import ExactEntropyModel
from dicmh_ray.codec.icmh.official import (
    NUM_TAGS,
    OfficialStream,
    pack_tag_ids,
    parse_official,
    unpack_tag_ids,
    write_official,
)
from dicmh_ray.codec.icmh.transcode import latents_of_official, official_of_latents
from dicmh_ray.errors import BitstreamError, InvalidHeaderError, TruncatedBitstreamError
from tests.codec.icmh.small_latent_coder import reference_coder, reference_tensors

WORDS = bytes(range(16))


def a_stream(**changes):
    fields = {"z_shape": (2, 3), "y_string": WORDS, "z_string": WORDS[:8], "tag_ids": (3, 4584)}
    return OfficialStream(**{**fields, **changes})


strings = st.binary(min_size=2, max_size=24).map(lambda data: data * 4)
tag_lists = st.lists(st.integers(0, NUM_TAGS - 1), max_size=40).map(tuple)
streams = st.builds(
    OfficialStream,
    z_shape=st.tuples(st.integers(1, 256), st.integers(1, 256)),
    y_string=strings,
    z_string=strings,
    tag_ids=st.none() | tag_lists,
)


@pytest.fixture(scope="module")
def example(reference):
    return json.loads((reference / "stream.json").read_text())


def test_the_reference_stream_is_parsed_and_written_byte_for_byte(example):
    data = bytes.fromhex(example["stream"])
    stream = parse_official(data)
    assert stream.z_shape == tuple(example["z_shape"])
    assert (len(stream.y_string), len(stream.z_string)) == (example["y_len"], example["z_len"])
    assert stream.tag_ids == tuple(example["tag_ids"])
    assert stream.padded_size == (192, 128)
    assert write_official(stream) == data


def test_the_reference_strings_are_those_of_the_latent_codec(example, reference):
    facts = json.loads((reference / "latent_codec_tiny.json").read_text())
    text = json.dumps(facts)
    stream = parse_official(bytes.fromhex(example["stream"]))
    assert stream.y_string.hex() in text
    assert stream.z_string.hex() in text


def test_the_reference_tags_are_packed_and_unpacked_byte_for_byte(example):
    payload = bytes.fromhex(example["tag_bytes"])
    assert pack_tag_ids(example["tag_ids"]) == payload
    assert unpack_tag_ids(payload, 5) == tuple(example["tag_ids"])


@settings(max_examples=60, deadline=None)
@given(streams)
def test_what_is_written_is_read_back(stream):
    data = write_official(stream)
    assert parse_official(data) == stream
    assert parse_official(data, has_tags=stream.tag_ids is not None) == stream


@settings(max_examples=60, deadline=None)
@given(tag_lists)
def test_tags_survive_in_their_order_in_thirteen_bits_each(ids):
    payload = pack_tag_ids(ids)
    assert len(payload) == -(-13 * len(ids) // 8)
    assert unpack_tag_ids(payload, len(ids)) == ids


@settings(max_examples=30, deadline=None)
@given(streams)
def test_a_file_cut_anywhere_says_which_field_was_cut(stream):
    data = write_official(stream)
    for end in range(len(data)):
        with pytest.raises(TruncatedBitstreamError) as caught:
            parse_official(data[:end], has_tags=stream.tag_ids is not None)
        error = caught.value
        assert error.section
        assert error.found_bytes < error.needed_bytes


def test_the_cut_field_is_named_with_its_need_and_what_is_left():
    data = write_official(a_stream())
    names = {}
    for end in range(len(data)):
        with pytest.raises(TruncatedBitstreamError) as caught:
            parse_official(data[:end], has_tags=True)
        names.setdefault(caught.value.section, (end, caught.value.needed_bytes))
    assert names == {
        "z height": (0, 4),
        "z width": (4, 4),
        "number of strings": (8, 4),
        "length of y": (12, 4),
        "y": (16, 16),
        "length of z": (32, 4),
        "z": (36, 8),
        "number of tags": (44, 4),
        "bits of a tag": (48, 4),
        "length of tags": (52, 4),
        "tags": (56, 4),
    }


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=120))
def test_any_bytes_whatever_are_a_stream_or_a_named_fault(data):
    try:
        stream = parse_official(data)
    except BitstreamError:
        return
    assert write_official(stream) == data


@settings(max_examples=100, deadline=None)
@given(streams, st.data())
def test_a_flipped_bit_gives_another_stream_or_a_named_fault(stream, data):
    content = bytearray(write_official(stream))
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    with contextlib.suppress(BitstreamError):
        assert parse_official(bytes(content)) != stream


def test_a_stream_without_tags_differs_from_one_with_none():
    without, none = write_official(a_stream(tag_ids=None)), write_official(a_stream(tag_ids=()))
    assert none == without + struct.pack(">III", 0, 13, 0)
    assert parse_official(without).tag_ids is None
    assert parse_official(none).tag_ids == ()


def test_a_cut_where_the_tags_start_is_only_seen_by_who_expects_tags():
    data = write_official(a_stream(tag_ids=None))
    assert parse_official(data).tag_ids is None
    with pytest.raises(TruncatedBitstreamError, match="'number of tags'"):
        parse_official(data, has_tags=True)


def test_tags_that_were_not_expected_are_refused():
    with pytest.raises(InvalidHeaderError, match="bytes after the end"):
        parse_official(write_official(a_stream()), has_tags=False)


@pytest.mark.parametrize("extra", [b"\0", bytes(12), b"more"])
def test_trailing_bytes_are_refused(extra):
    with pytest.raises(InvalidHeaderError, match="'bytes after the end' is"):
        parse_official(write_official(a_stream()) + extra)


def test_a_set_of_every_tag_is_carried():
    stream = a_stream(tag_ids=tuple(range(NUM_TAGS)))
    assert parse_official(write_official(stream)) == stream


@pytest.mark.parametrize("wrong", [4585, 8191, -1])
def test_a_tag_outside_the_list_is_refused_when_written(wrong):
    with pytest.raises(InvalidHeaderError, match=r"'tag id' is .*, wanted 0\.\.4584"):
        pack_tag_ids([0, wrong])
    with pytest.raises(InvalidHeaderError, match="'tag id'"):
        a_stream(tag_ids=(wrong,))


@pytest.mark.parametrize("wrong", [4585, 8191])
def test_a_tag_outside_the_list_is_refused_when_read(wrong):
    payload = (wrong << 3).to_bytes(2, "big")
    with pytest.raises(InvalidHeaderError, match=f"'tag id' is {wrong}"):
        unpack_tag_ids(payload, 1)


def test_bits_after_the_last_tag_must_be_zeros():
    with pytest.raises(InvalidHeaderError, match="bits after the last tag"):
        unpack_tag_ids(b"\0\1", 1)


@pytest.mark.parametrize("count", [0, 1, 3, 2**31, 2**32 - 1])
def test_a_number_of_tags_that_does_not_fit_their_bytes_is_refused(count):
    data = write_official(a_stream(tag_ids=None)) + struct.pack(">III", count, 13, 4) + bytes(4)
    with pytest.raises(InvalidHeaderError, match="'length of tags' is 4"):
        parse_official(data)


def test_tags_of_another_width_are_refused():
    data = write_official(a_stream(tag_ids=None)) + struct.pack(">III", 1, 12, 2) + bytes(2)
    with pytest.raises(InvalidHeaderError, match="'bits of a tag' is 12, wanted 13"):
        parse_official(data)


@pytest.mark.parametrize("count", [0, 1, 3, 2**32 - 1])
def test_another_number_of_strings_is_refused(count):
    data = struct.pack(">III", 2, 3, count) + write_official(a_stream())[12:]
    with pytest.raises(InvalidHeaderError, match="number of strings"):
        parse_official(data)


def test_a_length_beyond_the_file_allocates_nothing():
    data = struct.pack(">IIII", 2, 3, 2, 2**32 - 1) + WORDS
    with pytest.raises(TruncatedBitstreamError, match="'y' needs 4294967295 bytes, 16 left"):
        parse_official(data)


@pytest.mark.parametrize(
    ("shape", "field"),
    [((0, 3), "z height"), ((2, 0), "z width"), ((1025, 1), "z height"), ((1024, 1024), "z shape")],
)
def test_a_size_that_no_picture_has_is_refused(shape, field):
    data = struct.pack(">II", *shape) + write_official(a_stream())[8:]
    with pytest.raises(InvalidHeaderError, match=f"'{field}'"):
        parse_official(data)


@pytest.mark.parametrize("string", [b"", WORDS[:4], WORDS[:9]])
def test_strings_that_compressai_would_read_past_are_refused(string):
    with pytest.raises(InvalidHeaderError, match="'length of z'"):
        a_stream(z_string=string)


def test_the_picture_must_be_one_that_pads_to_the_stream():
    stream = a_stream()
    for width, height in [(192, 128), (129, 65), (160, 100)]:
        stream.check_size(width, height)
    for width, height in [(193, 128), (128, 128), (192, 64), (192, 129)]:
        with pytest.raises(InvalidHeaderError, match="z shape"):
            stream.check_size(width, height)


def test_the_reference_stream_becomes_latents_and_the_same_stream_again(example, reference):
    coder = reference_coder(reference)
    coder.update_tables()
    stream = parse_official(bytes.fromhex(example["stream"]))
    latents = latents_of_official(stream, coder)
    again = official_of_latents(latents, coder, tag_ids=stream.tag_ids)
    assert write_official(again) == bytes.fromhex(example["stream"])
    estimate = coder.estimate(*(torch.from_numpy(array)[None] for array in latents))
    decoded = reference_tensors(reference)["codec/decoded"]
    assert torch.allclose(estimate, decoded, rtol=0, atol=1e-4)


def test_an_official_stream_is_carried_over_by_the_exact_model(example, reference):
    coder = reference_coder(reference)
    coder.update_tables()
    tensors = reference_tensors(reference)
    exact = ExactEntropyModel.fit(coder, [(tensors["x"], tensors["ref"])])
    latents = latents_of_official(parse_official(bytes.fromhex(example["stream"])), coder)
    coded = exact.encode(*latents)
    decoded = exact.decode(coded.payload, latents.y_MIJ.shape[1:])
    close = np.abs(decoded.y_hat - latents.y_MIJ) < 0.1
    assert close.mean() > 0.99
    assert np.abs(decoded.z_hat - latents.z_NKL).max() < 1 / 128


def test_a_damaged_official_string_is_an_error_and_no_noise(example, reference):
    coder = reference_coder(reference)
    coder.update_tables()
    stream = parse_official(bytes.fromhex(example["stream"]))
    cut = dataclasses.replace(stream, y_string=stream.y_string[:800])
    with pytest.raises(BitstreamError):
        latents_of_official(cut, coder)
