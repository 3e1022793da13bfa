"""The benchmark's own parts: its codec is one, its plain writers write every row."""

import json
import os

import numpy as np
import pytest

pytest.importorskip("ray")

from dicmh_ray import EncodePolicy
from jobs import bench_pipeline
from tests.small_collections import picture


def test_the_light_codec_is_exact_with_both_states_and_coarse_with_one():
    codec = bench_pipeline.ZlibCodec()
    image = picture(3, height=40, width=50)
    (stream,) = codec.encode([image], tags=[()], exif_orientations=[1])
    (exact,) = codec.decode([stream])
    assert np.array_equal(exact, image)
    half = bench_pipeline.parse_bitstream(stream)
    assert len(half.states) == 2
    (coarse,) = codec.decode([stream], states=1)
    assert 0 < np.abs(coarse.astype(int) - image).max() <= 8
    assert codec.measure([image], [exact])[0].psnr == 100.0


def test_the_bare_loop_and_a_shard_of_the_pool_encode_the_whole_collection(tmp_path, monkeypatch):
    sources = bench_pipeline.make_collection(tmp_path, images=5, per_tar=3, side=64)
    assert len(sources) == 2
    notes = tmp_path / "notes"
    notes.mkdir()
    codec = bench_pipeline.NotedCodec("zlib", str(notes))
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


def test_ratios_are_of_the_bare_loops_of_the_same_round_and_workers():
    def way(name, workers, cpu_seconds):
        return bench_pipeline.Way(
            name=name,
            workers=workers,
            images=12,
            cpu_seconds=cpu_seconds,
            wall_seconds=cpu_seconds / workers,
            startup_seconds=0.0,
            worker_bytes=1,
        )

    rounds = [
        [way("bare loop", 1, 1.0), way("bare loops", 2, 2.0), way("dicmh", 2, 4.0)],
        [way("bare loop", 1, 1.0), way("bare loops", 2, 4.0), way("dicmh", 2, 5.0)],
    ]
    alone, loops, ours = bench_pipeline.compared(rounds)
    assert alone.ratios("per_cpu_second") == loops.ratios("per_cpu_second") == [1.0, 1.0]
    assert ours.ratios("per_cpu_second") == pytest.approx([0.5, 0.8])
    assert "0.65 (0.50-0.80)" in ours.line()


def test_processor_time_counts_ended_processes_and_leaves_out_their_start(monkeypatch):
    seen = iter([{1: 5.0, os.getpid(): 1.0}, {1: 6.0, 2: 9.0, os.getpid(): 4.0}])
    monkeypatch.setattr(bench_pipeline, "cpu_of_family", lambda: next(seen, {os.getpid(): 4.0}))
    watch = bench_pipeline.Watch()
    watch._last |= bench_pipeline.cpu_of_family()
    watch.end()
    # 1 s of process 1, 9 - 7 of process 2, 3 - 0.5 of this one.
    assert watch.cpu_seconds({2: 7.0, os.getpid(): 0.5}) == pytest.approx(1 + 2 + 2.5)
