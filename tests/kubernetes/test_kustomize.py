"""The folders of k8s: built as kustomize does, and equal to what is rendered.

Where ``kubectl`` is installed, its kustomize must agree with the resolver of these tests.
"""

import shlex
import shutil
import subprocess

import pytest

from tests.kubernetes.rendering import (
    BASES,
    BUILDABLE,
    K8S,
    KUSTOMIZATIONS,
    OVERLAYS,
    build,
    by_name,
    invoke,
    name_of,
    read_kustomization,
)
from tests.kubernetes.schemas import read_documents


@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=name_of)
def test_a_kustomization_names_files_that_exist(folder):
    kustomization = read_kustomization(folder)
    for name in [*kustomization.get("resources", ()), *kustomization.get("components", ())]:
        path = folder / name
        assert path.is_file() or (path / "kustomization.yaml").is_file(), name
    for patch in kustomization.get("patches", ()):
        assert (folder / patch["path"]).is_file()


def test_every_file_of_k8s_belongs_to_a_kustomization():
    named = {folder / "kustomization.yaml" for folder in KUSTOMIZATIONS}
    for folder in KUSTOMIZATIONS:
        kustomization = read_kustomization(folder)
        named |= {(folder / name).resolve() for name in kustomization.get("resources", ())}
        named |= {folder / patch["path"] for patch in kustomization.get("patches", ())}
    assert set(K8S.rglob("*.yaml")) == {path for path in named if path.is_file()}


@pytest.mark.parametrize("folder", BUILDABLE, ids=name_of)
def test_the_resolver_and_kubectl_build_the_same(folder):
    found = by_name(build(folder))
    kubectl = shutil.which("kubectl")
    if kubectl:
        result = subprocess.run(
            [kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=True
        )
        assert by_name(read_documents(result.stdout)) == found


@pytest.mark.parametrize("name", BASES)
def test_the_base_is_what_render_writes_to_the_byte(name, tmp_path):
    invoke("-o", tmp_path / "out", *BASES[name])
    written = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert written == {path.name: path.read_text() for path in (K8S / "base" / name).iterdir()}


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_gives_what_the_same_flags_give(name):
    expected = read_documents(invoke(*OVERLAYS[name]).stdout)
    found = build(K8S / "overlays" / name)
    for one in found + expected:
        if one["kind"] == "RayJob":
            # The order of a script's options is nobody's business; that of words in quotes is.
            one["spec"]["entrypoint"] = sorted(shlex.split(one["spec"]["entrypoint"]))
    assert by_name(found) == by_name(expected)


def test_a_rendered_folder_builds_to_the_rendered_stream(tmp_path):
    flags = BASES["compress"]
    invoke(*flags, "-o", tmp_path)
    assert by_name(build(tmp_path)) == by_name(read_documents(invoke(*flags).stdout))
