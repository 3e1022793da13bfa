"""Bulk decode in Ray actors, some of which die."""

import os
import signal
import subprocess
import sys
from functools import partial

import pytest

pytest.importorskip("ray")

from dicmh_ray.errors import JobError
from dicmh_ray.ray_plugin.decoding import decode_on_ray
from dicmh_ray.views.bulk import BulkOptions, plan_bulk_decode
from dicmh_ray.views.bulk_local import decode_here
from tests.adapters.conftest import archive_uri, pictures  # noqa: F401
from tests.fake_codec import FakeCodec

pytestmark = pytest.mark.ray


class DeadlyCodec(FakeCodec):
    """Kills its process at a decode, as often as there are markers left to make."""

    def __init__(self, folder, deaths):
        super().__init__()
        self._markers = [os.path.join(folder, f"died-{n}") for n in range(deaths)]

    def decode(self, bitstreams, *, states=None, view="machine"):
        for marker in self._markers:
            try:
                os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            os.kill(os.getpid(), signal.SIGKILL)
        return super().decode(bitstreams, states=states, view=view)


def planned(uri, output, shard_rows=4):
    options = BulkOptions(where="status == 'ok'", shard_rows=shard_rows)
    return plan_bulk_decode(uri, str(output), options)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_worker_that_dies_costs_nothing(cluster, archive_uri, tmp_path):  # noqa: F811
    job = planned(archive_uri, tmp_path / "here")
    decode_here(job, workers=1, codec=FakeCodec)
    sums = job.finish()
    job = planned(archive_uri, tmp_path / "ray")
    records = []
    codec = partial(DeadlyCodec, str(tmp_path), 1)
    decode_on_ray(job, workers=2, codec=codec, on_shard=records.append)
    assert (tmp_path / "died-0").exists()
    assert sorted(record.shard for record in records) == list(range(job.num_shards))
    assert job.finish() == sums
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "here")


def test_a_shard_that_kills_every_worker_ends_the_job(cluster, archive_uri, tmp_path):  # noqa: F811
    job = planned(archive_uri, tmp_path / "out", shard_rows=100)
    with pytest.raises(JobError, match="shard 0 killed 3 workers"):
        decode_on_ray(job, workers=1, codec=partial(DeadlyCodec, str(tmp_path), 3))
    assert job.shards_left() == [0]


def test_what_ray_reads_at_its_import_is_set_before():
    watch = """
import os, sys
class Watch:
    def find_spec(self, name, *_):
        if name == "ray" and "RAY_AUTH_MODE" not in os.environ:
            sys.exit("ray is imported before its settings")
sys.meta_path.insert(0, Watch())
import dicmh_ray.ray_plugin.decoding
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    subprocess.run([sys.executable, "-c", watch], env=environment, check=True)
