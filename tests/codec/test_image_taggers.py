"""Descriptions of taggers, and code of the user's as a tagger. No torch."""

import pickle

import numpy as np
import pytest

from dicmh_ray.codec import TagScore
from dicmh_ray.codec.image_taggers import (
    CallableTagger,
    TaggerSpec,
    best_tags,
    find_callable,
    load_image_tagger,
    model_directory,
    model_sha256,
)
from dicmh_ray.errors import TaggerError
from tests import user_taggers

BRIGHT, DARK = np.full((4, 6, 3), 200, np.uint8), np.full((6, 4, 3), 20, np.uint8)
WORDS = ("dog", "cat")


def test_a_function_an_object_and_a_class_are_taggers() -> None:
    for name, wanted in [
        ("brightness", [(TagScore("bright", 1.0),), (TagScore("dark", 1.0),)]),
        (
            "Sizes",
            [
                (TagScore("picture", 0.9), TagScore("wide", 0.75)),
                (TagScore("picture", 0.9), TagScore("tall", 0.75)),
            ],
        ),
    ]:
        tagger = load_image_tagger(TaggerSpec.parse(f"tests.user_taggers:{name}"))
        assert tagger.tag([BRIGHT, DARK]) == wanted
    tagger = load_image_tagger(TaggerSpec.parse("tests.user_taggers:INSTANCE"))
    assert tagger.tag([DARK]) == wanted[1:]
    assert tagger.tag([]) == []


def test_threshold_and_limit_hold_for_code_too() -> None:
    spec = TaggerSpec.parse("tests.user_taggers:Sizes", threshold=0.8)
    assert load_image_tagger(spec).tag([BRIGHT]) == [(TagScore("picture", 0.9),)]
    spec = TaggerSpec.parse("tests.user_taggers:Sizes", top_k=1)
    assert load_image_tagger(spec).tag([BRIGHT]) == [(TagScore("picture", 0.9),)]


def test_the_best_come_first_and_equal_ones_by_word() -> None:
    scored = [TagScore("b", 0.5), TagScore("a", 0.5), TagScore("c", 0.9), TagScore("d", 0.1)]
    assert [tag.tag for tag in best_tags(scored, 0.2, 9)] == ["c", "a", "b"]


def test_a_word_that_comes_twice_is_one_with_the_higher_score() -> None:
    tagger = CallableTagger(lambda images: [[("dog", 0.2), "dog", ("dog", 0.3)]], "twice")
    assert tagger.tag([BRIGHT]) == [(TagScore("dog", 1.0),)]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("tests.user_taggers", "wanted package.module:name"),
        ("tests.user_taggers:", "wanted package.module:name"),
        ("../evil:name", "wanted package.module:name"),
        ("no_such_package.taggers:tag", "there is no module no_such_package"),
        ("tests.no_such_module:tag", "there is no module tests.no_such_module"),
        ("tests.user_taggers:nobody", "tests.user_taggers has no nobody"),
    ],
)
def test_a_path_that_leads_nowhere_is_told(path: str, reason: str) -> None:
    with pytest.raises(TaggerError, match=reason):
        find_callable(path)


def test_modules_that_fail_are_told_with_their_reason(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_tagger.py").write_text("1 / 0\n")
    (tmp_path / "hungry_tagger.py").write_text("import no_such_dependency\n")
    with pytest.raises(TaggerError, match=r"broken_tagger fails: ZeroDivisionError"):
        find_callable("broken_tagger:tag")
    with pytest.raises(TaggerError, match=r"imports no_such_dependency, which is not installed"):
        find_callable("hungry_tagger:tag")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("NOT_A_TAGGER", "a int is no function"),
        ("NeedsAKey", "cannot be made: KeyError: 'API_KEY'"),
    ],
)
def test_what_is_no_tagger_is_refused_when_it_is_loaded(name: str, reason: str) -> None:
    with pytest.raises(TaggerError, match=reason):
        load_image_tagger(TaggerSpec.parse(f"tests.user_taggers:{name}"))


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ([], "gave 0 results for 1 pictures"),
        (None, "gave a NoneType"),
        (["dog"], "gave 'dog' for a picture"),
        ([None], "gave None for a picture"),
        ([[3]], "gave 3, wanted a word"),
        ([[("dog", "sure")]], "wanted a word or a pair"),
        ([[("dog", 0.5, 1)]], "wanted a word or a pair"),
    ],
)
def test_a_result_of_another_form_ends_the_job(result, reason: str) -> None:
    with pytest.raises(TaggerError, match=reason):
        CallableTagger(lambda images: result, "mine").tag([BRIGHT])


@pytest.mark.parametrize("entry", [("dog", 1.5), ("dog", float("nan")), "", "a\nb", "x" * 256])
def test_a_word_or_score_that_cannot_be_ends_only_its_picture(entry) -> None:
    with pytest.raises(ValueError, match=r"dog|tag"):
        CallableTagger(lambda images: [[entry]], "mine").tag([BRIGHT])


def test_code_cannot_change_the_pictures_that_are_encoded_next() -> None:
    image = BRIGHT.copy()
    with pytest.raises(ValueError, match="read-only"):
        CallableTagger(user_taggers.careless, "careless").tag([image])
    assert (image == BRIGHT).all()
    image[:] = 0


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("head", {}),
        ("clip:", {"vocabulary": WORDS}),
        (":tag", {}),
        ("clip:folder", {}),
        ("tests.user_taggers:brightness", {"vocabulary": WORDS}),
        ("tests.user_taggers:brightness", {"prompts": ("{}",)}),
        ("clip:folder", {"vocabulary": WORDS, "threshold": 1.5}),
        ("clip:folder", {"vocabulary": WORDS, "top_k": 0}),
        ("clip:folder", {"vocabulary": WORDS, "prompts": ("a photo",)}),
        ("clip:folder", {"vocabulary": WORDS, "prompts": ("{} and {}",)}),
        ("clip:folder", {"vocabulary": WORDS, "prompts": ("{0} and {}",)}),
    ],
)
def test_descriptions_without_meaning_are_value_errors(text: str, options) -> None:
    with pytest.raises(ValueError, match=r"wanted|vocabulary|not"):
        TaggerSpec.parse(text, **options)


def test_a_description_pickles_and_its_identity_forgets_where_the_model_lies(tmp_path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    specs = [
        TaggerSpec.parse(f"clip:{tmp_path / name}", vocabulary=WORDS) for name in ("here", "there")
    ]
    here, there = (spec.pinned() for spec in specs)
    assert pickle.loads(pickle.dumps(here)) == here
    assert here != there
    assert here.identity() == there.identity()
    assert here.identity()["model_sha256"] == model_sha256(tmp_path / "here")
    (tmp_path / "there" / "model.safetensors").write_bytes(b"others")
    assert specs[1].pinned().identity() != here.identity()
    more = TaggerSpec.parse(f"clip:{tmp_path / 'here'}", vocabulary=(*WORDS, "bird")).pinned()
    assert more.identity() != here.identity()
    code = TaggerSpec.parse("tests.user_taggers:brightness").pinned()
    assert code.identity()["target"] == "tests.user_taggers:brightness"


def test_directories_that_hold_no_model_are_told(tmp_path) -> None:
    with pytest.raises(TaggerError, match="no such directory"):
        model_directory(str(tmp_path / "nothing"))
    with pytest.raises(TaggerError, match=r"config\.json is missing"):
        model_sha256(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(TaggerError, match="never unpickled"):
        model_sha256(tmp_path)
