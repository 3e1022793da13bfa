"""Body of ``dicmh k8s render``: flags to YAML, on standard output or as a kustomize folder."""

from pathlib import Path

import typer

from dicmh_ray.cli.job_options import JobOptions
from dicmh_ray.cli.manifests import kustomization, manifests
from dicmh_ray.cli.output import tell
from dicmh_ray.cli.yaml_text import yaml_documents

NOTICE = "# Made by `dicmh k8s render`; docs/kubernetes.md. Changes belong in an overlay.\n"


def rendered(options: JobOptions) -> dict[str, str]:
    """The files of a kustomize folder: name to text."""
    files = {name: yaml_documents(objects) for name, objects in manifests(options).items()}
    files["kustomization.yaml"] = yaml_documents([kustomization(options)])
    return {name: NOTICE + text for name, text in files.items()}


def run_render(options: JobOptions, output: Path | None) -> None:
    """Print one stream of documents, or write the folder for ``kubectl apply -k``."""
    if output is None:
        objects = [item for group in manifests(options).values() for item in group]
        typer.echo(yaml_documents(objects), nl=False)
        return
    output.mkdir(parents=True, exist_ok=True)
    for name, text in rendered(options).items():
        (output / name).write_text(text, encoding="utf-8")
        tell(f"wrote {output / name}")
