"""Rows with real bitstreams, for the tests of the archive and the reader."""

import hashlib
import json

from dicmh_ray.archive import EncodedImage, Plan
from dicmh_ray.bitstream import Header, State, parse_bitstream, write_bitstream

CODEC_ID = "ab" * 32
CODEC_FILES = {"config.json": b'{"states":3}', "weights/net.safetensors": bytes(range(100))}


def plan_of(*units, **parameters):
    return Plan(
        units=[{"name": unit, "uri": f"{unit}.tar"} for unit in units],
        codec_id=CODEC_ID,
        parameters=parameters,
    )


def ok_row(key, *, tags=(), size=40, num_states=3, base_states=2, **fields):
    """A row with a bitstream of ``num_states`` states of about ``size`` bytes."""
    noise = hashlib.shake_128(key.encode()).digest(size * num_states)
    states = [State(noise[k * size : (k + 1) * size], k) for k in range(num_states)]
    header = Header(codec_id=CODEC_ID, width=16, height=8, num_states=num_states)
    stream = write_bitstream(header, tags, states)
    prefixes = parse_bitstream(stream).prefix_bytes
    cut = prefixes[base_states - 1]
    defaults = {
        "width": 16,
        "height": 8,
        "bpp": 8 * len(stream) / 128,
        "tier": "faithful",
        "psnr": 31.5,
        "worst_tile_psnr": 25.25,
        "num_states": num_states,
        "source_uri": "photos/000.tar",
        "source_offset": 512,
        "original_sha256": hashlib.sha256(key.encode()).hexdigest(),
        "original_bytes": 1000,
        "original_format": "JPEG",
        "metadata": json.dumps({"cls": len(key), "caption": f"picture {key}"}),
    }
    return EncodedImage(
        key=key,
        status="ok",
        tags=tuple(tags),
        prefix_bytes=prefixes,
        base=stream[:cut],
        detail=stream[cut:],
        **(defaults | fields),
    )


def kept_row(key, *, original=None, **fields):
    """A row whose source bytes were kept."""
    original = key.encode() * 7 if original is None else original
    return EncodedImage(
        key=key,
        status="kept_original",
        error="cmyk",
        tier="original",
        original=original,
        original_sha256=hashlib.sha256(original).hexdigest(),
        original_bytes=len(original),
        original_format="JPEG",
        source_uri="photos/000.tar",
        **fields,
    )


def failed_row(key, **fields):
    """A row of a source image that could not be read at all."""
    return EncodedImage(
        key=key, status="failed", error="truncated", source_uri="photos/000.tar", **fields
    )


def mixed_rows(start=0, count=6):
    """Rows of every status, in no useful order."""
    makers = (
        lambda key: ok_row(key, tags=("dog", "grass"), tag_scores=(0.75, 0.5)),
        lambda key: ok_row(key, tags=("cat",), exif=b"Exif\0\0", icc=b"icc"),
        kept_row,
        failed_row,
    )
    return [makers[i % 4](f"img-{start + i:04d}") for i in reversed(range(count))]
