"""The command line: parse, call, print.

This module knows only typer, so that ``dicmh --help`` is there at once; each command imports its
body when it is called. Exit codes: 0 done · 1 an error, told in one line · 2 usage · 3 too many
images failed · 130 interrupted. ``verify`` has its own: 0 sound · 1 damaged · 2 not checked.
Results go to standard output, progress and messages to standard error.
"""

import logging
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="dicmh",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich help takes three times as long to appear
    pretty_exceptions_enable=False,
    help="Learned image archives: compress a collection once, read it back lazily.",
)
bench_app = typer.Typer(no_args_is_help=True, help="Measure the codec.")
app.add_typer(bench_app, name="bench")
k8s_app = typer.Typer(no_args_is_help=True, help="Run jobs on Kubernetes.")
app.add_typer(k8s_app, name="k8s")


class Runtime(StrEnum):
    """Where units run."""

    RAY = "ray"
    LOCAL = "local"


class KeepOriginal(StrEnum):
    """Which source bytes stay in the archive."""

    NEVER = "never"
    BELOW_FLOOR = "below-floor"
    ALWAYS = "always"


class View(StrEnum):
    """What is written of an image."""

    MACHINE = "machine"
    HUMAN = "human"
    LATENT = "latent"
    ORIGINAL = "original"


class BenchView(StrEnum):
    """What is measured of ours."""

    MACHINE = "machine"
    HUMAN = "human"


class Format(StrEnum):
    """Of decoded pictures."""

    PNG = "png"
    JPG = "jpg"
    NPY = "npy"


class KubernetesJob(StrEnum):
    """What runs there."""

    COMPRESS = "compress"
    VERIFY = "verify"
    INTERACTIVE = "interactive"


class Spot(StrEnum):
    """Whether workers go to machines that may be taken away."""

    NEVER = "never"
    PREFER = "prefer"
    REQUIRE = "require"


ArchiveArgument = Annotated[str, typer.Argument(metavar="ARCHIVE", help="Its folder or URL.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
StorageOption = Annotated[
    list[str] | None,
    typer.Option(
        "--storage-option",
        metavar="NAME=VALUE",
        help="For the fsspec file system of remote addresses, e.g. `anon=true`. Repeatable.",
    ),
]
VersionOption = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="An older version; `dicmh history` lists them."),
]
DeviceOption = Annotated[str, typer.Option(help="Where the codec runs: cpu, cuda, cuda:1, auto.")]
CheckpointOption = Annotated[str, typer.Option(help="Checkpoint: `default` or a directory.")]
VocabularyOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Words to look for, one a line. Default: the checkpoint's, where it has some.",
    ),
]
ThresholdOption = Annotated[
    float | None, typer.Option(min=0, max=1, help="Score from which a word is a tag.")
]
TopKOption = Annotated[int | None, typer.Option(min=1, help="Tags of a picture at most.")]
PromptOption = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="Sentence with {} for the word. Repeatable: averaged."),
]


@app.callback()
def configure(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log what happens, to standard error.")
    ] = False,
) -> None:
    """Set up logging for every command."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.ERROR,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )


@app.command()
def compress(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SRC",
            help="Tars, Parquet files, folders, globs, {000..099}; any fsspec URL.",
        ),
    ],
    archive: ArchiveArgument,
    runtime: Annotated[Runtime, typer.Option(help="Ray actors, or a loop here.")] = Runtime.RAY,
    states: Annotated[
        int | None, typer.Option(min=1, help="Write exactly so many states of each image.")
    ] = None,
    target_bpp: Annotated[
        float | None, typer.Option(help="Write the most states within so many bits per pixel.")
    ] = None,
    min_psnr: Annotated[float, typer.Option(help="Floor in dB, whole picture.")] = 30.0,
    min_tile_psnr: Annotated[float, typer.Option(help="Floor in dB, worst 64x64 tile.")] = 24.0,
    keep_original: Annotated[
        KeepOriginal,
        typer.Option(
            help="Source bytes that stay: of no image, of those without a stream, of all."
        ),
    ] = KeepOriginal.BELOW_FLOOR,
    base_states: Annotated[
        int, typer.Option(min=1, help="States in the column that previews read.")
    ] = 2,
    tag_field: Annotated[
        list[str] | None,
        typer.Option(help="Metadata field whose values become tags: cls, json.labels. Repeatable."),
    ] = None,
    suggest_tags: Annotated[
        bool,
        typer.Option("--suggest-tags", help="Add tags that the checkpoint's tagger is sure of."),
    ] = False,
    tagger: Annotated[
        str | None,
        typer.Option(
            metavar="TAGGER", help="Add tags: clip:DIR, siglip:DIR, package.module:name or head."
        ),
    ] = None,
    vocabulary: VocabularyOption = None,
    threshold: ThresholdOption = None,
    top_k: TopKOption = None,
    prompt: PromptOption = None,
    image_column: Annotated[str | None, typer.Option(help="Parquet: column of images.")] = None,
    key_column: Annotated[str | None, typer.Option(help="Parquet: column of keys.")] = None,
    checkpoint: CheckpointOption = "default",
    device: DeviceOption = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of torch in each process.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Ray: actors. Default: one a GPU, else one a CPU.")
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Ray: a running cluster, e.g. `auto`.")
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on with an archive that has commits, or refuse it.")
    ] = True,
    append: Annotated[
        bool,
        typer.Option("--append", help="Add to a finished archive what it does not have yet."),
    ] = False,
    failure_budget: Annotated[
        str,
        typer.Option(metavar="N|SHARE", help="Failed images tolerated: 100, or 0.05 for 5 %."),
    ] = "0.1",
    storage_option: StorageOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the units and totals; write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compress a collection into an archive; the same command again goes on where it stopped.

    By default each image gets the fewest states whose decode meets the quality floor. What cannot
    be encoded, misses the floor or would grow keeps its original bytes: nothing is lost.

    Examples:

        dicmh compress photos/ archive/

        dicmh compress 'shards/{000..099}.tar' s3://bucket/archive --tag-field cls

        dicmh compress data.parquet out/ --image-column image --target-bpp 0.5 --runtime local

        dicmh compress photos/ archive/ --tagger siglip:models/siglip --vocabulary words.txt

        dicmh compress 'shards/*.tar' s3://bucket/archive --append
    """
    from dicmh_ray.cli.tagger_options import HEAD, TaggerArguments
    from dicmh_ray.cli.writing import CompressArguments, run_compress

    options = {"vocabulary": vocabulary, "threshold": threshold, "top_k": top_k}
    if tagger in (None, HEAD) and (prompt or any(value is not None for value in options.values())):
        raise typer.BadParameter(
            "--vocabulary, --threshold, --top-k and --prompt go with --tagger clip:, siglip: or code"
        )

    run_compress(
        CompressArguments(
            sources=sources,
            archive=archive,
            runtime=runtime.value,
            policy={
                "states": states,
                "target_bpp": target_bpp,
                "min_psnr": min_psnr,
                "min_worst_tile_psnr": min_tile_psnr,
                "keep_original": keep_original.value,
                "base_states": base_states,
                "suggest_tags": suggest_tags or tagger == HEAD,
            },
            source={
                "tag_fields": tag_field or (),
                "image_column": image_column,
                "key_column": key_column,
            },
            checkpoint=checkpoint,
            device=device,
            threads=threads,
            workers=workers,
            ray_address=ray_address,
            resume=resume,
            append=append,
            failure_budget=failure_budget,
            storage_options=storage_option or [],
            tagger=None
            if tagger is None
            else TaggerArguments(
                tagger=tagger,
                vocabulary=vocabulary,
                threshold=threshold,
                top_k=top_k,
                prompts=prompt or (),
            ),
        ),
        dry_run=dry_run,
        as_json=as_json,
    )


@app.command()
def info(
    archive: ArchiveArgument,
    version: VersionOption = None,
    as_json: JsonOption = False,
    storage_option: StorageOption = None,
) -> None:
    """Say what an archive holds, from its commits alone.

    Example:

        dicmh info archive/ --json
    """
    from dicmh_ray.cli.reading import run_info

    run_info(archive, storage_option or [], version=version, as_json=as_json)


@app.command()
def history(
    archive: ArchiveArgument, as_json: JsonOption = False, storage_option: StorageOption = None
) -> None:
    """List the versions of an archive, and the jobs that may become the next one.

    Example:

        dicmh history archive/
    """
    from dicmh_ray.cli.maintaining import run_history

    run_history(archive, storage_option or [], as_json=as_json)


@app.command()
def compact(
    archive: ArchiveArgument,
    target_mb: Annotated[
        float, typer.Option(min=0.001, help="Size of a part to aim for, MiB.")
    ] = 256,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")
    ] = False,
    as_json: JsonOption = False,
    storage_option: StorageOption = None,
) -> None:
    """Rewrite many small parts into few large ones, as a new version; no image is encoded again.

    The old parts stay for the older versions until `dicmh gc`.

    Example:

        dicmh compact archive/ --dry-run
    """
    from dicmh_ray.cli.maintaining import run_compact

    run_compact(
        archive,
        storage_option or [],
        target_bytes=round(target_mb * 2**20),
        dry_run=dry_run,
        as_json=as_json,
    )


@app.command()
def gc(
    archive: ArchiveArgument,
    keep_versions: Annotated[
        int, typer.Option(min=1, help="Keep so many of the newest versions,")
    ] = 10,
    keep_days: Annotated[
        float, typer.Option(min=0, help="and those that are younger than this.")
    ] = 7,
    grace_hours: Annotated[
        float,
        typer.Option(
            min=0,
            help="Spare strays so long: a running job may need them. Below 12 only when idle.",
        ),
    ] = 24,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be deleted; delete nothing.")
    ] = False,
    as_json: JsonOption = False,
    storage_option: StorageOption = None,
) -> None:
    """Give up old versions, and delete what no version and no running job needs.

    Examples:

        dicmh gc archive/ --dry-run

        dicmh gc archive/ --keep-versions 1 --keep-days 0
    """
    from dicmh_ray.cli.maintaining import run_gc

    run_gc(
        archive,
        storage_option or [],
        keep_versions=keep_versions,
        keep_s=keep_days * 86_400,
        grace_s=grace_hours * 3600,
        dry_run=dry_run,
        as_json=as_json,
    )


@app.command()
def verify(
    archive: ArchiveArgument,
    subset: Annotated[
        str | None, typer.Option(metavar="N/T", help="Check every T-th unit from the N-th.")
    ] = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="Decode every stream, too (slow).")
    ] = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    storage_option: StorageOption = None,
) -> None:
    """Check every object and every row. Exit 0: sound, 1: damaged, 2: could not be checked.

    Examples:

        dicmh verify archive/

        dicmh verify s3://bucket/archive --subset 1/30
    """
    from dicmh_ray.cli.reading import run_verify

    run_verify(
        archive,
        storage_option or [],
        subset=subset,
        decode=decode,
        device=device,
        as_json=as_json,
    )


@app.command()
def decode(
    archive: ArchiveArgument,
    keys: Annotated[list[str] | None, typer.Argument(metavar="KEY", help="Images.")] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the files; is created.")
    ] = Path(),
    where: Annotated[
        str | None, typer.Option(help="Also the images a filter selects; `True` is all.")
    ] = None,
    states: Annotated[
        int | None, typer.Option(min=1, help="Decode from the first states only, where there are.")
    ] = None,
    view: Annotated[
        View, typer.Option(help="Faithful or generated picture, latent (npy), or source bytes.")
    ] = (View.MACHINE),
    format: Annotated[Format, typer.Option(help="Of pictures.")] = Format.PNG,
    version: VersionOption = None,
    device: DeviceOption = "auto",
    storage_option: StorageOption = None,
) -> None:
    """Decode images to files and print a line for each: key, tab, file.

    Keys are data, never paths: file names are made safe and unique.

    Examples:

        dicmh decode archive/ 000-0004 000-0017 -o out/

        dicmh decode archive/ --where "'dog' in tags" --states 2 --format jpg -o dogs/
    """
    from dicmh_ray.cli.reading import run_decode

    run_decode(
        archive,
        storage_option or [],
        version=version,
        keys=keys or [],
        where=where,
        output=output,
        states=states,
        view=view.value,
        format=format.value,
        device=device,
    )


@app.command()
def ls(
    archive: ArchiveArgument,
    where: Annotated[
        str | None, typer.Option(help="Filter: \"'dog' in tags and width >= 512\".")
    ] = None,
    columns: Annotated[
        str, typer.Option(help="Comma-separated.")
    ] = "key,status,tier,tags,width,height,bpp,psnr,num_states,error",
    limit: Annotated[int, typer.Option(min=0, help="Rows at most; 0 is all.")] = 50,
    version: VersionOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
    storage_option: StorageOption = None,
) -> None:
    """List rows. Reads no blob.

    Examples:

        dicmh ls archive/ --where "status != 'ok'" --columns key,error

        dicmh ls archive/ --where "metadata.cls == 3 and bpp < 0.5" --limit 0 --json
    """
    from dicmh_ray.cli.reading import run_ls

    names = [name.strip() for name in columns.split(",") if name.strip()]
    run_ls(
        archive,
        storage_option or [],
        version=version,
        where=where,
        columns=names,
        limit=limit,
        as_json=as_json,
    )


@app.command()
def train(
    sources: Annotated[
        list[str], typer.Argument(metavar="SRC", help="Training photographs, as for compress.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the run; found there, it goes on.")
    ],
    preset: Annotated[
        str,
        typer.Option(
            help="`default`, or `tiny` for a trial; `diff-icmh`, `diff-icmh-small` for a CPU, "
            "`diff-icmh-tiny` for a trial."
        ),
    ] = "default",
    steps: Annotated[int | None, typer.Option(min=1, help="Instead of the preset's.")] = None,
    minutes: Annotated[float | None, typer.Option(help="End the schedule by then.")] = None,
    start_from: Annotated[
        str | None,
        typer.Option("--from", help="Improve a checkpoint: `default` or a directory."),
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Weights of a classifier: its features shall survive, and it teaches the human view.",
        ),
    ] = None,
    human_minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Then train the human view for so long.")
    ] = None,
    labels: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True, dir_okay=False, help="CSV with `file,label`: tags that guide it."
        ),
    ] = None,
    prior_minutes: Annotated[
        float | None,
        typer.Option(min=0.01, help="Diff-ICMH: first train its prior for so long."),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(min=0, help="Diff-ICMH: weight of bits per pixel, 2 to 32.")
    ] = None,
    semantic: Annotated[
        float | None, typer.Option(min=0, help="Diff-ICMH: weight of the SC loss; 0: none.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Diff-ICMH: on Ray, so many processes. OUTPUT is shared by all."),
    ] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="A GPU for each worker.")] = False,
    device: DeviceOption = "auto",
) -> None:
    """Train a checkpoint on photographs and export it to OUTPUT/checkpoint.

    Example:

        dicmh train photos/ -o run/ --minutes 90
        dicmh train photos/ -o better/ --from default --minutes 90
        dicmh train photos/ -o full/ --teacher mobilenet.safetensors --labels labels.csv
        dicmh train photos/ -o icmh/ --preset diff-icmh-small --prior-minutes 30 --minutes 60
        dicmh train photos/ -o large/ --preset diff-icmh --from sd21/ --rate 8
        dicmh train photos/ -o large/ --preset diff-icmh --from sd21/ --workers 8 --gpu
    """
    from dicmh_ray.cli.training import run_train

    run_train(
        sources,
        output,
        preset=preset,
        steps=steps,
        minutes=minutes,
        human_minutes=human_minutes,
        teacher=teacher,
        labels=labels or [],
        device=device,
        start_from=start_from,
        prior_minutes=prior_minutes,
        rate=rate,
        semantic=semantic,
        workers=workers,
        use_gpu=gpu,
    )


PicturesArgument = Annotated[
    list[Path], typer.Argument(metavar="PICTURES", help="Image files, folders of them.")
]
ReportOption = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder for JSON, Markdown and plots.")
]
BenchViewOption = Annotated[
    list[BenchView] | None, typer.Option("--view", help="Of ours. Repeatable.")
]
NetsOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder of ONNX nets that judge; docs/evaluation.md."),
]
FeaturesOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE:TAP,TAP", help="ONNX net and tensors for feature distances. Repeatable."
    ),
]
LpipsOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="LPIPS as ONNX: two RGB inputs in -1..1.")
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Only the first pictures.")]
BenchThreadsOption = Annotated[int, typer.Option(min=1, help="Pictures at once.")]


@bench_app.command("rd")
def bench_rd(
    pictures: PicturesArgument,
    output: ReportOption = None,
    checkpoint: CheckpointOption = "default",
    device: DeviceOption = "auto",
    view: BenchViewOption = None,
    nets: NetsOption = None,
    features: FeaturesOption = None,
    lpips: LpipsOption = None,
    limit: LimitOption = None,
    threads: BenchThreadsOption = 2,
    as_json: JsonOption = False,
) -> None:
    """Measure rate and distortion of every state against JPEG, WebP, AVIF, JPEG XL; BD-rates.

    Examples:

        dicmh bench rd kodak/ -o report/

        dicmh bench rd kodak/ --view machine --view human --nets nets/
    """
    from dicmh_ray.cli.measuring import BenchArguments, run_bench_rd

    run_bench_rd(
        BenchArguments(
            pictures=pictures,
            output=output,
            checkpoint=checkpoint,
            device=device,
            views=[one.value for one in view or ()],
            nets=nets,
            features=features or [],
            lpips=lpips,
            limit=limit,
            threads=threads,
            as_json=as_json,
        )
    )


@bench_app.command("tasks")
def bench_tasks(
    pictures: PicturesArgument,
    nets: NetsOption,
    output: ReportOption = None,
    checkpoint: CheckpointOption = "default",
    device: DeviceOption = "auto",
    view: BenchViewOption = None,
    features: FeaturesOption = None,
    lpips: LpipsOption = None,
    limit: LimitOption = None,
    threads: BenchThreadsOption = 2,
    as_json: JsonOption = False,
) -> None:
    """Score machine tasks at equal bytes: classes, boxes, segments, faces. Labels lie beside.

    Example:

        dicmh bench tasks coco/images --nets nets/ -o report/
    """
    from dicmh_ray.cli.measuring import BenchArguments, run_bench_tasks

    run_bench_tasks(
        BenchArguments(
            pictures=pictures,
            output=output,
            checkpoint=checkpoint,
            device=device,
            views=[one.value for one in view or ()],
            nets=nets,
            features=features or [],
            lpips=lpips,
            limit=limit,
            threads=threads,
            as_json=as_json,
        )
    )


@bench_app.command("all")
def bench_all(
    pictures: PicturesArgument,
    nets: NetsOption,
    output: ReportOption = None,
    checkpoint: CheckpointOption = "default",
    device: DeviceOption = "auto",
    view: BenchViewOption = None,
    features: FeaturesOption = None,
    lpips: LpipsOption = None,
    limit: LimitOption = None,
    rd_limit: Annotated[
        int | None, typer.Option(min=1, help="Curves from so many pictures, evenly chosen.")
    ] = None,
    sheets: Annotated[int, typer.Option(min=0, help="Contact sheets, and those of failures.")] = 2,
    threads: BenchThreadsOption = 2,
    as_json: JsonOption = False,
) -> None:
    """Do `rd` and `tasks` in one pass, with plots, tables and contact sheets.

    Example:

        dicmh bench all kodak/ --nets nets/ -o docs/results/kodak
    """
    from dicmh_ray.cli.measuring import BenchArguments, run_bench_all

    run_bench_all(
        BenchArguments(
            pictures=pictures,
            output=output,
            checkpoint=checkpoint,
            device=device,
            views=[one.value for one in view or ()],
            nets=nets,
            features=features or [],
            lpips=lpips,
            limit=limit,
            threads=threads,
            as_json=as_json,
        ),
        rd_limit=rd_limit,
        pages=sheets,
    )


@app.command("train-tagger")
def train_tagger(
    photographs: Annotated[
        list[str], typer.Argument(metavar="SRC", help="Photographs, as for compress.")
    ],
    labels: Annotated[
        list[Path],
        typer.Option(metavar="CSV", help="Columns `file` and `label`. One a collection."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File: tagger.safetensors in the checkpoint.")
    ],
    report: Annotated[
        Path | None, typer.Option(metavar="MD", help="Write the figures there, too.")
    ] = None,
    checkpoint: CheckpointOption = "default",
    device: DeviceOption = "auto",
) -> None:
    """Fit a tagger to labelled photographs; print how well each word is found.

    Photographs without a label only show how often tags would be suggested for others.

    Example:

        dicmh train-tagger photos/ --labels photos/labels.csv -o mine/tagger.safetensors
    """
    from dicmh_ray.cli.tagging import run_train_tagger

    run_train_tagger(
        photographs,
        labels=labels,
        output=output,
        report=report,
        checkpoint=checkpoint,
        device=device,
    )


@app.command()
def tag(
    pictures: Annotated[list[Path], typer.Argument(metavar="PICTURE", help="Image files.")],
    tagger: Annotated[
        str,
        typer.Option(
            metavar="TAGGER",
            help="`head`: the checkpoint's. clip:DIR, siglip:DIR: zero-shot. package.module:name.",
        ),
    ] = "head",
    vocabulary: VocabularyOption = None,
    threshold: ThresholdOption = None,
    top_k: TopKOption = None,
    prompt: PromptOption = None,
    checkpoint: CheckpointOption = "default",
    device: DeviceOption = "auto",
    every: Annotated[
        bool, typer.Option("--all", help="Every word the tagger knows, suggested or not.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Print the tags of pictures, a line for each: file, tab, tag, tab, score.

    Examples:

        dicmh tag photo.jpg

        dicmh tag *.jpg --tagger clip:models/clip --vocabulary words.txt --top-k 5 --json
    """
    from dicmh_ray.cli.tagger_options import TaggerArguments
    from dicmh_ray.cli.tagging import run_tag

    run_tag(
        pictures,
        TaggerArguments(
            tagger=tagger,
            vocabulary=vocabulary,
            threshold=threshold,
            top_k=top_k,
            prompts=prompt or (),
        ),
        checkpoint=checkpoint,
        device=device,
        every=every,
        as_json=as_json,
    )


@app.command()
def convert(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory to make; with --to-official a file.")
    ],
    sources: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FILE", help="Official .ckpt or .safetensors, in any order."),
    ] = None,
    to_official: Annotated[
        Path | None,
        typer.Option("--to-official", metavar="DIR", help="Back: this checkpoint directory."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Shapes, where not the official ones: a config.json or its directory."),
    ] = None,
    fp16: Annotated[
        bool, typer.Option("--fp16", help="Halve all weights but the latent coder's.")
    ] = False,
    calibration: Annotated[
        str | None,
        typer.Option(metavar="SRC", help="Photographs to fit the integer entropy tables on."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder with vocab.json and merges.txt.")
    ] = None,
    vocabulary: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Words that streams name by number."),
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(metavar="PREFIX", help="Further tensors to leave out. Repeatable."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check names and shapes; write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Turn official Diff-ICMH weights into a checkpoint directory, or back. Runs nothing in them.

    Examples:

        dicmh convert model.ckpt -o diff-icmh/ --tokenizer sd21/tokenizer --calibration photos/

        dicmh convert --to-official diff-icmh/ -o model.ckpt
    """
    from dicmh_ray.cli.converting import ConvertArguments, run_convert

    run_convert(
        ConvertArguments(
            sources=sources or [],
            to_official=to_official,
            output=output,
            config=config,
            fp16=fp16,
            calibration=calibration,
            tokenizer=tokenizer,
            vocabulary=vocabulary,
            drop=drop or [],
            dry_run=dry_run,
            as_json=as_json,
        )
    )


@app.command("import-official")
def import_official(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="FILE", help="Files of the official program, folders of them."),
    ],
    archive: ArchiveArgument,
    checkpoint: Annotated[
        str, typer.Option(metavar="DIR", help="The weights they were written with, converted.")
    ],
    sizes: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV", exists=True, dir_okay=False, help="Columns `file`, `width`, `height`."
        ),
    ] = None,
    padded: Annotated[
        bool, typer.Option("--padded", help="Take the padded size for the picture's.")
    ] = False,
    keep_original: Annotated[
        bool, typer.Option("--keep-original", help="Keep the bytes of the files, too.")
    ] = False,
    device: DeviceOption = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.")] = None,
    failure_budget: Annotated[
        str,
        typer.Option(metavar="N|SHARE", help="Failed files tolerated: 100, or 0.05 for 5 %."),
    ] = "0.1",
    storage_option: StorageOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Look at the files alone; write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make an archive of files of the official Diff-ICMH program; the same command goes on.

    The files hold no picture size. A file that cannot be read becomes a row that says why.

    Examples:

        dicmh import-official bitstreams/ archive/ --checkpoint diff-icmh/ --sizes sizes.csv

        dicmh import-official bitstreams/ archive/ --checkpoint diff-icmh/ --padded --dry-run
    """
    from dicmh_ray.cli.official import ImportArguments, run_import_official

    run_import_official(
        ImportArguments(
            sources=sources,
            archive=archive,
            checkpoint=checkpoint,
            sizes=sizes,
            padded=padded,
            keep_original=keep_original,
            device=device,
            threads=threads,
            failure_budget=failure_budget,
            storage_options=storage_option or [],
        ),
        dry_run=dry_run,
        as_json=as_json,
    )


@app.command("export-official")
def export_official(
    archive: ArchiveArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the files; is created.")
    ],
    where: Annotated[str | None, typer.Option(help="Only the images a filter selects.")] = None,
    sizes: Annotated[
        Path | None,
        typer.Option(metavar="CSV", help="Write the sizes there: the files do not hold them."),
    ] = None,
    device: DeviceOption = "auto",
    storage_option: StorageOption = None,
) -> None:
    """Write streams as files of the official Diff-ICMH program; a line for each: key, tab, file.

    Example:

        dicmh export-official archive/ -o bitstreams/ --where "'dog' in tags" --sizes sizes.csv
    """
    from dicmh_ray.cli.official import run_export_official

    run_export_official(
        archive,
        storage_option or [],
        where=where,
        output=output,
        sizes=sizes,
        device=device,
    )


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
        Path | None, typer.Option("--output", "-o", help="Folder for `kubectl apply -k`.")
    ] = None,
) -> None:
    """Print the Kubernetes objects of a job, or write them as a kustomize folder.

    Examples:

        dicmh k8s render --image registry.example/dicmh:0.1.0-cuda
        --source 's3://photos/{000..099}.tar' --archive s3://archives/photos
        --gpu-workers 1:16 --spot prefer --queue batch --secret store | kubectl apply -f -

        dicmh k8s render --job verify --image registry.example/dicmh:0.1.0-cpu
        --archive s3://archives/photos -o verify/ -- --subset 1/8
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


@app.command()
def version(as_json: JsonOption = False) -> None:
    """Print the versions of package, default checkpoint and libraries."""
    from dicmh_ray.cli.measuring import run_version

    run_version(as_json=as_json)


def main() -> None:
    """Entry point of the ``dicmh`` program."""
    app()
