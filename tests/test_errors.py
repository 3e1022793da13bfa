"""Errors cross process borders whole, and the tree in the module's docstring is the real one."""

import inspect
import pickle
import re

import pytest

from dicmh_ray import errors

CLASSES = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if cls.__module__ == errors.__name__
]


def an_example_of(cls):
    """An instance with a value of the annotated type in every field."""
    samples = {int: 7, float: 0.25, str: "text", bytes: b"\x00\xff", object: ("any", 1)}
    if not inspect.isfunction(cls.__init__):
        return cls("a family is raised with a plain message")
    parameters = list(inspect.signature(cls).parameters.values())
    return cls(*(samples[parameter.annotation] for parameter in parameters))


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_survives_pickle_with_its_fields(cls):
    error = an_example_of(cls)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert copy.args == error.args
    assert vars(copy) == vars(error)
    assert str(copy) == str(error)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_says_something_and_is_ours(cls):
    assert issubclass(cls, errors.DicmhError)
    assert cls.__name__.endswith("Error")
    assert cls.__doc__
    assert str(an_example_of(cls))


def test_the_docstring_lists_exactly_the_classes_of_the_module():
    listed = re.findall(r"^ *[*x+] (\w+)", errors.__doc__, flags=re.MULTILINE)
    assert sorted(listed) == sorted(cls.__name__ for cls in CLASSES)


def test_the_docstring_shows_each_class_below_its_base():
    bases = {}
    for marker, name in re.findall(r"^ *([*x+]) (\w+)", errors.__doc__, flags=re.MULTILINE):
        level = "*x+".index(marker)
        bases[level] = name
        if level:
            assert getattr(errors, name).__bases__[0].__name__ == bases[level - 1]
