"""Cases out of Python files: the `Case` objects, and lists of them, that a file has at its top level.

    FILE               all of them, in the order in which they stand there
    FILE::NAME         the case or list of that name, one case of a list (ports[2]), or a case's own name

Names that begin with an underscore are the file's own business.
"""

from __future__ import annotations

import contextlib
import importlib.util
import linecache
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import click

from vmxlab.cases.case import MAX_NAME, Case
from vmxlab.cli.output import say
from vmxlab.errors import CaseError, MissingCapability, VmxlabError

if TYPE_CHECKING:
    from vmxlab.image.compiler import CompiledCase, Target

_NAMES_SHOWN = 30


@dataclass(frozen=True, slots=True)
class FoundCase:
    """A case and where it stands: the module-level `name`, and its place in it if that is a list."""

    name: str
    place: int | None
    case: Case

    @property
    def label(self) -> str:
        """How to name it on the command line."""
        return self.name if self.place is None else f"{self.name}[{self.place}]"

    def answers_to(self, name: str) -> bool:
        """Whether FILE::name means this case, among others perhaps."""
        return name in (self.name, self.label, self.case.name)

    def named(self) -> Case:
        """The case, with a name to be known by in the log: its label where it has none of its own."""
        if self.case.name or len(self.label) > MAX_NAME or not self.label.isascii():
            return self.case
        return replace(self.case, name=self.label)


def load_cases(argument: str) -> list[Case]:
    """The cases of FILE or FILE::NAME.

    Raises click.UsageError for a file or a name that does not exist, CaseError for a file that can't be
    loaded or holds no case.
    """
    path_text, _, name = argument.partition("::")
    path = Path(path_text)
    if not path.exists():
        raise click.UsageError(f"there is no file {path_text!r}")
    if path.is_dir():
        raise click.UsageError(f"{path_text!r} is a folder; name a Python file with cases")
    found = list(_find_cases(_load(path), path))
    if not found:
        raise CaseError(
            f"{path} has no cases: no Case, and no list of them, at its top level",
            advice=f"write one: hello = Case(program='hlt'); if {path} holds tests, run pytest {path}",
        )
    chosen = [item for item in found if not name or item.answers_to(name)]
    if not chosen:
        raise click.UsageError(f"{path} has no case {name!r}; it has {_listing(found)}")
    return [item.named() for item in chosen]


def _listing(found: Sequence[FoundCase]) -> str:
    labels = [item.label + (f" ({item.case.name})" if item.case.name else "") for item in found]
    more = len(labels) - _NAMES_SHOWN
    return ", ".join(labels[:_NAMES_SHOWN]) + (f", and {more} more" if more > 0 else "")


def _find_cases(module: ModuleType, path: Path) -> Iterator[FoundCase]:
    seen: set[int] = set()
    for name, value in vars(module).items():
        if name.startswith("_") or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Case):
            yield FoundCase(name, None, value)
        elif isinstance(value, list | tuple) and any(isinstance(item, Case) for item in value):
            for place, item in enumerate(value):
                if not isinstance(item, Case):
                    raise CaseError(f"{path}: {name}[{place}] is no Case but {type(item).__name__}: {item!r}")
                yield FoundCase(name, place, item)


def _load(path: Path) -> ModuleType:
    """Run the file as a module of its own; what stands beside it can be imported, as with `python FILE`."""
    name = f"vmxlab_cases_{abs(hash(path.resolve())):x}"
    loader = SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    # dataclasses and pickle look a class's module up by name.
    sys.modules[name] = module
    sys.path.insert(0, folder)
    try:
        loader.exec_module(module)
    except VmxlabError as error:
        raise error.locate(case=_place(path, error)) from None
    except SyntaxError as error:
        raise CaseError(_syntax_error(path, error)) from None
    except (Exception, SystemExit) as error:
        raise CaseError(
            f"{path} can't be loaded: {type(error).__name__}: {error}\n  {_place(path, error)}"
        ) from None
    finally:
        sys.path.remove(folder)
        del sys.modules[name]
    return module


def _place(path: Path, error: BaseException) -> str:
    """The last line of the file that an exception came through."""
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if not lines:
        return str(path)
    number = lines[-1].lineno or 0
    return f"{path}, line {number}: {linecache.getline(str(path), number).strip()}"


def _syntax_error(path: Path, error: SyntaxError) -> str:
    where = error.filename or str(path)
    text = (error.text or "").rstrip()
    shown = f"\n    {text.lstrip()}" if text else ""
    if text and error.offset:
        indent = len(text) - len(text.lstrip())
        shown += f"\n    {' ' * max(0, error.offset - 1 - indent)}^"
    return f"{where}, line {error.lineno}: {error.msg}{shown}"


def assemble_ahead(cases: Sequence[Case]) -> None:
    """Have all programs assembled in one call, and remembered; a wrong one shows when it is used."""
    from vmxlab.image.compiler import assemble_programs

    with contextlib.suppress(VmxlabError):
        assemble_programs(cases)


def compile_for(target: Target, cases: Sequence[Case], *, report_code: bool = False) -> list[CompiledCase]:
    """All cases that the target can run, numbered from 0; what it lacks is said. Raises CaseError.

    `report_code`: see `compile_case`.
    """
    from vmxlab.image.compiler import compile_case

    assemble_ahead(cases)
    compiled: list[CompiledCase] = []
    for number, case in enumerate(cases):
        name = case.name or f"case {number}"
        try:
            compiled.append(compile_case(case, target, number=len(compiled), report_code=report_code))
        except MissingCapability as error:
            say(f"left out {name}: {error.message}")
        except CaseError as error:
            raise error.locate(case=name) from None
    return compiled
