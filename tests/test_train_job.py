"""jobs/train_codec.py: which training its options start, and what it prints."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")
pytest.importorskip("compressai")

from dicmh_ray.errors import SourceNotFoundError
from jobs import train_codec


@pytest.fixture
def started(monkeypatch):
    """What was called, with which arguments."""
    calls = []

    def note(name):
        def train(photographs, output, **options):
            calls.append((name, options))
            if photographs == ["nothing"]:
                raise SourceNotFoundError("nothing")
            return SimpleNamespace(codec_id="ab" * 32)

        return train

    monkeypatch.setattr(train_codec, "train_checkpoint", note("layered"))
    monkeypatch.setattr(train_codec, "train_icmh_checkpoint", note("icmh"))
    training = pytest.importorskip("dicmh_ray.ray_plugin.icmh_training")
    monkeypatch.setattr(training, "train_icmh_on_ray", note("icmh on ray"))
    monkeypatch.setattr("dicmh_ray.ray_plugin.training.train_on_ray", note("layered on ray"))
    return calls


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train_codec.py", *arguments])
    return train_codec.main()


def test_a_preset_starts_its_own_training(started, monkeypatch, capsys):
    from dicmh_ray.ray_plugin.training import Workers

    assert run(monkeypatch, "a", "-o", "run", "--minutes", "3") == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"checkpoint": "run/checkpoint", "codec_id": "ab" * 32}
    assert run(monkeypatch, "a", "-o", "run", "--preset", "diff-icmh-tiny", "--rate", "8") == 0
    ray = ("--preset", "diff-icmh-tiny", "--workers", "2", "--gpu", "--ray-address", "auto")
    assert run(monkeypatch, "a", "-o", "run", "--steps", "7", *ray) == 0
    full = ("--teacher", "net.safetensors", "--human-minutes", "9", "--workers", "3")
    assert run(monkeypatch, "a", "-o", "run", *full) == 0
    (first, one), (second, two), (third, three), (fourth, four) = started
    assert (first, second) == ("layered", "icmh")
    assert (third, fourth) == ("icmh on ray", "layered on ray")
    assert (one["options"].minutes, two["options"].rate, three["options"].steps) == (3, 8, 7)
    assert three["workers"] == Workers(count=2, use_gpu=True, address="auto")
    assert (four["workers"], four["teacher"]) == (Workers(count=3), Path("net.safetensors"))
    assert four["human"].minutes == 9


def test_an_error_is_told_by_the_exit_code(started, monkeypatch):
    assert run(monkeypatch, "nothing", "-o", "run") == 1


@pytest.mark.parametrize(
    "words",
    [
        ("--rate", "8"),
        ("--human-minutes", "9"),
        ("--preset", "diff-icmh-tiny", "--teacher", "net.safetensors"),
        ("--gpu",),
        ("--preset", "none"),
    ],
)
def test_what_does_not_go_together_is_a_usage_error(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        train_codec.parse(["a", "-o", "run", *words])
    assert capsys.readouterr().err
