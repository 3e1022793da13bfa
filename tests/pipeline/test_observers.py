"""What operators see of a job: events, metrics, estimates, retries. No torch, no ray."""

import errno
import io
import json
import math
import random

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dicmh_ray.archive import ArchiveWriter
from dicmh_ray.errors import FailureBudgetError, JobError, StoreAccessError
from dicmh_ray.pipeline import JobMonitor, JobObserver, UnitsQueue, compress_local, plan_job
from dicmh_ray.pipeline import units_queue as units_queue_module
from dicmh_ray.pipeline.event_log import JsonEventLog
from dicmh_ray.pipeline.metrics import METRICS, MetricsObserver, TextfileSink
from dicmh_ray.pipeline.units_queue import RETRY_MAX_S, retry_delay_s
from dicmh_ray.ray_plugin import compress
from tests.fake_codec import FakeCodec
from tests.small_collections import bmp, picture, poison, write_tar, write_tars


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(units_queue_module, "RETRY_BASE_S", 0.01)


@pytest.fixture
def sources(tmp_path):
    broken = {"x-junk": b"junk", "x-poison": bmp(poison()), "x-sound": bmp(picture(1))}
    return [*write_tars(tmp_path), write_tar(tmp_path / "shard-900.tar", broken)]


def local(sources, archive, **options):
    return compress(sources, str(archive), codec=FakeCodec, runtime="local", **options)


def events_of(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_every_event_of_a_job_is_one_json_line(sources, tmp_path):
    stream = io.StringIO()
    report = local(sources, tmp_path / "a", failure_budget=1.0, observers=[JsonEventLog(stream)])
    events = events_of(stream)
    assert [event["event"] for event in events] == [
        "job_started", *["unit_committed"] * 4, "failures", "job_ended"
    ]  # fmt: skip
    assert all(event["archive"] == str(tmp_path / "a") for event in events)
    assert all(event["time"].endswith("+00:00") for event in events)
    started, ended = events[0], events[-1]
    assert (started["units_total"], started["runtime"]) == (4, "local")
    assert events[-2]["causes"] == {"encode-failed": 1, "unreadable": 1}
    assert events[-2]["examples"]["unreadable"][0]["key"].endswith("x-junk")
    assert sum(event["images"] for event in events[1:5]) == ended["images"] == 21
    assert (ended["outcome"], ended["manifest"]) == ("succeeded", 1)
    assert ended["bytes_saved"] == report.tally.bytes_in - report.tally.bytes_out


def test_a_job_over_its_budget_ends_its_log_with_the_reason(sources, tmp_path):
    stream = io.StringIO()
    with pytest.raises(FailureBudgetError):
        local(sources, tmp_path / "a", failure_budget=0, observers=[JsonEventLog(stream)])
    last = events_of(stream)[-1]
    assert (last["event"], last["outcome"]) == ("job_ended", "over_failure_budget")
    assert "2 of" in last["message"]


def test_retries_and_units_given_up_are_told_and_the_others_do_not_wait_for_them(tmp_path):
    tars = write_tars(tmp_path)
    job, units, report = plan_job(tars, str(tmp_path / "a"), codec=FakeCodec)
    (tmp_path / "shard-000.tar").unlink()
    stream = io.StringIO()
    sink = TextfileSink(path=tmp_path / "job.prom")
    observers = [JsonEventLog(stream), MetricsObserver(sink)]
    with (
        pytest.raises(JobError, match=r"\(000000: FileNotFoundError: .*shard-000\.tar'\);"),
        JobMonitor(report, observers=observers, seed=1) as monitor,
    ):
        compress_local(job, units, monitor)
    names = [event["event"] for event in events_of(stream)]
    assert names.count("unit_retried") == 2
    assert names.count("unit_given_up") == 1
    assert names.index("unit_committed") < names.index("unit_given_up")
    (given_up,) = [event for event in events_of(stream) if event["event"] == "unit_given_up"]
    assert given_up["reason"].startswith("FileNotFoundError: ")
    retried = [event for event in events_of(stream) if event["event"] == "unit_retried"]
    assert [event["attempt"] for event in retried] == [1, 2]
    assert all(event["error"] == "FileNotFoundError" for event in retried)
    values = read_metrics(tmp_path / "job.prom")
    assert values["dicmh_unit_retries_total", "FileNotFoundError"] == 2
    assert values["dicmh_units_given_up_total", None] == 1
    assert values["dicmh_job_succeeded", None] == 0
    assert (report.units_retried, report.units_failed) == (2, [units[0].name])


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), StoreAccessError("a", "data/x", "403")],
    ids=["full disk", "no right"],
)
def test_a_store_that_takes_nothing_stops_the_job_after_one_unit(tmp_path, monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(ArchiveWriter, "commit_unit", refuse)
    job, units, report = plan_job(write_tars(tmp_path), str(tmp_path / "a"), codec=FakeCodec)
    with pytest.raises(type(error)), JobMonitor(report) as monitor:
        compress_local(job, units, monitor)
    assert len(report.units_failed) == 1
    assert report.units_retried >= 2


def test_a_source_that_was_changed_is_not_tried_again(tmp_path):
    tars = write_tars(tmp_path)
    job, units, report = plan_job(tars, str(tmp_path / "a"), codec=FakeCodec)
    write_tar(tmp_path / "shard-001.tar", {"other": bmp(picture(1, height=99))})
    with pytest.raises(JobError):
        compress_local(job, units, JobMonitor(report))
    assert (report.units_retried, len(report.units_failed)) == (0, 1)


def read_metrics(path):
    """(name, second label) -> value."""
    found = {}
    for family in text_string_to_metric_families(path.read_text()):
        for sample in family.samples:
            more = [value for name, value in sample.labels.items() if name != "archive"]
            found[sample.name, more[0] if more else None] = sample.value
    return found


def test_the_metrics_file_is_what_prometheus_reads_and_agrees_with_the_report(sources, tmp_path):
    path = tmp_path / "job.prom"
    sink = TextfileSink(path=path)
    archive = tmp_path / 'a "b"\\c'
    report = local(sources, archive, failure_budget=1.0, observers=[MetricsObserver(sink)])
    values = read_metrics(path)
    tally = report.tally
    assert values["dicmh_images_total", "ok"] == tally.ok == 19
    assert values["dicmh_images_total", "kept_original"] == tally.kept_original == 2
    assert values["dicmh_images_without_stream_total", "unreadable"] == 1
    assert values["dicmh_failures_total", None] == 2
    assert values["dicmh_source_bytes_total", None] == tally.bytes_in
    assert values["dicmh_archive_bytes_total", None] == tally.bytes_out
    assert values["dicmh_unit_seconds_count", None] == 4
    assert values["dicmh_unit_seconds_bucket", "+Inf"] == 4
    assert values["dicmh_units_left", None] == values["dicmh_source_bytes_left", None] == 0
    assert (values["dicmh_job_running", None], values["dicmh_job_succeeded", None]) == (0, 1)
    families = {family.name: family for family in text_string_to_metric_families(path.read_text())}
    labels = {s.labels["archive"] for family in families.values() for s in family.samples}
    assert labels == {str(archive)}
    assert families["dicmh_images"].type == "counter"


def test_a_running_job_says_so_and_a_file_that_cannot_be_written_does_not_stop_it(
    sources, tmp_path
):
    class Look(JobObserver):
        def unit_committed(self, report, unit, result):
            sink.flush(is_last=True)
            seen.append(read_metrics(sink.path)["dicmh_job_running", None])

    sink, seen = TextfileSink(path=tmp_path / "job.prom"), []
    local(sources[:3], tmp_path / "a", observers=[MetricsObserver(sink), Look()])
    assert seen == [1, 1, 1]
    lost = TextfileSink(path=tmp_path / "missing" / "job.prom")
    assert local(sources[:3], tmp_path / "b", observers=[MetricsObserver(lost)]).manifest == 1


def test_every_metric_has_a_name_of_its_own_that_says_what_it_counts():
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.name.startswith("dicmh_")
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert bool(metric.buckets) == (metric.kind == "histogram")


def test_the_estimate_of_the_time_to_go_follows_the_pace(tmp_path, monkeypatch):
    estimates = []

    def look(report):
        if report.units_done and report.eta_s is not None:
            estimates.append((report.units_done, report.eta_s, report.seconds))

    local(write_tars(tmp_path, tars=4), tmp_path / "a", progress=look)
    first = next(estimate for estimate in estimates if estimate[0] == 2)
    assert first[1] == pytest.approx(first[2], rel=0.2), "half is done"
    assert estimates[-1][1] == 0


def test_delays_double_with_jitter_up_to_a_bound():
    rng = random.Random(1)
    for attempt in range(1, 20):
        bound = min(RETRY_MAX_S, units_queue_module.RETRY_BASE_S * 2 ** (attempt - 1))
        delays = [retry_delay_s(attempt, rng) for _ in range(50)]
        assert bound / 2 <= min(delays) < max(delays) <= bound
        assert len(set(delays)) == 50


def test_units_that_were_put_back_wait_while_others_go_first(monkeypatch):
    now = 100.0
    monkeypatch.setattr(units_queue_module.time, "monotonic", lambda: now)
    queue = UnitsQueue(["a", "b"])
    queue.put(queue.take(), delay_s=5)
    assert (len(queue), queue.wait_s(), queue.take()) == (2, 0, "b")
    assert (queue.take(), queue.wait_s()) == (None, 5)
    queue.put_first("c")
    now = 105.0
    assert [queue.take(), queue.take(), queue.take()] == ["a", "c", None]
    assert math.isclose(queue.wait_s(), 0)


def test_a_mixed_queue_keeps_every_unit_and_is_mixed_once():
    units = [str(n) for n in range(50)]
    queue = UnitsQueue(units)
    assert [queue.take(), queue.take()] == ["0", "1"]
    queue.mix()
    taken = [queue.take() for _ in range(24)]
    queue.mix()
    order = taken + [queue.take() for _ in range(24)]
    assert sorted(order, key=int) == units[2:]
    assert order != units[2:]
