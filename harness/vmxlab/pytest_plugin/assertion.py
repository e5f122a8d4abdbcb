"""The assertion that failed, taken out of its test: what it says of one run, for a test of that run alone.

    assert [e.reason for e in vmxlab.run(case).exits] == expected

becomes `assert [e.reason for e in run.exits] == expected` with the value of `expected`. An assertion that
can't be taken along, as it is about several runs or about objects of the test's own, is left where it is.
"""

from __future__ import annotations

import ast
import builtins
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from vmxlab.pytest_plugin.fixture import VmxlabFixture

if TYPE_CHECKING:
    from vmxlab.cases.source import Asserted
    from vmxlab.console.run import Run

_RUN = "run"


def failed_assertion(
    excinfo: pytest.ExceptionInfo[BaseException], runs: Sequence[Run]
) -> tuple[Run, Asserted] | None:
    """The run that a failed `assert` is about, and the assertion; None where there is none to take along."""
    if not isinstance(excinfo.value, AssertionError):
        return None
    entry = excinfo.traceback[-1]
    statement = _statement(str(entry.statement))
    if statement is None:
        return None
    frame = entry.frame
    return _Taken({**vars(builtins), **frame.f_globals, **frame.f_locals}, runs).take(statement.test)


def _statement(text: str) -> ast.Assert | None:
    try:
        body = ast.parse(textwrap.dedent(text).strip()).body
    except SyntaxError:
        return None
    return body[0] if len(body) == 1 and isinstance(body[0], ast.Assert) else None


class _Taken(ast.NodeTransformer):
    """Takes an assertion out of a frame whose names mean `scope`."""

    def __init__(self, scope: Mapping[str, Any], runs: Sequence[Run]) -> None:
        self._scope = scope
        self._runs = runs
        self._calls = 0
        self._clashes = False
        self._about: list[Run] = []

    def take(self, test: ast.expr) -> tuple[Run, Asserted] | None:
        """The run, and what is asserted of it."""
        from vmxlab.cases.source import Asserted

        test = self.visit(test)
        names = {node.id for node in ast.walk(test) if isinstance(node, ast.Name)}
        own = {n.id for n in ast.walk(test) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        if self._calls:
            self._about += self._runs[-1:]
        found = {name: self._scope[name] for name in sorted(names - own - {_RUN}) if name in self._scope}
        found = {name: value for name, value in found.items() if value is not vars(builtins).get(name)}
        expressions = {}
        for run in self._runs:
            for name in [name for name, value in found.items() if name not in expressions]:
                expression = _of_run(found[name], run)
                if expression is not None:
                    expressions[name] = expression
                    self._about.append(run)
        values = {name: value for name, value in found.items() if name not in expressions}
        several = self._calls > 1 or any(run is not self._about[0] for run in self._about)
        if not self._about or several or self._clashes:
            return None
        return self._about[0], Asserted(f"assert {ast.unparse(test)}", values, expressions)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """`vmxlab.run(...)` is the run."""
        match node.func:
            case ast.Attribute(ast.Name(name), "run") if isinstance(self._scope.get(name), VmxlabFixture):
                self._calls += 1
                return ast.Name(_RUN, ast.Load())
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """A variable that is a run is called `run`, and no other one may be."""
        value = self._scope.get(node.id)
        if any(value is run for run in self._runs):
            self._about += [run for run in self._runs if run is value]
            return ast.Name(_RUN, node.ctx)
        self._clashes = self._clashes or node.id == _RUN
        return node


def _of_run(value: object, run: Run) -> str | None:
    """A value as an expression that begins with the run; None where it is no part of it."""
    if value is run.exits:
        return f"{_RUN}.exits"
    if value is run.outcomes:
        return f"{_RUN}.outcomes"
    return next((f"{_RUN}.exits[{at}]" for at, exit_ in enumerate(run.exits) if value is exit_), None)
