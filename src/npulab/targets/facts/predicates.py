"""Predicates of the facts files: a small part of Python's expressions, with a third answer for what is not known.

Comparisons, `and`, `or`, `not`, `+ - * // %`, lists, literals and the functions of FUNCTIONS; what is decided means
what Python means by it. A name without a value makes undecided what needs it: `or` with a true side is true all the
same, `and` with a false side false. What Python would stop at (1 // 0, a number less than a text) is undecided as well.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

LENGTH_MAX = 1000
"""Characters of a predicate."""
DEPTH_MAX = 24
"""Expressions inside each other."""


class _Undecided:
    """The value of what is not known. Nothing but the functions here sees it."""


UNDECIDED: Final = _Undecided()

Lookup = Callable[[str], Any]
"""A name's value, or None without one."""
Code = Callable[[Lookup], Any]


class PredicateError(ValueError):
    """A text is no predicate; says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Predicate:
    """A compiled predicate. `names`: those it reads, in order of appearance."""

    text: str
    names: tuple[str, ...]
    code: Code

    def decide(self, lookup: Lookup) -> bool | None:
        """True or False; None where the values that are known do not decide it."""
        value = self.code(lookup)
        return None if value is UNDECIDED else bool(value)

    def culprits(self, lookup: Lookup) -> tuple[str, ...]:
        """The names whose values make it false, or undecided."""
        wanted, parts = self.decide(lookup), _parts(self.text)
        return tuple(dict.fromkeys(n for p in parts if p.decide(lookup) is wanted for n in p.culprits(lookup))
                     ) if parts else self.names


@lru_cache(4096)
def compile_predicate(text: str) -> Predicate:
    """The predicate of a text. Raises PredicateError saying what it may not have."""
    if len(text) > LENGTH_MAX:
        raise PredicateError(f"{len(text)} characters, more than {LENGTH_MAX}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as e:
        raise PredicateError(f"no expression: {getattr(e, 'msg', None) or e}") from None
    names: dict[str, None] = {}
    code = _compile(tree, names, DEPTH_MAX)
    return Predicate(text, tuple(names), code)


@lru_cache(4096)
def _parts(text: str) -> tuple[Predicate, ...]:
    """What `and` joins at the top of a predicate. Few are ever asked for: those that something breaks."""
    tree = ast.parse(text.strip(), mode="eval").body
    joined = tree.values if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And) else ()
    return tuple(compile_predicate(ast.unparse(part)) for part in joined)


def _all(values: list[Any]) -> Any:
    """As Python's, but a false value decides although others are not known."""
    if any(v is not UNDECIDED and not v for v in values):
        return False
    return UNDECIDED if any(v is UNDECIDED for v in values) else True


def _any(values: list[Any]) -> Any:
    if any(v is not UNDECIDED and v for v in values):
        return True
    return UNDECIDED if any(v is UNDECIDED for v in values) else False


FUNCTIONS: dict[str, Callable[..., Any]] = {"min": min, "max": max, "abs": abs, "len": len, "all": _all, "any": _any}
ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod}
COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge}


def _compile(tree: ast.expr, names: dict[str, None], depth: int) -> Code:
    if not depth:
        raise PredicateError(f"more than {DEPTH_MAX} expressions inside each other")

    def inner(e: ast.expr) -> Code:
        return _compile(e, names, depth - 1)

    match tree:
        case ast.Constant(value=bool() | int() | float() | str() as constant):
            return lambda _: constant
        case ast.Name(id=name):
            names[name] = None
            return lambda lookup: UNDECIDED if (value := lookup(name)) is None else value
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            parts = [inner(e) for e in elements]
            return lambda lookup: [part(lookup) for part in parts]
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            part = inner(operand)
            return lambda lookup: UNDECIDED if (v := part(lookup)) is UNDECIDED else not v
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            part = inner(operand)
            return lambda lookup: -v if _number(v := part(lookup)) else UNDECIDED
        case ast.BoolOp(op=op, values=values):
            return _bool_op(isinstance(op, ast.Or), [inner(v) for v in values])
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            return _arithmetic(ARITHMETIC[type(op)], inner(left), inner(right))
        case ast.Compare(left=left, ops=ops, comparators=others):
            return _compare([_comparison(op) for op in ops], [inner(left), *(inner(o) for o in others)])
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS and args:
            if name not in ("min", "max") and len(args) != 1:
                raise PredicateError(f"{name}() with {len(args)} values, it takes 1")
            return _call(name, [inner(a) for a in args])
    raise PredicateError(f"'{ast.unparse(tree)[:60]}' is none of: comparisons, and, or, not, in, + - * // %, lists, "
                         f"numbers, texts, names, {'() '.join(FUNCTIONS)}()")


def _number(value: Any) -> bool:
    return isinstance(value, int | float)


def _known(value: Any) -> bool:
    """Whether all of a value is known."""
    return value is not UNDECIDED and not (isinstance(value, list) and not all(map(_known, value)))


def _bool_op(is_or: bool, parts: list[Code]) -> Code:
    def code(lookup: Lookup) -> Any:
        open_ = False
        value: Any = UNDECIDED
        for part in parts:
            value = part(lookup)
            if value is UNDECIDED:
                open_ = True
            elif bool(value) is is_or:
                return value
        return UNDECIDED if open_ else value
    return code


def _arithmetic(function: Callable[[Any, Any], Any], left: Code, right: Code) -> Code:
    def code(lookup: Lookup) -> Any:
        a, b = left(lookup), right(lookup)
        if not (_number(a) and _number(b)):  # nothing else: "x" * 10**9 is no predicate
            return UNDECIDED
        try:
            return function(a, b)
        except (ZeroDivisionError, OverflowError):
            return UNDECIDED
    return code


def _comparison(op: ast.cmpop) -> Callable[[Any, Any], Any]:
    if isinstance(op, ast.In):
        return _is_in
    if isinstance(op, ast.NotIn):
        return lambda a, b: UNDECIDED if (found := _is_in(a, b)) is UNDECIDED else not found
    if type(op) not in COMPARISONS:
        raise PredicateError("'is' is no comparison here")
    compare = COMPARISONS[type(op)]

    def code(a: Any, b: Any) -> Any:
        if not (_known(a) and _known(b)):
            return UNDECIDED
        try:
            return compare(a, b)
        except TypeError:
            return UNDECIDED
    return code


def _is_in(a: Any, b: Any) -> Any:
    if not _known(a) or b is UNDECIDED or not isinstance(b, list | str) or (isinstance(b, str)
                                                                            and not isinstance(a, str)):
        return UNDECIDED
    if isinstance(b, str):
        return a in b
    known = [v for v in b if _known(v)]
    return True if a in known else False if len(known) == len(b) else UNDECIDED


def _compare(compare: list[Callable[[Any, Any], Any]], parts: list[Code]) -> Code:
    if len(compare) == 1:
        only, left, right = compare[0], parts[0], parts[1]
        return lambda lookup: only(left(lookup), right(lookup))

    def code(lookup: Lookup) -> Any:
        values = [part(lookup) for part in parts]
        return _all([c(values[i], values[i + 1]) for i, c in enumerate(compare)])
    return code


def _call(name: str, parts: list[Code]) -> Code:
    function = FUNCTIONS[name]
    collects = name in ("all", "any")

    def code(lookup: Lookup) -> Any:
        values = [part(lookup) for part in parts]
        if collects:
            return function(values[0]) if isinstance(values[0], list) else UNDECIDED
        if not all(map(_known, values)):
            return UNDECIDED
        try:
            return function(*values)
        except (TypeError, ValueError):
            return UNDECIDED
    return code

