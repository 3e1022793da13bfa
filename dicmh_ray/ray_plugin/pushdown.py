"""Filters of Ray Data as filters of archives, where the two mean the same.

A comparison with a null is false here, and in Ray it is null, which a filter drops as well; they
differ below a negation. So negations are pushed down to the comparisons, and a negated one says
that the column is not null.
"""

from typing import Any

from ray.data.expressions import (
    AliasExpr,
    BinaryExpr,
    ColumnExpr,
    Expr,
    LiteralExpr,
    Operation,
    UnaryExpr,
)

from dicmh_ray.errors import WhereError
from dicmh_ray.reader import parse_where

_COMPARISONS = {
    Operation.EQ: ("==", Operation.NE),
    Operation.NE: ("!=", Operation.EQ),
    Operation.LT: ("<", Operation.GE),
    Operation.LE: ("<=", Operation.GT),
    Operation.GT: (">", Operation.LE),
    Operation.GE: (">=", Operation.LT),
}
"""Operation -> how it is written, and its opposite."""

_MIRRORED = {
    Operation.EQ: Operation.EQ,
    Operation.NE: Operation.NE,
    Operation.LT: Operation.GT,
    Operation.LE: Operation.GE,
    Operation.GT: Operation.LT,
    Operation.GE: Operation.LE,
}


class _NotSaid(Exception):
    """The expression has no counterpart."""


def where_of(expr: Expr) -> str | None:
    """A filter of :func:`dicmh_ray.reader.parse_where` that keeps the same rows; None without one."""
    try:
        text = _condition(expr, negated=False)
        parse_where(text)
    except (_NotSaid, WhereError):
        return None
    return text


def _condition(expr: Expr, *, negated: bool) -> str:
    if isinstance(expr, AliasExpr):
        return _condition(expr.expr, negated=negated)
    if isinstance(expr, UnaryExpr):
        return _of_one(expr, negated)
    if not isinstance(expr, BinaryExpr):
        raise _NotSaid
    if expr.op in (Operation.AND, Operation.OR):
        word = "and" if (expr.op == Operation.AND) != negated else "or"
        left = _condition(expr.left, negated=negated)
        right = _condition(expr.right, negated=negated)
        return f"({left}) {word} ({right})"
    if expr.op in (Operation.IN, Operation.NOT_IN):
        return _membership(expr, negated)
    if expr.op in _COMPARISONS:
        return _comparison(expr, negated)
    raise _NotSaid


def _of_one(expr: UnaryExpr, negated: bool) -> str:
    if expr.op == Operation.NOT:
        return _condition(expr.operand, negated=not negated)
    if expr.op in (Operation.IS_NULL, Operation.IS_NOT_NULL):
        is_null = (expr.op == Operation.IS_NULL) != negated
        return f"{_column(expr.operand)} is {'' if is_null else 'not '}None"
    raise _NotSaid


def _comparison(expr: BinaryExpr, negated: bool) -> str:
    left, op, right = expr.left, expr.op, expr.right
    if isinstance(left, LiteralExpr):
        left, op, right = right, _MIRRORED[op], left
    if negated:
        op = _COMPARISONS[op][1]
    column, value = _column(left), _literal(right)
    text = f"{column} {_COMPARISONS[op][0]} {value}"
    return f"{text} and {column} is not None" if op == Operation.NE else text


def _membership(expr: BinaryExpr, negated: bool) -> str:
    if not isinstance(expr.right, LiteralExpr) or not isinstance(expr.right.value, list | tuple):
        raise _NotSaid
    # Arrow finds a null in no list, and so keeps it where a list is excluded; so does a Where.
    word = "in" if (expr.op == Operation.IN) != negated else "not in"
    values = ", ".join(_constant(value) for value in expr.right.value)
    return f"{_column(expr.left)} {word} [{values}]"


def _column(expr: Expr) -> str:
    if not isinstance(expr, ColumnExpr):
        raise _NotSaid
    return str(expr.name)


def _literal(expr: Expr) -> str:
    if not isinstance(expr, LiteralExpr):
        raise _NotSaid
    return _constant(expr.value)


def _constant(value: Any) -> str:
    if type(value) not in (str, int, float) or value != value:  # noqa: PLR0124  NaN
        raise _NotSaid
    return repr(value)
