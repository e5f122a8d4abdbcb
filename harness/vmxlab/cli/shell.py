"""`vmxlab shell`: IPython with a live machine, all names in scope, values decoded."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vmxlab.cli.common import Status, engine_options, log_option, open_lab
from vmxlab.cli.debugging import debugging, gdb_option
from vmxlab.cli.interrupts import answer_first
from vmxlab.errors import LiveStateLost, MachineError, VmxlabError
from vmxlab.reports import live as texts

if TYPE_CHECKING:
    from IPython.core.interactiveshell import ExecutionResult

    from vmxlab.console.lab import Lab
    from vmxlab.console.live.machine import LiveMachine
    from vmxlab.console.live.stepping import Stepped
    from vmxlab.console.run import Exit

_NAMES_OF = {
    "vmxlab.sdm": (
        "CR0", "EFER", "RFLAGS", "ActivityState", "InterruptibilityState", "InterruptionInformation",
        "InterruptionType", "Vector",
    ),
    "vmxlab.cases.memory": ("DATA", "PROGRAM", "UNMAPPED"),
    "vmxlab.image": ("layout",),
}  # fmt: skip
"""In scope besides the public names."""


@click.command()
@click.option("-c", "code", metavar="CODE", help="Run this Python code, and leave.")
@gdb_option
@engine_options
@log_option
def shell(code: str | None, debugged: bool, engine: str, model: str | None, log_dir: Path | None) -> int:
    """Talk to a live machine in Python: `vm`.

    It is IPython, with the public names of vmxlab in scope. The machine is set up and not entered; after each
    entry a line or two say what changed. With -c, or a pipe for input, the code is run and what its
    expressions give is shown.

    Exit status of code: 0, 1 for a failed assertion, 3 for another error, 4 where the machine died.
    """
    _require_ipython()
    interactive = code is None and sys.stdin.isatty()
    if code is None and not interactive:
        code = sys.stdin.read()
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(open_lab(engine, model, log_dir, command="shell", debugged=debugged))
        if debugged:
            stack.enter_context(debugging(lab.engine, lab.log_dir, own_terminal=False))
        vm = lab.live()
        vm.link.uninterrupted = answer_first
        ipython = stack.enter_context(_shell(lab, vm, interactive=interactive))
        if code is not None:
            return status_of(ipython.run_cell(code))
        click.echo(texts.banner(vm))
        ipython.mainloop()
    return Status.PASS


def _require_ipython() -> None:
    try:
        import IPython  # noqa: F401
    except ImportError as error:
        raise VmxlabError(
            f"the Python shell needs IPython, which is not there ({error})",
            advice="pip install 'vmxlab[shell]'; `vmxlab console` is the monitor's own prompt, without it",
        ) from error


@contextlib.contextmanager
def _shell(lab: Lab, vm: LiveMachine, *, interactive: bool) -> Iterator[Any]:
    """IPython's shell (Any: much of it has no types)."""
    from IPython.terminal.interactiveshell import TerminalInteractiveShell
    from traitlets.config import Config

    config = Config()
    config.TerminalInteractiveShell.banner1 = ""
    config.TerminalInteractiveShell.confirm_exit = False
    with tempfile.TemporaryDirectory(prefix="vmxlab-") as temporary:
        if not interactive:  # a script leaves nothing in the user's history, and is no terminal's
            config.TerminalInteractiveShell.ipython_dir = temporary
            config.TerminalInteractiveShell.simple_prompt = True
            config.TerminalInteractiveShell.ast_node_interactivity = "all"
            config.TerminalInteractiveShell.cache_size = 0  # no Out[n]
            config.TerminalInteractiveShell.colors = "NoColor"
            config.HistoryManager.enabled = False
        ipython: Any = TerminalInteractiveShell.instance(config=config, user_ns=_names(lab, vm))
        try:
            watch = _Watch(vm)
            _show_decoded(ipython, watch)
            ipython.set_custom_exc((VmxlabError, KeyboardInterrupt), _error_shower(vm))
            ipython.events.register("post_run_cell", watch.after_cell)
            yield ipython
        finally:
            TerminalInteractiveShell.clear_instance()


def _names(lab: Lab, vm: LiveMachine) -> dict[str, Any]:
    from importlib import import_module

    vmxlab = import_module("vmxlab")
    names = {name: getattr(vmxlab, name) for name in vmxlab.__all__}
    for module, more in _NAMES_OF.items():
        names |= {name: getattr(import_module(module), name) for name in more}
    return {**names, "vmxlab": vmxlab, "lab": lab, "vm": vm}


class _Watch:
    """Says after each entry what it changed: with the exit, where that is shown, else behind the cell."""

    def __init__(self, vm: LiveMachine) -> None:
        self._vm = vm
        self._told = vm.entries

    def exit_text(self, exit: Exit) -> str:
        """An exit; the last one with what changed."""
        return "\n".join([texts.exit_text(exit), *(self._lines() if exit is self._vm.last_exit else ())])

    def stepped_text(self, stepped: Stepped) -> str:
        """Steps, in the same way."""
        last = stepped.exit is self._vm.last_exit
        return "\n".join([texts.stepped_text(stepped), *(self._lines() if last else ())])

    def after_cell(self, result: ExecutionResult) -> None:
        """For `post_run_cell`."""
        del result
        for line in self._lines():
            click.echo(line)

    def _lines(self) -> list[str]:
        if self._vm.entries == self._told:
            return []
        self._told = self._vm.entries
        try:
            return texts.changes_lines(self._vm.changes)
        except VmxlabError:  # the machine is gone, or has no VMCS any more: said, or wanted
            return []


def _show_decoded(ipython: Any, watch: _Watch) -> None:
    """Values as people read them, in place of their repr."""
    from vmxlab.console.live.snapshot import Changes, Snapshot
    from vmxlab.console.live.stepping import Stepped
    from vmxlab.console.run import Exit, Outcome
    from vmxlab.sdm.qualifications.base import Qualification

    plain = ipython.display_formatter.formatters["text/plain"]
    for kind, text in (
        (Exit, watch.exit_text),
        (Stepped, watch.stepped_text),
        (Outcome, texts.outcome_text),
        (Snapshot, texts.snapshot_text),
        (Changes, str),
        *((kind, texts.qualification_text) for kind in _kinds_of(Qualification)),
    ):
        plain.for_type(kind, _printer(text))


def _kinds_of(kind: type[Any]) -> Iterator[type[Any]]:
    """A class and all below it: IPython takes a class's own repr before what it is told of the one above."""
    yield kind
    for below in kind.__subclasses__():
        yield from _kinds_of(below)


def _printer(text: Any) -> Any:
    def show(value: object, printer: Any, cycle: bool) -> None:
        del cycle
        for number, line in enumerate(text(value).splitlines()):
            if number:
                printer.break_()
            printer.text(line)

    return show


def _error_shower(vm: LiveMachine) -> Callable[..., None]:
    """What IPython calls with an error: a user's mistake is a message, never a traceback; so is a crash."""

    def show(ipython: object, kind: object, error: BaseException, *more: object, **options: object) -> None:
        del ipython, kind, more, options
        if isinstance(error, KeyboardInterrupt):
            lost = "" if vm.link.alive else ", in the middle of a command: the machine was given up"
            text = f"interrupted{lost}"
        else:
            text = f"{'crash' if isinstance(error, MachineError) else 'error'}: {error}"
        click.echo(f"vmxlab: {text}", err=True)
        if not vm.link.alive and not isinstance(error, LiveStateLost):
            click.echo("  vm.restart() begins anew, on a fresh machine", err=True)

    return show


def status_of(result: ExecutionResult) -> int:
    """The exit status after code: what its error says."""
    error = result.error_before_exec or result.error_in_exec
    match error:
        case None:
            return Status.PASS
        case AssertionError():
            return Status.FAIL
        case KeyboardInterrupt():
            return Status.INTERRUPTED
        case MachineError() | LiveStateLost():
            return Status.CRASH
        case SystemExit(code=None):
            return Status.PASS
        case SystemExit(code=int(code)):
            return code
    return Status.ERROR
