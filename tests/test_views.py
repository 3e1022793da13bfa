"""Zero decodes until touched, then one. No torch, no ray."""

import io
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageCms

from dicmh_ray.archive import EncodedImage, create_archive, open_store
from dicmh_ray.errors import (
    ArchiveNotFoundError,
    BitstreamError,
    CodecMismatchError,
    RowNotFoundError,
    UnreadableImageError,
    UnsupportedImageError,
)
from dicmh_ray.pipeline import EncodePolicy
from dicmh_ray.ray_plugin import compress
from dicmh_ray.source import SourceOptions
from dicmh_ray.views import codecs, decode_views, open_archive, picture_of, read_mark, save_picture
from dicmh_ray.views.pictures import reduced
from dicmh_ray.views.saving import mark_of
from tests.archive.rows import CODEC_FILES, kept_row, ok_row, plan_of
from tests.fake_codec import FakeCodec
from tests.small_collections import bmp, picture, write_tar


@pytest.fixture
def codec():
    return FakeCodec()


@pytest.fixture
def archive(tmp_path, codec):
    images = {
        "a": bmp(picture(1)),
        "b": bmp(picture(2, step=1)),
        "broken": b"junk",
        "empty": b"",
    }
    tar = write_tar(tmp_path / "x.tar", images, metadata={"a": {"label": "dog", "n": [1, 2]}})
    compress(
        tar,
        str(tmp_path / "archive"),
        codec=FakeCodec,
        runtime="local",
        failure_budget=1.0,
        source_options=SourceOptions(tag_fields=("label",)),
    )
    return open_archive(str(tmp_path / "archive"), codec=codec)


def test_an_archive_is_a_sequence_that_decodes_nothing(archive, codec):
    assert len(archive) == 4
    assert {view.key for view in archive} == set(archive.keys()) == {"a", "b", "broken", "empty"}
    assert "a" in archive
    assert "c" not in archive
    assert 3 not in archive
    assert archive[0].key == next(iter(archive.keys()))
    assert archive[-1].key == list(archive)[-1].key
    view = archive["a"]
    assert (view.status, view.tags, view.width, view.height) == ("ok", ("dog",), 32, 24)
    assert view.metadata["label"] == "dog"
    assert (view.tier, view.num_states, view.psnr) == ("faithful", 2, 100.0)
    assert view.bpp > 0
    assert view.error is None
    assert view.row.key == "a"
    assert repr(view) == "ImageView('a', ok, 32x24)"
    assert codec.num_decoded == 0


def test_pixels_are_decoded_once_for_each_touch(archive, codec):
    assert (archive["a"].pixels() == picture(1)).all()
    assert codec.num_decoded == 1


def test_fewer_states_give_a_coarser_picture_from_fewer_bytes(archive):
    view = archive["b"]
    coarse = view.pixels(states=1).astype(int)
    assert 0 < abs(coarse - picture(2, step=1)).max() < 64
    assert len(view.bitstream(1)) == view.row.prefix_bytes[0] < len(view.bitstream())
    assert view.bitstream().startswith(archive["b"].bitstream(2))


def test_a_latent_is_float16_with_channels_first(archive):
    latent = archive["a"].latent()
    assert (latent.dtype, latent.shape) == (np.float16, (3, 24, 32))


@pytest.fixture
def twins(tmp_path):
    """Rows of five units; the first four have one key."""
    rows = [
        ok_row("x", tags=("cat",), size=40, psnr=31.0),
        kept_row("x", tags=("cat",), original=b"second"),
        ok_row("x", tags=("dog",), size=50, psnr=33.0),
        kept_row("x", tags=("dog",), original=b"fourth"),
        kept_row("y", original=b"fifth"),
    ]
    units = [f"u{number}" for number in range(len(rows))]
    uri = str(tmp_path / "twins")
    writer = create_archive(uri, plan=plan_of(*units), codec_files=CODEC_FILES)
    for unit, row in zip(units, rows, strict=True):
        writer.commit_unit(unit, [row])
    writer.finalize()
    return open_archive(uri, codec=FakeCodec()), rows


def content(view):
    """What has to be read of a view, all of it lazily."""
    stream = view.bitstream() if view.num_states else b""
    return view.row.psnr, view.tags, stream, view.original


@pytest.mark.parametrize(
    "views",
    [
        lambda archive: archive,
        lambda archive: archive.take(5),
        lambda archive: [archive[number - 5] for number in range(5)],
        lambda archive: sorted(archive.iter(shuffle=1), key=lambda view: view.number),
        lambda archive: [pickle.loads(pickle.dumps(view)) for view in archive],
        lambda archive: archive.view_rows(archive.reader.sample_rows(5, seed=0)),
    ],
    ids=["loop", "take", "position", "shuffled", "pickled", "sample"],
)
def test_rows_with_one_key_are_each_themselves(twins, views):
    archive, rows = twins
    assert [content(view) for view in views(archive)] == [
        (row.psnr, row.tags, row.base + row.detail, row.original) for row in rows
    ]


def test_of_rows_with_one_key_the_key_means_the_first_and_a_filter_those_that_match(twins):
    archive, rows = twins
    assert content(archive["x"])[2] == rows[0].base + rows[0].detail
    assert [view.number for view in archive.get_many(["y", "x"])] == [4, 0]
    dogs = archive.views("'dog' in tags and source_offset is None")
    assert [view.original for view in dogs] == [b"fourth"]
    held = archive.iter("status == 'kept_original'", view="original", batch_size=2)
    assert [view.original for view in held] == [b"second", b"fourth", b"fifth"]


@pytest.mark.parametrize("states", [0, -1, 4])
def test_states_that_are_not_there_are_refused(archive, states):
    with pytest.raises(ValueError, match="has 1 to 3"):
        archive["b"].pixels(states=states)


def test_a_key_that_is_not_there_is_a_key_error(archive):
    with pytest.raises(RowNotFoundError, match="no row with key 'c'"):
        archive["c"]
    with pytest.raises(IndexError):
        archive[4]
    with pytest.raises(TypeError, match="integer"):
        archive[1.0]


def test_a_position_may_be_an_integer_of_numpy(archive):
    assert archive[np.int64(1)].key == archive[1].key
    assert archive[np.int8(-1)].key == archive[-1].key


def test_a_filter_selects_rows(archive):
    assert [view.key for view in archive.views("'dog' in tags")] == ["a"]


def test_a_row_without_a_picture_says_why(archive):
    assert archive["broken"].original == b"junk"
    assert archive["a"].original == b""
    with pytest.raises(UnreadableImageError, match="not an image"):
        archive["broken"].pixels()
    with pytest.raises(UnreadableImageError, match="'empty' holds no picture: unreadable"):
        archive["empty"].pixels()
    with pytest.raises(UnsupportedImageError, match="has no bitstream"):
        archive["broken"].latent()


def test_a_kept_original_shows_its_own_pixels_without_a_codec(tmp_path):
    tar = write_tar(tmp_path / "x.tar", {"a": bmp(picture(1, step=1))})
    policy = EncodePolicy(states=1)
    compress(tar, str(tmp_path / "x"), codec=FakeCodec, runtime="local", policy=policy)
    view = open_archive(str(tmp_path / "x"))["a"]
    assert (view.tier, view.num_states) == ("original", 0)
    assert (view.pixels(states=1) == picture(1, step=1)).all()


def test_a_codec_of_another_archive_is_refused(archive):
    with pytest.raises(CodecMismatchError):
        open_archive(archive.reader.snapshot.uri, codec=FakeCodec("cd" * 32))


def test_where_there_is_no_archive_the_error_says_so(tmp_path):
    with pytest.raises(ArchiveNotFoundError):
        open_archive(str(tmp_path / "nothing"))


def test_a_codec_is_loaded_once_for_each_process(archive, monkeypatch):
    loaded = []

    def load(checkpoint="default", *, device="auto", threads=None):
        loaded.append(checkpoint)
        return FakeCodec()

    monkeypatch.setattr(codecs, "load_codec", load)
    monkeypatch.setattr(codecs, "_loaded_codecs", {})
    uri = archive.reader.snapshot.uri
    first, second = open_archive(uri), open_archive(uri)
    assert loaded == []
    assert (first["a"].pixels() == second["a"].pixels()).all()
    assert first.codec is second.codec
    assert len(loaded) == 1


def test_a_checkpoint_that_is_not_the_archives_is_refused(archive, monkeypatch):
    monkeypatch.setattr(codecs, "load_codec", lambda *_, **__: FakeCodec("cd" * 32))
    monkeypatch.setattr(codecs, "_loaded_codecs", {})
    with pytest.raises(CodecMismatchError):
        open_archive(archive.reader.snapshot.uri)["a"].pixels()


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(Image.new("RGBA", (2, 3), (10, 20, 30, 0))), (255, 255, 255)),
        (encoded(Image.new("RGBA", (2, 3), (10, 20, 30, 254))), (11, 21, 31)),
        (encoded(Image.fromarray(np.full((3, 2), 0x8000, np.uint16))), (128, 128, 128)),
        (encoded(Image.new("CMYK", (2, 3), (0, 0, 0, 255)), "TIFF"), (0, 0, 0)),
        (encoded(Image.new("F", (2, 3), 7.0), "TIFF"), (7, 7, 7)),
    ],
    ids=["transparent", "translucent", "16-bit", "cmyk", "float"],
)
def test_an_original_the_codec_does_not_serve_can_be_shown(data, expected):
    shown = picture_of(data)
    assert (shown.dtype, shown.shape) == (np.uint8, (3, 2, 3))
    assert tuple(shown[0, 0]) == expected


def test_of_an_animation_the_first_frame_is_shown():
    frames = [Image.new("RGB", (2, 3), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert tuple(picture_of(data)[0, 0]) == (255, 0, 0)


def test_a_format_that_is_known_but_not_read_cannot_be_shown():
    heif = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(16)
    with pytest.raises(UnreadableImageError, match="cannot be shown"):
        picture_of(heif)


def test_images_are_found_without_reading_a_part(archive):
    view, other = archive.get_many(["b", "a"])
    assert (view.key, other.key) == ("b", "a")
    assert (view.status, view.width, view.num_states) == ("ok", 32, 3)
    assert other.metadata["label"] == "dog"
    assert [view.key for view in archive.take(2)] == list(archive.keys())[:2]
    assert [view.key for view in archive.take(9, "'dog' in tags")] == ["a"]


def test_a_thumbnail_is_small_and_takes_one_state(archive, codec):
    thumbnail = archive["b"].thumbnail(8)
    assert (thumbnail.dtype, thumbnail.shape) == (np.uint8, (6, 8, 3))
    assert np.array_equal(archive["b"].thumbnail(), archive["b"].pixels(states=1))
    assert codec.num_decoded == 3


@pytest.mark.parametrize(
    ("size", "max_side", "reduction", "shape"),
    [
        ((24, 32), 32, 1, (24, 32)),
        ((24, 33), 32, 1, (23, 32)),
        ((250, 511), 64, 4, (31, 64)),
        ((250, 512), 64, 8, (31, 64)),
        ((4001, 3001), 256, 8, (256, 192)),
        ((8, 8), 1, 8, (1, 1)),
    ],
)
def test_a_thumbnail_is_drawn_as_small_as_the_codec_can(size, max_side, reduction, shape):
    height, width = size
    whole = np.dstack(
        [np.tile(np.linspace(0, 255, width), (height, 1)), np.zeros((height, width, 2))]
    ).astype(np.uint8)
    drawn = []

    class Reducing:
        def decode_reduced(self, bitstreams, reductions, *, states):
            drawn.append((reductions, states))
            edges = ((0, -height % reduction), (0, -width % reduction), (0, 0))
            padded = np.pad(whole, edges, "edge")
            blocks = padded.reshape(len(padded) // reduction, reduction, -1, reduction, 3)
            return [np.rint(blocks.mean((1, 3))).astype(np.uint8)]

    row = EncodedImage(
        key="a", status="ok", width=width, height=height, base=b"stream", prefix_bytes=(6,)
    )
    (small,) = decode_views([row], "thumbnail", codec=Reducing(), max_side=max_side)
    assert drawn == [([reduction], 1)]
    assert small.shape == (*shape, 3)
    direct = reduced(whole, max_side)
    assert np.abs(small.astype(int) - direct).max() <= 4


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_file_says_whether_its_detail_was_generated(archive, tmp_path, suffix):
    for view, generated in (("machine", False), ("human", True)):
        path = tmp_path / f"{view}.{suffix}"
        mark = archive["a"].save(path, view)
        assert mark.is_generated is archive["a"].is_generated(view) is generated
        assert read_mark(path) == read_mark(path.read_bytes()) == mark
        assert ("generated" in mark.note) is generated
        assert archive["a"].row.original_sha256 in mark.note
    with Image.open(tmp_path / f"human.{suffix}") as opened:
        assert opened.size == (32, 24)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_decoded_picture_keeps_the_colour_profile_of_its_samples(archive, suffix):
    row = archive["a"].row
    rgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    grey = rgb[:16] + b"GRAY" + rgb[20:]
    buffer = io.BytesIO()
    save_picture(
        buffer, archive["a"].pixels(), mark_of(replace(row, icc=rgb), "machine"), format=suffix
    )
    with Image.open(buffer) as opened:
        assert opened.info["icc_profile"] == rgb
    assert mark_of(replace(row, icc=grey), "machine").icc is None
    assert mark_of(replace(row, icc=rgb, prefix_bytes=()), "machine").icc is None


@pytest.mark.parametrize(("suffix", "side"), [("webp", 16_384), ("jpg", 65_501)])
def test_a_picture_that_a_format_cannot_hold_is_refused_by_name(archive, suffix, side):
    mark, image = archive["a"].mark(), np.zeros((1, side, 3), np.uint8)
    with pytest.raises(UnsupportedImageError, match=f"{side}x1"):
        save_picture(io.BytesIO(), image, mark, format=suffix)
    with pytest.raises(UnsupportedImageError, match=f"1x{side}"):
        save_picture(io.BytesIO(), image.transpose(1, 0, 2), mark, format=suffix)


def test_a_thumbnail_is_of_as_many_states_as_it_is_asked_for(archive):
    one, three = (archive["b"].thumbnail(states=n) for n in (1, 3))
    assert not np.array_equal(one, three)
    np.testing.assert_array_equal(archive["b"].thumbnail(), one)
    row = next(r for r in archive.reader.rows(blobs=("base", "detail")) if r.key == "b")
    (wanted,) = decode_views([row], "thumbnail", 3, archive.codec)
    np.testing.assert_array_equal(three, wanted)
    for states, wanted in ((None, one), (3, three)):
        buffer = io.BytesIO()
        archive["b"].save(buffer, "thumbnail", states=states, format="png")
        np.testing.assert_array_equal(np.asarray(Image.open(buffer)), wanted)


def test_a_file_can_be_written_to_memory_and_other_formats_are_refused(archive):
    buffer = io.BytesIO()
    archive["a"].save(buffer, "thumbnail", format="webp")
    assert read_mark(buffer.getvalue()) is not None
    with pytest.raises(ValueError, match="format is 'gif'"):
        archive["a"].save(io.BytesIO(), format="gif")
    plain = io.BytesIO()
    Image.new("RGB", (2, 2)).save(plain, "PNG")
    assert read_mark(plain.getvalue()) is None


def test_rows_are_decoded_in_batches_and_each_error_has_its_place(archive, codec):
    rows = {row.key: row for row in archive.reader.rows(blobs=("base", "detail", "original"))}
    chosen = [rows["b"], rows["broken"], rows["a"], rows["empty"]]
    results = decode_views(chosen, "machine", codec=codec, on_error="return")
    assert np.array_equal(results[0], archive["b"].pixels())
    assert np.array_equal(results[2], picture(1))
    assert [type(results[i]) for i in (1, 3)] == [UnreadableImageError, UnreadableImageError]
    with pytest.raises(UnreadableImageError):
        decode_views(chosen, "machine", codec=codec)
    assert decode_views(chosen, "tags")[2] == ("dog",)
    assert decode_views([rows["broken"]], "original") == [b"junk"]
    latents = decode_views([rows["a"]], "latent", codec=lambda: codec)
    assert np.array_equal(latents[0], archive["a"].latent())
    damaged = replace(rows["a"], base=rows["a"].base[:-1] + b"?")
    results = decode_views([rows["b"], damaged], "machine", codec=codec, on_error="return")
    assert isinstance(results[1], BitstreamError)
    with pytest.raises(ValueError, match="view is 'x'"):
        decode_views(chosen, "x")
    with pytest.raises(ValueError, match="a codec is needed"):
        decode_views([rows["a"]], "machine")


def test_a_loop_decodes_only_what_matches_and_only_once(archive, codec):
    (view,) = archive.iter("'dog' in tags", view="machine")
    assert codec.num_decoded == 1
    assert np.array_equal(view.pixels(), picture(1))
    assert codec.num_decoded == 1


def test_a_loop_goes_on_from_its_bookmark(archive):
    loop = archive.iter("status == 'ok'", view="machine", shuffle=2, batch_size=1)
    first = next(loop)
    state = json.loads(json.dumps(loop.state_dict()))
    rest = [view.key for view in loop]
    again = pickle.loads(pickle.dumps(archive)).iter("status == 'ok'", shuffle=2)
    again.load_state_dict(state)
    assert [view.key for view in again] == rest
    assert {first.key, *rest} == {"a", "b"}
    assert len(again) == 2


def test_a_loop_leaves_out_rows_without_a_picture_where_that_was_chosen(archive):
    keys = {view.key for view in archive.iter(view="machine", on_error="skip")}
    assert keys == {"a", "b"}
    assert {fault.key for fault in archive.faults} == {"broken", "empty"}
    with pytest.raises(UnreadableImageError):
        list(archive.iter(view="machine"))
    assert len(list(archive.iter())) == 4


def test_a_loop_that_raised_is_not_at_its_end(archive):
    loop = archive.iter(view="machine")
    with pytest.raises(UnreadableImageError):
        list(loop)
    state = loop.state_dict()
    with pytest.raises(UnreadableImageError):
        next(loop)
    assert loop.state_dict() == state


def test_what_was_decoded_is_read_from_the_cache(archive, codec, tmp_path):
    uri = archive.reader.snapshot.uri
    for _ in range(2):
        again = open_archive(uri, codec=codec, cache=str(tmp_path / "cache"), cache_bytes=10**6)
        assert np.array_equal(again["a"].pixels(), picture(1))
    for part in open_store(uri).list("data/"):
        open_store(uri).delete(part)
    again = open_archive(uri, codec=codec, cache=str(tmp_path / "cache"))
    assert np.array_equal(again["a"].pixels(), picture(1))
