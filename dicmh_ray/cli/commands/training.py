"""Commands that train codecs and taggers, and the one that tags pictures."""

from pathlib import Path
from typing import Annotated

import typer

from dicmh_ray.cli.options import (
    CheckpointOption,
    DeviceOption,
    PromptOption,
    ThresholdOption,
    TopKOption,
    VocabularyOption,
    on_this_machine,
)
from dicmh_ray.cli.program import app


@app.command()
def train(
    sources: Annotated[
        list[str], typer.Argument(metavar="SRC", help="Training photographs, as for compress.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            callback=on_this_machine,
            help="Folder of the run; found there, it goes on.",
        ),
    ],
    preset: Annotated[
        str,
        typer.Option(
            help="`default`, or `tiny` for a trial; `diff-icmh`, `diff-icmh-small` for a CPU, "
            "`diff-icmh-tiny` for a trial."
        ),
    ] = "default",
    steps: Annotated[
        int | None, typer.Option(min=1, help="All in all, instead of the preset's.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="End the schedule by then.")
    ] = None,
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
        typer.Option(min=1, help="On Ray, so many processes. All of them see OUTPUT."),
    ] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="A GPU for each worker.")] = False,
    device: DeviceOption = "auto",
) -> None:
    """Train a checkpoint on photographs and export it to OUTPUT/checkpoint.

    Examples:

        dicmh train photos/ -o run/ --minutes 90

        dicmh train photos/ -o better/ --from default --minutes 90

        dicmh train photos/ -o full/ --teacher mobilenet.safetensors --labels labels.csv

        dicmh train photos/ -o full/ --teacher mobilenet.safetensors --workers 8 --gpu

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
        Path,
        typer.Option(
            "--output",
            "-o",
            callback=on_this_machine,
            help="File: tagger.safetensors in the checkpoint.",
        ),
    ],
    report: Annotated[
        Path | None,
        typer.Option(metavar="MD", callback=on_this_machine, help="Write the figures there, too."),
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

        dicmh tag photo.jpg --checkpoint checkpoints/with-tagger

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
