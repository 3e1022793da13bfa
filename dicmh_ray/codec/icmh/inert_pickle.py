"""What a checkpoint's pickle describes, found without unpickling.

A pickle is a program: unpickling imports what it names and calls what it asks for.
:mod:`pickletools` takes it apart into opcodes, and :func:`read_inert` follows them on
placeholders, importing nothing and calling nothing. A tensor becomes a note of its storage,
offset, size and strides. The few names that checkpoints are known to hold stay names, and what
would be built from them becomes one :class:`Inert`. Any other name, and any opcode that checkpoints
have no use for, ends the reading with an error that says it.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


class InertPickleError(Exception):
    """This pickle is no checkpoint's. The message says what it holds."""


class Name(NamedTuple):
    """A function or class that a pickle names. Never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True)
class Inert:
    """Stands for an object of a class that is of no concern here."""

    kind: Name


@dataclass(frozen=True, slots=True)
class Storage:
    """A block of elements of one type, which lies outside the pickle."""

    dtype: torch.dtype

    key: str
    """Its file is ``data/<key>``."""

    length: int
    """Elements."""


@dataclass(frozen=True, slots=True)
class StridedTensor:
    """Where the elements of a tensor are in its storage. All numbers are elements, none negative."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def end(self) -> int:
        """Elements of the storage up to the last one of the tensor."""
        if 0 in self.shape:
            return self.offset
        pairs = zip(self.shape, self.strides, strict=True)
        return self.offset + 1 + sum((size - 1) * stride for size, stride in pairs)


STORAGES = {
    Name("torch", f"{name}Storage"): dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}

_TENSOR = Name("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = Name("torch._utils", "_rebuild_parameter")
_ORDERED_DICT = Name("collections", "OrderedDict")

_INERT = frozenset(
    Name(module, name)
    for module, names in {
        "_codecs": ("encode",),
        "argparse": ("Namespace",),
        "collections": ("defaultdict",),
        "builtins": ("set", "frozenset", "dict", "list", "int", "float", "str", "bytearray"),
        "__builtin__": ("set", "frozenset", "dict", "list", "int", "float", "str", "bytearray"),
        "numpy": ("dtype", "ndarray"),
        "numpy.core.multiarray": ("scalar", "_reconstruct"),
        "numpy.core.numeric": ("_frombuffer",),
        "numpy._core.multiarray": ("scalar", "_reconstruct"),
        "numpy._core.numeric": ("_frombuffer",),
        "omegaconf.base": ("ContainerMetadata", "Metadata"),
        "omegaconf.dictconfig": ("DictConfig",),
        "omegaconf.listconfig": ("ListConfig",),
        "omegaconf.nodes": ("AnyNode",),
        "pathlib": ("Path", "PosixPath", "PurePosixPath"),
        "pytorch_lightning.utilities.parsing": ("AttributeDict",),
        "torch": ("Size", "device"),
        "typing": ("Any",),
    }.items()
    for name in names
)
"""Plain data that Lightning, numpy and OmegaConf leave in checkpoints. Nothing of it is built."""

_CALLBACKS = ("pytorch_lightning.callbacks.", "lightning.pytorch.callbacks.")
"""Lightning keys the states of its callbacks by their classes: such a name may be named, and only
that."""

_MARK = object()


def read_inert(content: bytes) -> Any:
    """The object that a pickle describes: containers, numbers and texts, else placeholders.

    Memory is a multiple of ``len(content)``, which the caller bounds. Containers may hold
    themselves; dictionaries have keys of plain types, else nested keys could exhaust the stack.

    Raises:
        InertPickleError: it names or does something that no checkpoint needs, or is damaged.
    """
    machine = _Machine()
    end = -1
    try:
        for opcode, argument, position in pickletools.genops(content):
            end = position or 0
            machine.step(opcode.name, argument)
    except (ValueError, IndexError, KeyError, TypeError) as exc:
        raise InertPickleError(f"damaged pickle: {exc}") from exc
    if end + 1 != len(content):
        raise InertPickleError("bytes after the end of the pickle")
    return machine.result()


class _Machine:
    """The stack and the memo of an unpickler, without its powers."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def result(self) -> Any:
        if len(self._stack) != 1 or self._stack[0] is _MARK:
            raise InertPickleError(f"{len(self._stack)} objects at the end of the pickle")
        return self._stack[0]

    def step(self, opcode: str, argument: Any) -> None:
        """Follow one opcode. Raises any of what :func:`read_inert` catches on a damaged pickle."""
        if opcode in _NOTHING:
            return
        if opcode in _CONSTANTS:
            self._stack.append(_CONSTANTS[opcode])
        elif opcode in _LITERALS:
            self._stack.append(argument)
        elif opcode in _EMPTY:
            self._stack.append(_EMPTY[opcode]())
        elif opcode in _OPERATIONS:
            _OPERATIONS[opcode](self, argument)
        else:
            raise InertPickleError(f"the pickle uses {opcode}, which no checkpoint needs")

    def pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("a mark where an object should be")
        return value

    def pop_to_mark(self) -> list[Any]:
        start = len(self._stack) - 1
        while self._stack[start] is not _MARK:
            start -= 1
            if start < 0:
                raise ValueError("no mark")
        values = self._stack[start + 1 :]
        del self._stack[start:]
        return values

    def top(self, kind: type) -> Any:
        if not isinstance(self._stack[-1], kind):
            raise TypeError(f"a {type(self._stack[-1]).__name__} where a {kind.__name__} should be")
        return self._stack[-1]

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def mark(self, _: Any) -> None:
        self._stack.append(_MARK)

    def duplicate(self, _: Any) -> None:
        self._stack.append(self.top(object))

    def pop_one(self, _: Any) -> None:
        self._stack.pop()

    def memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self.top(object)

    def put(self, index: int) -> None:
        self._memo[index] = self.top(object)

    def get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def tuple_of(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self._stack.append(tuple(reversed(values)))

    def set_items(self, pairs: list[Any]) -> None:
        if isinstance(self._stack[-1], Inert):
            return
        _fill(self.top(dict), pairs)

    def set_item(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def append(self, values: list[Any]) -> None:
        if not isinstance(self._stack[-1], Inert):
            self.top(list).extend(values)

    def name(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._stack.append(_known(Name(module, name)))

    def name_from_stack(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise TypeError("a name that is no text")
        self._stack.append(_known(Name(module, name)))

    def build_from(self, _: Any) -> None:
        """REDUCE and NEWOBJ: what a function or class makes of arguments."""
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise InertPickleError("the pickle calls what is no function")
        if function == _TENSOR:
            self._stack.append(_tensor(*arguments[:4]))
        elif function == _PARAMETER:
            self._stack.append(arguments[0])
        elif function == _ORDERED_DICT:
            made: dict[Any, Any] = {}
            for key, value in arguments[0] if arguments else ():
                _fill(made, [key, value])
            self._stack.append(made)
        elif function in _INERT:
            self._stack.append(Inert(function))
        else:
            raise InertPickleError(f"the pickle calls {function}, which no checkpoint needs")

    def set_state(self, _: Any) -> None:
        """BUILD: attributes. Those of a dictionary are torch's version notes; nothing needs them."""
        self.pop()
        if not isinstance(self._stack[-1], dict | Inert):
            raise InertPickleError("the pickle sets attributes of what has none")

    def storage(self, _: Any) -> None:
        """BINPERSID: ``("storage", type, key, device, elements)``."""
        described = self.pop()
        word, kind, key, _device, length = described
        is_storage = word == "storage" and isinstance(kind, Name) and isinstance(key, str)
        if not is_storage or kind not in STORAGES:
            raise InertPickleError("the pickle refers to something that is no tensor storage")
        self._stack.append(Storage(STORAGES[kind], key, _count(length)))


def _fill(target: dict[Any, Any], pairs: list[Any]) -> dict[Any, Any]:
    """Put ``[key, value, key, value, ...]`` into a dictionary."""
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        if not isinstance(key, str | int | float | bytes | Name | None):
            raise TypeError(f"a {type(key).__name__} as the key of a dictionary")
        target[key] = value
    return target


def _known(name: Name) -> Name:
    is_known = (
        name in (_TENSOR, _PARAMETER, _ORDERED_DICT)
        or name in STORAGES
        or name in _INERT
        or name.module.startswith(_CALLBACKS)
    )
    if not is_known:
        raise InertPickleError(
            f"the pickle names {name}, which is no part of a checkpoint; nothing of it was run"
        )
    return name


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> StridedTensor:
    if not isinstance(storage, Storage) or len(shape) != len(strides):
        raise TypeError("a tensor without a storage, or with strides of another shape")
    sizes, steps = (tuple(_count(one) for one in numbers) for numbers in (shape, strides))
    tensor = StridedTensor(storage, _count(offset), sizes, steps)
    if tensor.end > storage.length:
        raise ValueError(f"a tensor that ends behind its storage {storage.key!r}")
    return tensor


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError("a size that is no count")
    return value


_NOTHING = frozenset({"PROTO", "FRAME", "STOP"})
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
_BYTES = {"STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_TEXTS = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_LITERALS = _NUMBERS | _BYTES | _TEXTS | {"BYTEARRAY8"}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": list,  # members of sets need not be told apart, nor hashed
}
_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "POP": _Machine.pop_one,
    "POP_MARK": lambda machine, _: machine.pop_to_mark().clear(),
    "DUP": _Machine.duplicate,
    "MEMOIZE": _Machine.memoize,
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "LIST": lambda machine, _: machine.push(machine.pop_to_mark()),
    "FROZENSET": lambda machine, _: machine.push(machine.pop_to_mark()),
    "APPEND": lambda machine, _: machine.append([machine.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.pop_to_mark()),
    "ADDITEMS": lambda machine, _: machine.append(machine.pop_to_mark()),
    "DICT": lambda machine, _: machine.push(_fill({}, machine.pop_to_mark())),
    "SETITEM": _Machine.set_item,
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.name_from_stack,
    "REDUCE": _Machine.build_from,
    "NEWOBJ": _Machine.build_from,
    "BUILD": _Machine.set_state,
    "BINPERSID": _Machine.storage,
}
