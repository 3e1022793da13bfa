"""Write the golden streams: ``python -m tests.golden.make_golden``. Never overwrites any.

A released format is read for ever: these files are never made again, only added to.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from dicmh_ray.codec import read_checkpoint
from dicmh_ray.codec.layered_codec import load_layered_codec

GOLDEN = Path(__file__).parent
CHECKPOINTS = {"bitstream_v1": "checkpoint", "layered_payload_v2": "checkpoint_v2"}
"""Folder of streams -> that of the checkpoint that wrote them."""

SIZES = {
    "one_pixel": (1, 1),
    "one_cell": (16, 16),
    "odd": (17, 33),
    "portrait": (90, 61),
    "landscape": (61, 90),
    "two_tiles_wide": (24, 1040),
    "two_tiles_high": (1040, 24),
    "flat": (48, 48),
    "grey": (50, 40),
    "noise": (40, 40),
}


def picture(name: str, height: int, width: int) -> np.ndarray:
    """A fixed synthetic picture, uint8 ``[H, W, 3]``, from integer arithmetic alone."""
    y, x = np.mgrid[:height, :width].astype(np.int64)
    if name == "flat":
        return np.full((height, width, 3), 77, np.uint8)
    if name == "noise":
        state = (x * 2654435761 + y * 40503 + 12345) % 65521
        return np.stack([state % 256, state // 7 % 256, state // 31 % 256], -1).astype(np.uint8)
    image = np.stack([x * 5 + y, 255 - y * 3 - x, (x * y) // 9], -1) % 256
    image[(x // 13 + y // 11) % 4 == 0] //= 3
    if name == "grey":
        image = np.repeat(image[:, :, :1], 3, 2)
    return image.astype(np.uint8)


def digest(symbols: np.ndarray) -> str:
    """SHA-256 of symbols as int16 little-endian in row, column, channel order."""
    return hashlib.sha256(np.ascontiguousarray(symbols, "<i2").tobytes()).hexdigest()


def write(folder: Path, checkpoint: Path) -> None:
    """Encode the pictures and write down what decodes."""
    codec = load_layered_codec(read_checkpoint(checkpoint), device="cpu")
    folder.mkdir()
    streams = {}
    for name, size in SIZES.items():
        tags = ("golden", name) if name != "flat" else ()
        data = codec.encode([picture(name, *size)], tags=[tags], exif_orientations=[1])[0]
        (folder / f"{name}.dicm").write_bytes(data)
        states = []
        for count in range(1, codec.num_states + 1):
            pixels = codec.decode([data], states=count)[0]
            symbols = codec._decode_symbols(data, count)[1]
            states.append({"symbols_sha256": digest(symbols), "mean": float(pixels.mean())})
        streams[name] = {"bytes": len(data), "tags": list(tags), "states": states}
    content = {"codec_id": codec.codec_id, "streams": streams}
    (folder / "expected.json").write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    for folder, checkpoint in CHECKPOINTS.items():
        if not (GOLDEN / folder).exists():
            write(GOLDEN / folder, GOLDEN / checkpoint)


if __name__ == "__main__":
    main()
