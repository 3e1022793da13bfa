"""The YAML that is written is the YAML that a parser reads."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dicmh_ray.cli.kubernetes import rendered
from dicmh_ray.cli.manifests import manifests
from dicmh_ray.cli.yaml_text import Noted, without_notes, yaml_documents
from tests.kubernetes.rendering import options
from tests.kubernetes.schemas import read_documents

SCALARS = st.none() | st.booleans() | st.integers() | st.text()
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(SCALARS | st.dictionaries(st.text(), inner, max_size=3), max_size=3)
        | st.dictionaries(st.text(), inner, max_size=3)
        | st.builds(lambda value: value, inner)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), VALUES, max_size=4))
@settings(max_examples=200, deadline=None)
def test_what_is_written_is_what_a_parser_reads(document):
    text = yaml_documents([document, document])
    assert list(yaml.safe_load_all(text)) == [document, document]


@pytest.mark.parametrize(
    "word",
    [
        *("yes", "No", "ON", "off", "true", "NULL", "~", "y", "n", "", " a", "a ", "1e3", "0x1f"),
        *("1_0", "12:30:45", "2026-11-21", ".inf", "-", "- a", "a: b", "a #b", "#a", "&a", "*a"),
        *("!a", "%a", "@a", "`a", "{a}", "[a]", "|", ">", "'a'", '"a"', "a\tb", "a\nb", "<<", "="),
        *("?", "a:"),
    ],
)
def test_words_that_parsers_take_for_something_else_are_quoted(word):
    text = yaml_documents([{word: word, "list": [word, {word: [word]}]}])
    assert yaml.safe_load(text) == {word: word, "list": [word, {word: [word]}]}
    assert word == "" or f'"{word[0]}'.replace('""', '"\\"') in text


def test_notes_become_comments_above_their_key():
    document = {"a": Noted({"b": Noted(1, "one\nline more")}, "first"), "c": [{"d": Noted(2, "x")}]}
    text = yaml_documents([document])
    assert text == "# first\na:\n  # one\n  # line more\n  b: 1\nc:\n  # x\n  - d: 2\n"
    assert yaml.safe_load(text) == without_notes(document)


def test_what_yaml_text_cannot_say_is_an_error():
    for value in (1.5, b"a", {1, 2}):
        with pytest.raises(TypeError):
            yaml_documents([{"a": value}])
    with pytest.raises(TypeError):
        yaml_documents([{"a": [["b"]]}])


def test_rendered_files_are_read_back_as_they_were_meant():
    for job_options in (options(), options(job="verify"), options(job="interactive")):
        for name, file in manifests(job_options).items():
            assert read_documents(rendered(job_options)[name]) == [without_notes(o) for o in file]
