"""From a manifest to the script in its image: arguments, scripts, the verify job."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dicmh_ray.archive import verify as verify_module
from dicmh_ray.cli.job_options import Replicas
from dicmh_ray.cli.manifests import JOBS_FOLDER, RAY_VERSION, SCRIPTS, USER_ID, entrypoint
from jobs import compress_collection, verify_archive
from tests.kubernetes.rendering import (
    BUILDABLE,
    JOBS,
    K8S,
    ROOT,
    build,
    every_rendering,
    objects,
    options,
)


def as_the_script_sees_it(command, env):
    """Arguments after KubeRay's submitter (kubelet, bash), ``ray job submit`` and the head's shell."""

    def expand(match):  # the kubelet, in args of containers
        if match[0] == "$$":
            return "$"
        return env.get(match[1], match[0])

    command = re.sub(r"\$\$|\$\(([^)]*)\)", expand, command)
    show = f"{sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))'"
    submitted = subprocess.run(
        ["/bin/bash", "-ce", "--", f"{show} {command} ;"],
        capture_output=True,
        text=True,
        check=True,
        env=env,
    )
    joined = shlex.join(json.loads(submitted.stdout))
    run = subprocess.run(
        f"{show} {joined}", shell=True, capture_output=True, text=True, check=True, env=env
    )
    return json.loads(run.stdout)


NASTY = [
    "s3://bucket/{000..099}.tar",
    "s3://bucket/it's here/*.tar",
    's3://bucket/"quoted"/a.tar',
    "s3://bucket/$(rm -rf x)/`id`.tar",
    "s3://bucket/$HOME/$$/$(RAY_AUTH_TOKEN)/$$(HOME).tar",
    "s3://bucket/a;b&&c|d>e<f#g!h~i\\j",
    "s3://bucket/ü/日本/🙂.tar",
    "s3://bucket/a: b #c - d, [e] {f} %g @h",
    "s3://bucket/a=b?c",
]


@pytest.mark.parametrize("source", NASTY)
def test_an_address_reaches_the_script_as_it_was_given(source):
    job_options = options(sources=[source], archive=source, arguments=["--tag-field", "a $b 'c'"])
    (job,) = [one for one in objects(job_options) if one["kind"] == "RayJob"]
    env = {"HOME": "/root", "RAY_AUTH_TOKEN": "leaked", "PATH": "/usr/bin:/bin"}
    env["PYTHONIOENCODING"] = "utf-8"
    env["LC_ALL"] = "C.UTF-8"
    words = as_the_script_sees_it(job["spec"]["entrypoint"], env)
    assert words[:2] == ["python", f"{JOBS_FOLDER}/compress_collection.py"]
    parsed = compress_collection.parse(words[2:])
    assert parsed.sources == [source]
    assert parsed.archive == source
    assert parsed.tag_field == ["a $b 'c'"]
    assert parsed.ray_address == "auto"
    assert parsed.workers == 4


def test_the_scripts_of_the_image_take_what_is_rendered():
    parsed = parsed_as_job(entrypoint(options(job="verify", arguments=["--subset", "1/8"])))
    assert (parsed.archive, parsed.subset) == ("s3://bucket/archive", "1/8")
    net = ["--net", "s3://nets/a.onnx", "--states", "2"]
    parsed = parsed_as_job(entrypoint(options(job="analyze", arguments=net)))
    assert (parsed.archive, parsed.task, parsed.net) == (
        "s3://bucket/archive", "classify", "s3://nets/a.onnx"
    )  # fmt: skip
    assert (parsed.ray_address, parsed.workers, parsed.runtime) == ("auto", 4, "ray")
    parsed = parsed_as_job(entrypoint(options(job="decode", arguments=["--view", "thumbnail"])))
    assert (parsed.archive, parsed.output) == ("s3://bucket/archive", "s3://bucket/out")
    assert (parsed.ray_address, parsed.num_gpus, parsed.runtime) == ("auto", 1, "ray")
    found = [one for folder in BUILDABLE for one in build(folder)]
    found += [one for _, rendering in every_rendering() for one in rendering]
    entrypoints = {one["spec"]["entrypoint"] for one in found if one["kind"] == "RayJob"}
    assert {parsed_as_job(one).archive.partition("://")[0] for one in entrypoints} == {"s3"}


def parsed_as_job(command):
    """What the script makes of its words; argparse ends the test where it does not know one."""
    python, script, *words = shlex.split(command)
    assert python == "python"
    kind = {script: kind for kind, script in SCRIPTS.items()}[
        script.removeprefix(f"{JOBS_FOLDER}/")
    ]
    return JOBS[kind].parse(words)


@pytest.mark.parametrize(
    ("gpus", "cpus", "workers"),
    [("1:8", "0:4", "8"), ("4:4", "0:0", None), ("0:0", "2:8", "64"), ("0:0", "3:3", None)],
)
def test_an_elastic_job_asks_for_all_it_may_have(gpus, cpus, workers):
    words = shlex.split(
        entrypoint(
            options(gpu_workers=Replicas.parse("", gpus), cpu_workers=Replicas.parse("", cpus))
        )
    )
    assert (words[words.index("--workers") + 1] if "--workers" in words else None) == workers


def dockerfile():
    text = (K8S / "docker/Dockerfile").read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_the_ray_of_the_manifests_is_the_ray_of_the_image():
    constraints = (ROOT / "requirements/constraints.txt").read_text().splitlines()
    assert f"ray=={RAY_VERSION}" in constraints


def test_the_image_has_both_variants_a_pinned_base_and_a_numeric_user():
    lines = dockerfile()
    stages = [line.split() for line in lines if line.startswith("FROM ")]
    names = [stage[3] for stage in stages]
    assert names[-2:] == ["cpu", "cuda"]
    (base,) = [line.partition("=")[2] for line in lines if line.startswith("ARG PYTHON_IMAGE=")]
    assert re.fullmatch(r"python:3\.1[12]\.\d+-slim-\w+", base)
    assert all(stage[1] in ("${PYTHON_IMAGE}", *names) for stage in stages)
    assert f"USER {USER_ID}:{USER_ID}" in lines
    installs = [line for line in lines if "pip install" in line]
    assert all("requirements/constraints.txt" in line or "--no-deps" in line for line in installs)
    assert not any(re.search(r"(?i)secret|token|password", line) for line in lines)


def test_the_image_holds_the_scripts_where_the_manifests_look_for_them():
    ignored = (K8S / "docker/Dockerfile.dockerignore").read_text().splitlines()
    copies = [line.split()[1:] for line in dockerfile() if line.startswith("COPY ")]
    for *sources, target in copies:
        if sources[0].startswith("--from"):
            continue
        for source in sources:
            assert (ROOT / source).exists()
            assert f"!{source}" in ignored
        if sources[0].startswith("jobs/"):
            assert target == f"{JOBS_FOLDER}/"
            assert {Path(source).name for source in sources} == {*SCRIPTS.values()}


def test_the_verify_job_prints_a_report_and_ends_with_its_code(monkeypatch, capsys):
    reports = {
        "s3://a/sound": verify_module.VerifyReport(uri="s3://a/sound", rows=3, is_complete=True),
        "s3://a/gone": verify_module.VerifyReport(uri="s3://a/gone", unchecked="no archive"),
    }
    seen = []

    def verify(uri, *, subset):
        seen.append((uri, subset))
        return reports[uri]

    monkeypatch.setattr(verify_archive, "verify_archive", verify)
    for uri, code in (("s3://a/sound", 0), ("s3://a/gone", 2)):
        monkeypatch.setattr(sys, "argv", ["verify_archive.py", uri, "--subset", "2/3"])
        assert verify_archive.main() == code
        assert json.loads(capsys.readouterr().out)["exit_code"] == code
    assert seen == [("s3://a/sound", "2/3"), ("s3://a/gone", "2/3")]


def test_the_verify_job_says_what_it_cannot_check(monkeypatch, capsys, tmp_path):
    for arguments in ([str(tmp_path / "nothing")], [str(tmp_path), "--subset", "9/3"]):
        monkeypatch.setattr(sys, "argv", ["verify_archive.py", *arguments])
        assert verify_archive.main() == 2
    capsys.readouterr()
