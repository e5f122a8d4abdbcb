"""A reproducer: a folder with all that it takes to ask one case again, elsewhere and without this harness.

    README.md            what was asked, what came, and how to ask again: the place to begin
    reproduce.py         the case as a test
    case.rom, case.elf   the image: this case alone
    case.bochsrc         what Bochs is told
    boot.sh              boots the image: the command lines
    serial.log           the machine's boot and the case, out of the whole serial log

It can be moved and sent away: every path in it is relative to it. The test is not called test_..., as the
folder may lie where pytest looks for tests.
"""

from __future__ import annotations

import contextlib
import itertools
import platform
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmxlab import __version__
from vmxlab.cases.source import BY_THE_ORACLE, Asserted, case_source
from vmxlab.console.records import parse_line
from vmxlab.console.run import Run, Verdict
from vmxlab.engines.base import EngineInfo
from vmxlab.engines.bochs import BochsEngine
from vmxlab.engines.logs import log_error
from vmxlab.engines.rom import RomImage
from vmxlab.errors import ImageError, VmxlabError
from vmxlab.image.compiler import assemble_programs
from vmxlab.image.frames import pack_payload
from vmxlab.image.rom import pack_elf, pack_rom
from vmxlab.reports.boot_by_hand import (
    Way,
    bochs_configuration,
    bochs_way,
    engine_way,
    kernel_way,
    modules_of_kvm,
)
from vmxlab.reports.disassembly import Code
from vmxlab.reports.runs import exit_table, remarks, title, verdict_text

_ROM, _ELF, _BOCHSRC = Path("case.rom"), Path("case.elf"), Path("case.bochsrc")
_BOOT, _TEST, _LOG, _README = "boot.sh", "reproduce.py", "serial.log", "README.md"
_TEST_NAME = "test_reproduces"

FOLDER = "failed"
"""Where reproducers of failed cases lie, beside the logs."""

AS_EXPECTED = Asserted("assert run.difference() is None")
"""For a case whose own `expect` is the question."""

_WHAT = {
    _README: "this page",
    _TEST: "the case as a test for pytest, with vmxlab installed",
    str(_ROM): "the image for a machine without firmware: it starts from the reset vector",
    str(_ELF): "the same image for a boot loader: ELF32, multiboot 1 and PVH",
    str(_BOCHSRC): "what Bochs is told",
    _BOOT: "boots the image: ./boot.sh bochs, ./boot.sh qemu or ./boot.sh kernel",
    _LOG: "what the machine said on its serial line: its boot, and this case",
}


_ABOUT = """\
This folder holds one case of vmxlab: a question to a processor with VMX, as an image that boots by itself,
with what came of it. Words are those of the Intel SDM; L1 is the image, L2 the guest program of the case.
"""
_BY_HAND = """\
Without it, in this folder. The image says on its serial line what it is, runs the case, and waits at a
prompt:
"""
_CONTROLS = """\
The controls are those of the processor that the case was made for: where one of them is missing the VM entry
fails. The test has them computed for the processor at hand.
"""


@dataclass(frozen=True, slots=True)
class Reproducer:
    """One case, and what is known of it.

    `run`: what came back, or for a case that never ran its verdict alone. `info`: what it ran on, or was made
    for; None where that is not known. `test`, `failure`: which test ran it, and what that said. `asserted`:
    what that asserted of the run, where it can be taken along. `ran`: whether it was run at all.
    """

    run: Run
    info: EngineInfo | None = None
    test: str = ""
    failure: str = ""
    asserted: Asserted | None = None
    ran: bool = True

    def write(self, folder: Path) -> None:
        """Write the folder's files; it must be there. Raises LogError where that can't be."""
        for name, content in self.files().items():
            path = folder / name
            try:
                path.write_bytes(content)
                if name == _BOOT:
                    path.chmod(0o755)
            except OSError as error:
                raise log_error(path, error) from error

    def files(self) -> dict[str, bytes]:
        """The folder's files, by name. What can't be made is left out, and README.md says why."""
        files: dict[str, bytes] = {}
        ways: Mapping[str, Way] = {}
        problems = []
        try:
            image = self._image()
            ways = self._ways(len(image[str(_ROM)]))
            files |= image | {_BOOT: _script(ways).encode()}
        except VmxlabError as error:
            problems.append(f"no image: {error.message.splitlines()[0]}")
        log = self._log()
        if log:
            files[_LOG] = log
        elif self.ran:
            problems.append(f"no {_LOG}: there is no serial log of it")
        test, remark = self._test()
        if test:
            files[_TEST] = test.encode()
        else:
            problems.append(f"no {_TEST}: {remark}")
        names = [f"`{name}`: {_WHAT[name]}" for name in (_README, *files)]
        readme = "\n".join(self._readme(ways, remark, [*names, *problems])) + "\n"
        return {_README: readme.encode(), **files}

    # --- the image -------------------------------------------------------------------------------------

    def _image(self) -> dict[str, bytes]:
        """Raises VmxlabError where there can be none."""
        compiled = self.run.compiled
        if compiled is None:
            unknown = ImageError("the case that was compiled is not known")
            raise self.run.error if isinstance(self.run.error, VmxlabError) else unknown
        monitor, payload = compiled.target.monitor, pack_payload([compiled.units])
        rom = pack_rom(monitor, payload)
        model = self.info.model if self.info is not None and self._ran_on_bochs() else None
        bochsrc = bochs_configuration(
            RomImage(_ROM, len(rom)), compiled.case.processors, model or BochsEngine.default_model
        )
        return {
            str(_ROM): rom,
            str(_ELF): pack_elf(monitor, payload),
            str(_BOCHSRC): bochsrc.encode(),
        }

    def _ways(self, rom_bytes: int) -> dict[str, Way]:
        """How to boot it, by the word for boot.sh; what it ran on comes first."""
        processors = self.run.case.processors if self.run.case is not None else 1
        bochs = {"bochs": bochs_way(_BOCHSRC)}
        qemu = {
            "qemu": engine_way(RomImage(_ROM, rom_bytes), processors, self.info),
            "kernel": kernel_way(_ELF, processors, self.info),
        }
        return bochs | qemu if self._ran_on_bochs() else qemu | bochs

    def _ran_on_bochs(self) -> bool:
        return self.info is not None and self.info.name == BochsEngine.name

    # --- the log and the test --------------------------------------------------------------------------

    def _log(self) -> bytes:
        path = self.run.log_path
        if path is None or not path.is_file():
            return b"".join(f"{record.line}\n".encode() for record in self.run.records)
        return excerpt(path.read_bytes(), self.run.number)

    def _test(self) -> tuple[str, str]:
        """The test, and what it asserts in words; no text, and why, where it can't be written."""
        case = self.run.case
        if case is None:
            return "", "a run that was read from a log has no case"
        about = f'"""{self._headline()}\n\n    {self._pytest()}\n"""\n\n'
        problem = ""
        for asserted, remark in self._assertions():
            try:
                return about + case_source(case, name=_TEST_NAME, asserted=asserted), remark
            except TypeError as error:
                problem = str(error)
        return "", problem

    def _assertions(self) -> Iterator[tuple[Asserted, str]]:
        """What the test may assert, the best first."""
        if self.asserted is not None:
            yield self.asserted, "It asserts what the test that failed did."
        if self.ran and self.run.verdict in (Verdict.ERROR, Verdict.CRASH):
            yield (
                BY_THE_ORACLE,
                "The case itself ended in an error; a run without one is checked by the oracle.",
            )
        if self.ran and self.run.verdict is Verdict.FAIL:
            yield AS_EXPECTED, "It asserts what the case itself expects."
        own = "" if not self.failure else ", not what the test that failed did: that could not be taken along"
        yield BY_THE_ORACLE, f"It asserts what the SDM says of the case, as vmxlab knows it{own}."

    def _pytest(self) -> str:
        where = () if self.info is None else ("--vmx-engine", self.info.name, "--vmx-model", self.info.model)
        return shlex.join(("pytest", _TEST, *where))

    # --- README.md -------------------------------------------------------------------------------------

    def _headline(self) -> str:
        if not self.ran:
            return f"{title(self.run)}: an image for given capabilities, not run"
        where = self.info.title() if self.info is not None else self.run.engine or "no machine"
        return f"{title(self.run)}: {self.run.verdict.name} on {where}"

    def _readme(self, ways: Mapping[str, Way], remark: str, files: Sequence[str]) -> Iterator[str]:
        yield from (f"# {self._headline()}", "", *_ABOUT.splitlines(), "")
        if self.ran:
            yield from ("## What happened", "", *_block(self._happened()))
        yield from ("## Where", "", *self._where())
        yield from ("## Again", "", "As a test, with vmxlab installed:", "", *_block([self._pytest()]))
        yield from (remark, "")
        if ways:
            yield from self._by_hand(ways)
        yield from ("## Files", "", *(f"- {line}" for line in files))

    def _happened(self) -> Iterator[str]:
        run = self.run
        yield f"{run.verdict.name}  {verdict_text(run)}"
        if self.failure:
            yield from ("", *self.failure.splitlines())
        if run.exits:
            yield from ("", *exit_table(run, _code(run)).plain())
        notes = remarks(run)
        if notes:
            yield from ("", *notes)

    def _where(self) -> Iterator[str]:
        boot = next(
            (r for r in map(parse_line, self._log().splitlines()) if r is not None and r.kind == "boot"), None
        )
        facts = {
            "engine": self.info.title() if self.info is not None else "",
            "why": self.info.why if self.info is not None else "",
            "test": self.test,
            "monitor": f"build {boot.number('build'):#010x}, protocol {boot.number('protocol')}"
            if boot
            else "",
            "vmxlab": f"{__version__}, Python {platform.python_version()}",
            "whole log": str(self.run.log_path.absolute()) if self.run.log_path is not None else "",
        }
        yield from (f"- {name}: {text}" for name, text in facts.items() if text)
        yield ""

    def _by_hand(self, ways: Mapping[str, Way]) -> Iterator[str]:
        yield from (*_BY_HAND.splitlines(), "")
        modules = modules_of_kvm(self.info) if self.info is not None else []
        if modules:
            yield from ("The modules of KVM were loaded like this:", "", *_block(modules))
        for word, way in ways.items():
            yield from (f"{way.what} (`./{_BOOT} {word}`):", "", *_block([str(way)]))
        yield from (*_CONTROLS.splitlines(), "")


def new_folder(parent: Path, name: str) -> Path:
    """Make a folder of that name, with a number where there is one of another session. Raises LogError."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            folder = parent / (name if number == 1 else f"{name}.{number}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as error:
        raise log_error(parent / name, error) from error
    raise AssertionError("unreachable")


def excerpt(log: bytes, number: int) -> bytes:
    """Of a serial log the boot, and the case of that number: to its end, or if it has none to the log's."""
    lines = log.splitlines(keepends=True)
    records = [parse_line(line.rstrip()) for line in lines]
    cases = [at for at, record in enumerate(records) if record is not None and record.kind == "case"]
    boot = lines[: cases[0]] if cases else lines
    own = [at for at in cases if (record := records[at]) is not None and record.number("id", -1) == number]
    if not own:
        return b"".join(boot)
    start = own[-1]
    ends = (at for at in range(start, len(lines)) if (r := records[at]) is not None and r.kind == "end")
    return b"".join([*boot, *lines[start : next(ends, len(lines)) + 1]])


def _code(run: Run) -> Code | None:
    """The machine code of the case; None where it does not assemble."""
    if run.case is None:
        return None
    try:
        return Code.of(run.case, *assemble_programs([run.case]))
    except VmxlabError:
        return None


def _block(lines: Sequence[str] | Iterator[str]) -> list[str]:
    return [*(f"    {line}".rstrip() for line in lines), ""]


def _script(ways: Mapping[str, Way]) -> str:
    first, words = next(iter(ways)), "|".join(ways)
    branches = "".join(f"    {word}) # {way.what}\n        {way}\n        ;;\n" for word, way in ways.items())
    return (
        "#!/bin/sh\n"
        f"# Boots the image in this folder; without a word as it was run first. ./{_BOOT} [{words}]\n"
        "set -e\n"
        'cd "$(dirname "$0")"\n'
        f'case "${{1:-{first}}}" in\n'
        f"{branches}"
        f'    *)\n        echo "usage: $0 [{words}]" >&2\n        exit 2\n        ;;\n'
        "esac\n"
    )
