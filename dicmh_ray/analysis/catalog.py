"""Tasks by name, as the command line and jobs name them; any other is ``package.module:Class``."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import fsspec

from dicmh_ray.analysis.head_task import LatentHeadTask
from dicmh_ray.analysis.latent_tasks import EmbedLatent
from dicmh_ray.analysis.near_duplicates import NearDuplicates
from dicmh_ray.analysis.net_tasks import (
    Classify,
    Detect,
    EmbedPicture,
    FindFaces,
    FindLandmarks,
    PictureNetTask,
    Segment,
)
from dicmh_ray.analysis.survey import Survey
from dicmh_ray.analysis.tag_statistics import TagStatistics
from dicmh_ray.analysis.task import Task
from dicmh_ray.errors import NetError, TaskError
from dicmh_ray.vision.nets import DESCRIPTION, NetSpec, net_of_file

NET_TASKS: Mapping[str, type[PictureNetTask]] = {
    "classify": Classify,
    "detect": Detect,
    "segment": Segment,
    "faces": FindFaces,
    "landmarks": FindLandmarks,
    "embed": EmbedPicture,
}
BUILT_IN = (*NET_TASKS, "embed-latent", "latent-head", "near-duplicates", "tags")


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskOptions:
    """What a task is told; None is its own default, and what does not concern it must be None."""

    net: str | None = None
    """Address of an ONNX file; of ``embed`` with ``:TENSOR`` behind it."""

    names: str | None = None
    """Address of a text file with the name of each class, one a line."""

    head: str | None = None
    """Address of a head, from ``dicmh fit-head``."""

    view: str | None = None
    """``machine`` or ``thumbnail``."""

    states: int | None = None
    top_k: int | None = None
    min_score: float | None = None
    threshold: float | None = None

    def given(self) -> dict[str, Any]:
        """Those that are not None."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in values.items() if value is not None}


def load_task(
    name: str,
    options: TaskOptions | None = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
) -> Task | Survey:
    """The task of a name.

    Args:
        name: one of :data:`BUILT_IN`, or ``package.module:Class`` of a :class:`Task` or
            :class:`Survey` that is made without arguments, but for ``states`` where given.
        options: what it is told.
        storage_options: of the addresses in the options.

    Raises:
        TaskError: there is no such task, or an option does not go with it.
        NetError: the net is missing, unknown, or for another task.
        ValueError: an option has a value that it cannot have.
    """
    options = options or TaskOptions()
    if ":" in name:
        return _user_task(name, options)
    if name in NET_TASKS:
        return _net_task(name, options, storage_options)
    makers: dict[str, tuple[Callable[..., Task | Survey], tuple[str, ...]]] = {
        "embed-latent": (EmbedLatent, ("states",)),
        "near-duplicates": (NearDuplicates, ("states", "threshold")),
        "tags": (TagStatistics, ()),
    }
    if name == "latent-head":
        _refuse_others(name, options, ("head", "states", "top_k"))
        if options.head is None:
            raise TaskError(name, "needs a head: fit one with `dicmh fit-head`")
        data = _read(options.head, storage_options)
        return LatentHeadTask(data, states=options.states, top_k=options.top_k or 5)
    if name not in makers:
        raise TaskError(name, f"is none of {', '.join(BUILT_IN)}, and no package.module:Class")
    maker, taken = makers[name]
    _refuse_others(name, options, taken)
    return maker(**options.given())


def _net_task(
    name: str, options: TaskOptions, storage_options: Mapping[str, Any] | None
) -> PictureNetTask:
    special = {
        "classify": ("names", "top_k"),
        "detect": ("names", "min_score"),
        "segment": ("names",),
        "faces": ("min_score",),
    }
    _refuse_others(name, options, ("net", "view", "states", *special.get(name, ())))
    if options.net is None:
        raise TaskError(name, "needs a net: an ONNX file")
    address, tap = options.net, ""
    if ".onnx:" in address:
        address, _, tap = address.rpartition(":")
    if bool(tap) != (name == "embed"):
        raise TaskError(name, "takes FILE.onnx:TENSOR" if name == "embed" else "takes no tensor")
    spec, data = read_net(address, storage_options)
    further = options.given()
    further.pop("net")
    names = further.pop("names", None)
    if names is not None:
        further["names"] = _read(names, storage_options).decode().splitlines()
    if tap:
        further["tap"] = tap
    return NET_TASKS[name](spec, data, **further)


def read_net(
    address: str, storage_options: Mapping[str, Any] | None = None
) -> tuple[NetSpec, bytes]:
    """A net's description and its bytes: known by its file's name, or from ``nets.toml`` beside it.

    Raises:
        NetError: it is missing, or nothing describes it.
    """
    folder, slash, file = address.rpartition("/")
    try:
        data = _read(address, storage_options)
    except FileNotFoundError as exc:
        raise NetError(file, "is not there") from exc
    spec = net_of_file(file)
    if spec is None:
        try:
            text = _read(f"{folder}{slash}{DESCRIPTION}", storage_options).decode()
        except FileNotFoundError as exc:
            reason = f"is not a known net: describe it in a {DESCRIPTION} beside it"
            raise NetError(file, reason) from exc
        spec = net_of_file(file, text)
    if spec is None:
        raise NetError(file, f"the {DESCRIPTION} beside it does not describe it")
    return spec, data


def _user_task(target: str, options: TaskOptions) -> Task | Survey:
    _refuse_others(target, options, ("states",))
    module, _, name = target.partition(":")
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        made = found(**options.given()) if callable(found) else found
    except (ImportError, AttributeError, TypeError, ValueError) as exc:
        raise TaskError(target, f"cannot be made: {type(exc).__name__}: {exc}") from exc
    if not isinstance(made, (Task, Survey)):
        raise TaskError(target, f"gives a {type(made).__name__}, wanted a Task or a Survey")
    return made


def _refuse_others(name: str, options: TaskOptions, taken: tuple[str, ...]) -> None:
    others = sorted(set(options.given()) - set(taken))
    if others:
        raise TaskError(name, f"takes no {', '.join(others)}")


def _read(address: str, storage_options: Mapping[str, Any] | None) -> bytes:
    remote = "://" in address
    with fsspec.open(address, "rb", **(storage_options or {} if remote else {})) as file:
        return bytes(file.read())
