"""Every key in comes out once, whatever fails. No torch, no ray."""

import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicmh_ray.archive import open_snapshot
from dicmh_ray.archive.schema import check_row
from dicmh_ray.bitstream import parse_bitstream
from dicmh_ray.errors import (
    FailureBudgetError,
    JobError,
    PlanConflictError,
    SourceImageError,
    UnreadableImageError,
    WeightsError,
)
from dicmh_ray.pipeline import (
    Checkpoint,
    EncodeOptions,
    EncodePolicy,
    Job,
    JobMonitor,
    compress_local,
    encode_images,
    plan_job,
    units_queue,
)
from dicmh_ray.pipeline import job as job_module
from dicmh_ray.ray_plugin import compress
from dicmh_ray.reader import ArchiveReader
from dicmh_ray.source import SourceImage
from tests.fake_codec import FakeCodec
from tests.small_collections import bmp, picture, poison, write_tar, write_tars


def source(key, data, **fields):
    return SourceImage(key=key, data=data, source_uri="memory://shard.tar", **fields)


def encode(images, policy=None, codec=None, **options):
    rows = list(encode_images(images, codec or FakeCodec(), policy or EncodePolicy(), **options))
    for row in rows:
        check_row(row)
    return rows


def encode_one(data, policy=None, **options):
    (row,) = encode([source("one", data)], policy, **options)
    return row


def local(sources, archive, **options):
    return compress(sources, str(archive), codec=FakeCodec, runtime="local", **options)


def rows_of(archive):
    return {row.key: row for row in ArchiveReader(open_snapshot(str(archive))).rows()}


MIXED = {
    "sound": bmp(picture(1)),
    "truncated": bmp(picture(2))[:200],
    "poison": bmp(poison()),
    "empty": b"",
    "text": b"this is no image",
    "noise": bmp(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)),
    "tiny": bmp(picture(3, height=1, width=1)),
}


@pytest.mark.parametrize("keep", ["never", "below-floor", "always"])
@pytest.mark.parametrize("batch_pixels", [1, 1000, 10**6])
@pytest.mark.parametrize("load_threads", [0, 3])
def test_every_key_comes_out_once_and_in_order_whatever_fails(keep, batch_pixels, load_threads):
    images = [source(key, data) for key, data in MIXED.items()]
    options = EncodeOptions(batch_pixels=batch_pixels, load_threads=load_threads)
    rows = encode(images, EncodePolicy(keep_original=keep), options=options)
    assert [row.key for row in rows] == list(MIXED)
    for row in rows:
        if row.status == "ok":
            assert row.base
        elif keep == "never":
            assert row.status == "failed"
            assert not row.original
        else:
            assert row.original == MIXED[row.key] or not MIXED[row.key]


@pytest.mark.parametrize("batch_pixels", [1, 10**6])
def test_rows_do_not_depend_on_the_batch(batch_pixels):
    images = [source(key, data) for key, data in MIXED.items()]
    options = EncodeOptions(batch_pixels=batch_pixels)
    assert encode(images, options=options) == encode(images, options=EncodeOptions())


@pytest.mark.parametrize("name", ["min_psnr", "min_worst_tile_psnr", "target_bpp"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_policy_has_finite_numbers(name, value):
    with pytest.raises(ValueError, match=name):
        EncodePolicy(**{name: value})


def test_the_fewest_states_that_meet_the_floor_are_written():
    row = encode_one(bmp(picture(1, step=16)))
    assert (row.status, row.tier, row.num_states, row.psnr) == ("ok", "faithful", 2, 100.0)
    row = encode_one(bmp(picture(1, step=1)))
    assert (row.status, row.num_states) == ("ok", 3)


def test_a_search_that_starts_high_comes_down_and_one_that_starts_low_goes_up():
    flat, fine = bmp(np.zeros((24, 32, 3), np.uint8)), bmp(picture(1, step=1))
    rows = encode(
        [source("a", fine), source("b", flat), source("c", fine)],
        options=EncodeOptions(batch_pixels=1),
    )
    assert [row.num_states for row in rows] == [3, 1, 3]


def test_the_quality_of_a_row_is_that_of_its_own_bytes():
    image = picture(1, step=1)
    row = encode_one(bmp(image), EncodePolicy(states=2, min_psnr=0, min_worst_tile_psnr=0))
    codec = FakeCodec()
    stream = row.base + row.detail
    (quality,) = codec.measure([image], codec.decode([stream]))
    assert (row.psnr, row.worst_tile_psnr) == (quality.psnr, quality.worst_tile_psnr)
    assert len(parse_bitstream(stream).states) == 2
    assert row.bpp == 8 * len(stream) / (24 * 32)


def test_base_and_detail_are_cut_where_the_policy_says():
    for base_states, in_base in [(1, 1), (2, 2), (9, 3)]:
        row = encode_one(bmp(picture(1, step=1)), EncodePolicy(base_states=base_states))
        assert len(row.base) == row.prefix_bytes[in_base - 1]
        assert len(row.base + row.detail) == row.prefix_bytes[-1]


def test_a_rate_by_number_of_states_is_cut_to_what_the_codec_has():
    assert encode_one(bmp(picture(1, step=1)), EncodePolicy(states=9)).num_states == 3


def test_a_target_rate_takes_the_most_states_below_it_and_at_least_one():
    no_floor = {"min_psnr": 0.0, "min_worst_tile_psnr": 0.0}
    data = bmp(picture(1, step=1))
    ends = encode_one(data, EncodePolicy(states=3, **no_floor)).prefix_bytes
    for k, end in enumerate(ends, start=1):
        policy = EncodePolicy(target_bpp=8 * end / (24 * 32), **no_floor)
        assert encode_one(data, policy).num_states == k
    assert encode_one(data, EncodePolicy(target_bpp=1e-6, **no_floor)).num_states == 1


NO_FLOOR = {"min_psnr": 0.0, "min_worst_tile_psnr": 0.0}
RATES = st.one_of(
    st.just({}),
    st.builds(lambda n: {"states": n}, st.integers(1, 4)),
    st.builds(lambda bpp: {"target_bpp": bpp}, st.floats(0.01, 40)),
)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 50),
    step=st.sampled_from([1, 4, 16]),
    max_bytes=st.integers(1, 3000),
    rate=RATES,
    floor=st.floats(0, 60),
    keep=st.sampled_from(["never", "below-floor", "always"]),
)
def test_a_stream_is_within_max_bytes_unless_it_has_one_state(
    seed, step, max_bytes, rate, floor, keep
):
    data = bmp(picture(seed, step=step))
    options = {"min_psnr": floor, "min_worst_tile_psnr": 0.0, "keep_original": keep}
    row = encode_one(data, EncodePolicy(max_bytes=max_bytes, **rate, **options))
    free = encode_one(data, EncodePolicy(**rate, **(options | {"keep_original": "never"})))
    if row.status != "ok":
        assert row.error.startswith("below-floor: ")
        assert row.original == data
        return
    length = len(row.base + row.detail)
    assert length <= max_bytes or row.num_states == 1
    assert row.num_states <= free.num_states
    if row.num_states < free.num_states:
        assert free.prefix_bytes[row.num_states] > max_bytes, "no state is left out without need"
    assert row.tier == ("faithful" if row.psnr >= floor else "none")


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 50), step=st.sampled_from([1, 4, 16]), bpp=st.floats(0.01, 40))
def test_a_stream_is_within_the_target_rate_unless_it_has_one_state(seed, step, bpp):
    data = bmp(picture(seed, step=step))
    row = encode_one(data, EncodePolicy(target_bpp=bpp, keep_original="never"))
    whole = encode_one(data, EncodePolicy(states=3, keep_original="never"))
    assert row.bpp <= bpp or row.num_states == 1
    assert row.num_states == 3 or 8 * whole.prefix_bytes[row.num_states] > bpp * 24 * 32


def test_max_bytes_comes_before_the_floor_and_the_floor_decides_what_is_kept():
    data = bmp(picture(1, step=1))
    ends = encode_one(data, EncodePolicy(states=3)).prefix_bytes
    limited = EncodePolicy(max_bytes=ends[1])
    assert encode_one(data, limited).error.startswith("below-floor: ")
    assert encode_one(data, EncodePolicy(max_bytes=ends[1], **NO_FLOOR)).num_states == 1
    assert encode_one(data, EncodePolicy(max_bytes=ends[1], states=3, **NO_FLOOR)).num_states == 2
    row = encode_one(data, EncodePolicy(max_bytes=ends[0] - 1, states=3, **NO_FLOOR))
    assert (row.num_states, row.status) == (1, "ok"), "a stream has at least one state"


def test_an_image_below_the_floor_keeps_its_original_and_says_why():
    data = bmp(picture(1, step=1))
    row = encode_one(data, EncodePolicy(states=1))
    assert (row.status, row.tier, row.original) == ("kept_original", "original", data)
    assert row.error.startswith("below-floor: psnr ")
    assert row.prefix_bytes == ()


def test_below_the_floor_without_originals_a_stream_is_written_that_promises_nothing():
    row = encode_one(bmp(picture(1, step=1)), EncodePolicy(states=1, keep_original="never"))
    assert (row.status, row.tier, row.original) == ("ok", "none", b"")
    assert row.psnr < 30


def test_a_stream_larger_than_its_source_is_not_written():
    row = encode_one(MIXED["noise"])
    assert row.status == "kept_original"
    assert row.error.startswith("larger-than-source: ")


def test_originals_can_stand_beside_streams():
    data = bmp(picture(1))
    row = encode_one(data, EncodePolicy(keep_original="always"))
    assert (row.status, row.original) == ("ok", data)
    assert row.base


def test_an_image_that_the_codec_refuses_does_not_spoil_its_batch():
    images = [source(f"{i}", bmp(poison() if i in (2, 5) else picture(i))) for i in range(8)]
    rows = encode(images, options=EncodeOptions(batch_pixels=10**6))
    assert [row.status for row in rows].count("ok") == 6
    assert all("encode-failed: EncodeError" in rows[i].error for i in (2, 5))


def test_few_images_are_encoded_again_for_one_that_is_refused():
    images = [source(f"{i:02d}", bmp(poison() if i == 15 else picture(i))) for i in range(16)]
    codec = FakeCodec()
    rows = encode(images, codec=codec, options=EncodeOptions(batch_pixels=10**6))
    assert [row.key for row in rows if row.status != "ok"] == ["15"]
    assert codec.num_encoded == 15 + 15, "until the batch fails, and each alone"


class BrokenCodec(FakeCodec):
    def encode(self, images, **_):
        raise WeightsError("default", "damaged")


def test_a_codec_that_is_broken_stops_everything():
    with pytest.raises(WeightsError):
        encode([source("a", bmp(picture(1)))], codec=BrokenCodec())


def test_an_image_the_source_could_not_read_is_a_failed_row():
    error = UnreadableImageError("member too large")
    (row,) = encode([source("a", b"", error=error)])
    assert (row.status, row.error) == ("failed", "unreadable: member too large")
    assert row.original_sha256 == ""


def test_a_quarantined_image_is_kept_without_a_look_at_its_bytes():
    images = [source("a", bmp(picture(1))), source("b", bmp(picture(2)))]
    rows = encode(images, quarantine={1})
    assert [row.status for row in rows] == ["ok", "kept_original"]
    assert rows[1].error.startswith("crash: ")
    assert rows[1].original == images[1].data


def test_duplicate_keys_get_the_same_suffix_every_time():
    keys = ["a", "a", "a~2", "a"]
    rows = encode([source(key, bmp(picture(1))) for key in keys])
    assert [row.key for row in rows] == ["a", "a~2", "a~2~2", "a~3"]


def test_tags_and_metadata_travel_with_the_image():
    image = source("a", bmp(picture(1)), metadata={"cls": 3, "x": "ä"}, tags=("dog", "Tür"))
    (row,) = encode([image])
    assert row.tags == parse_bitstream(row.base + row.detail).tags == ("dog", "Tür")
    assert row.metadata == '{"cls":3,"x":"ä"}'


@pytest.mark.parametrize(
    "fields",
    [
        {"states": 1, "target_bpp": 1.0},
        {"states": 0},
        {"target_bpp": 0.0},
        {"max_bytes": 0},
        {"base_states": 0},
        {"keep_original": "sometimes"},
    ],
)
def test_a_policy_without_meaning_is_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        EncodePolicy(**fields)


def test_a_policy_survives_json_and_refuses_unknown_names():
    policy = EncodePolicy(states=3, keep_original="always")
    assert EncodePolicy.from_dict(policy.to_dict()) == policy
    with pytest.raises(ValueError, match="unknown"):
        EncodePolicy.from_dict({"state": 3})
    assert "max_bytes" not in policy.to_dict(), "plans of before it existed stay the same plans"
    policy = EncodePolicy(max_bytes=1000)
    assert EncodePolicy.from_dict(policy.to_dict()) == policy


def test_a_local_job_commits_every_image_once(tmp_path):
    report = local(write_tars(tmp_path), tmp_path / "archive")
    assert (report.tally.images, report.tally.ok, report.manifest) == (18, 18, 1)
    assert len(rows_of(tmp_path / "archive")) == 18
    assert report.tally.bytes_in > report.tally.stream_bytes > 0
    assert pickle.loads(pickle.dumps(report)).to_dict() == report.to_dict()


def test_a_job_goes_on_where_another_was_stopped(tmp_path):
    tars = write_tars(tmp_path)
    local(tars, tmp_path / "undisturbed")
    done = []

    def stop_after_two(report):
        done.append(report.units_done)
        if report.units_done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        local(tars, tmp_path / "archive", progress=stop_after_two)
    assert len(open_snapshot(str(tmp_path / "archive")).commits) == 2
    report = local(tars, tmp_path / "archive")
    assert (report.units_resumed, report.units_done, report.tally.images) == (2, 1, 6)
    assert rows_of(tmp_path / "archive") == rows_of(tmp_path / "undisturbed")
    assert local(tars, tmp_path / "archive").units_done == 0


def test_without_resume_an_archive_with_commits_is_refused(tmp_path):
    tars = write_tars(tmp_path, tars=1)
    local(tars, tmp_path / "archive", resume=False)
    with pytest.raises(JobError, match="already holds 1 of 1 units"):
        local(tars, tmp_path / "archive", resume=False)


def test_another_policy_does_not_continue_an_archive(tmp_path):
    tars = write_tars(tmp_path, tars=1)
    local(tars, tmp_path / "archive")
    with pytest.raises(PlanConflictError):
        local(tars, tmp_path / "archive", policy=EncodePolicy(states=1))


def test_a_commit_says_why_images_were_not_encoded(tmp_path):
    tar = write_tar(tmp_path / "mixed.tar", MIXED)
    report = local(tar, tmp_path / "archive", failure_budget=1.0)
    (commit,) = open_snapshot(str(tmp_path / "archive")).commits
    assert commit.info["causes"] == dict(report.tally.causes)
    assert report.tally.causes["encode-failed"] == 1
    assert report.tally.failures == 4


def test_a_count_over_the_failure_budget_stops_the_job_and_keeps_what_is_done(tmp_path):
    tars = [write_tar(tmp_path / f"{n}.tar", {"a": b"junk", "b": b"junk"}) for n in range(4)]
    with pytest.raises(FailureBudgetError) as caught:
        local(tars, tmp_path / "archive", failure_budget=3)
    assert (caught.value.failed, caught.value.done) == (4, 4)
    assert len(open_snapshot(str(tmp_path / "archive")).commits) == 2


def test_a_share_over_the_failure_budget_is_judged_at_the_end_of_a_small_job(tmp_path):
    tar = write_tar(tmp_path / "mixed.tar", MIXED)
    with pytest.raises(FailureBudgetError):
        local(tar, tmp_path / "archive", failure_budget=0.1)
    assert open_snapshot(str(tmp_path / "archive")).is_complete


def test_a_tar_that_ends_in_garbage_is_kept_up_to_there_and_the_damage_is_a_row(tmp_path):
    images = {f"{i}": bmp(picture(i)) for i in range(3)}
    tar = write_tar(tmp_path / "damaged.tar", images)
    data = bytearray((tmp_path / "damaged.tar").read_bytes())
    last_header = data.index(b"2.bmp")
    data[last_header : last_header + 512] = b"\xff" * 512
    (tmp_path / "damaged.tar").write_bytes(data)
    report = local(tar, tmp_path / "archive", failure_budget=1.0)
    rows = rows_of(tmp_path / "archive")
    assert {"0", "1"} < set(rows)
    (damage,) = set(rows) - {"0", "1"}
    assert "#damaged-at-" in damage
    assert rows[damage].error.startswith("damaged-source: ")
    assert report.tally.causes == {"damaged-source": 1}


def test_a_unit_that_cannot_be_read_leaves_the_others_committed(tmp_path):
    tars = write_tars(tmp_path)
    job, units, report = plan_job(tars, str(tmp_path / "archive"), codec=FakeCodec)
    assert (len(units), report.units_total) == (3, 3)
    assert pickle.loads(pickle.dumps(job)).checkpoint == job.checkpoint
    (tmp_path / "shard-001.tar").unlink()
    with pytest.raises(JobError, match="1 of 3 units could not be run"):
        compress_local(job, units, JobMonitor(report))
    assert len(open_snapshot(str(tmp_path / "archive")).commits) == 2


def test_a_worker_with_another_checkpoint_than_the_plans_refuses(tmp_path):
    checkpoint = Checkpoint(codec_id="cd" * 32, files={}, factory=FakeCodec)
    with pytest.raises(Exception, match="was written by"):
        checkpoint.load(EncodeOptions())


def test_source_errors_without_a_kind_keep_their_words():
    (row,) = encode([source("a", b"", error=SourceImageError("damaged-source: cut off"))])
    assert row.error == "damaged-source: cut off"


def test_two_drivers_in_step_part_as_soon_as_one_finds_a_unit_done(tmp_path, monkeypatch):
    sources, archive = write_tars(tmp_path, tars=9, images=1), str(tmp_path / "a")
    job, units, report = plan_job(sources, archive, codec=FakeCodec)
    theirs, their_units, _ = plan_job(sources, archive, codec=FakeCodec)
    monkeypatch.setattr(units_queue.random, "shuffle", lambda units: units.reverse())
    begun = []

    def the_other_driver_is_faster(row):
        """It takes the same units, in the plan's order, one for each of ours."""
        begun.append(row.key)
        missing = theirs.writer.committed_units()
        left = [unit for unit in their_units if unit.name not in missing]
        if left:
            with monkeypatch.context() as elsewhere:
                elsewhere.setattr(job_module.socket, "gethostname", lambda: "elsewhere")
                theirs.run_unit(left[0], FakeCodec())

    run_unit = Job.run_unit
    monkeypatch.setattr(
        Job,
        "run_unit",
        lambda self, *args, on_row=None, **options: run_unit(
            self, *args, on_row=on_row and the_other_driver_is_faster, **options
        ),
    )
    done = compress_local(job, units, JobMonitor(report, failure_budget=0.1))
    assert (done.units_done, done.tally.images) == (9, 9)
    # The first one in vain; then from the end, until both meet.
    assert len(begun) == 5
    assert sorted(rows_of(archive)) == [f"shard-{n:03d}/{n:03d}-0000" for n in range(9)]
