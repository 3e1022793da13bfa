"""Tasks over archives: one row for each row, once, whatever happens on the way."""

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dicmh_ray.analysis import (
    AnalysisOptions,
    Task,
    forecast,
    list_results,
    plan_analysis,
    read_results,
)
from dicmh_ray.analysis.run import Analysis
from dicmh_ray.archive import (
    GcOptions,
    collect_garbage,
    compact_archive,
    open_snapshot,
    verify_archive,
)
from dicmh_ray.errors import (
    CodecMismatchError,
    CorruptObjectError,
    FailureBudgetError,
    ResultsError,
    TaskError,
    WhereError,
)
from dicmh_ray.ray_plugin import compress
from dicmh_ray.ray_plugin.analysis import analyze
from dicmh_ray.reader import ArchiveReader
from dicmh_ray.source import SourceOptions
from tests.analysis.conftest import NUM_UNITS, write_collection
from tests.analysis.user_tasks import Brightness, Broken, Fussy, Wrong
from tests.fake_codec import FakeCodec
from tests.small_collections import picture

LENIENT = AnalysisOptions(failure_budget=1.0)


class Shapes(Task):
    """What it was given, for looking at."""

    name = "shapes"
    schema = pa.schema([("shape", pa.list_(pa.int32())), ("status", pa.string())])

    def __init__(self, reads, states=None, facts="index"):
        self.reads, self.states, self.facts = reads, states, facts

    def __call__(self, batch):
        return batch.table(
            shape=[np.shape(value) for value in batch.values],
            status=[row.status for row in batch.rows],
        )


def table_of(snapshot, task, **options):
    return read_results(snapshot, task, **options).table().sort_by("key").to_pydict()


def test_every_row_has_one_result_that_joins_by_key(snapshot, codec):
    done = analyze(snapshot, Brightness(), codec=codec)
    results = read_results(snapshot, Brightness())
    assert results.is_complete
    assert results.folder.name == done.results
    rows = {row["key"]: row for row in results.table().to_pylist()}
    assert sorted(rows) == sorted(ArchiveReader(snapshot).keys())
    assert rows["001/001-2"]["mean"] == pytest.approx(picture(9).mean(), abs=1e-4)
    assert all(row["error"] is None for row in rows.values())
    assert (done.report.rows, done.report.units_done) == (5 * NUM_UNITS, NUM_UNITS)
    # Any engine reads the folder, and finds each row once.
    folder = f"{snapshot.uri}/analysis/{done.results}"
    assert sorted(pq.read_table(folder)["key"].to_pylist()) == sorted(rows)


def test_a_second_run_does_nothing(snapshot, codec):
    analyze(snapshot, Brightness(), codec=codec)
    again = analyze(snapshot, Brightness(), codec=codec)
    assert (again.report.units_done, again.report.units_resumed) == (0, NUM_UNITS)
    assert codec.num_decoded == 4 * NUM_UNITS


def test_an_interrupted_run_goes_on_where_it_stopped(snapshot, codec, monkeypatch):
    whole = Analysis.run_unit
    seen = []

    def dies(self, commit):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(commit.unit)
        return whole(self, commit)

    monkeypatch.setattr(Analysis, "run_unit", dies)
    with pytest.raises(KeyboardInterrupt):
        analyze(snapshot, Brightness(), codec=codec)
    partial = read_results(snapshot, Brightness())
    assert len(partial.files) == 2
    assert partial.missing == (snapshot.commits[2].unit,)
    monkeypatch.setattr(Analysis, "run_unit", whole)
    done = analyze(snapshot, Brightness(), codec=codec)
    assert (done.report.units_done, done.report.units_resumed) == (1, 2)
    assert read_results(snapshot, Brightness()).is_complete


def test_two_runs_of_one_unit_give_its_results_once(snapshot, codec):
    analysis, todo, _ = plan_analysis(snapshot, Brightness(), codec=codec)
    copy = pickle.loads(pickle.dumps(analysis))
    first, second = analysis.run_unit(todo[0]), copy.run_unit(todo[0])
    assert first.is_ours
    assert second.is_ours  # the same bytes: nobody can tell whose they are
    assert len(analysis.folder.files()) == 1


def test_what_is_new_is_looked_at_when_the_archive_has_grown(archive, codec, tmp_path):
    analyze(archive, Brightness(), codec=codec)
    (tmp_path / "more").mkdir()
    compress(
        write_collection(tmp_path / "more", first=7, units=1),
        archive,
        append=True,
        codec=FakeCodec,
        runtime="local",
        failure_budget=1.0,
        source_options=SourceOptions(tag_fields=("cls", "also")),
    )
    done = analyze(archive, Brightness(), codec=codec)
    assert (done.report.units_done, done.report.units_resumed) == (1, NUM_UNITS)
    newest, first = open_snapshot(archive), open_snapshot(archive, version=1)
    assert len(read_results(newest, Brightness()).table()) == 5 * (NUM_UNITS + 1)
    assert len(read_results(first, Brightness()).table()) == 5 * NUM_UNITS


@pytest.mark.parametrize(
    ("task", "shapes", "errors"),
    [
        (Shapes("tags"), [[2], [2], [0]], [False, False, False]),
        (Shapes("latent", states=1), [[3, 24, 32], [3, 24, 32], None], [False, False, True]),
        (Shapes("machine"), [[24, 32, 3]] * 3, [False] * 3),
        (Shapes("thumbnail"), [[24, 32, 3]] * 3, [False] * 3),
        (Shapes("original"), [None, None, []], [True, True, False]),
    ],
)
def test_a_task_reads_what_it_says_and_rows_without_it_have_an_error(
    snapshot, codec, task, shapes, errors
):
    analyze(snapshot, task, codec=codec, where="'u0' in tags or status != 'ok'")
    rows = {
        row["key"]: row
        for row in read_results(snapshot, task, where="'u0' in tags or status != 'ok'")
        .table()
        .to_pylist()
    }
    chosen = [rows[key] for key in ("000/000-0", "000/000-1", "000/000-poison")]
    assert [row["shape"] for row in chosen] == shapes
    assert [row["error"] is not None for row in chosen] == errors
    assert len(rows) == 4 + NUM_UNITS


def test_what_does_not_depend_on_pictures_decodes_none(snapshot, codec):
    analyze(snapshot, Shapes("tags"), codec=codec)
    analyze(snapshot, Shapes("latent", states=1), codec=codec)
    assert codec.num_decoded == 0


def test_a_filter_comes_before_reading_and_has_results_of_its_own(snapshot, codec):
    odd = "'odd' in tags"
    analyze(snapshot, Brightness(), codec=codec, where=odd)
    assert codec.num_decoded == 2 * NUM_UNITS
    assert len(read_results(snapshot, Brightness(), where=odd).table()) == 2 * NUM_UNITS
    with pytest.raises(ResultsError, match="there are none"):
        read_results(snapshot, Brightness())
    with pytest.raises(WhereError):
        analyze(snapshot, Brightness(), codec=codec, where="no such thing (")
    # Units without a matching row are done too: they are not looked at again.
    one = "'u0' in tags"
    assert analyze(snapshot, Brightness(), codec=codec, where=one).report.units_done == NUM_UNITS
    assert len(read_results(snapshot, Brightness(), where=one).table()) == 4


def test_a_row_that_the_task_fails_on_has_the_reason_and_the_others_their_result(snapshot, codec):
    done = analyze(snapshot, Fussy(), codec=codec)
    table = table_of(snapshot, Fussy())
    wrong = [key for key, error in zip(table["key"], table["error"], strict=True) if error]
    assert wrong == [f"{number:03d}/{number:03d}-1" for number in range(NUM_UNITS)]
    assert table["error"][table["key"].index("001/001-1")] == "RuntimeError: not this one"
    assert all(
        (mean is None) == (key in wrong)
        for key, mean in zip(table["key"], table["mean"], strict=True)
    )
    assert done.report.causes == {"RuntimeError": NUM_UNITS}


def test_a_task_that_fails_on_everything_ends_the_job_and_leaves_no_results(snapshot, codec):
    with pytest.raises(FailureBudgetError):
        analyze(snapshot, Broken(), codec=codec)
    assert not read_results(snapshot, Broken()).files
    analyze(snapshot, Broken(), codec=codec, options=LENIENT)
    assert set(table_of(snapshot, Broken())["mean"]) == {None}


def test_a_task_that_does_not_keep_its_word_is_refused(snapshot, codec):
    with pytest.raises(TaskError, match="wanted key"):
        analyze(snapshot, Wrong(), codec=codec)
    for broken in (
        type("Named", (Brightness,), {"name": "No Name"}),
        type("Human", (Brightness,), {"reads": "human"}),
        type("None_", (Brightness,), {"states": 0}),
        type("Facts", (Brightness,), {"facts": "some"}),
        type("Keyed", (Brightness,), {"schema": pa.schema([("key", pa.string())])}),
        type("Twice", (Brightness,), {"schema": pa.schema([("a", pa.int8()), ("a", pa.int8())])}),
    ):
        with pytest.raises(ValueError, match=r"wanted|may not|twice"):
            analyze(snapshot, broken(), codec=codec)


def test_results_depend_on_version_parameters_states_filter_and_checkpoint(snapshot, codec):
    def name(task, **options):
        return plan_analysis(snapshot, task, **options)[2].task

    newer = type("Newer", (Brightness,), {"version": "2"})
    other = type("Other", (Brightness,), {"parameters": lambda _: {"gamma": 2}})
    fewer = type("Fewer", (Brightness,), {"states": 1})
    names = [name(task()) for task in (Brightness, newer, other, fewer)]
    names.append(name(Brightness(), where="width > 3"))
    assert len(set(names)) == 5
    assert all(one.startswith("brightness-") for one in names)
    assert name(Brightness()) == names[0]


def test_a_task_for_another_checkpoint_is_refused(snapshot, codec):
    stranger = type("Stranger", (Brightness,), {"codec_id": "cd" * 32})
    with pytest.raises(CodecMismatchError):
        analyze(snapshot, stranger(), codec=codec)
    with pytest.raises(CodecMismatchError):
        analyze(snapshot, Brightness(), codec=FakeCodec("cd" * 32))


def test_damaged_rows_have_the_damage_as_their_result(archive, codec):
    snapshot = open_snapshot(archive)
    part = snapshot.commits[1].parts[0]
    index = ArchiveReader(snapshot).snapshot.read_index(snapshot.commits[1])
    row = next(row for row in index.to_pylist() if row["base_length"])
    path = f"{archive}/{part.name}"
    with open(path, "r+b") as file:
        file.seek(row["base_offset"] + row["base_length"] - 1)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    analyze(snapshot, Brightness(), codec=codec)
    table = read_results(snapshot, Brightness()).table().to_pylist()
    assert len(table) == 5 * NUM_UNITS
    assert [one["key"] for one in table if one["error"]] == [row["key"]]


def test_a_dry_run_says_what_would_be_read(snapshot, codec):
    first = forecast(*plan_analysis(snapshot, Shapes("latent", states=1), codec=codec))
    assert (first.units, first.rows, first.originals) == (NUM_UNITS, 5 * NUM_UNITS, 0)
    whole = forecast(*plan_analysis(snapshot, Brightness(), codec=codec))
    assert 0 < first.bytes_to_read < whole.bytes_to_read
    assert whole.originals == NUM_UNITS
    assert not list_results(snapshot)


def test_results_are_no_part_of_the_archive(archive, codec):
    done = analyze(archive, Brightness(), codec=codec)
    report = verify_archive(archive)
    assert (report.exit_code, report.notes) == (0, [])
    options = GcOptions(keep_versions=1, keep_s=0, grace_s=0)
    assert not collect_garbage(archive, options=options).deleted
    compact_archive(archive)
    collect_garbage(archive, options=options)
    snapshot = open_snapshot(archive)
    assert list_results(snapshot) == [done.results]
    assert not read_results(snapshot, Brightness()).is_complete  # its units are others now
    analyze(archive, Brightness(), codec=codec)
    assert len(read_results(snapshot, done.results).table()) == 5 * NUM_UNITS


def test_damaged_results_are_told(snapshot, codec):
    analyze(snapshot, Brightness(), codec=codec)
    results = read_results(snapshot, Brightness())
    name = f"analysis/{results.folder.name}/{results.files[0]}"
    data = bytearray(snapshot.store.get(name))
    data[len(data) // 3] ^= 0x40
    snapshot.store.put(name, bytes(data))
    with pytest.raises(CorruptObjectError, match="analysis/"):
        results.table()
    with pytest.raises(ValueError, match="no name of results"):
        read_results(snapshot, "../commit")
