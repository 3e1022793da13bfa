"""Filter expressions: a small, safe part of Python's, over columns and metadata.

    'dog' in tags and width >= 512 and metadata.cls == 3
    status in ('failed', 'kept_original') or not error is None
    20 < psnr < 30 and metadata['photo by'] != 'me'

A text is parsed, never evaluated. A comparison with a missing value (a null column, an absent
metadata field, another type) is false; ``!=`` and ``not in`` are true exactly where ``==`` and
``in`` are false.
"""

import ast
import json
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dicmh_ray.archive.schema import ARROW_SCHEMA, BLOBS
from dicmh_ray.errors import WhereError

Mask = npt.NDArray[np.bool_]
_Test = Callable[[pa.Table], Mask]

_MAX_TEXT = 10_000
_MAX_DEPTH = 50
_NOT_COMPARABLE = frozenset({*BLOBS, "exif", "icc", "tag_scores", "prefix_bytes"})
_NUMBERS = (int, float)
_INT64 = 2**63
_SURROGATE = re.compile("[\ud800-\udfff]")


class _Comparison(NamedTuple):
    """One operator: on values, on Arrow arrays, and the one that reads the same from the right."""

    python: Callable[[Any, Any], bool]
    arrow: Callable[[Any, Any], Any]
    mirrored: type[ast.cmpop]


_COMPARISONS: dict[type[ast.cmpop], _Comparison] = {
    ast.Eq: _Comparison(operator.eq, pc.equal, ast.Eq),
    ast.Lt: _Comparison(operator.lt, pc.less, ast.Gt),
    ast.LtE: _Comparison(operator.le, pc.less_equal, ast.GtE),
    ast.Gt: _Comparison(operator.gt, pc.greater, ast.Lt),
    ast.GtE: _Comparison(operator.ge, pc.greater_equal, ast.LtE),
}


@dataclass(frozen=True)
class Where:
    """A parsed filter. Pickles as its text."""

    text: str
    """As given."""

    columns: frozenset[str]
    """Columns it looks at: what must be read before it can tell."""

    test: Callable[[pa.Table], Mask] = field(repr=False, compare=False)
    """bool [rows] of a table that has all of ``columns``: which rows match."""

    terms: tuple["Where", ...] = field(default=(), repr=False, compare=False)
    """Of a filter ``a and b and c``: the filters that must all hold; empty of any other."""

    def __reduce__(self) -> tuple[Any, ...]:
        return parse_where, (self.text,)

    def split(self, cheap: frozenset[str]) -> tuple["Where | None", "Where | None"]:
        """This filter as two that must both hold: what ``cheap`` columns decide, and the rest."""
        terms = self.terms or (self,)
        first = [term for term in terms if term.columns <= cheap]
        rest = [term for term in terms if not term.columns <= cheap]
        return _all_of(first), _all_of(rest)


def parse_where(text: str) -> Where:
    """Parse a filter expression.

    Operators: ``and or not``, ``== != < <= > >=`` (chained too), ``in`` and ``not in`` a list of
    constants, ``'tag' in tags``, ``'part' in source_uri``, ``is None`` and ``is not None``. ``True``
    alone is every row.
    Operands: column names, strings, numbers, ``True``, ``False``, and ``metadata.field`` or
    ``metadata['field']``, nested.

    Raises:
        WhereError: it is no such expression; the message says why.
    """
    if len(text) > _MAX_TEXT:
        raise WhereError(text[:40] + "...", f"longer than {_MAX_TEXT} characters")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as exc:
        raise WhereError(text, f"not an expression: {exc}") from exc
    _check_tree(text, tree.body)
    terms = []
    if isinstance(tree.body, ast.BoolOp) and isinstance(tree.body.op, ast.And):
        terms = [_where(ast.unparse(node), node) for node in tree.body.values]
    whole = _where(text, tree.body)
    return replace(whole, terms=tuple(terms))


def _check_tree(text: str, tree: ast.expr) -> None:
    """Refuse what could not even be quoted in a message, or compared with a column."""
    level: list[ast.AST] = [tree]
    for _ in range(_MAX_DEPTH):
        for value in (node.value for node in level if isinstance(node, ast.Constant)):
            if isinstance(value, int) and value > _INT64:
                raise WhereError(text, "a number does not fit 64 bits")
            if isinstance(value, str) and _SURROGATE.search(value):
                raise WhereError(text, f"{value[:60]!a} is no Unicode text")
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        if not level:
            return
    raise WhereError(text, "nested too deep")


def _where(text: str, node: ast.expr) -> Where:
    parser = _Parser(text)
    test = parser.condition(node)
    return Where(text, frozenset(parser.columns), test)


def _all_of(terms: list[Where]) -> Where | None:
    if len(terms) < 2:
        return terms[0] if terms else None
    return parse_where(" and ".join(f"({term.text})" for term in terms))


@dataclass(frozen=True)
class _Field:
    """A column, or a path of names into the JSON of the metadata column."""

    column: str
    path: tuple[str, ...] = ()

    def values(self, table: pa.Table) -> list[Any]:
        column = table[self.column].to_pylist()
        return [_follow(json.loads(text), self.path) for text in column] if self.path else column


@dataclass
class _Parser:
    text: str
    columns: set[str] = field(default_factory=set)

    def condition(self, node: ast.expr) -> _Test:
        if isinstance(node, ast.BoolOp):
            tests = [self.condition(value) for value in node.values]
            join = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
            return lambda table: reduce(join, (test(table) for test in tests))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return _negated(self.condition(node.operand))
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            tests = [
                self.comparison(left, op, right)
                for left, op, right in zip(sides, node.ops, sides[1:], strict=False)
            ]
            return lambda table: reduce(np.logical_and, (test(table) for test in tests))
        if isinstance(node, ast.Constant) and isinstance(node.value, bool):
            everyone = node.value
            self.columns.add("status")  # a table of no columns does not know how many rows it has
            return lambda table: np.full(table.num_rows, everyone)
        raise self.refuse(node, "is no condition; write a comparison")

    def comparison(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> _Test:
        if isinstance(op, ast.NotEq):
            return _negated(self.comparison(left, ast.Eq(), right))
        if isinstance(op, ast.NotIn):
            return _negated(self.comparison(left, ast.In(), right))
        if isinstance(op, ast.IsNot):
            return _negated(self.comparison(left, ast.Is(), right))
        if isinstance(op, ast.Is):
            return self.is_none(left, right)
        if isinstance(op, ast.In):
            return self.membership(left, right)
        if not self.is_field(left) and self.is_field(right):
            left, right, op = right, left, _COMPARISONS[type(op)].mirrored()
        one = self.field(left)
        how = _COMPARISONS[type(op)]
        other = self.field(right) if self.is_field(right) else self.constant(right)
        if other is None:
            raise self.refuse(right, "is compared with 'is None' and 'is not None'")
        if isinstance(other, _Field) or one.path:
            return _compared_values(one, how, other)
        self.check_type(one, other, right)
        return lambda table: _filled(how.arrow(table[one.column], _scalar(other)))

    def is_none(self, left: ast.expr, right: ast.expr) -> _Test:
        if not (isinstance(right, ast.Constant) and right.value is None):
            raise self.refuse(right, "cannot follow 'is'; only None can")
        what = self.field(left)
        if not what.path:
            return lambda table: _mask(pc.is_null(table[what.column]))
        return lambda table: np.array([value is None for value in what.values(table)], bool)

    def membership(self, left: ast.expr, right: ast.expr) -> _Test:
        if isinstance(right, ast.List | ast.Tuple | ast.Set):
            what = self.field(left)
            wanted = [self.constant(element) for element in right.elts]
            if not what.path:
                for value, element in zip(wanted, right.elts, strict=True):
                    self.check_type(what, value, element)
                return lambda table: _is_one_of(table[what.column], wanted)
            return lambda table: np.array([value in wanted for value in what.values(table)], bool)
        item = self.constant(left)
        container = self.field(right, container=True)
        if not container.path:
            kind = ARROW_SCHEMA.field(container.column).type
            if not isinstance(item, str) or not (container.column == "tags" or _is_text(kind)):
                raise self.refuse(left, f"cannot be in {container.column}")
        if container.column == "tags":
            return lambda table: _has_element(table["tags"], item)
        if not container.path:
            return lambda table: _filled(pc.match_substring(table[container.column], str(item)))
        return lambda table: np.array(
            [_contains(value, item) for value in container.values(table)], bool
        )

    def is_field(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name | ast.Attribute | ast.Subscript)

    def field(self, node: ast.expr, *, container: bool = False) -> _Field:
        path: list[str] = []
        inner = node
        while isinstance(inner, ast.Attribute | ast.Subscript):
            if isinstance(inner, ast.Attribute):
                path.append(inner.attr)
            else:
                name = self.constant(inner.slice)
                if not isinstance(name, str):
                    raise self.refuse(inner, "must name a metadata field by a string")
                path.append(name)
            inner = inner.value
        if not isinstance(inner, ast.Name):
            raise self.refuse(node, "is neither a column nor a metadata field")
        column = inner.id
        if column not in ARROW_SCHEMA.names or column in _NOT_COMPARABLE:
            raise self.refuse(inner, "is no column to filter by")
        if bool(path) != (column == "metadata"):
            raise self.refuse(node, "needs a field" if column == "metadata" else "has no fields")
        if column == "tags" and not container:
            raise self.refuse(node, "is a list: write 'dog' in tags")
        self.columns.add(column)
        return _Field(column, tuple(reversed(path)))

    def constant(self, node: ast.expr) -> str | int | float | bool | None:
        value: object = node
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            number = self.constant(node.operand)
            value = -number if isinstance(number, _NUMBERS) else node
        elif isinstance(node, ast.Constant):
            value = node.value
        if isinstance(value, int) and not -_INT64 <= value < _INT64:
            raise self.refuse(node, "does not fit 64 bits")
        if value is None or isinstance(value, str | int | float | bool):
            return value
        raise self.refuse(node, "is no constant")

    def check_type(self, what: _Field, value: Any, node: ast.expr) -> None:
        if _is_text(ARROW_SCHEMA.field(what.column).type) != isinstance(value, str):
            raise self.refuse(node, f"cannot be compared with {what.column}")

    def refuse(self, node: ast.expr, reason: str) -> WhereError:
        return WhereError(self.text, f"{ast.unparse(node)[:60]} {reason}")


def _negated(test: _Test) -> _Test:
    return lambda table: np.logical_not(test(table))


def _compared_values(one: _Field, how: _Comparison, other: Any) -> _Test:
    def compare(a: Any, b: Any) -> bool:
        if a is None or b is None:
            return False
        if isinstance(a, _NUMBERS) != isinstance(b, _NUMBERS) or isinstance(a, dict | list):
            return False
        return isinstance(b, int | float | str) and bool(how.python(a, b))

    def test(table: pa.Table) -> Mask:
        left = one.values(table)
        right = other.values(table) if isinstance(other, _Field) else [other] * len(left)
        return np.array([compare(a, b) for a, b in zip(left, right, strict=True)], bool)

    return test


def _mask(result: pa.ChunkedArray | pa.Array) -> Mask:
    mask: Mask = np.asarray(result, bool)
    return mask


def _filled(result: pa.ChunkedArray) -> Mask:
    return _mask(pc.fill_null(result, False))


def _is_one_of(column: pa.ChunkedArray, wanted: Sequence[Any]) -> Mask:
    values = [value for value in wanted if value is not None]
    found = np.zeros(len(column), bool)
    if _is_text(column.type):
        found |= _mask(pc.is_in(column, value_set=pa.array(values, pa.string())))
    else:
        for value in values:
            found |= _filled(pc.equal(column, _scalar(value)))
    if len(values) < len(wanted):
        found |= _mask(pc.is_null(column))
    return found


def _scalar(value: Any) -> pa.Scalar:
    """A constant for Arrow, for which True is no number."""
    return pa.scalar(int(value) if isinstance(value, bool) else value)


def _has_element(lists: pa.ChunkedArray, item: Any) -> Mask:
    mask = np.zeros(len(lists), bool)
    start = 0
    for chunk in lists.chunks:
        hits = _mask(pc.equal(chunk.flatten(), item))
        if hits.any():
            # Rows of a chunk may begin anywhere in its values: a slice keeps them all.
            edges = chunk.offsets.to_numpy() - chunk.offsets[0].as_py()
            rows = np.searchsorted(edges, np.flatnonzero(hits), side="right") - 1
            mask[start + rows] = True
        start += len(chunk)
    return mask


def _contains(container: Any, item: Any) -> bool:
    if isinstance(container, list):
        return item in container
    return isinstance(container, str) and isinstance(item, str) and item in container


def _follow(value: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind))
