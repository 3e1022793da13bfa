"""What fits on which machines; no cluster is started."""

import signal

import pytest

pytest.importorskip("ray")

from dicmh_ray.errors import JobStoppedError, RayUnavailableError
from dicmh_ray.pipeline import EncodeOptions
from dicmh_ray.ray_plugin import RayOptions, cluster, compress
from dicmh_ray.ray_plugin.actors import CHUNK_BYTES, UnitReader
from dicmh_ray.ray_plugin.cluster import ActorSize, Layout, Machine, connected
from tests.fake_codec import FakeCodec
from tests.small_collections import write_tars
from tests.test_streaming import loaded


def machine(cpus, gpus=0):
    return Machine(node_id=f"{cpus}-{gpus}", cpus=cpus, gpus=gpus)


@pytest.fixture
def laid_out(monkeypatch):
    def lay(nodes, device="auto", threads=None, units=10**6, **options):
        monkeypatch.setattr(cluster, "machines", lambda: nodes)
        return Layout.of(RayOptions(**options), device, threads, units)

    return lay


@pytest.mark.parametrize(
    ("size", "nodes", "count"),
    [
        (ActorSize(cpus=0, gpus=1), [machine(8, 2), machine(64)], 2),
        (ActorSize(cpus=0, gpus=0.5), [machine(8, 2), machine(8, 1)], 6),
        (ActorSize(cpus=0, gpus=0.4), [machine(8, 3)], 6),
        (ActorSize(cpus=0, gpus=0.1), [machine(8, 1)], 10),
        (ActorSize(cpus=0, gpus=2), [machine(8, 3), machine(8, 1)], 1),
        (ActorSize(cpus=1, gpus=0), [machine(8), machine(2)], 10),
        (ActorSize(cpus=3, gpus=0), [machine(8), machine(2)], 2),
        (ActorSize(cpus=1, gpus=0), [], 0),
    ],
)
def test_shares_of_a_gpu_are_of_one_gpu_and_cores_of_one_machine(size, nodes, count):
    assert size.fitting(nodes) == count


def test_on_cpus_every_core_has_a_worker_with_one_thread(laid_out):
    layout = laid_out([machine(8), machine(4)])
    assert (layout.worker, layout.on_gpu, layout.max_readers) == (
        ActorSize(cpus=1, gpus=0),
        False,
        0,
    )
    options = layout.fit(EncodeOptions())
    assert (options.threads, options.batch_pixels, options.load_threads) == (1, 2**20, 1)


@pytest.mark.parametrize(
    ("nodes", "options", "units", "cpus"),
    [
        ([machine(8)], {}, 2, 4),
        ([machine(8)], {"workers": 3}, 100, 2),
        ([machine(8)], {"max_concurrency": 1}, 100, 8),
        ([machine(2), machine(2)], {"workers": 1}, 100, 2),
        ([], {}, 100, 1),
    ],
)
def test_fewer_workers_than_cores_get_several_each(laid_out, nodes, options, units, cpus):
    layout = laid_out(nodes, units=units, **options)
    assert layout.worker.cpus == cpus
    assert layout.fit(EncodeOptions()).threads == cpus


def test_threads_that_were_asked_for_are_claimed(laid_out):
    assert laid_out([machine(8)], threads=2).worker.cpus == 2
    assert laid_out([machine(2)], threads=16).worker.cpus == 2


def test_readers_are_used_where_machines_without_gpu_stand_beside_those_with_one(laid_out):
    mixed = [machine(8, 1), machine(16), machine(6)]
    layout = laid_out(mixed)
    assert (layout.worker, layout.max_readers) == (ActorSize(cpus=0, gpus=1), 5)
    assert layout.reader == ActorSize(cpus=4, gpus=0)
    assert laid_out(mixed, readers="never").reader is None
    assert laid_out([machine(8, 1)]).reader is None
    assert laid_out([machine(8, 1)], readers="always").max_readers == 1
    assert laid_out([machine(16)]).reader is None
    assert laid_out([machine(16)], readers="always", reader_cpus=2).max_readers == 4
    options = layout.fit(EncodeOptions())
    assert (options.threads, options.batch_pixels, options.load_threads) == (None, 2**24, 4)


def test_a_device_that_is_named_decides_before_there_are_machines(laid_out):
    assert laid_out([machine(2)], device="cuda").worker == ActorSize(cpus=0, gpus=1)
    assert laid_out([machine(2, 1)], device="cpu").worker == ActorSize(cpus=1, gpus=0)


@pytest.mark.parametrize(
    "options",
    [
        {"workers": 0},
        {"min_workers": 0},
        {"min_workers": 3, "workers": 2},
        {"max_concurrency": 0},
        {"gpus_per_worker": 0},
        {"gpus_per_worker": 1.5},
        {"readers": "sometimes"},
        {"reader_cpus": 0},
        {"grace_s": -1},
    ],
)
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        RayOptions(**options)


class ReadJob:
    """The part of a job that a reader uses."""

    encode_options = EncodeOptions(load_threads=0)

    def read(self, unit):
        return unit


def test_a_readers_answers_are_bounded_by_bytes_and_end_with_an_empty_one(monkeypatch):
    side = 2048
    large = loaded(side, side)
    monkeypatch.setattr("dicmh_ray.ray_plugin.actors.load_unit", lambda images, _: iter(images))
    reader = UnitReader(ReadJob())
    assert reader.read() == []
    huge = loaded(4096, 4096)
    reader.open([large, large, large, huge, large])
    answers = []
    while answer := reader.read():
        answers.append(len(answer))
    assert answers == [2, 1, 1, 1]
    assert 2 * large.num_bytes <= CHUNK_BYTES < 3 * large.num_bytes
    reader.open([large])
    reader.open([huge])
    assert reader.read() == [huge]
    assert reader.read() == []


@pytest.fixture
def no_ray(monkeypatch):
    """Gives this process the way in which Ray fails to start; a cluster of other tests stays."""

    def fails(init):
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
        monkeypatch.setattr(cluster.ray, "init", init)
        monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)

    return fails


@pytest.mark.parametrize(
    ("address", "error", "calls", "told"),
    [
        (None, Exception("The current node timed out during startup. This\ncould"), 3, "is busy"),
        (None, ValueError("no such port\nadvice"), 1, "ValueError: no such port"),
        ("ray://head:10001", ConnectionError(), 1, "ConnectionError"),
    ],
)
def test_a_ray_that_is_not_there_is_a_typed_error(no_ray, address, error, calls, told):
    tried = []

    def init(**options):
        tried.append(options["address"])
        raise error

    no_ray(init)
    with (
        pytest.raises(RayUnavailableError, match=told) as caught,
        connected(RayOptions(address=address)),
    ):
        pass
    assert len(tried) == calls
    assert "advice" not in str(caught.value)


def test_told_to_stop_while_ray_starts_a_job_ends_as_one_that_was_told_to_stop(no_ray, tmp_path):
    """Ray's handler, which is there until ours is, ends the process with the signal's number."""

    def init(**_):
        raise SystemExit(signal.SIGTERM)

    no_ray(init)
    with pytest.raises(JobStoppedError, match="3 units left"):
        compress(write_tars(tmp_path), str(tmp_path / "archive"), codec=FakeCodec)
