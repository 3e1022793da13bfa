"""Every kind of picture: exact pixels, or the right reason, and never a warning or a crash."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile

from dicmh_ray.errors import SourceImageError, UnreadableImageError, UnsupportedImageError
from dicmh_ray.source import load_pixels
from tests.source.pictures import encoded, exif_block, jpeg, photo, png_chunks, png_file, raw_png

PHOTO = photo()
GREY = PHOTO[..., 1]


def reason(data: bytes, **options: int) -> tuple[str, str]:
    with pytest.raises(SourceImageError) as caught:
        load_pixels(data, **options)
    kind = "unsupported" if isinstance(caught.value, UnsupportedImageError) else "unreadable"
    return kind, caught.value.reason


def palette_image(colours: list[tuple[int, int, int]]) -> Image.Image:
    image = Image.fromarray((np.arange(24 * 32).reshape(24, 32) % len(colours)).astype(np.uint8))
    image.putpalette([value for colour in colours for value in colour])
    return image


RED_BLUE = palette_image([(255, 0, 0), (0, 0, 255), (9, 8, 7)])
GREYS = palette_image([(0, 0, 0), (100, 100, 100), (255, 255, 255)])


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("PNG", {"optimize": True}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_adobe_deflate"}),
        ("PPM", {}),
        ("JPEG2000", {"irreversible": False}),
    ],
)
def test_lossless_formats_give_exactly_the_pixels_that_went_in(format, options):
    pixels = load_pixels(encoded(PHOTO, format, **options))
    np.testing.assert_array_equal(pixels.image, PHOTO)
    assert pixels.image.dtype == np.uint8
    assert pixels.image.flags.c_contiguous
    assert (pixels.format, pixels.exif_orientation, pixels.is_grey) == (format, 1, False)


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "AVIF", "GIF"])
def test_lossy_formats_give_about_the_picture(format):
    pixels = load_pixels(encoded(PHOTO, format))
    assert pixels.format == format
    assert pixels.image.shape == PHOTO.shape
    assert np.abs(pixels.image.astype(int) - PHOTO).mean() < 12


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM", "BMP"])
def test_grey_becomes_three_equal_channels_exactly(format):
    pixels = load_pixels(encoded(GREY, format))
    np.testing.assert_array_equal(pixels.image, np.repeat(GREY[..., None], 3, 2))
    assert pixels.is_grey


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM", "BMP"])
def test_bilevel_becomes_black_and_white(format):
    bits = GREY > 127
    pixels = load_pixels(encoded(Image.fromarray(bits), format))
    np.testing.assert_array_equal(pixels.image[..., 2], bits * np.uint8(255))
    assert pixels.is_grey


@pytest.mark.parametrize("image", [RED_BLUE, GREYS])
@pytest.mark.parametrize("format", ["PNG", "GIF", "BMP", "TIFF"])
def test_palettes_are_looked_up(image, format):
    pixels = load_pixels(encoded(image, format))
    np.testing.assert_array_equal(pixels.image, np.array(image.convert("RGB")))
    assert pixels.is_grey == (image is GREYS)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_png_of_few_bits_fills_the_range(bits):
    rows = b"".join(b"\x00" + bytes([0x0F] * 4) for _ in range(4))
    pixels = load_pixels(raw_png(32 // bits, 4, bits, 0, rows))
    assert {0, 255} <= set(pixels.image.ravel().tolist())
    assert pixels.is_grey


def test_opaque_alpha_is_dropped_and_real_transparency_is_kept_for_the_original():
    rgba = np.dstack([PHOTO, np.full(PHOTO.shape[:2], 255, np.uint8)])
    la = np.dstack([GREY, rgba[..., 3]])
    for format in ("PNG", "TIFF"):
        np.testing.assert_array_equal(load_pixels(encoded(rgba, format)).image, PHOTO)
        assert load_pixels(encoded(Image.fromarray(la, "LA"), format)).is_grey
    np.testing.assert_array_equal(load_pixels(encoded(rgba, "WEBP", lossless=True)).image, PHOTO)
    rgba[3:12, 4:12, 3] = 9
    la[3, 4, 1] = 0
    assert reason(encoded(Image.fromarray(la, "LA"), "PNG")) == ("unsupported", "alpha")
    for format in ("PNG", "TIFF", "WEBP", "AVIF"):
        assert reason(
            encoded(rgba, format, **({"lossless": True} if format == "WEBP" else {}))
        ) == (
            "unsupported",
            "alpha",
        )


@pytest.mark.parametrize("transparency", [1, b"\xff\x80\xff", b"\xff\x00"])
def test_palette_with_a_transparent_colour_in_use_is_unsupported(transparency):
    data = encoded(RED_BLUE, "PNG", transparency=transparency)
    assert reason(data) == ("unsupported", "alpha")


def test_palette_with_a_transparent_colour_nobody_uses_is_opaque():
    data = encoded(RED_BLUE, "PNG", transparency=b"\xff\xff\xff\x00")
    np.testing.assert_array_equal(load_pixels(data).image, np.array(RED_BLUE.convert("RGB")))


def test_gif_with_a_transparent_colour_in_use_is_unsupported():
    assert reason(encoded(RED_BLUE, "GIF", transparency=0)) == ("unsupported", "alpha")


def test_colour_key_counts_only_where_a_pixel_has_it():
    flat = np.full((4, 4, 3), 7, np.uint8)
    image = Image.fromarray(flat)
    assert reason(encoded(image, "PNG", transparency=(7, 7, 7))) == ("unsupported", "alpha")
    np.testing.assert_array_equal(
        load_pixels(encoded(image, "PNG", transparency=(7, 7, 8))).image, flat
    )
    grey = Image.fromarray(flat[..., 0])
    assert reason(encoded(grey, "PNG", transparency=7)) == ("unsupported", "alpha")
    assert load_pixels(encoded(grey, "PNG", transparency=9)).is_grey


def test_colour_key_of_a_two_bit_png_is_compared_at_the_same_scale():
    rows = b"".join(b"\x00" + b"\xe4" for _ in range(4))
    data = raw_png(4, 4, 2, 0, rows, (b"tRNS", struct.pack(">H", 2)))
    assert reason(data) == ("unsupported", "alpha")


SIXTEEN = (np.arange(24 * 32, dtype=np.uint16).reshape(24, 32) * 80).astype(np.uint16)


def sixteen_bit_png(colour: int) -> bytes:
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    return raw_png(2, 2, 16, colour, (b"\x00" + b"\x12\x34" * channels * 2) * 2)


def tiff_with(bits: int, sample_format: int, channels: int = 1) -> bytes:
    """An uncompressed 4x4 TIFF of the given sample type."""
    entries = [
        (256, 3, 1, 4), (257, 3, 1, 4), (259, 3, 1, 1), (262, 3, 1, 1 if channels == 1 else 2),
        (273, 4, 1, 8), (277, 3, 1, channels), (278, 3, 1, 4),
        (279, 4, 1, 16 * channels * bits // 8), (339, 3, 1, sample_format),
    ]  # fmt: skip
    samples = bytes(16 * channels * bits // 8)
    if channels == 1:
        entries.append((258, 3, 1, bits))
        tail = b""
    else:
        entries.append((258, 3, channels, 8 + len(samples)))
        tail = struct.pack(f"<{channels}H", *[bits] * channels)
    body = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    ifd = 8 + len(samples) + len(tail)
    return (
        b"II*\x00" + struct.pack("<I", ifd) + samples + tail
        + struct.pack("<H", len(entries)) + body + bytes(4)
    )  # fmt: skip


def animation(format: str, **options: object) -> bytes:
    frames = [Image.fromarray(photo(seed=seed)) for seed in range(3)]
    return encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)


def jpeg_frame_patched(offset: int, value: bytes, marker: int = 0xC0) -> bytes:
    """A JPEG whose frame header has other bytes at ``offset`` after the marker."""
    data = bytearray(jpeg())
    start = data.index(bytes([0xFF, 0xC0]))
    data[start + 1] = marker
    data[start + 2 + offset : start + 2 + offset + len(value)] = value
    return bytes(data)


def ycck_jpeg() -> bytes:
    data = encoded(Image.fromarray(PHOTO).convert("CMYK"), "JPEG")
    adobe = data.index(b"Adobe")
    return data[: adobe + 11] + b"\x02" + data[adobe + 12 :]


def multi_picture_jpeg() -> bytes:
    first, second = Image.fromarray(PHOTO), Image.fromarray(photo(seed=1))
    return encoded(first, "MPO", save_all=True, append_images=[second])


def ftyp(brand: bytes) -> bytes:
    return struct.pack(">I", 24) + b"ftyp" + brand + bytes(4) + b"mif1" + brand + bytes(64)


UNSUPPORTED = {
    "16-bit grey PNG": (lambda: encoded(Image.fromarray(SIXTEEN), "PNG"), "16-bit"),
    "16-bit grey PNG by hand": (lambda: sixteen_bit_png(0), "16-bit"),
    "16-bit RGB PNG": (lambda: sixteen_bit_png(2), "16-bit"),
    "16-bit LA PNG": (lambda: sixteen_bit_png(4), "16-bit"),
    "16-bit RGBA PNG": (lambda: sixteen_bit_png(6), "16-bit"),
    "16-bit TIFF": (lambda: encoded(Image.fromarray(SIXTEEN), "TIFF"), "16-bit"),
    "16-bit RGB TIFF": (lambda: tiff_with(16, 1, 3), "16-bit"),
    "32-bit TIFF": (lambda: encoded(Image.fromarray(SIXTEEN.astype(np.int32)), "TIFF"), "32-bit"),
    "float TIFF": (lambda: encoded(Image.fromarray(SIXTEEN.astype(np.float32)), "TIFF"), "float"),
    "16-bit PGM": (lambda: b"P5 2 2 65535\n" + bytes(8), "16-bit"),
    "16-bit PPM": (lambda: b"P6 2 2 65535\n" + bytes(24), "16-bit"),
    "10-bit PPM": (lambda: b"P6 2 2 1023\n" + bytes(24), "16-bit"),
    "PFM": (lambda: b"Pf\n2 2\n-1.0\n" + bytes(16), "float"),
    "16-bit JPEG 2000": (lambda: encoded(Image.fromarray(SIXTEEN), "JPEG2000"), "16-bit"),
    "12-bit JPEG": (lambda: jpeg_frame_patched(2, b"\x0c", 0xC1), "12-bit"),
    "lossless JPEG": (lambda: jpeg_frame_patched(2, b"\x08", 0xC3), "lossless-jpeg"),
    "arithmetic JPEG": (lambda: jpeg_frame_patched(2, b"\x08", 0xC9), "arithmetic-jpeg"),
    "CMYK JPEG": (lambda: encoded(Image.fromarray(PHOTO).convert("CMYK"), "JPEG"), "cmyk"),
    "YCCK JPEG": (ycck_jpeg, "ycck"),
    "CMYK TIFF": (lambda: encoded(Image.fromarray(PHOTO).convert("CMYK"), "TIFF"), "cmyk"),
    "LAB TIFF": (lambda: encoded(lab_image(), "TIFF"), "lab"),
    "multi-picture JPEG": (multi_picture_jpeg, "multi-picture"),
    "wide PNG": (
        lambda: encoded(np.zeros((1, 65_536), np.uint8), "PNG"),
        "side above 65535 pixels",
    ),
    "animated GIF": (lambda: animation("GIF"), "animated"),
    "animated WebP": (lambda: animation("WEBP"), "animated"),
    "animated AVIF": (lambda: animation("AVIF"), "animated"),
    "animated PNG": (lambda: animation("PNG"), "animated"),
    "two-page TIFF": (lambda: animation("TIFF"), "multi-frame"),
    "GIF frame smaller than its screen": (lambda: gif_with_small_frame(), "alpha"),
    "HEIC": (lambda: ftyp(b"heic"), "heif"),
    "JPEG XL": (lambda: b"\xff\x0a" + bytes(50), "jxl"),
    "Photoshop": (lambda: b"8BPS\x00\x01" + bytes(50), "psd"),
    "OpenEXR": (lambda: b"v/1\x01" + bytes(50), "exr"),
    "DDS": (lambda: b"DDS " + bytes(124), "dds"),
}


def lab_image() -> Image.Image:
    transform = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    image = ImageCms.applyTransform(Image.fromarray(PHOTO), transform)
    assert image is not None
    return image


def gif_with_small_frame() -> bytes:
    data = bytearray(encoded(RED_BLUE, "GIF"))
    data[6:10] = struct.pack("<HH", 40, 40)
    return bytes(data)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_kinds_the_codec_does_not_serve_are_named(name):
    make, wanted = UNSUPPORTED[name]
    assert reason(make()) == ("unsupported", wanted)


def bomb_png(width: int, height: int) -> bytes:
    """A few kB that promise and hold width x height bilevel pixels."""
    return raw_png(width, height, 1, 0, bytes((width // 8 + 1) * height))


def lying_jpeg(side: int = 12_000) -> bytes:
    return jpeg_frame_patched(3, struct.pack(">HH", side, side))


def without_chunk(kind: bytes) -> bytes:
    chunks = png_chunks(encoded(PHOTO, "PNG"))
    return png_file(chunk for chunk in chunks if chunk[0] != kind)


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :]


def zero_sized_png() -> bytes:
    return raw_png(0, 0, 8, 2, b"")


def short_idat_png() -> bytes:
    return raw_png(16, 16, 8, 2, (b"\x00" + bytes(48)) * 7)


UNREADABLE = {
    "empty": (lambda: b"", "empty"),
    "one byte": (lambda: b"\xff", "not an image"),
    "html": (lambda: b"<!doctype html><html><body>404</body></html>", "not an image"),
    "text that starts with BM": (lambda: b"BMW is a maker of cars and more", "not an image"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    "pdf": (lambda: b"%PDF-1.7\n", "not an image"),
    "postscript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "zeros": (lambda: bytes(1000), "not an image"),
    "JPEG magic only": (lambda: b"\xff\xd8\xff", "damaged"),
    "JPEG cut in the header": (lambda: jpeg()[:100], "damaged"),
    "JPEG cut in the scan": (lambda: jpeg(0, 200, 200)[:-900], "truncated"),
    "JPEG header that lies": (lying_jpeg, "truncated"),
    "JPEG with zero height": (lambda: jpeg_frame_patched(3, b"\x00\x00"), "damaged"),
    "JPEG without components": (lambda: jpeg_frame_patched(7, b"\x00"), "damaged"),
    "JPEG with zero sampling": (lambda: jpeg_frame_patched(9, b"\x00"), "damaged"),
    "PNG magic only": (lambda: b"\x89PNG\r\n\x1a\n", "truncated"),
    "PNG cut in IDAT": (lambda: encoded(PHOTO, "PNG")[:-40], "truncated"),
    "PNG without IEND": (lambda: encoded(PHOTO, "PNG")[:-12], "truncated"),
    "PNG with a flipped bit": (lambda: flipped(encoded(PHOTO, "PNG"), 200), "damaged"),
    "PNG with too few rows": (short_idat_png, "truncated"),
    "PNG without IHDR": (lambda: without_chunk(b"IHDR"), "damaged"),
    "PNG without IDAT": (lambda: without_chunk(b"IDAT"), "truncated"),
    "PNG of 0x0": (zero_sized_png, "damaged"),
    "PNG of 2^31": (lambda: raw_png(2**31 - 1, 2**31 - 1, 8, 2, b""), "too many pixels"),
    "PNG over the limit": (lambda: raw_png(20_000, 20_000, 8, 2, b""), "too many pixels"),
    "PNG with a text bomb": (
        lambda: raw_png(
            2, 2, 8, 0, bytes(6), (b"zTXt", b"k\x00\x00" + zlib.compress(bytes(2**22)))
        ),
        "damaged",
    ),
    "GIF magic only": (lambda: b"GIF89a", "truncated"),
    "GIF without a frame": (lambda: b"GIF89a\x04\x00\x04\x00\x00\x00\x00;", "truncated"),
    "GIF cut": (lambda: encoded(RED_BLUE, "GIF")[:-30], "truncated"),
    "GIF with a bad block": (lambda: b"GIF89a\x04\x00\x04\x00\x00\x00\x00\x99\x00", "damaged"),
    "GIF over the limit": (
        lambda: b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b","
        + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x00;",
        "too many pixels",
    ),
    "WebP cut": (lambda: encoded(PHOTO, "WEBP")[:-30], "truncated"),
    "WebP magic only": (lambda: b"RIFF\x04\x00\x00\x00WEBP", "truncated"),
    "AVIF cut": (lambda: encoded(PHOTO, "AVIF")[:-60], "truncated"),
    "AVIF magic only": (lambda: ftyp(b"avif"), "damaged"),
    "BMP cut": (lambda: encoded(PHOTO, "BMP")[:-60], "truncated"),
    "TIFF cut": (lambda: encoded(PHOTO, "TIFF")[:60], "damaged"),
    "TIFF magic only": (lambda: b"II*\x00", "damaged"),
    "TIFF that points at itself": (lambda: b"II*\x00\x08\x00\x00\x00" + b"\x01" * 40, "damaged"),
    "PPM cut": (lambda: b"P6 10 10 255\n" + bytes(100), "truncated"),
    "PPM without numbers": (lambda: b"P6 x y z\n", "damaged"),
    "JPEG 2000 cut": (lambda: encoded(PHOTO, "JPEG2000")[:90], "truncated"),
    "JPEG 2000 magic only": (lambda: b"\xff\x4f\xff\x51", "truncated"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_refused_with_a_stable_reason(name):
    make, wanted = UNREADABLE[name]
    assert reason(make()) == ("unreadable", wanted)


def test_interlaced_png_is_measured_pass_by_pass():
    rows = b"\x00\x0a" + b"\x00\x14" + b"\x00\x1e\x28" + b"\x00\x32\x00\x3c" + b"\x00\x46\x50\x5a"
    chunks = png_chunks(raw_png(3, 3, 8, 0, rows))
    header = chunks[0][1][:-1] + b"\x01"
    data = png_file([(b"IHDR", header), *chunks[1:]])
    assert load_pixels(data).image[..., 0].tolist() == [[10, 50, 20], [70, 80, 90], [30, 60, 40]]
    cut = png_file([(b"IHDR", header), (b"IDAT", zlib.compress(rows[:-1])), (b"IEND", b"")])
    assert reason(cut) == ("unreadable", "truncated")


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 50), (65_500, 2), (3, 2000)])
def test_extreme_shapes_are_read(width, height):
    image = np.full((height, width, 3), 99, np.uint8)
    np.testing.assert_array_equal(load_pixels(encoded(image, "PNG")).image, image)
    assert load_pixels(encoded(image, "JPEG")).image.shape == image.shape


def test_a_large_picture_gives_no_warning_where_pillow_would_warn():
    # 90 MP of one bit: over Image.MAX_IMAGE_PIXELS; warnings are errors in this suite.
    data = bomb_png(9_000, 10_000)
    with pytest.raises(Image.DecompressionBombWarning):
        Image.open(io.BytesIO(data))
    assert reason(data, max_pixels=80_000_000) == ("unreadable", "too many pixels")


def test_a_file_is_what_its_bytes_are_and_the_limit_is_inclusive():
    data = encoded(PHOTO, "WEBP", lossless=True)
    assert load_pixels(data, max_pixels=32 * 24).format == "WEBP"
    assert reason(data, max_pixels=32 * 24 - 1) == ("unreadable", "too many pixels")


def stored_as(orientation: int) -> np.ndarray:
    """PHOTO as a camera stores it under an orientation: what undoing it must give PHOTO back."""
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    return np.ascontiguousarray(undo[orientation](PHOTO))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "TIFF-LZW"])
def test_all_eight_orientations_are_applied_once_and_reported(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"TIFF-LZW": {"compression": "tiff_lzw"}, "WEBP": {"lossless": True}}.get(format, {})
    data = encoded(stored_as(orientation), format[:4], exif=exif.tobytes(), **options)
    pixels = load_pixels(data)
    np.testing.assert_array_equal(pixels.image, PHOTO)
    assert pixels.exif_orientation == orientation
    assert pixels.image.flags.c_contiguous


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("format", ["JPEG", "AVIF"])
def test_orientation_of_lossy_formats_agrees_with_pillow(format, orientation):
    data = encoded(stored_as(orientation), format, exif=exif_block(orientation))
    pixels = load_pixels(data)
    assert pixels.exif_orientation == orientation
    assert np.abs(pixels.image.astype(int) - PHOTO).mean() < 12


@pytest.mark.parametrize(
    ("block", "wanted"),
    [
        (exif_block(6, "<"), 6),
        (exif_block(8, ">"), 8),
        (exif_block(0), 1),
        (exif_block(9), 1),
        (exif_block(6, kind=4), 1),
        (b"Exif\x00\x00", 1),
        (b"Exif\x00\x00II*\x00\xff\xff\xff\xff" + bytes(10), 1),
        (b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff" + bytes(30), 1),
        (b"garbage" * 9, 1),
    ],
)
def test_exif_nonsense_means_upright_and_is_kept_verbatim(block, wanted):
    pixels = load_pixels(encoded(PHOTO, "JPEG", exif=block))
    assert pixels.exif_orientation == wanted
    if block.startswith(b"Exif"):
        assert pixels.exif == block


def test_exif_in_imagemagicks_text_form_is_understood():
    block = exif_block(6)
    text = b"Raw profile type exif\x00\nexif\n%8d\n%s\n" % (len(block), block.hex().encode())
    chunks = png_chunks(encoded(stored_as(6), "PNG"))
    pixels = load_pixels(png_file([chunks[0], (b"tEXt", text), *chunks[1:]]))
    assert (pixels.exif_orientation, pixels.exif) == (6, block)
    np.testing.assert_array_equal(pixels.image, PHOTO)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_colour_profiles_are_kept_verbatim_and_not_applied(format):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert load_pixels(encoded(PHOTO, format, icc_profile=profile)).icc == profile
    assert load_pixels(encoded(PHOTO, format)).icc is None


def test_trailing_bytes_do_not_hurt():
    for format in ("JPEG", "PNG", "WEBP"):
        data = encoded(PHOTO, format)
        np.testing.assert_array_equal(
            load_pixels(data + b"garbage" * 9).image, load_pixels(data).image
        )


def test_no_prefix_of_a_jpeg_gives_other_pixels():
    data = jpeg(0, 48, 40)
    whole = load_pixels(data).image
    for length in range(0, len(data), 7):
        try:
            cut = load_pixels(data[:length])
        except UnreadableImageError:
            continue
        np.testing.assert_array_equal(cut.image, whole)


def test_truncated_images_are_never_filled_in():
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


SEEDS = [encoded(PHOTO, f) for f in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000")]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.sampled_from(SEEDS),
    edits=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.integers(0, 2**16),
)
def test_damaged_files_give_pixels_or_a_source_image_error_and_nothing_else(seed, edits, cut):
    data = bytearray(seed)
    for position, value in edits:
        data[position % len(data)] = value
    try:
        pixels = load_pixels(bytes(data[: max(1, cut % (2 * len(data)))]), max_pixels=10**7)
    except SourceImageError as exc:
        found = exc.reason
    else:
        found = pixels.format
        assert pixels.image.dtype == np.uint8
        assert pixels.image.ndim == 3
    assert 0 < len(found) < 40


def test_a_png_whose_exif_follows_its_samples_is_turned_too():
    chunks = png_chunks(encoded(PHOTO, "PNG"))
    block = (b"eXIf", exif_block(6)[6:])
    before, after = (
        load_pixels(png_file([chunks[0], block, *chunks[1:]])),
        load_pixels(png_file([*chunks[:-1], block, chunks[-1]])),
    )
    assert (after.exif_orientation, after.exif) == (6, before.exif)
    np.testing.assert_array_equal(after.image, np.rot90(PHOTO, -1))
    np.testing.assert_array_equal(after.image, before.image)
