"""One small archive for every adapter: three tars, tags, a kept original and a row without a picture."""

import pytest

from dicmh_ray.ray_plugin import compress
from dicmh_ray.source import SourceOptions
from tests.fake_codec import FakeCodec
from tests.small_collections import bmp, picture, write_tar

IMAGES_A_TAR = 6


def tag_of(number):
    """Every third picture is a dog."""
    return "dog" if number % 3 == 0 else "cat"


def key_of(number):
    """Of several tars, each gives its keys its own name."""
    return f"{number // IMAGES_A_TAR}/img-{number:03d}"


@pytest.fixture(scope="session")
def pictures():
    """uint8 [24, 32, 3] by key, of the rows that have one. FakeCodec keeps all of it."""
    return {key_of(n): picture(n, step=16 if n % 2 else 1) for n in range(3 * IMAGES_A_TAR)}


@pytest.fixture(scope="session")
def archive_uri(tmp_path_factory, pictures):
    """Three units of six pictures; the last has a damaged image too."""
    folder = tmp_path_factory.mktemp("adapters")
    keys = sorted(pictures)
    tars = []
    for unit in range(3):
        chosen = keys[unit * IMAGES_A_TAR : (unit + 1) * IMAGES_A_TAR]
        images = {key.partition("/")[2]: bmp(pictures[key]) for key in chosen}
        metadata = {
            name: {"label": tag_of(int(name[-3:])), "number": int(name[-3:])} for name in images
        }
        if unit == 2:
            images["img-broken"] = b""
        tars.append(write_tar(folder / f"{unit}.tar", images, metadata=metadata))
    compress(
        tars,
        str(folder / "archive"),
        codec=FakeCodec,
        runtime="local",
        failure_budget=1.0,
        source_options=SourceOptions(tag_fields=("label",)),
    )
    return str(folder / "archive")
