"""What several tests of training need."""

from pathlib import Path

import pytest

from tests.tiny_teacher import write_teacher


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "teacher.safetensors")
