"""Fixtures used by two folders or more."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def dicmh_data() -> Path:
    """The folder of photographs and nets named by ``DICMH_DATA``; skips where there is none."""
    folder = os.environ.get("DICMH_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("DICMH_DATA names no folder")
    return Path(folder)
