"""Who may import whom, read from the source. A new module must declare itself here.

A layer imports lower layers; ``source``, ``codec`` and ``archive`` are siblings and stay apart.
"""

import ast
import sys
from pathlib import Path

import pytest

import dicmh_ray

PACKAGE = Path(dicmh_ray.__file__).parent

FLOOR = {"bitstream", "checksum", "errors", "tags"}
LOW = FLOOR | {"archive", "reader", "source"}
MAY_IMPORT = {
    "errors": set(),
    "checksum": {"google_crc32c", "numpy"},
    "tags": {"errors"},
    "bitstream": FLOOR | {"numpy"},
    "source": FLOOR | {"PIL", "fsspec", "numpy", "pyarrow"},
    "codec": FLOOR
    | {"PIL", "compressai", "constriction", "diffusers", "numpy", "safetensors", "torch"}
    | {"pytorch_msssim", "threadpoolctl", "tokenizers", "torchvision", "transformers"},
    "archive": FLOOR | {"fsspec", "numpy", "pyarrow"},
    "reader": FLOOR | {"archive", "fsspec", "numpy", "pyarrow"},
    "pipeline": LOW | {"codec", "numpy", "pyarrow"},
    "views": LOW | {"PIL", "codec", "numpy", "pyarrow"},
    "adapters": LOW
    | {"codec", "datasets", "fsspec", "numpy", "pyarrow", "torch", "views", "webdataset"},
    "recipe": FLOOR | {"codec", "numpy", "source"},
    "icmh_recipe": FLOOR | {"codec", "recipe"},
    "tag_recipe": FLOOR | {"codec", "numpy", "recipe", "source"},
    "ray_plugin": LOW
    | {"PIL", "adapters", "analysis", "codec", "numpy", "pipeline", "pyarrow", "ray", "recipe"}
    | {"views"},
    "vision": FLOOR | {"PIL", "numpy", "onnx", "onnxruntime"},  # nets that look at pictures
    "analysis": LOW | {"PIL", "codec", "fsspec", "numpy", "pyarrow", "views", "vision"},
    "bench": LOW
    | {"PIL", "bjontegaard", "codec", "matplotlib", "numpy", "pillow_jxl", "views", "vision"},
    "cli": LOW
    | {"PIL", "analysis", "bench", "codec", "dicmh_ray", "numpy", "pipeline", "ray_plugin"}
    | {"icmh_recipe", "recipe", "rich", "tag_recipe", "typer", "views", "vision"},
    # What breaks things on purpose: it starts whole jobs, and nothing imports it.
    "testing": LOW | {"PIL", "codec", "numpy", "ray_plugin"},
    "__init__": LOW | {"codec", "pipeline", "ray_plugin", "views"},
    "__main__": {"cli"},
}

LAZY = {
    ("codec/__init__.py", "dicmh_ray.codec.layered_codec"): "load_codec is what loads torch",
    ("codec/__init__.py", "dicmh_ray.codec.icmh.icmh_codec"): "the same",
    ("analysis/head_task.py", "dicmh_ray.codec.latent_head"): "torch, when a head is read",
    ("analysis/heads.py", "dicmh_ray.codec.latent_head"): "torch, when a head is fitted",
    ("codec/image_taggers.py", "dicmh_ray.codec.zero_shot"): "torch, when a model shall tag",
    ("codec/image_taggers.py", "transformers.utils.hub"): "the same, for hub ids only",
    (
        "cli/training.py",
        "dicmh_ray.ray_plugin.training",
    ): "the ray extra, when workers are asked for",
    ("cli/icmh_training.py", "dicmh_ray.ray_plugin.training"): "the same",
    ("cli/icmh_training.py", "dicmh_ray.ray_plugin.icmh_training"): "the same",
    (
        "cli/bulk_decoding.py",
        "dicmh_ray.ray_plugin.decoding",
    ): "the ray extra, when Ray is asked for",
    ("cli/training.py", "dicmh_ray.cli.icmh_training"): "compressai, transformers: for its presets",
    ("ray_plugin/__init__.py", "dicmh_ray.ray_plugin.run"): "the ray extra, when Ray is asked for",
    ("ray_plugin/analysis.py", "dicmh_ray.ray_plugin.analysis_pool"): "the same",
    ("bench/bd_rate.py", "bjontegaard"): "the bench extra",
    ("bench/peers.py", "pillow_jxl"): "the same",
    ("bench/plots.py", "matplotlib"): "the same",
    ("vision/onnx_net.py", "onnx"): "the same",
    ("vision/onnx_net.py", "onnxruntime"): "the same",
}
"""The imports inside functions, each with its reason: an optional extra, or a heavy start."""

COMMANDS = "cli/commands/"
"""Every command imports its body, of ``dicmh_ray.cli``, when it is called: the help must not wait."""

FORBIDDEN = ("pickle", "marshal", "shelve", "dill", "cloudpickle", "yaml", "ray.data._internal")
FORBIDDEN_CALLS = {"eval", "exec", "compile", "torch.load", "__import__"}

FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path):
    return path.relative_to(PACKAGE).as_posix()


def part_of(path):
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports_of(tree):
    """Every import: (dotted module, names taken from it, relative level, inside a function)."""
    lazy = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, (), 0, id(node) in lazy
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.name for alias in node.names)
            yield node.module or "", names, node.level, id(node) in lazy


def parts_imported(module, names):
    """The part of our package, or the foreign top-level package, that an import reaches."""
    top, _, rest = module.partition(".")
    if top != "dicmh_ray":
        return [top]
    if rest:
        return [rest.partition(".")[0]]
    return [name if name in MAY_IMPORT else "dicmh_ray" for name in names] or ["dicmh_ray"]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_module_imports_only_what_its_layer_may(path):
    part = part_of(path)
    allowed = MAY_IMPORT[part] | {part} | set(sys.stdlib_module_names)
    for module, names, level, _ in imports_of(ast.parse(path.read_text())):
        assert level == 0, f"relative import of {module}"
        for imported in parts_imported(module, names):
            assert imported in allowed, f"{part} imports {imported}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_an_import_inside_a_function_has_a_reason_on_the_list(path):
    for module, _, _, is_lazy in imports_of(ast.parse(path.read_text())):
        if is_lazy and name_of(path).startswith(COMMANDS):
            assert module.startswith("dicmh_ray.cli.")
        elif is_lazy:
            assert any(
                name_of(path) == file and (module == name or module.startswith(name + "."))
                for file, name in LAZY
            ), f"lazy import of {module}"


def test_the_list_of_lazy_imports_names_no_import_that_is_gone():
    for file, name in LAZY:
        imports = imports_of(ast.parse((PACKAGE / file).read_text()))
        assert any(module == name and is_lazy for module, _, _, is_lazy in imports), (file, name)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_that_runs_code_from_data_is_used(path):
    tree = ast.parse(path.read_text())
    for module, names, _, _ in imports_of(tree):
        for full in (module, *(f"{module}.{name}" for name in names)):
            assert not any(full == bad or full.startswith(bad + ".") for bad in FORBIDDEN), full
            assert full not in FORBIDDEN_CALLS
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS, f"line {node.lineno}"


def test_only_one_folder_knows_torch_and_only_one_knows_ray():
    homes = [("torch", ["codec", "adapters"]), ("ray", ["ray_plugin"]), ("constriction", ["codec"])]
    for foreign, known in homes:
        assert [part for part, allowed in MAY_IMPORT.items() if foreign in allowed] == known


def test_of_the_adapters_only_the_one_for_torch_knows_torch():
    adapters = [path for path in FILES if part_of(path) == "adapters"]
    knowing = [
        path.name
        for path in adapters
        for module, _, _, _ in imports_of(ast.parse(path.read_text()))
        if module.partition(".")[0] == "torch"
    ]
    assert set(knowing) <= {"torch_data.py"}


def test_siblings_do_not_know_each_other():
    siblings = {"source", "codec", "archive"}
    for one in siblings:
        assert not MAY_IMPORT[one] & (siblings - {one})


def test_the_table_has_no_cycle():
    done = set()
    while len(done) < len(MAY_IMPORT):
        ready = {
            part
            for part, allowed in MAY_IMPORT.items()
            if part not in done and not (allowed & set(MAY_IMPORT)) - done - {part}
        }
        assert ready, f"a cycle among {sorted(set(MAY_IMPORT) - done)}"
        done |= ready


def test_parquet_is_never_read_by_threads_of_arrow():
    """Such a thread may give up Python's bytes after the interpreter has ended: that aborts a process
    that had succeeded."""
    reads = {"read_row_group", "read_row_groups", "iter_batches", "read_table"}
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            given = {one.arg: one.value for one in node.keywords}
            is_read = node.func.attr in reads or (node.func.attr == "read" and "columns" in given)
            threads = given.get("use_threads")
            if is_read and getattr(threads, "value", None) is not False:
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert found == []
