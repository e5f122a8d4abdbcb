"""The lab: cases in, runs out.

A lab keeps one machine of one engine up, sends it cases, and starts it again when a case has killed it, so
that no case takes the next one down. It is what the pytest fixture `vmxlab` is, and what `vmxlab run` uses.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from vmxlab.cases.case import Case
from vmxlab.console.image_reader import ImageReader
from vmxlab.console.log import SerialLog
from vmxlab.console.rebuild import run_from_records
from vmxlab.console.run import Run
from vmxlab.console.session import Session
from vmxlab.console.unfinished import crashed_run, failed_run
from vmxlab.engines.logs import log_error
from vmxlab.errors import (
    CaseError,
    ImageError,
    MachineError,
    MissingCapability,
    ProtocolError,
    VmxlabError,
)
from vmxlab.image import script
from vmxlab.image.compiler import CompiledCase, Target, assemble_programs, compile_case
from vmxlab.image.frames import Frame, encode_frame, pack_payload
from vmxlab.image.monitor import load_monitor
from vmxlab.image.rom import pack_rom

if TYPE_CHECKING:
    from vmxlab.console.live.link import LiveLink
    from vmxlab.console.live.machine import LiveMachine
    from vmxlab.console.records import Record
    from vmxlab.engines.base import Engine, EngineInfo, Machine
    from vmxlab.image.code import LoadedCode
    from vmxlab.structures import Capabilities

BOOT_DEADLINE_S = 30.0
CASE_DEADLINE_S = 20.0
DEBUGGED_DEADLINE_S = 7 * 24 * 3600.0
"""A person with a debugger takes the time they need."""

CPUID_VMX = "CPUID.1:ECX.VMX[5]"


class Lab:
    """One engine, one machine that is up when needed, and its logs. A context manager.

    `engine` None or "auto" takes kvm where nested VMX is proven, else bochs (`vmxlab.engines.choose`).
    `log_dir` holds the serial logs and the engine's own; without one they lie in a temporary folder that goes
    with the lab. `case_deadline_s` is what the engine needs, where none is given. `why` is the
    reason for this engine, where the caller chose it. `debugged`: someone holds the machine with a debugger
    (`Engine.debug`), so no deadline counts, and an idle emulator is not stopped.
    """

    def __init__(
        self,
        engine: str | None = None,
        *,
        model: str | None = None,
        log_dir: Path | None = None,
        case_deadline_s: float | None = None,
        boot_deadline_s: float = BOOT_DEADLINE_S,
        why: str | None = None,
        debugged: bool = False,
    ) -> None:
        from vmxlab.engines.choose import choose

        # All that is loaded on first use is loaded here: a Ctrl-C in the middle of an import may be lost in
        # callbacks of Python's own, and while a lab works none may be.
        load_monitor()
        self._engine, chosen_because = choose(engine, model)
        self._why = why or chosen_because
        self._model = model
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        if log_dir is None:
            self._temporary = _temporary_folder()
            log_dir = Path(self._temporary.name)
        self._log_dir = log_dir
        self._case_deadline_s = case_deadline_s or CASE_DEADLINE_S * self._engine.patience
        self._boot_deadline_s = DEBUGGED_DEADLINE_S if debugged else boot_deadline_s
        self._debugged = debugged
        self._numbers = itertools.count(0)
        self._machine: Machine | None = None
        self._processors = 1
        self._session: Session | None = None
        self._frame: Frame | None = None
        self._capabilities: Capabilities | None = None
        self._info: EngineInfo | None = None
        self._width = 52
        self._has_vmx: bool | None = None
        self._entries_of_past_machines: int | None = None
        self._live: LiveLink | None = None

    # --- what it runs on -------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """The engine that was chosen."""
        return self._engine

    @property
    def info(self) -> EngineInfo:
        """Engine, version, processor model, and why; boots a machine where none has been up yet."""
        if self._info is None:
            self._up()
            self._idle()
        assert self._info is not None
        return self._info

    @property
    def known_info(self) -> EngineInfo | None:
        """As `info`; None where no machine has been up yet."""
        return self._info

    @property
    def capabilities(self) -> Capabilities:
        """The capability MSRs of the processor. Raises MissingCapability where it has no VMX."""
        if self._has_vmx is None:
            self._up()
            self._idle()
        if not self._has_vmx or self._capabilities is None:
            raise MissingCapability("VMX", CPUID_VMX).locate(engine=self.info.title())
        return self._capabilities

    @property
    def target(self) -> Target:
        """What cases are compiled for."""
        capabilities = self.capabilities
        return Target(capabilities, load_monitor(), self._engine.l2_budget_tsc, self._width)

    @property
    def log_dir(self) -> Path:
        """Where its logs are."""
        return self._log_dir

    @property
    def log_path(self) -> Path | None:
        """The serial log of the machine that is up."""
        return self._session.log.path if self._session else None

    def nested_entries(self) -> int | None:
        """How many VM entries of L1 the engine has counted so far: a witness that is not the monitor.

        None where the engine counts none. What a machine counted that died with its QEMU is lost.
        """
        past, machine = self._entries_of_past_machines, self._machine
        if machine is None:
            return past
        with contextlib.suppress(MachineError):
            now = machine.nested_entries()
            past = past if now is None else (past or 0) + now
        return past

    # --- running ---------------------------------------------------------------------------------------

    def run(self, case: Case, *, number: int | None = None) -> Run:
        """Run one case on the machine that is up. `number` is what its records call it; else it is counted.

        Raises MissingCapability (skip it), CaseError, or MachineError if the machine died or hung; the
        error's `run` then holds what had arrived. The next call starts a fresh machine.
        """
        return self._run(case, next(self._numbers) if number is None else number)

    def _run(self, case: Case, number: int) -> Run:
        try:
            compiled = compile_case(case, self.target, number=number)
            session = self._up(case.processors)
        except MachineError as error:  # while it booted
            error.run = failed_run(case, number, error)
            raise
        except VmxlabError as error:
            error.locate(case=case.name or f"case {number}")
            raise
        deadline = self._deadline(case.limits.seconds)
        self._live = None
        try:
            frame = encode_frame(compiled.units, self._frame)
            session.log.code(number, compiled.code)
            records = session.run_frame(frame.data, deadline)
        except MachineError as error:
            error.run = replace(crashed_run(error, case, number, session), compiled=compiled)
            self._down()
            raise
        except BaseException as error:
            self._down()  # in the middle of a conversation nobody knows where it stands
            if isinstance(error, VmxlabError):
                session.located(error).locate(case=case.name or f"case {number}")
            raise
        self._frame = frame
        self._idle()
        try:
            run = run_from_records(
                records,
                case,
                engine=session.machine.info.title(),
                log_path=session.log.path,
                compiled=compiled,
            )
            if run.number != number:
                raise ProtocolError(f"case {number} was sent, records of case {run.number} came back")
        except ProtocolError as error:
            raise session.located(error).locate(case=case.name or f"case {number}") from None
        return run

    def run_all(self, cases: Sequence[Case]) -> list[Run]:
        """Run every case, one after the other; a case that can't run has its verdict in its own run."""
        runs = []
        for case in cases:
            number = next(self._numbers)
            try:
                runs.append(self._run(case, number))
            except VmxlabError as error:
                runs.append(failed_run(case, number, error))
        return runs

    def run_image(self, cases: Sequence[Case], *, numbers: Sequence[int] | None = None) -> list[Run]:
        """Run all cases out of one image, booted afresh, without anything being sent to it.

        `numbers` are what their records call them; without, they are counted from 0.

        A case that kills the machine is a CRASH of its own; the image of those behind it is booted next.
        Where none can be booted any more, the rest is an ERROR each.
        """
        target = self.target
        runs: dict[int, Run] = {}
        waiting: dict[int, CompiledCase] = {}
        numbers = range(len(cases)) if numbers is None else numbers
        for case, number, result in zip(cases, numbers, _compile_each(cases, numbers, target), strict=True):
            if isinstance(result, CompiledCase):
                waiting[number] = result
            else:
                runs[number] = failed_run(case, number, result)
        while waiting:
            done = self._run_one_image(waiting)
            runs |= {number: replace(run, compiled=waiting[number]) for number, run in done.items()}
            waiting = {number: case for number, case in waiting.items() if number not in done}
        return [runs[number] for number in numbers]

    def _run_one_image(self, waiting: Mapping[int, CompiledCase]) -> dict[int, Run]:
        """Boot an image and read it until it ends or dies; at least one case is answered."""
        try:
            waiting, rom = _pack_what_fits(waiting)
        except ImageError as error:  # the first case alone is too large
            number, case = next(iter(waiting.items()))
            error.locate(case=case.case.name or f"case {number}")
            return {number: failed_run(case.case, number, error)}
        cases = {number: compiled.case for number, compiled in waiting.items()}
        try:
            session = self._open(rom, max(case.processors for case in cases.values()))
        except VmxlabError as error:
            return {number: failed_run(case, number, error) for number, case in cases.items()}
        try:
            for number, compiled in waiting.items():
                session.log.code(number, compiled.code)
            return ImageReader(session, cases, self._boot_deadline_s, self._deadline()).read()
        finally:
            self._down()

    # --- live ------------------------------------------------------------------------------------------

    def live(self, case: Case | None = None) -> LiveMachine:
        """A live machine on the machine that is up, set up as `case` says but not entered.

        It is lost when a case runs here, or another live machine begins. Without a case it is there on a
        processor without VMX, too. Raises as `run`, and InstructionFailed where the set-up fails.
        """
        from vmxlab.console.live.machine import LiveMachine

        return LiveMachine(self, case)

    def begin_live(self, link: LiveLink, processors: int) -> Session:
        """Give the machine to a live machine, with what another one has set up undone. For `LiveLink`."""
        session = self._up(processors)
        # Any case undoes it; this one does nothing else, and shows in the log where a live session begins.
        self._exchange(session, [script.case(next(self._numbers), "live")], self._deadline())
        self._live = link
        return session

    def is_live(self, link: LiveLink) -> bool:
        """Whether the machine is still this live machine's. For `LiveLink`."""
        return self._live is link

    def end_live(self, link: LiveLink) -> None:
        """Take the machine back. For `LiveLink`."""
        if self._live is link:
            self._live = None

    def live_exchange(
        self, number: int, units: Sequence[bytes], deadline_s: float | None, code: LoadedCode | None
    ) -> tuple[Session, list[Record]]:
        """Send a live script to the machine that is up, and give its records. For `LiveLink`.

        `code` is what L2 may execute in it, for the log.
        """
        assert self._session is not None and self._machine is not None
        self._machine.resume()
        if code is not None:
            self._session.log.code(number, code)
        units = [script.live(number), *units]
        return self._session, self._exchange(self._session, units, self._deadline(deadline_s))

    def _exchange(self, session: Session, units: Sequence[bytes], deadline_s: float) -> list[Record]:
        try:
            frame = encode_frame(units)
            records = session.run_frame(frame.data, deadline_s)
        except BaseException:
            self._down()
            raise
        self._frame = frame
        self._idle()
        return records

    # --- the machine -----------------------------------------------------------------------------------

    def session(self) -> Session:
        """The session of the machine that is up, at its prompt."""
        return self._up()

    def image_session(self, payload: bytes, processors: int = 1) -> Session:
        """Boot an image that waits with its cases (`pack_payload`): a session at its prompt."""
        return self._boot(pack_rom(load_monitor(), payload), processors)

    def _up(self, processors: int | None = None) -> Session:
        """A session on the machine that is up, if it has so many processors; else on one that is booted."""
        wanted = processors or self._processors
        if self._session is not None and self._machine is not None and self._processors == wanted:
            self._machine.resume()
            if self._machine.end().alive:
                return self._session
            self._down()
        return self._boot(pack_rom(load_monitor()), wanted)

    def _boot(self, rom: bytes, processors: int) -> Session:
        session = self._open(rom, processors)
        try:
            session.boot(self._boot_deadline_s)
        except BaseException as error:
            self._down()
            if isinstance(error, VmxlabError):
                session.located(error)
            raise
        self._learn(session)
        return session

    def _learn(self, session: Session) -> None:
        assert session.boot_record is not None
        self._has_vmx = session.has_vmx
        self._capabilities = session.capabilities
        self._width = session.boot_record.number("maxphyaddr")

    def _open(self, rom: bytes, processors: int = 1) -> Session:
        self._down()
        self._processors = processors
        log = SerialLog(self._log_dir)
        rom_path = log.path.with_suffix(".rom")
        try:
            _write_rom(rom_path, rom)
            self._machine = self._engine.open(
                rom_path, log_dir=self._log_dir, model=self._model, why=self._why, processors=processors
            )
            self._info = self._machine.info
            log.remark(f"engine: {self._info.title()}; {self._info.why}")
            self._session = Session(self._machine, log)
        except BaseException as error:
            log.close()
            self._down()
            if isinstance(error, VmxlabError):
                error.locate(engine=self._engine.name, log_path=log.path)
            raise
        finally:
            rom_path.unlink(missing_ok=True)
        return self._session

    def _deadline(self, own_s: float | None = None) -> float:
        """How long the machine may take for a case; `own_s` is the case's own limit."""
        return DEBUGGED_DEADLINE_S if self._debugged else own_s or self._case_deadline_s

    def _idle(self) -> None:
        """An emulator at its prompt costs a whole core: it sleeps until the next case."""
        if self._machine is not None and not self._debugged:
            self._machine.pause()

    def _down(self) -> None:
        self._entries_of_past_machines = self.nested_entries()
        session, self._session = self._session, None
        machine, self._machine = self._machine, None
        self._frame = self._live = None
        if machine is not None:
            machine.stop()
        if session is not None:
            session.log.close()

    def close(self) -> None:
        """Stop the machine; nothing of it stays behind but the logs in `log_dir`."""
        self._down()
        self._engine.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="vmxlab-")
    except OSError as error:
        raise log_error(Path(tempfile.gettempdir()), error) from error


def _pack_what_fits(waiting: Mapping[int, CompiledCase]) -> tuple[Mapping[int, CompiledCase], bytes]:
    """An image with all cases, or with the first half, or with the first half of these..."""
    while True:
        try:
            return waiting, pack_rom(load_monitor(), pack_payload([c.units for c in waiting.values()]))
        except ImageError:
            if len(waiting) == 1:
                raise
            waiting = dict(itertools.islice(waiting.items(), len(waiting) // 2))


def _compile_each(
    cases: Sequence[Case], numbers: Sequence[int], target: Target
) -> list[CompiledCase | VmxlabError]:
    """Their programs at once where all are good, as the assembler likes it; else each with its own error."""
    programs: Sequence[bytes | None] = [None] * len(cases)
    with contextlib.suppress(CaseError, ValueError):
        programs = assemble_programs(cases)
    results: list[CompiledCase | VmxlabError] = []
    for case, number, program in zip(cases, numbers, programs, strict=True):
        try:
            results.append(compile_case(case, target, number=number, program=program))
        except VmxlabError as error:
            results.append(error.locate(case=case.name or f"case {number}"))
    return results


def _write_rom(path: Path, rom: bytes) -> None:
    try:
        path.write_bytes(rom)
    except OSError as error:
        raise log_error(path, error) from error
