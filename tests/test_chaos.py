"""The chaos command in small: 20 kills, a broken schedule, and the record that goes on."""

import argparse
import json

import pytest

pytest.importorskip("ray")

from dicmh_ray.testing.collection import make_collection
from dicmh_ray.testing.processes import VICTIMS
from jobs import chaos


def sums(path):
    """The one trial of a report."""
    ((_, found),) = json.loads(path.read_text())["trials"].items()
    return found


def test_kills_at_failpoints_once_and_twice_lose_nothing(tmp_path):
    pictures = {"per_tar": 4, "seed": 11, "side": 16}
    first = make_collection(tmp_path, images=8, **pictures)
    later = make_collection(tmp_path, images=4, first_key=100, **pictures)
    record = chaos.Record(None)
    options = argparse.Namespace(failpoints=6, seed=11)
    root = str(tmp_path / "archives"), {}
    chaos.try_failpoints("failpoints", root, (first, later), record, options)
    found = record.figures()["failpoints"]
    assert (found["archives"], found["rows"], found["wrong"]) == (12, 144, 0)
    # What a first life has done, a second one need not do again.
    assert 15 <= found["kills"] <= 18


@pytest.mark.ray
def test_five_kills_of_driver_actor_worker_and_raylet_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(chaos, "PAUSE_S", (0.0, 2.0))
    monkeypatch.setattr(chaos, "RAYLET_PATIENCE_S", 5.0)
    report = tmp_path / "report.json"
    arguments = ["--kills", "5", "--images", "100", "--seed", "11", "--json", str(report)]
    assert chaos.main(arguments) == 0
    found = sums(report)
    assert (found["kills"], found["wrong"]) == (5, 0)
    assert set(found["kills by kind"]) == set(VICTIMS)


def test_a_broken_schedule_loses_nothing_and_a_second_run_finds_it_done(tmp_path, capsys):
    record, report = tmp_path / "record.jsonl", tmp_path / "report.json"
    arguments = ["--schedules", "1", "--seed", "5", "--record", str(record), "--json", str(report)]
    assert chaos.main(arguments) == 0
    found = sums(report)
    assert found["broken requests"] > 3
    assert (found["rows"], found["wrong"]) == (12, 0)
    before = record.read_text()
    case = json.loads(before) | {"wrong": ["one row is missing"]}
    record.write_text(json.dumps(case) + "\n")
    assert chaos.main(arguments) == 1, "what went wrong stays wrong"
    assert "FAIL" in capsys.readouterr().out
