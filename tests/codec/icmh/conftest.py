"""What several tests of Diff-ICMH start from."""

from pathlib import Path

import pytest

from tests.codec.icmh.tiny_codec import write_tiny_checkpoint


@pytest.fixture(scope="session")
def reference(dicmh_data: Path) -> Path:
    """The folder of reference tensors beside ``DICMH_DATA``; skips where there is none."""
    folder = dicmh_data.parent / "reference"
    if not folder.is_dir():
        pytest.skip("there are no reference tensors beside DICMH_DATA")
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory with random networks and all views. Not to be changed."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_checkpoint(folder)
    return folder
