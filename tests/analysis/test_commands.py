"""``dicmh analyze``, ``dicmh fit-head`` and the job in jobs/."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dicmh_ray.analysis import read_results, read_survey
from dicmh_ray.archive import open_snapshot
from dicmh_ray.cli import app
from dicmh_ray.views import codecs
from jobs import analyze_collection
from tests.analysis.user_tasks import Brightness
from tests.fake_codec import FakeCodec

USER_TASK = "tests.analysis.user_tasks:Brightness"


@pytest.fixture(autouse=True)
def fake_codec(monkeypatch):
    monkeypatch.setitem(codecs._loaded_codecs, ("ab" * 32, "auto"), FakeCodec())


@pytest.fixture
def run():
    def invoke(*arguments, code=0):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output
        return result

    return invoke


def test_a_task_of_the_users_runs_from_the_command_line(run, archive):
    command = ("analyze", archive, "--task", USER_TASK)
    assert not Path(archive, "analysis").exists()
    plan = json.loads(run(*command, "--dry-run", "--json").stdout)
    assert (plan["units"], plan["rows"], plan["originals"]) == (3, 15, 3)
    assert "originals to read" in run(*command, "--dry-run").stdout
    assert not Path(archive, "analysis").exists()
    result = run(*command, "--json")
    facts = json.loads(result.stdout)
    assert facts["results"] == plan["results"]
    assert (facts["report"]["rows"], facts["report"]["units_done"]) == (15, 3)
    assert "3 of 3 units, 15 rows" in result.stderr
    assert len(read_results(open_snapshot(archive), Brightness()).table()) == 15
    assert "0 done, 3 before" in run(*command).stdout


def test_surveys_run_from_the_command_line(run, archive):
    assert "the index alone" in run("analyze", archive, "--task", "tags", "--dry-run").stdout
    facts = json.loads(run("analyze", archive, "--task", "tags", "--json").stdout)
    assert facts["tables"] == {"tags": 6, "pairs": 6}
    assert facts["report"] is None
    assert len(read_survey(open_snapshot(archive), facts["results"])["tags"]) == 6
    shown = run("analyze", archive, "--task", "near-duplicates", "--threshold", "0.999").stdout
    assert "rows of groups" in shown


def test_what_cannot_run_is_told_in_one_line(run, archive):
    for arguments, code, text in [
        (("--task", "nonsense"), 1, "error: task nonsense: is none of classify"),
        (("--task", "classify"), 1, "needs a net"),
        (("--task", "tags", "--net", "x.onnx"), 1, "takes no net"),
        (("--task", USER_TASK, "--where", "width +"), 1, "error: filter"),
        (("--task", "tests.analysis.user_tasks:Broken"), 3, "failed, the budget is 0.1"),
    ]:
        assert text in run("analyze", archive, *arguments, code=code).stderr


def test_a_head_is_fitted_and_run(run, archive, tmp_path):
    pytest.importorskip("torch").set_num_threads(1)
    head = tmp_path / "out" / "head"
    command = ("fit-head", archive, "-o", head, "--epochs", "2", "--states", "1")
    facts = json.loads(run(*command, "--left-out", "0.3", "--json").stdout)
    assert facts["fitted_to"] + facts["left_out"] == 12
    assert "accuracy on them" in run(*command, "--label", "metadata.cls").stdout
    done = run("analyze", archive, "--task", "latent-head", "--head", head, "--json")
    assert json.loads(done.stdout)["report"]["errors"] == 3
    run("fit-head", archive, "-o", head, "--label", "status", code=2)


def test_the_job_prints_its_report_and_ends_with_its_code(archive, monkeypatch, capsys):
    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["analyze_collection.py", archive, *arguments])
        with pytest.raises(SystemExit) as ended:
            analyze_collection.main()
        return ended.value.code, capsys.readouterr().out

    here = ("--runtime", "local")
    code, output = main("--task", USER_TASK, *here, "--batch-size", "4")
    assert code == 0
    assert json.loads(output)["report"]["rows"] == 15
    assert main("--task", "tests.analysis.user_tasks:Broken", *here) == (3, "")
    assert main("--task", "nonsense", *here) == (1, "")
    shutil.rmtree(archive)
    assert main("--task", "tags", *here) == (1, "")
