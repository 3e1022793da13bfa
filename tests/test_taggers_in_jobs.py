"""Taggers on their way through a job: own tags first, scores beside, failures of one image only."""

import json
import pickle
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from dicmh_ray.bitstream import parse_bitstream
from dicmh_ray.cli import app
from dicmh_ray.codec.image_taggers import TaggerSpec
from dicmh_ray.errors import PlanConflictError, TaggerError
from dicmh_ray.pipeline import plan_job
from dicmh_ray.pipeline.job import Checkpoint
from dicmh_ray.ray_plugin import compress
from dicmh_ray.ray_plugin.actors import UnitWorker
from dicmh_ray.reader import ArchiveReader
from tests import user_taggers
from tests.fake_codec import FakeCodec
from tests.small_collections import bmp, picture, poison, write_tar

SIZES = TaggerSpec.parse("tests.user_taggers:Sizes")


@pytest.fixture
def tar(tmp_path):
    """A sound picture with own tags, one the codec refuses, one that is none, and a tall one."""
    images = {
        "a": bmp(picture(1)),
        "b": bmp(poison()),
        "c": b"no picture",
        "d": bmp(picture(2, height=40)),
    }
    return write_tar(tmp_path / "x.tar", images, metadata={"a": {"cls": "Wide"}})


@pytest.fixture
def run(monkeypatch):
    """The program with FakeCodec as the default checkpoint."""
    monkeypatch.setattr(
        Checkpoint,
        "open",
        classmethod(lambda cls, _: cls(codec_id="ab" * 32, files={}, factory=FakeCodec)),
    )

    def invoke(*arguments, code=0):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output
        return result

    return invoke


def rows_of(archive):
    return {row.key: row for row in ArchiveReader.open(str(archive)).rows(blobs=("base", "detail"))}


def job(tar, archive, tagger, **options):
    options = {"codec": FakeCodec, "runtime": "local", "failure_budget": 1.0} | options
    return compress([tar], str(archive), tagger=tagger, **options)


def test_a_users_tagger_tags_what_the_program_compresses(run, tar, tmp_path):
    run(
        "compress", tar, tmp_path / "a", "--runtime", "local", "--failure-budget", "1.0",
        "--tag-field", "cls", "--tagger", "tests.user_taggers:Sizes",
    )  # fmt: skip
    rows = rows_of(tmp_path / "a")
    assert rows["a"].tags == ("Wide", "picture"), "its own tag says `wide` already"
    assert rows["a"].tag_scores == pytest.approx((1.0, 0.9))
    assert parse_bitstream(rows["a"].base + rows["a"].detail).tags == ("Wide", "picture")
    assert rows["d"].tags == ("picture", "tall")
    assert rows["d"].tag_scores == pytest.approx((0.9, 0.75))
    assert rows["b"].tags == ("picture", "wide"), "of an original that is kept, too"
    assert rows["b"].error.startswith("encode-failed")
    assert rows["c"].tags == ()
    plan = json.loads((tmp_path / "a" / "plan.json").read_text())
    assert plan["parameters"]["tagger"]["target"] == "tests.user_taggers:Sizes"
    assert "suggest_tags" not in plan["parameters"]["policy"]


def test_threshold_and_limit_reach_the_tagger(run, tar, tmp_path):
    common = ("--runtime", "local", "--failure-budget", "1.0", "--tagger")
    tagger = "tests.user_taggers:Sizes"
    run("compress", tar, tmp_path / "a", *common, tagger, "--threshold", "0.8")
    assert rows_of(tmp_path / "a")["d"].tags == ("picture",)
    run("compress", tar, tmp_path / "b", *common, tagger, "--top-k", "1")
    assert rows_of(tmp_path / "b")["d"].tags == ("picture",)


def test_a_tagger_is_part_of_the_plan_and_absent_where_there_is_none(tar, tmp_path):
    job(tar, tmp_path / "a", SIZES)
    report = job(tar, tmp_path / "a", SIZES)
    assert report.units_resumed == 1
    for other in (None, TaggerSpec.parse("tests.user_taggers:brightness")):
        with pytest.raises(PlanConflictError):
            job(tar, tmp_path / "a", other)
    job(tar, tmp_path / "b", None)
    assert "tagger" not in json.loads((tmp_path / "b" / "plan.json").read_text())["parameters"]
    assert rows_of(tmp_path / "b")["d"].tag_scores == ()


def test_a_tagger_is_made_once_and_only_where_there_is_work(tar, tmp_path):
    user_taggers.Sizes.made = 0
    job(tar, tmp_path / "a", SIZES)
    job(tar, tmp_path / "a", SIZES)
    assert user_taggers.Sizes.made == 1


def test_a_picture_that_the_tagger_fails_on_keeps_its_original_and_counts(tmp_path):
    white = picture(1)
    white[0, 0] = 255
    images = {name: bmp(picture(n + 1)) for n, name in enumerate("pqrst")} | {"u": bmp(white)}
    tar = write_tar(tmp_path / "y.tar", images)
    report = job(tar, tmp_path / "a", TaggerSpec.parse("tests.user_taggers:picky"))
    rows = rows_of(tmp_path / "a")
    assert [rows[key].tags for key in "pqrst"] == [("fine",)] * 5
    assert rows["u"].status == "kept_original"
    assert rows["u"].error == "tag-failed: RuntimeError: no white corners, please"
    assert report.tally.causes == {"tag-failed": 1}
    assert report.tally.failures == 1


@pytest.mark.parametrize("name", ["vain", "rude", "careless"])
def test_impossible_tags_are_failures_of_their_pictures(tar, tmp_path, name):
    job(tar, tmp_path / "a", TaggerSpec.parse(f"tests.user_taggers:{name}"))
    assert rows_of(tmp_path / "a")["d"].error.startswith("tag-failed: ValueError")


def test_a_tagger_that_breaks_its_contract_ends_the_job(tar, tmp_path):
    with pytest.raises(TaggerError, match="gave 0 results"):
        job(tar, tmp_path / "a", TaggerSpec.parse("tests.user_taggers:shy"))


def test_a_tagger_that_is_not_there_begins_nothing(run, tar, tmp_path):
    result = run(
        "compress", tar, tmp_path / "a", "--runtime", "local",
        "--tagger", "tests.user_taggers:nobody", code=1,
    )  # fmt: skip
    assert (
        "error: tagger tests.user_taggers:nobody: tests.user_taggers has no nobody" in result.stderr
    )
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "options",
    [
        ("--tagger", "nonsense"),
        ("--tagger", "clip:folder"),
        ("--tagger", "tests.user_taggers:Sizes", "--prompt", "a {}"),
        ("--tagger", "head", "--top-k", "3"),
        ("--threshold", "0.5"),
        ("--tagger", "tests.user_taggers:Sizes", "--threshold", "2"),
    ],
    ids=" ".join,
)
def test_tagger_options_without_meaning_are_usage_errors(run, tar, tmp_path, options):
    run("compress", tar, tmp_path / "a", "--runtime", "local", *options, code=2)
    assert not (tmp_path / "a").exists()


def test_a_vocabulary_with_a_fault_is_told_in_one_line(run, tar, tmp_path):
    (tmp_path / "words.txt").write_text("dog\ndog\n")
    options = ("--tagger", "clip:folder", "--vocabulary", tmp_path / "words.txt")
    result = run("compress", tar, tmp_path / "a", "--runtime", "local", *options, code=1)
    assert "line 2: 'dog' is in line 1 already" in result.stderr


def test_the_program_prints_what_a_users_tagger_says(run, tmp_path):
    (tmp_path / "x.bmp").write_bytes(bmp(picture(1)))
    (tmp_path / "y.bmp").write_bytes(b"no picture")
    tagger = ("--tagger", "tests.user_taggers:Sizes")
    result = run("tag", tmp_path / "x.bmp", *tagger)
    assert (
        result.stdout
        == f"{tmp_path / 'x.bmp'}\tpicture\t0.900\n{tmp_path / 'x.bmp'}\twide\t0.750\n"
    )
    result = run("tag", tmp_path / "y.bmp", tmp_path / "x.bmp", *tagger, "--json", code=1)
    assert json.loads(result.stdout) == {
        "file": str(tmp_path / "x.bmp"),
        "tags": [{"tag": "picture", "score": 0.9}, {"tag": "wide", "score": 0.75}],
    }
    assert "y.bmp" in result.stderr
    result = run("tag", tmp_path / "nowhere.bmp", tmp_path / "x.bmp", *tagger, code=1)
    assert result.stdout.count("x.bmp") == 2
    assert f"{tmp_path / 'nowhere.bmp'}: No such file" in result.stderr
    white = picture(1)
    white[0, 0] = 255
    (tmp_path / "z.bmp").write_bytes(bmp(white))
    picky = ("--tagger", "tests.user_taggers:picky")
    result = run("tag", tmp_path / "z.bmp", tmp_path / "x.bmp", *picky, code=1)
    assert result.stdout.endswith("fine\t1.000\n")
    assert "RuntimeError: no white corners" in result.stderr


def test_a_module_in_the_current_folder_is_found(run, tmp_path, monkeypatch):
    (tmp_path / "my_tags_of_this_test.py").write_text(
        "def tag(images): return [['mine']] * len(images)\n"
    )
    (tmp_path / "x.bmp").write_bytes(bmp(picture(1)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    result = run("tag", "x.bmp", "--tagger", "my_tags_of_this_test:tag")
    assert result.stdout == "x.bmp\tmine\t1.000\n"


def test_pictures_reach_the_tagger_upright_and_in_order(tmp_path):
    images = {f"{n}": bmp(np.full((8 + n, 16, 3), 16 * n + 2, np.uint8)) for n in range(12)}
    tar = write_tar(tmp_path / "z.tar", images)
    job(tar, tmp_path / "a", TaggerSpec.parse("tests.user_taggers:brightness"))
    rows = rows_of(tmp_path / "a")
    assert [rows[str(n)].tags[0] for n in range(12)] == ["dark"] * 8 + ["bright"] * 4


def test_a_worker_makes_the_tagger_from_the_job_it_was_sent(tar, tmp_path):
    planned, units, _ = plan_job([tar], str(tmp_path / "a"), codec=FakeCodec, tagger=SIZES)
    worker = UnitWorker(pickle.loads(pickle.dumps(planned)))
    user_taggers.Sizes.made = 0
    worker.rehearse(units[0], 0, 1)
    worker.run_unit(units[0])
    assert user_taggers.Sizes.made == 1
    assert rows_of(tmp_path / "a")["d"].tags == ("picture", "tall")
