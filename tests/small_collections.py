"""Small collections for the tests of pipeline, views, command line and Ray."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

from tests.fake_codec import POISON


def picture(seed, *, height=24, width=32, step=16):
    """A gradient that differs with the seed; a multiple of 16 needs two of FakeCodec's states."""
    rows, columns = np.mgrid[0:height, 0:width]
    image = np.stack([rows * 5 + seed, columns * 7, rows + columns + 3 * seed], axis=2) % 256
    return (image // step * step).astype(np.uint8)


def poison(*, height=24, width=32):
    """A picture that FakeCodec refuses to encode."""
    return np.full((height, width, 3), POISON, np.uint8)


def bmp(image):
    """As an uncompressed file: larger than any stream of it."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "BMP")
    return buffer.getvalue()


def write_tar(path, images, *, metadata=None):
    """A WebDataset tar of BMP files, with a json member for each key in ``metadata``."""
    with tarfile.open(path, "w") as tar:
        for key, data in images.items():
            members = {f"{key}.bmp": data}
            if metadata and key in metadata:
                members[f"{key}.json"] = json.dumps(metadata[key]).encode()
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path)


def write_tars(folder, *, tars=3, images=6):
    """Several tars of sound pictures; returns their addresses."""
    return [
        write_tar(
            folder / f"shard-{number:03d}.tar",
            {
                f"{number:03d}-{i:04d}": bmp(picture(number * images + i, step=16 if i % 2 else 1))
                for i in range(images)
            },
            metadata={f"{number:03d}-{i:04d}": {"cls": i % 3} for i in range(images)},
        )
        for number in range(tars)
    ]
