"""Tasks on Ray: the same results as in this process, also when workers die."""

import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("ray")

from dicmh_ray.analysis import Task, read_results
from dicmh_ray.archive import open_snapshot
from dicmh_ray.errors import FailureBudgetError, JobError, MissingExtraError
from dicmh_ray.ray_plugin import RayOptions
from dicmh_ray.ray_plugin.analysis import analyze
from tests.analysis.conftest import archive_folder  # noqa: F401  a fixture
from tests.analysis.user_tasks import Brightness, Broken
from tests.fake_codec import FakeCodec

pytestmark = pytest.mark.ray

TWO = RayOptions(workers=2)


@pytest.fixture
def archive(archive_folder, tmp_path):  # noqa: F811
    shutil.copytree(archive_folder, tmp_path / "archive")
    return str(tmp_path / "archive")


class Deadly(Brightness):
    """Kills its process so many times."""

    name = "deadly"

    def __init__(self, folder, times):
        self.folder, self.times = folder, times

    def __call__(self, batch):
        deaths = list(Path(self.folder).iterdir())
        if len(deaths) < self.times:
            Path(self.folder, f"{len(deaths)}-{os.getpid()}").touch()
            os._exit(1)
        return super().__call__(batch)


class Unloadable(Brightness):
    """Cannot be set up."""

    name = "unloadable"

    def setup(self):
        raise MissingExtraError("something", "bench")


def table_of(archive, task):
    return read_results(open_snapshot(archive), task).table().sort_by("key")


def test_ray_gives_what_this_process_gives(cluster, archive, tmp_path):
    shutil.copytree(archive, tmp_path / "other")
    codec = FakeCodec()
    # The cluster has room for two: the third starts when one of them has nothing left to do.
    done = analyze(
        archive, Brightness(), runtime="ray", ray_options=RayOptions(workers=3), codec=codec
    )
    assert (done.report.units_done, done.report.rows, done.report.runtime) == (3, 15, "ray")
    analyze(str(tmp_path / "other"), Brightness(), codec=codec)
    assert table_of(archive, Brightness()).equals(table_of(str(tmp_path / "other"), Brightness()))
    again = analyze(archive, Brightness(), runtime="ray", ray_options=TWO, codec=codec)
    assert again.report.units_resumed == 3


def test_a_unit_whose_worker_died_is_looked_at_again(cluster, archive, tmp_path):
    (tmp_path / "deaths").mkdir()
    task = Deadly(str(tmp_path / "deaths"), 2)
    analyze(archive, task, runtime="ray", ray_options=RayOptions(workers=1), codec=FakeCodec())
    assert len(list((tmp_path / "deaths").iterdir())) == 2
    assert len(table_of(archive, task)) == 15


def test_a_unit_that_always_kills_is_given_up_by_name(cluster, archive, tmp_path):
    (tmp_path / "deaths").mkdir()
    task = Deadly(str(tmp_path / "deaths"), 99)
    with pytest.raises(JobError, match=r"1 units have no results: .*: its worker died"):
        analyze(
            archive, task, where="'u0' in tags", runtime="ray",
            ray_options=RayOptions(workers=1), codec=FakeCodec(),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("task", "error"), [(Broken, FailureBudgetError), (Unloadable, MissingExtraError)]
)
def test_errors_arrive_with_their_type(cluster, archive, task, error):
    assert issubclass(task, Task)
    with pytest.raises(error):
        analyze(archive, task(), runtime="ray", ray_options=TWO, codec=FakeCodec())
