"""What a file is, by its first bytes; what it claims to be, by its extension."""

IMAGE_EXTENSIONS = frozenset(
    [
        "avif",
        "avifs",
        "bmp",
        "dib",
        "gif",
        "heic",
        "heics",
        "heif",
        "heifs",
        "hif",
        "j2c",
        "j2k",
        "jfif",
        "jif",
        "jp2",
        "jpe",
        "jpeg",
        "jpf",
        "jpg",
        "jpx",
        "jxl",
        "apng",
        "pbm",
        "pfm",
        "pgm",
        "png",
        "pnm",
        "ppm",
        "tif",
        "tiff",
        "webp",
    ]
)
"""Lower case, without the dot. Kinds the codec does not serve are listed too: they are images, and
images are never lost."""

_PREFIXES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "JPEG2000"),
    (b"\xff\x0a", "JXL"),
    (b"\x00\x00\x00\x0cJXL \r\n\x87\n", "JXL"),
    (b"8BPS\x00", "PSD"),
    (b"v/1\x01", "EXR"),
    (b"#?RADIANCE", "HDR"),
    (b"qoif", "QOI"),
    (b"DDS ", "DDS"),
)
_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})


def sniff_format(data: bytes) -> str | None:
    """Name of the image format whose magic number ``data`` starts with; None for no image.

    Names are Pillow's where Pillow reads the format; "HEIF", "JXL", "PSD", "EXR", "HDR", "QOI",
    "DDS" are recognised so that they can be kept, not read.
    """
    for magic, name in _PREFIXES:
        if data.startswith(magic):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        return _ftyp_format(data)
    if data[:2] in {b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"PF", b"Pf"} and (
        data[2:3] in {b" ", b"\t", b"\n", b"\r", b"\x0b", b"\x0c", b"#"}
    ):
        return "PPM"
    # Two bytes of magic alone would call many a text a bitmap: the header's length must fit too.
    if data[:2] == b"BM" and int.from_bytes(data[14:18], "little") in {
        12,
        16,
        40,
        52,
        56,
        64,
        108,
        124,
    }:
        return "BMP"
    return None


def _ftyp_format(data: bytes) -> str | None:
    """AVIF or HEIF by major brand, else by the compatible brands of the ``ftyp`` box."""
    size = min(int.from_bytes(data[:4], "big"), 256, len(data))
    brands = [data[8:12], *(data[i : i + 4] for i in range(16, size - 3, 4))]
    if any(brand in _AVIF_BRANDS for brand in brands):
        return "AVIF"
    return "HEIF" if any(brand in _HEIF_BRANDS for brand in brands) else None
