"""The pool on a real cluster: growth, bounds, readers, notices."""

import os
import signal
from pathlib import Path

import pytest

from dicmh_ray.archive import open_snapshot
from dicmh_ray.errors import JobStoppedError
from dicmh_ray.pipeline import EncodeOptions
from dicmh_ray.ray_plugin import RayOptions, compress
from dicmh_ray.ray_plugin import cluster as cluster_module
from dicmh_ray.ray_plugin import pool as pool_module
from dicmh_ray.ray_plugin.actors import UnitReader
from dicmh_ray.ray_plugin.cluster import draining_nodes, machines
from dicmh_ray.reader import ArchiveReader
from tests.fake_codec import FakeCodec
from tests.ray_plugin.deadly_codecs import Alone, Slow, StopsOnce, die
from tests.small_collections import write_tars

pytestmark = pytest.mark.ray


def rows_of(archive):
    reader = ArchiveReader(open_snapshot(str(archive)))
    return list(reader.rows(blobs=("base", "detail", "original")))


def on_ray(sources, archive, codec=FakeCodec, **options):
    return compress(
        sources, str(archive), codec=codec, runtime="ray", ray_options=RayOptions(**options)
    )


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    return write_tars(tmp_path_factory.mktemp("tars"), tars=5, images=3)


@pytest.fixture(scope="module")
def undisturbed(tars, tmp_path_factory):
    archive = tmp_path_factory.mktemp("archive")
    compress(tars, str(archive / "a"), codec=FakeCodec, runtime="local")
    return rows_of(archive / "a")


def test_a_pool_whose_machines_never_come_ends_with_those_it_has(
    cluster, tars, undisturbed, tmp_path
):
    report = on_ray(tars, tmp_path / "a", workers=40, min_workers=40)
    assert rows_of(tmp_path / "a") == undisturbed
    assert 1 <= report.workers <= 2


def test_a_pool_that_starts_with_one_worker_grows_while_units_wait(
    cluster, undisturbed, tars, tmp_path
):
    report = on_ray(tars, tmp_path / "a", Slow(0.5), min_workers=1)
    assert report.workers == 2
    assert rows_of(tmp_path / "a") == undisturbed
    assert 0 <= report.connect_seconds <= report.first_unit_seconds < report.seconds
    assert report.codec_load_seconds < report.first_unit_seconds


def test_no_more_units_run_at_once_than_the_bound(cluster, undisturbed, tars, tmp_path):
    report = on_ray(tars, tmp_path / "a", Alone(str(tmp_path), 0.05), max_concurrency=1)
    assert not (tmp_path / "together").exists()
    assert report.workers == 1
    assert rows_of(tmp_path / "a") == undisturbed


class NotedReader(UnitReader):
    """Leaves a file for each unit it opens."""

    def __init__(self, job, notes):
        super().__init__(job)
        self._notes = Path(notes)

    def open(self, unit):
        (self._notes / unit.name).touch()
        super().open(unit)


class ReaderThatDiesOnce(NotedReader):
    """The first that is asked for images dies."""

    def read(self):
        try:
            os.close(os.open(self._notes / "died", os.O_CREAT | os.O_EXCL))
            die()
        except FileExistsError:
            pass
        return super().read()


def with_reader(monkeypatch, cls, notes):
    """Have the pool start readers of this class."""
    notes.mkdir()

    def start(size, actor_class, *args):
        if actor_class is UnitReader:
            return started(size, cls, *args, str(notes))
        return started(size, actor_class, *args)

    started = cluster_module.ActorSize.start
    monkeypatch.setattr(cluster_module.ActorSize, "start", start)
    return notes


def one_cpu(archive, tars, codec=FakeCodec):
    """A job whose worker claims one of the two CPUs, so that there is one for its reader."""
    return compress(
        tars,
        str(archive),
        codec=codec,
        ray_options=RayOptions(workers=1, readers="always", reader_cpus=1),
        encode_options=EncodeOptions(threads=1),
    )


def test_rows_of_pictures_that_a_reader_decoded_are_the_same(
    cluster, undisturbed, tars, tmp_path, monkeypatch
):
    notes = with_reader(monkeypatch, NotedReader, tmp_path / "notes")
    one_cpu(tmp_path / "a", tars, Slow(0.5))
    assert list(notes.iterdir()), "no reader was used"
    assert rows_of(tmp_path / "a") == undisturbed


def test_a_unit_whose_reader_died_is_run_again(cluster, undisturbed, tars, tmp_path, monkeypatch):
    notes = with_reader(monkeypatch, ReaderThatDiesOnce, tmp_path / "notes")
    report = one_cpu(tmp_path / "a", tars, Slow(0.5))
    assert (notes / "died").exists()
    assert report.workers_died == 0
    assert rows_of(tmp_path / "a") == undisturbed


@pytest.mark.parametrize("grace_s", [20.0, 0.0])
def test_a_worker_that_is_told_to_stop_is_replaced_and_no_unit_is_blamed(
    cluster, undisturbed, tars, tmp_path, grace_s
):
    report = on_ray(
        tars, tmp_path / "a", StopsOnce(str(tmp_path / "stopped")), workers=1, grace_s=grace_s
    )
    assert (tmp_path / "stopped").exists()
    assert (report.workers_died, report.units_retried) == (0, 0)
    assert rows_of(tmp_path / "a") == undisturbed


def test_a_driver_that_is_told_to_stop_commits_what_runs_and_begins_nothing(
    cluster, undisturbed, tars, tmp_path
):
    def stop(report):
        if report.units_done == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(JobStoppedError) as caught:
        compress(
            tars,
            str(tmp_path / "a"),
            codec=Slow(0.1),
            progress=stop_once(stop),
            ray_options=RayOptions(workers=1),
        )
    assert signal.getsignal(signal.SIGTERM) is before
    found = len(open_snapshot(str(tmp_path / "a")).commits)
    assert 1 <= found < 5
    assert caught.value.units_left == 5 - found
    report = on_ray(tars, tmp_path / "a")
    assert report.units_resumed == found
    assert rows_of(tmp_path / "a") == undisturbed


def stop_once(stop):
    """Calls it until it has sent its signal: the second one would end the tests."""
    sent = []

    def progress(report):
        if not sent and report.units_done:
            sent.append(True)
            stop(report)

    return progress


def test_workers_on_a_machine_that_is_taken_away_get_no_further_units(
    cluster, undisturbed, tars, tmp_path, monkeypatch
):
    assert draining_nodes() == frozenset()
    here = frozenset(machine.node_id for machine in machines())
    looks = []

    def draining():
        looks.append(True)
        return here if len(looks) == 3 else frozenset()

    monkeypatch.setattr(pool_module, "draining_nodes", draining)
    monkeypatch.setattr(pool_module, "CLUSTER_SECONDS", 0.2)
    report = on_ray(tars, tmp_path / "a", Slow(0.3), workers=1)
    assert len(looks) > 3
    assert (report.workers_died, report.units_retried) == (0, 0)
    assert rows_of(tmp_path / "a") == undisturbed
