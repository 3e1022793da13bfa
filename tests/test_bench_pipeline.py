"""The benchmark's own parts: its codec is one, its plain writers write every row."""

import itertools
import json
import os
import time

import pytest

pytest.importorskip("ray")

from dicmh_ray import EncodePolicy
from dicmh_ray.bench import process_watch
from jobs import bench_pipeline
from tests.small_collections import picture


def test_the_light_codec_is_better_with_both_states_than_with_one():
    codec = bench_pipeline.WebpCodec()
    image = picture(3, height=40, width=50)
    (stream,) = codec.encode([image], tags=[("a",)], exif_orientations=[1])
    assert len(bench_pipeline.parse_bitstream(stream).states) == 2
    (fine,), (coarse,) = codec.decode([stream]), codec.decode([stream], states=1)
    assert fine.shape == coarse.shape == image.shape
    better, worse = codec.measure([image, image], [fine, coarse])
    assert better.psnr > worse.psnr > 15


def test_the_bare_loop_and_a_shard_of_the_pool_encode_the_whole_collection(tmp_path, monkeypatch):
    sources = bench_pipeline.make_collection(tmp_path, images=5, per_tar=3, side=64)
    assert len(sources) == 2
    notes = tmp_path / "notes"
    notes.mkdir()
    codec = bench_pipeline.NotedCodec("webp", str(notes))
    policy = EncodePolicy(states=2)
    ways = bench_pipeline.Ways(sources=sources, policy=policy)
    assert ways.bare_loop(codec, tmp_path) == 5
    (note,) = (json.loads(path.read_text()) for path in notes.iterdir())
    assert note["pid"] == os.getpid()
    monkeypatch.setattr(bench_pipeline, "_loaded", [codec()])
    units = bench_pipeline.plan_units(sources, options=bench_pipeline.OPTIONS)
    counts = [bench_pipeline.write_shard((unit, policy, str(tmp_path))) for unit in units]
    assert counts == [3, 2]
    assert bench_pipeline.encode_share((units, policy)) == 5
    assert len(list(tmp_path.glob("*.parquet"))) == 2


def test_ratios_are_to_the_loop_beside_in_processor_time_and_to_loops_of_the_round_by_the_clock():
    def way(name, cpu_seconds, wall_seconds, beside):
        return bench_pipeline.Way(
            name=name,
            workers=2,
            images=12,
            cpu_seconds=cpu_seconds,
            started_at=100.0,
            wall_seconds=wall_seconds,
            startup_seconds=0.0,
            worker_bytes=1,
            loop_per_cpu_second=beside,
        )

    rounds = [
        [way("bare loops", 2.0, 1.0, 6.0), way("dicmh", 4.0, 2.0, 6.0)],
        [way("bare loops", 2.0, 2.0, 6.0), way("dicmh", 5.0, 2.5, 3.0)],
    ]
    loops, ours = bench_pipeline.compared(rounds)
    assert loops.wall_ratios == [1.0, 1.0]
    assert ours.cpu_ratios == pytest.approx([0.5, 0.8])
    assert ours.wall_ratios == pytest.approx([0.5, 0.8])
    assert ours.line().count("0.65 (0.50-0.80)") == 2


def test_the_loop_beside_counts_what_it_began_and_ended_meanwhile():
    samples = [
        bench_pipeline.Sample(started_at=at, ended_at=at + 1, images=4, cpu_seconds=cpu)
        for at, cpu in ((0.5, 9.0), (2.0, 0.5), (4.0, 1.5), (5.5, 9.0))
    ]
    assert bench_pipeline.rate_between(samples, 1.0, 6.0) == pytest.approx(8 / 2.0)
    with pytest.raises(RuntimeError, match="came to nothing"):
        bench_pipeline.rate_between(samples, 2.5, 3.5)


def test_the_loop_beside_goes_over_its_tars_until_it_is_told_to_stop(tmp_path):
    sources = bench_pipeline.make_collection(tmp_path, images=5, per_tar=3, side=64)
    units = bench_pipeline.plan_units(sources, options=bench_pipeline.OPTIONS)
    loop = bench_pipeline.LoopBeside(units, EncodePolicy(states=2), "webp")
    assert loop.pid not in (0, os.getpid())
    time.sleep(1)
    samples = loop.end()
    assert samples
    assert {one.images for one in samples} == {bench_pipeline.SAMPLE_IMAGES}
    pauses = [b.started_at - a.ended_at for a, b in itertools.pairwise(samples)]
    assert all(
        pause >= bench_pipeline.PAUSE * (one.ended_at - one.started_at) * 0.9
        for pause, one in zip(pauses, samples, strict=False)
    )


def test_processor_time_counts_ended_processes_and_leaves_out_their_start(monkeypatch):
    seen = iter([{1: 5.0, os.getpid(): 1.0}, {1: 6.0, 2: 9.0, 3: 8.0, os.getpid(): 4.0}])
    monkeypatch.setattr(process_watch, "cpu_of_family", lambda: next(seen, {os.getpid(): 4.0}))
    watch = process_watch.Watch(ignored=[3])
    watch._last |= process_watch.cpu_of_family()
    watch.end()
    # 1 s of process 1, 9 - 7 of process 2, 3 - 0.5 of this one, less what looking took.
    assert watch.cpu_seconds({2: 7.0, os.getpid(): 0.5}) == pytest.approx(1 + 2 + 2.5, abs=0.1)
