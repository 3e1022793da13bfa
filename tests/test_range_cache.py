"""The local cache: fewer requests, never other bytes."""

import os
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from dicmh_ray.archive import create_archive, open_snapshot
from dicmh_ray.archive.range_cache import RangeCache
from dicmh_ray.archive.ranges import ByteRange
from dicmh_ray.reader import ArchiveReader
from tests.archive.rows import CODEC_FILES, mixed_rows, plan_of
from tests.test_reader import CountingStore

SHA = "ab" * 32


def test_ranges_come_back_until_they_make_room(tmp_path):
    cache = RangeCache(tmp_path, 100_000)
    for number in range(200):
        cache.put(SHA, [(ByteRange(number * 1000, 1000), bytes([number]) * 1000)])
        assert cache.num_bytes() <= 100_000
    assert cache.get(SHA, ByteRange(199_000, 1000)) == bytes([199]) * 1000
    assert cache.get(SHA, ByteRange(0, 1000)) is None
    assert cache.get("cd" * 32, ByteRange(199_000, 1000)) is None
    assert cache.get(SHA, ByteRange(199_000, 999)) is None
    assert cache.get(SHA, ByteRange(5, 0)) == b""
    cache.put(SHA, [(ByteRange(0, 200_000), bytes(200_000))])
    assert cache.get(SHA, ByteRange(0, 200_000)) is None, "larger than the cache"
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 8_000_000, "the journal"


def test_an_entry_that_the_disk_changed_is_dropped(tmp_path):
    cache = RangeCache(tmp_path)
    cache.put(SHA, [(ByteRange(0, 4), b"abcd"), (ByteRange(4, 4), b"efgh")])
    with sqlite3.connect(tmp_path / "ranges-v1.sqlite") as database:
        database.execute("UPDATE ranges SET data = x'61626365' WHERE data = x'61626364'")
    assert cache.get_many(SHA, [ByteRange(0, 4), ByteRange(4, 4)]) == [None, b"efgh"]
    cache.put(SHA, [(ByteRange(0, 4), b"abcd")])
    assert cache.get(SHA, ByteRange(0, 4)) == b"abcd"


def test_a_file_that_is_no_database_is_started_again(tmp_path):
    (tmp_path / "ranges-v1.sqlite").write_bytes(b"no database at all" * 1000)
    cache = RangeCache(tmp_path)
    assert cache.get(SHA, ByteRange(0, 4)) is None
    cache.put(SHA, [(ByteRange(0, 4), b"abcd")])
    assert cache.get(SHA, ByteRange(0, 4)) == b"abcd"


def test_a_folder_that_cannot_be_made_costs_nothing_but_the_cache(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    cache = RangeCache(tmp_path / "file" / "folder")
    cache.put(SHA, [(ByteRange(0, 4), b"abcd")])
    assert cache.get(SHA, ByteRange(0, 4)) is None
    with pytest.raises(ValueError, match="cache_bytes"):
        RangeCache(tmp_path, 0)


def test_threads_and_processes_share_one_cache(tmp_path):
    cache = RangeCache(tmp_path, 60_000)
    code = (
        "import sys; from dicmh_ray.archive.range_cache import RangeCache;"
        "from dicmh_ray.archive.ranges import ByteRange;"
        "c = RangeCache(sys.argv[1], 60_000)\n"
        "for n in range(300):\n"
        "    p = ByteRange(n % 90 * 1000, 1000); d = bytes([n % 90]) * 1000\n"
        "    assert c.get('ab' * 32, p) in (None, d); c.put('ab' * 32, [(p, d)])"
    )
    others = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(2)]

    def work(offset):
        for number in range(200):
            n = (number + offset) % 90
            place, data = ByteRange(n * 1000, 1000), bytes([n]) * 1000
            assert cache.get(SHA, place) in (None, data)
            cache.put(SHA, [(place, data)])

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, [0, 30, 60]))
    assert [process.wait(60) for process in others] == [0, 0]
    assert cache.num_bytes() <= 60_000


def test_a_forked_process_opens_its_own_connection(tmp_path):
    cache = RangeCache(tmp_path)
    cache.put(SHA, [(ByteRange(0, 4), b"abcd")])
    child = os.fork()
    if not child:
        os._exit(0 if cache.get(SHA, ByteRange(0, 4)) == b"abcd" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert cache.get(SHA, ByteRange(0, 4)) == b"abcd"


@pytest.fixture
def archive(tmp_path):
    uri = str(tmp_path / "archive")
    job = create_archive(uri, plan=plan_of("a", "b"), codec_files=CODEC_FILES)
    job.commit_unit("a", mixed_rows(0, 6))
    job.commit_unit("b", mixed_rows(6, 6))
    job.finalize()
    return uri


def opened(uri, cache):
    store = CountingStore(uri)
    return ArchiveReader(replace(open_snapshot(uri), store=store), cache=cache), store


def test_what_was_read_once_costs_no_second_request(archive, tmp_path):
    first, store = opened(archive, RangeCache(tmp_path / "cache"))
    rows = list(first.rows(blobs=("base", "detail", "original")))
    assert store.reads
    second, store = opened(archive, RangeCache(tmp_path / "cache"))
    assert list(second.rows(blobs=("base", "detail", "original"))) == rows
    assert [second.get(row.key) for row in rows] == rows
    joined = [read for read in store.reads if "joined" in read[0]]
    assert len(store.reads) == len(joined) <= 1


def test_damaged_bytes_never_enter_the_cache(archive, tmp_path):
    cache = RangeCache(tmp_path / "cache")
    reader, store = opened(archive, cache)
    name = reader.snapshot.parts[0].name
    sound = store.get(name)
    key = next(iter(reader.keys()))
    place = next(p for p in reader.snapshot.read_indexes()[0].to_pylist() if p["base_length"])
    broken = bytearray(sound)
    broken[place["base_offset"] + 50] ^= 1
    store.put(name, bytes(broken))
    with pytest.raises(Exception, match="bitstream"):
        reader.bitstream(place["key"])
    store.put(name, sound)
    again, _ = opened(archive, cache)
    assert again.bitstream(place["key"])
    assert key


def test_an_archive_that_was_made_anew_at_its_address_is_not_read_from_the_old_cache(tmp_path):
    uri = str(tmp_path / "archive")
    cache = RangeCache(tmp_path / "cache")
    for start in (0, 50):
        job = create_archive(uri, plan=plan_of("a"), codec_files=CODEC_FILES)
        job.commit_unit("a", mixed_rows(start, 4))
        job.finalize()
        reader, store = opened(uri, cache)
        rows = list(reader.rows(blobs=("base", "detail", "original")))
        assert sorted(row.key for row in rows) == [f"img-{start + i:04d}" for i in range(4)]
        for name in store.list(""):
            store.delete(name)
