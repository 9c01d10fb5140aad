"""The changes that make mutants: one at one place of a source file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import NamedTuple

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
MESSAGES = ("debug", "info", "warning", "error", "exception")
"""Methods of loggers: what they are given is no behaviour."""
TEXTS = ("hint", "what")
"""Variables that hold a part of an error's message."""


class Mutant(NamedTuple):
    """A changed source: its text, the line of the change (from 1), and both versions of what was changed."""

    source: str
    line: int
    before: str
    after: str


def mutants(source: str) -> Iterator[Mutant]:
    """All mutants of the source, in the order of their places."""
    data = source.encode()
    starts = [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node, text in _changes(ast.parse(source)):
        assert node.end_lineno is not None and node.end_col_offset is not None
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        changed = data[:start] + text.encode() + data[end:]
        try:
            ast.parse(changed)
        except SyntaxError:  # as in an f-string, whose parts have no places before Python 3.12
            continue
        yield Mutant(changed.decode(), node.lineno, data[start:end].decode(), text)


def _changes(tree: ast.Module) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """Each node that can be changed, and the text that replaces it."""
    for node in _behaviour(tree):
        if isinstance(node, ast.stmt):
            if text := _statement(node):
                yield node, text
        elif isinstance(node, ast.expr):
            for text in _expression(node):
                yield node, f"({text})"


def _behaviour(node: ast.AST) -> Iterator[ast.AST]:
    """The node and those below it, without annotations, docstrings, logging, messages, and imports for types."""
    yield node
    if isinstance(node, ast.Raise):  # that it is raised is behaviour: not what it says
        return
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "bases", "keywords") and not isinstance(node, ast.Call):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _is_prose(child):
                yield from _behaviour(child)


def _is_prose(node: ast.AST) -> bool:
    match node:
        case ast.JoinedStr() | ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant()):
            return True
        case ast.keyword(arg="strict" | "repr"):  # of zip, whose arguments are of one length; of fields
            return True
        case ast.FunctionDef(name="__repr__") | ast.Call(func=ast.Name(id="shorten")):
            return True
        case ast.Assign(targets=[ast.Name(id=name)]):
            return name in TEXTS or name == "TYPE_CHECKING"
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="log"), attr=name))):
            return name in MESSAGES
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
    return False


def _statement(node: ast.stmt) -> str | None:
    """The statement's replacement: a call or a refusal that doesn't happen, a result that is lost."""
    match node:
        case ast.Expr() | ast.Raise() | ast.AugAssign() | ast.Delete():
            return "pass"
        case ast.Return(value=value) if value is not None and not isinstance(value, ast.Constant):
            return "return None"
        case ast.Continue():
            return "break"
        case ast.Break():
            return "continue"
    return None


def _expression(node: ast.expr) -> Iterator[str]:
    match node:
        case ast.Compare(ops=[first, *rest]) if type(first) in COMPARISONS:
            changed = ast.Compare(node.left, [COMPARISONS[type(first)](), *rest], node.comparators)
            yield ast.unparse(changed)
        case ast.BoolOp(op=ast.And()):
            yield ast.unparse(ast.BoolOp(ast.Or(), node.values))
        case ast.BoolOp(op=ast.Or()):
            yield ast.unparse(ast.BoolOp(ast.And(), node.values))
        case ast.UnaryOp(op=ast.Not()):
            yield ast.unparse(node.operand)
        case ast.BinOp(op=operator) if type(operator) in ARITHMETIC and not isinstance(node.right, ast.JoinedStr):
            yield ast.unparse(ast.BinOp(node.left, ARITHMETIC[type(operator)](), node.right))
        case ast.Constant(value=bool(value)):
            yield str(not value)
        case ast.Constant(value=int(value)):
            yield str(value + 1)
        case ast.Constant(value=str(value)) if "\n" in value:
            yield from map(repr, _without_a_line(value))
        case ast.IfExp():
            yield ast.unparse(ast.IfExp(node.test, node.orelse, node.body))


def _without_a_line(text: str) -> Iterator[str]:
    """The text, as rules of a packet filter or a script, without each of its lines that opens and closes no block."""
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        if line.strip() and line.count("{") == line.count("}"):
            yield "".join(lines[:number] + lines[number + 1 :])
