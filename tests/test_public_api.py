"""The names users import: complete, sorted, and free of charge until they are used."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import dicmh_ray
from dicmh_ray.errors import MissingExtraError

NEED_RAY = {"Decode", "read_archive", "write_archive"}
HEAVY = {"compressai", "diffusers", "matplotlib", "pyarrow", "ray", "torch"}


def test_all_is_sorted_and_has_no_name_twice():
    assert dicmh_ray.__all__ == sorted(set(dicmh_ray.__all__))


@pytest.mark.parametrize("name", dicmh_ray.__all__)
def test_every_public_name_can_be_imported_or_says_what_it_needs(name):
    assert name in dir(dicmh_ray)
    if name in NEED_RAY and importlib.util.find_spec("ray") is None:
        with pytest.raises(MissingExtraError, match=r"pip install 'dicmh_ray\[ray\]'"):
            getattr(dicmh_ray, name)
    else:
        assert getattr(dicmh_ray, name) is not None


def test_type_checkers_and_the_interpreter_find_each_name_in_the_same_place():
    tree = ast.parse(Path(dicmh_ray.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == dicmh_ray._HOMES
    assert {*seen, "__version__"} == set(dicmh_ray.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        dicmh_ray.compres  # noqa: B018


def test_importing_the_package_loads_nothing_heavy():
    code = "import dicmh_ray, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    ).stdout.split()
    assert not HEAVY & set(loaded)


@pytest.mark.parametrize(
    ("name", "never"),
    [
        ("open_archive", {"ray", "torch"}),
        ("load_codec", {"pyarrow", "ray", "torch"}),
        ("EncodePolicy", {"ray", "torch"}),
        ("load_pixels", {"ray", "torch"}),
    ],
)
def test_using_one_name_loads_only_what_it_needs(name, never):
    code = f"from dicmh_ray import {name}; import sys; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    ).stdout.split()
    assert not never & set(loaded)


def test_the_version_is_that_of_the_package_metadata():
    pyproject = (Path(dicmh_ray.__file__).parents[1] / "pyproject.toml").read_text()
    assert f'version = "{dicmh_ray.__version__}"' in pyproject
