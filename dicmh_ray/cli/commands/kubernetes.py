"""Commands for Kubernetes."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dicmh_ray.cli.options import on_this_machine
from dicmh_ray.cli.program import k8s_app


class KubernetesJob(StrEnum):
    """What runs there."""

    COMPRESS = "compress"
    VERIFY = "verify"
    ANALYZE = "analyze"
    DECODE = "decode"
    INTERACTIVE = "interactive"


class Spot(StrEnum):
    """Whether workers go to machines that may be taken away."""

    NEVER = "never"
    PREFER = "prefer"
    REQUIRE = "require"


@k8s_app.callback()
def k8s() -> None:
    """Keep ``render`` a command of its own name."""


@k8s_app.command("render")
def k8s_render(
    image: Annotated[str, typer.Option(help="Of k8s/docker, with a tag or digest.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- ARGUMENT", help="Further ones of the script in jobs/."),
    ] = None,
    job: Annotated[
        KubernetesJob, typer.Option(help="A RayJob, or a RayCluster to work on.")
    ] = KubernetesJob.COMPRESS,
    source: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="As for compress. Repeatable.")
    ] = None,
    archive: Annotated[str, typer.Option(metavar="URL", help="The archive's address.")] = "",
    task: Annotated[
        str | None, typer.Option(help="Of analyze: as for `dicmh analyze`, a net by its URL.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="URL", help="Of decode: where the pictures go.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the job. Default: dicmh-JOB.")] = None,
    namespace: Annotated[str, typer.Option(help="Where it runs.")] = "dicmh",
    queue: Annotated[
        str | None, typer.Option(help="Kueue's LocalQueue; it starts the job.")
    ] = None,
    priority: Annotated[str | None, typer.Option(help="Kueue's WorkloadPriorityClass.")] = None,
    gpu_workers: Annotated[
        str, typer.Option(metavar="MIN:MAX", help="Pods with a GPU each; 0: none.")
    ] = "0",
    cpu_workers: Annotated[
        str, typer.Option(metavar="MIN:MAX", help="Pods without; 0: none.")
    ] = "0",
    gpu_worker_cpus: Annotated[int, typer.Option(help="CPUs of each.")] = 6,
    gpu_worker_memory: Annotated[str, typer.Option(help="Memory of each.")] = "24Gi",
    cpu_worker_cpus: Annotated[int, typer.Option(help="CPUs of each.")] = 8,
    cpu_worker_memory: Annotated[str, typer.Option(help="Memory of each.")] = "16Gi",
    head_cpus: Annotated[int, typer.Option(help="CPUs of the head.")] = 2,
    head_memory: Annotated[str, typer.Option(help="Memory of the head.")] = "8Gi",
    spot: Annotated[
        Spot, typer.Option(help="Workers on machines that may be taken away.")
    ] = Spot.NEVER,
    secret: Annotated[
        str | None, typer.Option(help="Secret that holds the store's environment variables.")
    ] = None,
    service_account: Annotated[
        str | None, typer.Option(help="Instead: an account bound to an identity of the cloud.")
    ] = None,
    store_port: Annotated[int, typer.Option(help="TCP port of the object store.")] = 443,
    operator_namespace: Annotated[str, typer.Option(help="Where KubeRay runs.")] = "kuberay-system",
    retries: Annotated[int, typer.Option(help="New clusters after failures; each resumes.")] = 3,
    hours: Annotated[int, typer.Option(help="The longest that an attempt may take.")] = 72,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", callback=on_this_machine, help="Folder for `kubectl apply -k`."
        ),
    ] = None,
) -> None:
    """Print the Kubernetes objects of a job, or write them as a kustomize folder.

    Examples:

    \b
        dicmh k8s render --image registry.example/dicmh:0.1.0-cuda \\
            --source 's3://photos/{000..099}.tar' --archive s3://archives/photos \\
            --gpu-workers 1:16 --spot prefer --queue batch --secret store \\
            | kubectl apply -f -

    \b
        dicmh k8s render --job verify --image registry.example/dicmh:0.1.0-cpu \\
            --archive s3://archives/photos -o verify/ -- --subset 1/8

    \b
        dicmh k8s render --job analyze --image registry.example/dicmh:0.1.0-cpu \\
            --archive s3://archives/photos --task classify --cpu-workers 2:16 \\
            -- --net s3://nets/classifier.onnx
    """
    from dicmh_ray.cli.job_options import JobOptions, PodSize, Replicas
    from dicmh_ray.cli.kubernetes import run_render
    from dicmh_ray.cli.output import EXIT_USAGE, told_in_one_line

    with told_in_one_line(error_code=EXIT_USAGE):
        options = JobOptions(
            job=job.value,
            name=f"dicmh-{job.value}" if name is None else name,
            namespace=namespace,
            image=image,
            archive=archive,
            sources=source or [],
            task=task,
            target=target,
            arguments=arguments or [],
            gpu_workers=Replicas.parse("--gpu-workers", gpu_workers),
            cpu_workers=Replicas.parse("--cpu-workers", cpu_workers),
            head=PodSize(cpus=head_cpus, memory=head_memory),
            gpu_worker=PodSize(cpus=gpu_worker_cpus, memory=gpu_worker_memory),
            cpu_worker=PodSize(cpus=cpu_worker_cpus, memory=cpu_worker_memory),
            queue=queue,
            priority=priority,
            spot=spot.value,
            secret=secret,
            service_account=service_account,
            operator_namespace=operator_namespace,
            store_port=store_port,
            retries=retries,
            deadline_hours=hours,
        )
    with told_in_one_line():
        run_render(options, output)
