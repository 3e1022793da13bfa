"""A stage of training in several processes: same weights everywhere, one of them writes."""

import dataclasses
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dicmh_ray.codec.run_state import RunFolder
from dicmh_ray.codec.stage import Losses, Stage, StageOptions
from dicmh_ray.errors import WeightsError

FILES: Mapping[str, str] = {"state": "s.safetensors", "progress": "s.json", "log": "s.jsonl"}


class Distance(nn.Module):
    """How far a line is from another one at some points."""

    def __init__(self, line: nn.Linear) -> None:
        super().__init__()
        self.line = line

    def forward(self, points: Tensor) -> Losses:
        return {"distance": (1.0, (self.line(points) - 3 * points - 1).square().mean())}


class LineStage(Stage):
    """Trains two numbers."""

    delays = (0.0,)
    """Seconds that the draws of consecutive steps take."""

    def __init__(self, folder: Path, options: StageOptions) -> None:
        torch.manual_seed(5)
        line = nn.Linear(1, 1)
        self._module = Distance(line)
        self.seen: list[float] = []
        super().__init__({"line": line}, RunFolder(folder, **FILES), options, torch.device("cpu"))

    def draw(self, step: int, rng: np.random.Generator) -> tuple[Any, ...]:
        time.sleep(self.delays[step % len(self.delays)])
        points = torch.from_numpy(rng.normal(size=(8, 1)).astype(np.float32))
        self.seen.append(float(points.sum()))
        return (points,)

    def forward_module(self) -> nn.Module:
        return self._module


SCHEDULES = {"clock": StageOptions(minutes=0.02), "count": StageOptions(steps=5)}


def train_as_one_of_two(rank: int, folder: str) -> None:
    """The body of a process; the clock of the second runs five times as fast."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=120),
    )
    real = time.monotonic
    time.monotonic = lambda: real() * (1 + 4 * rank)
    try:
        for name, schedule in SCHEDULES.items():
            options = dataclasses.replace(schedule, learning_rate=0.02, report_steps=1)
            stage = LineStage(Path(folder, f"{name}-{rank}"), options)
            stage.run()
            line = stage.trained["line"]
            found = {
                "weights": torch.cat([p.detach().flatten() for p in line.parameters()]),
                "steps": torch.tensor(stage.step),
                "seen": torch.tensor(stage.seen[:3]),
            }
            save_file(found, Path(folder, f"{name}-{rank}.safetensors"))
        # Gloo's threads abort a process that leaves while the other one still talks to it.
        torch.distributed.barrier()
    finally:
        time.monotonic = real
        torch.distributed.destroy_process_group()


def test_two_processes_end_with_the_same_weights_and_the_first_alone_writes(
    tmp_path: Path,
) -> None:
    torch.multiprocessing.spawn(train_as_one_of_two, args=(str(tmp_path),), nprocs=2)
    for name in SCHEDULES:
        first, second = (load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in range(2))
        assert torch.equal(first["weights"], second["weights"])
        assert torch.equal(first["steps"], second["steps"])
        assert not torch.equal(first["seen"], second["seen"]), "each draws crops of its own"
        written = {path.name for path in (tmp_path / f"{name}-0").iterdir()}
        assert written == set(FILES.values())
        assert not (tmp_path / f"{name}-1").exists()
    assert int(first["steps"]) == SCHEDULES["count"].steps


def test_a_stage_that_is_run_again_goes_on_from_its_last_save(tmp_path: Path) -> None:
    options = StageOptions(steps=3, learning_rate=0.02)
    first = LineStage(tmp_path, options)
    first.run()
    again = LineStage(tmp_path, StageOptions(steps=5, learning_rate=0.02))
    assert again.step == 3
    saved = load_file(tmp_path / FILES["state"])
    assert torch.equal(again.trained["line"].weight, saved["module/line/weight"])
    assert torch.equal(first.trained["line"].weight, saved["average/line/weight"])
    moments = [optimiser.state_dict()["state"] for optimiser in again.optimisers]
    assert moments == [optimiser.state_dict()["state"] for optimiser in first.optimisers]
    again.run()
    assert (again.step, len(again.seen)) == (5, 2)


@pytest.mark.parametrize("name", ["state", "progress"])
def test_a_save_that_a_crash_cut_short_is_named(tmp_path: Path, name: str) -> None:
    options = StageOptions(steps=1)
    LineStage(tmp_path, options).run()
    (tmp_path / FILES[name]).write_bytes(b"")
    with pytest.raises(WeightsError, match=f"{FILES[name]}: a damaged save"):
        LineStage(tmp_path, options)


def test_a_run_that_goes_on_sees_what_it_would_have_seen(tmp_path: Path) -> None:
    options = StageOptions(steps=5, learning_rate=0.02)
    whole = LineStage(tmp_path / "whole", options)
    whole.run()
    begun = LineStage(tmp_path / "parts", dataclasses.replace(options, steps=2))
    begun.run()
    ended = LineStage(tmp_path / "parts", options)
    ended.run()
    assert begun.seen + ended.seen == whole.seen
    assert len(set(whole.seen)) == 5


def test_a_line_of_the_log_is_the_mean_of_its_steps_even_after_a_stop(tmp_path: Path) -> None:
    still = StageOptions(steps=4, learning_rate=0.0, report_steps=1)
    each: list[dict[str, Any]] = []
    LineStage(tmp_path / "each", still).run(each.append)
    LineStage(tmp_path / "parts", dataclasses.replace(still, steps=1)).run()
    told: list[dict[str, Any]] = []
    LineStage(tmp_path / "parts", dataclasses.replace(still, report_steps=4)).run(told.append)
    (line,) = told
    expected = np.mean([line["distance"] for line in each[1:]])
    assert line["distance"] == pytest.approx(expected, abs=2e-5)


def test_steps_that_threads_draw_ahead_come_in_order_and_are_the_same(tmp_path: Path) -> None:
    options = StageOptions(steps=20, learning_rate=0.02)
    plain = LineStage(tmp_path / "plain", options)
    plain.run()
    ahead = LineStage(tmp_path / "ahead", options)
    ahead.drawing_threads = 3
    ahead.delays = (0.02, 0.0, 0.01)
    ahead.run()
    assert sorted(ahead.seen) == sorted(plain.seen)
    assert torch.equal(ahead.trained["line"].weight, plain.trained["line"].weight)


def test_a_run_out_of_time_leaves_what_was_drawn_ahead(tmp_path: Path) -> None:
    stage = LineStage(tmp_path, StageOptions(minutes=0.05, learning_rate=0.02))
    stage.drawing_threads, stage.delays = 3, (0.05,)
    stage.run()
    drawn = len(stage.seen)
    assert 0 < stage.step < drawn
    time.sleep(0.3)
    assert len(stage.seen) == drawn, "its threads have ended"


def test_what_fails_in_a_thread_that_draws_ends_the_run(tmp_path: Path) -> None:
    stage = LineStage(tmp_path, StageOptions(steps=20, learning_rate=0.02))
    stage.drawing_threads, stage.delays = 3, (0.0, 0.0, -1.0)
    with pytest.raises(ValueError, match="non-negative"):
        stage.run()
    assert stage.step == 2
