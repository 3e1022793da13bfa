"""A small archive of pictures that FakeCodec wrote, with rows of every kind."""

import pytest

from dicmh_ray.archive import open_snapshot
from dicmh_ray.pipeline import EncodePolicy
from dicmh_ray.ray_plugin import compress
from dicmh_ray.source import SourceOptions
from tests.fake_codec import FakeCodec
from tests.small_collections import bmp, picture, poison, write_tar

NUM_UNITS = 3


def write_collection(folder, first=0, units=NUM_UNITS):
    """Tars of five pictures each: four sound ones, and one that the codec refuses."""
    for number in range(first, first + units):
        names = [f"{number:03d}-{i}" for i in range(4)]
        images = {name: bmp(picture(7 * number + i)) for i, name in enumerate(names)}
        write_tar(
            folder / f"{number:03d}.tar",
            {**images, f"{number:03d}-poison": bmp(poison())},
            metadata={
                name: {"cls": "even" if i % 2 == 0 else "odd", "also": f"u{number}"}
                for i, name in enumerate(names)
            },
        )
    return f"{folder}/*.tar"


@pytest.fixture(scope="session")
def archive_folder(tmp_path_factory):
    """An archive that nobody may change."""
    folder = tmp_path_factory.mktemp("collection")
    uri = str(tmp_path_factory.mktemp("archive") / "a")
    compress(
        write_collection(folder),
        uri,
        codec=FakeCodec,
        runtime="local",
        failure_budget=1.0,
        policy=EncodePolicy(keep_original="below-floor"),
        source_options=SourceOptions(tag_fields=("cls", "also")),
    )
    return uri


@pytest.fixture
def archive(archive_folder, tmp_path):
    """A copy of it."""
    import shutil

    shutil.copytree(archive_folder, tmp_path / "archive")
    return str(tmp_path / "archive")


@pytest.fixture
def snapshot(archive):
    return open_snapshot(archive)


@pytest.fixture
def codec():
    return FakeCodec()
