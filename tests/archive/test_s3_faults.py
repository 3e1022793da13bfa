"""S3 servers that refuse, lie, lose answers or break them: what an archive makes of it."""

import logging
import threading
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from dicmh_ray.archive import (
    append_to_archive,
    create_archive,
    open_snapshot,
    open_store,
    verify_archive,
)
from dicmh_ray.archive.store import probe
from dicmh_ray.errors import AppendError, DicmhError, StoreAccessError, StoreUnavailableError
from dicmh_ray.reader import ArchiveReader
from dicmh_ray.testing import ceph
from dicmh_ray.testing.fault_proxy import AFTER, BEFORE, CONDITIONAL, FaultProxy, Schedule
from tests.archive.conftest import KEY, SECRET, new_bucket
from tests.archive.rows import CODEC_FILES, mixed_rows, ok_row, plan_of

SHORT_PATIENCE = {"read_timeout": 0.4, "connect_timeout": 5, "s3": {"addressing_style": "path"}}


@pytest.fixture
def proxied(moto_options):
    """A proxy before moto that lets everything pass, an address behind it, and its options."""
    uri = f"s3://{new_bucket(moto_options)}/archive"
    with FaultProxy(moto_options["endpoint_url"], rate=0.0) as proxy:
        options = moto_options | {"endpoint_url": proxy.url, "config_kwargs": SHORT_PATIENCE}
        yield proxy, uri, options


def every_time(kind, hold_s=0.5):
    return Schedule(seed=1, rate=1.0, kinds=(kind,), hold_s=hold_s)


def test_a_wrong_secret_is_refused_and_not_told(ceph_options, caplog):
    caplog.set_level(logging.DEBUG, logger="dicmh_ray")
    bucket = new_bucket(ceph_options)
    wrong = ceph_options | {"secret": "a-wrong-secret-key"}
    uri = f"s3://{bucket}/archive"
    for action in (
        lambda: create_archive(
            uri, plan=plan_of("u0"), codec_files=CODEC_FILES, storage_options=wrong
        ),
        lambda: open_snapshot(uri, storage_options=wrong),
        lambda: open_store(uri, wrong).put("x", b""),
        lambda: open_store(uri, wrong).list(""),
    ):
        with pytest.raises(StoreAccessError, match=f"s3://{bucket}/archive: .*refused") as caught:
            action()
        told = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
        for secret in ("a-wrong-secret-key", ceph.ACCESS_KEY, ceph.SECRET_KEY):
            assert secret not in told
            assert secret not in caplog.text
    assert verify_archive(uri, storage_options=wrong).exit_code == 2
    right = create_archive(
        uri, plan=plan_of("u0"), codec_files=CODEC_FILES, storage_options=ceph_options
    )
    right.commit_unit("u0", mixed_rows(0, 2))


def test_nothing_that_is_written_holds_a_credential(place, caplog):
    """Neither objects nor logs, at the most talkative level of our own loggers."""
    caplog.set_level(logging.DEBUG, logger="dicmh_ray")
    job = create_archive(
        place.uri, plan=plan_of("u0"), codec_files=CODEC_FILES, storage_options=place.options
    )
    job.commit_unit("u0", mixed_rows(0, 6), info={"host": "a"})
    job.finalize()
    later = append_to_archive(
        place.uri,
        plan=plan_of("u1", later=True),
        codec_files=CODEC_FILES,
        storage_options=place.options,
    )
    later.commit_unit("u1", mixed_rows(6, 6))
    later.finalize()
    report = verify_archive(place.uri, storage_options=place.options)
    said = [
        caplog.text,
        repr(job),
        repr(report),
        str(open_snapshot(place.uri, storage_options=place.options).statistics),
    ]
    store = place.store()
    written = [store.get(name) for name in store.list("")]
    assert len(written) > 8
    for secret in (KEY, SECRET, ceph.ACCESS_KEY, ceph.SECRET_KEY):
        assert not any(secret in text for text in said)
        assert not any(secret.encode() in data for data in written)


@pytest.mark.parametrize("kind", [*BEFORE, *AFTER, *CONDITIONAL, "late"])
def test_a_conditional_put_has_one_winner_whatever_is_answered(proxied, kind):
    proxy, uri, options = proxied
    store = open_store(uri, options)
    # The first request of each name breaks, and only puts do.
    schedule = every_time(kind)
    broken = Counter()
    lock = threading.Lock()

    class Once(Schedule):
        def fault(self, method, path, seen, *, is_conditional):
            with lock:
                broken[path] += method == "PUT"
                first = method == "PUT" and broken[path] == 1
            return schedule.kinds[0] if first else None

    proxy.begin(Once(seed=1, rate=1.0, kinds=(kind,), hold_s=0.5))
    assert store.put_if_absent("commit/a", b"mine")
    assert store.put_if_absent("commit/a", b"mine")
    assert not store.put_if_absent("commit/a", b"theirs")
    with ThreadPoolExecutor(3) as pool:
        contents = [b"racer %d" % number for number in range(3)]
        won = list(pool.map(lambda data: store.put_if_absent("commit/b", data), contents))
    proxy.settle()
    assert won.count(True) == 1
    assert store.get("commit/b") == contents[won.index(True)]
    assert proxy.faults() == {kind: 2}


@pytest.mark.parametrize("kind", ["503-before", "reset-before", "short-read"])
def test_a_store_that_never_answers_is_named_with_object_and_tries(proxied, kind):
    proxy, uri, options = proxied
    store = open_store(uri, options)
    store.put("data/x", b"0123456789")
    proxy.begin(every_time(kind))
    with pytest.raises(StoreUnavailableError, match=f"{uri}: data/x: no answer in 4 tries"):
        store.get("data/x")
    # The client's own retries are off, but aiohttp asks again when a kept connection was reset.
    assert proxy.faults() == {kind: 8 if kind == "reset-before" else 4}


@pytest.mark.parametrize("kind", ["short-read", "timeout-after"])
def test_an_answer_that_is_cut_short_or_never_comes_is_asked_for_again(proxied, kind):
    proxy, uri, options = proxied
    store = open_store(uri, options)
    store.put("data/x", bytes(range(256)) * 8)

    class EveryOther(Schedule):
        def fault(self, method, path, seen, *, is_conditional):
            return kind if method == "GET" and seen % 2 else None

    proxy.begin(EveryOther())
    assert store.get("data/x") == bytes(range(256)) * 8
    assert store.get_range("data/x", 10, 700) == (bytes(range(256)) * 8)[10:710]
    assert proxy.faults() == {kind: 2}


def test_two_jobs_behind_a_bad_line_write_one_archive(proxied):
    proxy, uri, options = proxied
    proxy.begin(Schedule(seed=1, rate=0.2, hold_s=0.5))
    plan = plan_of("u0", "u1", "u2")

    def drive(_):
        for _ in range(20):
            try:
                job = create_archive(
                    uri, plan=plan, codec_files=CODEC_FILES, storage_options=options
                )
                for unit in sorted(set(plan.unit_names) - job.committed_units()):
                    job.commit_unit(unit, mixed_rows(10 * int(unit[1]), 3))
                return job.finalize()
            except (DicmhError, OSError):
                continue
        raise AssertionError("twenty starts were not enough")

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(drive, range(2))
    proxy.settle()
    assert one == other
    assert proxy.faults().total() > 3
    proxy.begin(Schedule(rate=0.0))
    assert verify_archive(uri, storage_options=options).exit_code == 0
    keys = list(ArchiveReader(open_snapshot(uri, storage_options=options)).keys())
    assert len(set(keys)) == len(keys) == 9


class TestServerThatIgnoresConditions:
    """It answers 200 to If-None-Match and overwrites: commits are then named by attempt."""

    @pytest.fixture
    def lying(self, proxied):
        proxy, uri, options = proxied
        proxy.ignore_conditions = True
        return uri, options

    def test_the_probe_finds_out(self, lying):
        uri, options = lying
        assert not probe(open_store(uri, options))

    def test_of_racing_jobs_one_attempt_a_unit_counts_for_everybody(self, lying):
        uri, options = lying
        plan = plan_of("u0", "u1")
        gate = threading.Barrier(3, timeout=60)

        def drive(number):
            job = create_archive(uri, plan=plan, codec_files=CODEC_FILES, storage_options=options)
            assert not job.conditional
            gate.wait()
            for unit in plan.unit_names:
                job.commit_unit(unit, [ok_row(f"{unit}-image", source_offset=number)])
            gate.wait()  # until then a smaller name may appear
            return job.finalize()

        with ThreadPoolExecutor(3) as pool:
            manifests = list(pool.map(drive, range(3)))
        assert manifests[0] == manifests[1] == manifests[2]
        snapshot = open_snapshot(uri, storage_options=options)
        names = snapshot.store.list("commit/")
        for commit in snapshot.commits:
            attempts = [name for name in names if name.startswith(f"commit/{commit.unit}/")]
            assert attempts[0] == f"commit/{commit.unit}/{commit.attempt}.json"
        assert snapshot.statistics.rows == 2
        assert verify_archive(uri, storage_options=options).exit_code == 0

    def test_a_writer_that_slept_changes_nothing_that_is_finished(self, lying):
        uri, options = lying
        plan = plan_of("u0")
        start = {"plan": plan, "codec_files": CODEC_FILES, "storage_options": options}
        sleeper = create_archive(uri, **start)
        awake, may_go = threading.Event(), threading.Event()

        def slow_rows():
            awake.set()
            assert may_go.wait(60)
            yield ok_row("image", source_offset=1)

        with ThreadPoolExecutor(1) as pool:
            slept = pool.submit(sleeper.commit_unit, "u0", slow_rows())
            assert awake.wait(60)
            job = create_archive(uri, **start)
            job.commit_unit("u0", [ok_row("image", source_offset=2)])
            finished = job.finalize()
            may_go.set()
            slept.result(60)
        assert sleeper.finalize() == finished
        (row,) = ArchiveReader(open_snapshot(uri, storage_options=options)).rows()
        assert row.source_offset == 2

    def test_nothing_is_appended_there(self, lying):
        uri, options = lying
        job = create_archive(
            uri, plan=plan_of("u0"), codec_files=CODEC_FILES, storage_options=options
        )
        job.commit_unit("u0", mixed_rows(0, 2))
        job.finalize()
        with pytest.raises(AppendError, match="ignores conditional puts"):
            append_to_archive(
                uri, plan=plan_of("u1"), codec_files=CODEC_FILES, storage_options=options
            )


def test_a_schedule_says_the_same_of_the_same_request():
    schedule = Schedule(seed=5, rate=0.5)

    def fates(name):
        return [
            schedule.fault("PUT", f"/b/{name}.json", seen, is_conditional=True)
            for seen in range(1, 60)
        ]

    assert fates("0123456789abcdef-1") == fates("fedcba9876543210-1"), "unique names do not matter"
    assert fates("a") != fates("b")
    broken = sum(fate is not None for fate in fates("a"))
    assert 15 < broken < 45
