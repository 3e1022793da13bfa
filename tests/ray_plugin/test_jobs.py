"""Jobs on a real cluster: units, deaths, quarantine, budget, resume."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dicmh_ray.archive import open_snapshot
from dicmh_ray.errors import FailureBudgetError, JobError, WeightsError
from dicmh_ray.ray_plugin import RayOptions, compress
from dicmh_ray.reader import ArchiveReader
from tests.fake_codec import FakeCodec
from tests.ray_plugin.deadly_codecs import (
    DEADLY,
    DiesOnce,
    DiesWhenLoaded,
    Slow,
    dies_on_deadly_pictures,
)
from tests.small_collections import bmp, picture, write_tar, write_tars

pytestmark = pytest.mark.ray

REPOSITORY = Path(__file__).parents[2]


def rows_of(archive):
    reader = ArchiveReader(open_snapshot(str(archive)))
    rows = list(reader.rows(blobs=("base", "detail", "original")))
    assert len({row.key for row in rows}) == len(rows)
    return rows


def on_ray(sources, archive, codec=FakeCodec, **options):
    return compress(sources, str(archive), codec=codec, runtime="ray", **options)


@pytest.fixture
def tars(tmp_path):
    return write_tars(tmp_path)


@pytest.fixture
def undisturbed(tars, tmp_path):
    compress(tars, str(tmp_path / "undisturbed"), codec=FakeCodec, runtime="local")
    return rows_of(tmp_path / "undisturbed")


def test_a_job_on_ray_writes_the_rows_that_a_loop_writes(cluster, tars, undisturbed, tmp_path):
    shown = []
    report = on_ray(
        tars, tmp_path / "archive", progress=lambda report: shown.append(report.units_done)
    )
    assert rows_of(tmp_path / "archive") == undisturbed
    assert (report.units_done, report.tally.images, report.manifest) == (3, 18, 1)
    assert report.runtime == "ray"
    assert 1 <= report.workers <= 2, "the first may have done everything before the second is there"
    assert shown[-1] == 3
    assert report.cpu_seconds > 0
    assert on_ray(tars, tmp_path / "archive").units_done == 0


def test_a_worker_that_is_killed_in_a_unit_costs_that_unit_a_second_run(
    cluster, tars, undisturbed, tmp_path
):
    report = on_ray(tars, tmp_path / "archive", DiesOnce(str(tmp_path / "died")))
    assert (tmp_path / "died").exists()
    assert report.units_done == 3
    assert rows_of(tmp_path / "archive") == undisturbed


def test_an_image_that_kills_its_worker_is_found_and_kept_as_it_came(cluster, tars, tmp_path):
    deadly = bmp(np.full((24, 32, 3), DEADLY, np.uint8))
    images = {f"{i}": deadly if i == 2 else bmp(picture(i)) for i in range(3)}
    sources = [write_tar(tmp_path / "deadly.tar", images), tars[0]]
    options = {"failure_budget": 1, "ray_options": RayOptions(workers=1)}
    report = on_ray(sources, tmp_path / "archive", dies_on_deadly_pictures, **options)
    rows = {row.key: row for row in rows_of(tmp_path / "archive")}
    assert len(rows) == 3 + 6
    crashed = {key for key, row in rows.items() if row.error and row.error.startswith("crash: ")}
    assert {key.rpartition("/")[2] for key in crashed} == {"2"}
    assert all(rows[key].original == deadly for key in crashed)
    assert report.tally.causes == {"crash": 1}
    assert report.manifest == 1


def test_workers_that_die_while_they_load_the_codec_end_the_job(cluster, tars, tmp_path):
    with pytest.raises(JobError, match="while they load the codec"):
        on_ray(tars[:1], tmp_path / "archive", DiesWhenLoaded(os.getpid()))


class BrokenCodec(FakeCodec):
    def encode(self, images, **_):
        raise WeightsError("default", "damaged")


def test_a_broken_codec_arrives_at_the_driver_with_its_type(cluster, tars, tmp_path):
    with pytest.raises(WeightsError) as caught:
        on_ray(tars[:1], tmp_path / "archive", BrokenCodec)
    assert caught.value.reason == "damaged"


def test_the_failure_budget_stops_a_job_and_keeps_what_is_committed(cluster, tmp_path):
    tars = [write_tar(tmp_path / f"{n}.tar", {f"{i}": b"junk" for i in range(4)}) for n in range(8)]
    with pytest.raises(FailureBudgetError):
        on_ray(tars, tmp_path / "archive", failure_budget=3, ray_options=RayOptions(workers=1))
    assert 1 <= len(open_snapshot(str(tmp_path / "archive")).commits) < 8


def test_a_driver_that_is_killed_is_continued_by_the_next(cluster, tars, undisturbed, tmp_path):
    archive = tmp_path / "archive"
    script = (
        "import sys; from dicmh_ray.ray_plugin import RayOptions, compress\n"
        "from tests.ray_plugin.deadly_codecs import Slow\n"
        "compress(sys.argv[3:], sys.argv[1], codec=Slow(0.1),\n"
        "         ray_options=RayOptions(address=sys.argv[2], workers=1))\n"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", script, str(archive), cluster, *tars], cwd=REPOSITORY
    )
    deadline = time.monotonic() + 120
    while not list(archive.glob("commit/*.json")):
        assert driver.poll() is None, "the driver ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    found = len(open_snapshot(str(archive)).commits)
    assert 1 <= found < 3
    report = on_ray(tars, archive, Slow(0.0))
    assert report.units_resumed >= found
    assert report.manifest == 1
    assert rows_of(archive) == undisturbed


def test_a_unit_that_cannot_be_read_is_named_at_the_end(cluster, tars, tmp_path):
    def remove_the_last(_):
        Path(tars[2]).unlink(missing_ok=True)

    options = {"progress": remove_the_last, "ray_options": RayOptions(workers=1)}
    with pytest.raises(JobError, match="1 of 3 units could not be run"):
        on_ray(tars, tmp_path / "archive", Slow(0.3), **options)
    assert len(open_snapshot(str(tmp_path / "archive")).commits) == 2
