"""Jobs that cannot run, and credentials, are refused by name."""

import pytest

from dicmh_ray.cli.job_options import PodSize, Replicas
from dicmh_ray.errors import ManifestError
from tests.kubernetes.rendering import BASES, invoke, objects, options

REFUSED = {
    "a name in capitals": {"name": "Photos"},
    "a name with an underscore": {"name": "my_photos"},
    "a name that starts with a digit": {"name": "2photos"},
    "a name that ends with a dash": {"name": "photos-"},
    "a name of 48": {"name": "a" * 48},
    "no name": {"name": ""},
    "a name with a line feed": {"name": "photos\n"},
    "a namespace with a dot": {"namespace": "a.b"},
    "a namespace of 64": {"namespace": "a" * 64},
    "an operator namespace": {"operator_namespace": "Kube"},
    "a queue with a slash": {"queue": "a/b"},
    "a queue too long for a label": {"queue": "a" * 64},
    "a secret with a space": {"secret": "my secret"},
    "a secret with a value": {"secret": "AWS_SECRET_ACCESS_KEY=abc"},
    "an account": {"service_account": "-a"},
    "a priority without a queue": {"priority": "bulk"},
    "an image without a tag": {"image": "registry.example/dicmh"},
    "an image with the tag latest": {"image": "registry.example/dicmh:latest"},
    "an image with a port and no tag": {"image": "registry.example:5000/dicmh"},
    "an image with a digest that is none": {"image": "registry.example/dicmh@sha256:abc"},
    "an image with a space": {"image": "registry.example/dicmh:1 0"},
    "no source": {"sources": []},
    "a relative source": {"sources": ["photos/"]},
    "a source on this machine": {"sources": ["/home/me/photos"]},
    "a file URL": {"sources": ["file:///photos"]},
    "an option as source": {"sources": ["--resume"]},
    "a relative archive": {"archive": "archive/"},
    "an archive that is no URL": {"archive": "s3://"},
    "a broken URL": {"archive": "s3://[bucket/a"},
    "a line feed in a source": {"sources": ["s3://a/b\nc"]},
    "a zero byte": {"sources": ["s3://a/b\0c"]},
    "half a character": {"sources": ["s3://a/\udcff"]},
    "no GPU at the start": {"gpu_workers": Replicas(minimum=0, maximum=4)},
    "no worker at all": {"gpu_workers": Replicas()},
    "workers that verify": {"job": "verify", "gpu_workers": Replicas(minimum=1, maximum=1)},
    "sources to verify": {"job": "verify", "sources": ["s3://a/b"]},
    "sources to analyze": {"job": "analyze", "sources": ["s3://a/b"]},
    "analyze without a task": {"job": "analyze", "task": None},
    "a task that is none": {"job": "analyze", "task": "--where"},
    "a task to compress": {"task": "classify"},
    "readers that analyze": {"job": "analyze", "cpu_workers": Replicas(minimum=1, maximum=1)},
    "decode to nowhere": {"job": "decode", "target": None},
    "decode to this machine": {"job": "decode", "target": "pictures/"},
    "a target to verify": {"job": "verify", "target": "s3://a/b"},
    "decode that grows": {"job": "decode", "gpu_workers": Replicas(minimum=1, maximum=2)},
    "a script for an interactive cluster": {"job": "interactive", "archive": "s3://a/b"},
    "an interactive cluster of a head": {"job": "interactive", "gpu_workers": Replicas()},
    "a port": {"store_port": 0},
    "retries": {"retries": -1},
    "hours": {"deadline_hours": 0},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused_by_name(name):
    assert objects(options())
    with pytest.raises(ManifestError, match="wanted"):
        options(**REFUSED[name])


CREDENTIALS = [
    {"archive": "s3://AKIAEXAMPLE:hunter2@bucket/a"},
    {"sources": ["https://hunter2@host/a.tar"]},
    {"sources": ["https://host/a.tar?X-Amz-Signature=hunter2"]},
    {"sources": ["https://account.example/a.tar?sv=1&sig=hunter2"]},
    {"archive": "abfs://user:hunter2@account/a"},
    {"arguments": ["--storage-option", "secret=hunter2"]},
    {"arguments": ["aws_access_key_id=hunter2"]},
    {"arguments": ["--token=hunter2"]},
]


@pytest.mark.parametrize("changes", CREDENTIALS)
def test_a_credential_is_refused_and_not_repeated(changes):
    with pytest.raises(ManifestError, match="Secret") as caught:
        options(**changes)
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in repr(caught.value.args)


def test_an_azure_container_is_no_credential():
    address = "abfss://container@account.dfs.core.windows.net/photos"
    assert options(archive=address).archive == address


@pytest.mark.parametrize("text", ["", "a", "-1", "3:", ":3", "5:2", "1:2:3", "1.5", "²", "1 : 2"])
def test_a_range_of_workers_that_is_none_is_refused(text):
    with pytest.raises(ManifestError, match="--gpu-workers is"):
        Replicas.parse("--gpu-workers", text)


def test_fewest_and_most_workers_are_read():
    assert Replicas.parse("", "3") == Replicas(minimum=3, maximum=3)
    assert Replicas.parse("", "0:12") == Replicas(minimum=0, maximum=12)
    with pytest.raises(ManifestError):
        Replicas(minimum=2, maximum=1)


@pytest.mark.parametrize("memory", ["16", "16GB", "16 Gi", "0Gi", "1.5Gi", "-1Gi", "16Gi\n"])
def test_memory_without_a_unit_of_kubernetes_is_refused(memory):
    with pytest.raises(ManifestError, match="memory"):
        PodSize(cpus=1, memory=memory)
    with pytest.raises(ManifestError, match="cpus"):
        PodSize(cpus=0, memory="1Gi")


def test_a_refusal_is_one_line_and_a_usage_error():
    flags = [*BASES["compress"], "--gpu-workers", "4:1"]
    result = invoke(*flags, code=2)
    assert result.stdout == ""
    assert result.stderr == "error: --gpu-workers is '4:1', wanted MIN <= MAX\n"
    result = invoke("--image", "a:1", "--archive", "s3://a/b?token=hunter2", code=2)
    assert "hunter2" not in result.output
