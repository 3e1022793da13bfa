"""Where the tests of Diff-ICMH find what a faithful implementation must compute."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def reference(dicmh_data: Path) -> Path:
    """The folder of reference tensors beside ``DICMH_DATA``; skips where there is none."""
    folder = dicmh_data.parent / "reference"
    if not folder.is_dir():
        pytest.skip("there are no reference tensors beside DICMH_DATA")
    return folder
