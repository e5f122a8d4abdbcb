"""The live machine: what a person types at a Python prompt, or a test does step by step.

    with lab.live() as vm:
        vm.io_bitmap.set_intercept(0x60, True)
        exit = vm.enter("in al, 0x60")
        vm.registers["rax"] = 0x1C
        vm.skip()
        assert vm.resume().reason is ExitReason.HLT

Each call is one exchange with the monitor, a few milliseconds. Nothing is undone between them: VMX operation,
the VMCS, memory and L2's registers stay as they are until a case runs on the same machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar, overload

from vmxlab.cases.case import Case, as_field
from vmxlab.cases.memory import PROGRAM, PROGRAM_LIMIT, guest_ept
from vmxlab.cases.reactions import Resume, Skip, Stop
from vmxlab.cases.steps import STANDARD, Enter
from vmxlab.cases.sweep import Sweep
from vmxlab.console.live.controls import control_values
from vmxlab.console.live.entering import broken_rules
from vmxlab.console.live.instructions import Instructions
from vmxlab.console.live.link import LiveLink, last_outcome
from vmxlab.console.live.memory import GuestMemory, MachineMemory
from vmxlab.console.live.registers import LiveRegisters
from vmxlab.console.live.snapshot import Changes, Snapshot, SnapshotReader, diff
from vmxlab.console.live.stepping import StepBy, Stepped, step
from vmxlab.console.live.structures import LiveStructures, is_ept_table
from vmxlab.errors import (
    CaseError,
    EntryFailed,
    ExitLimit,
    InstructionFailed,
    LiveError,
    MissingCapability,
)
from vmxlab.image import script
from vmxlab.image.code import LoadedCode
from vmxlab.image.compiler import CompiledCase, assemble_programs, compile_case
from vmxlab.image.protocol import Op
from vmxlab.sdm.controls import PrimaryControls, SecondaryControls
from vmxlab.sdm.fields import Field
from vmxlab.sdm.flags import BitFlags
from vmxlab.sdm.registers import InveptType
from vmxlab.structures import Capabilities, Ept, IOBitmap, MsrBitmap

if TYPE_CHECKING:
    from pathlib import Path

    from vmxlab.console.lab import Lab
    from vmxlab.console.run import Exit, Run
    from vmxlab.engines.base import EngineInfo
    from vmxlab.oracle.entry import Broken

_T = TypeVar("_T")

Decision = Resume | Skip | Stop | type[Resume] | type[Skip] | type[Stop] | None
"""What a handler says: go on where L2 is, go on behind the instruction, or (None too) come back."""

Handler = Callable[["Exit", "LiveMachine"], Decision]
"""Called at each exit; it may do anything with the machine before it decides."""

EXIT_LIMIT = 1000
_HLT = b"\xf4"
_MISSING_VMX = ("VMX", "CPUID.1:ECX.VMX[5]")
_NO_VMCS = "there is no current VMCS, or no VMX operation: vmxon(), vmclear(), vmptrld(), or restart()"


class LiveMachine(Instructions):
    """A machine whose VMX instructions are called from Python, one by one. Made by `Lab.live`.

    It begins with the baseline set up, or what a case says over it: VMXON, VMCLEAR, VMPTRLD, the VMWRITEs;
    not entered. Both bitmaps are in use, and let all through that the case does not intercept; the EPT is
    `guest_ept()`. `io_bitmap`, `msr_bitmap` and `ept` are Python's structures: what is changed in them is
    on the machine before anything else happens there. On a processor without VMX there are `memory`, `rdmsr`,
    `wrmsr` and `cpuid`; the rest raises MissingCapability.

    Every method may raise MachineError (the machine died or hung) and, after it, LiveStateLost, until
    `restart`.
    """

    def __init__(self, lab: Lab, case: Case | None = None) -> None:
        self._lab = lab
        self._case = _live_case(case)
        self._given = case is not None
        self.link = LiveLink(lab)
        self.memory = MachineMemory(self._send)
        self.guest_memory = GuestMemory(self._send, lambda: self._structures.ept)
        self.restart()

    # --- life ------------------------------------------------------------------------------------------

    def restart(self) -> None:
        """Begin anew: everything as at the start, on a machine that is booted where none is up."""
        self._structures = LiveStructures()
        self._snapshots = SnapshotReader()
        self._compiled: CompiledCase | None = None
        self._code: LoadedCode | None = None
        Instructions.__init__(self)
        self._at_entry: Snapshot | None = None
        self._last_exit: Exit | None = None
        self._entries = 0
        self.registers = LiveRegisters(self.vmread, self.vmwrite)
        session = self.link.begin(self._case.processors)
        self._has_vmx = session.has_vmx
        if self._has_vmx:
            self._set_up()
        elif self._given:
            self._require_vmx()

    def _set_up(self) -> None:
        compiled = compile_case(_with_bitmaps(self._case, self.capabilities), self._lab.target)
        case = compiled.case
        # Its first unit begins a case, its last one ends the script.
        run = self.link.send(
            [*compiled.units[1:-1], script.snapshot(all_=True, go_on=True)], self._deadline_s
        )
        self._compiled = compiled
        self._code = compiled.code
        ept = None
        if compiled.eptp is not None:
            ept = guest_ept() if case.ept is None else case.ept
        self._structures = LiveStructures(case.io_bitmap, case.msr_bitmap, ept)
        self._structures.arrived(self._structures.changed())
        self.registers.take(case.registers)
        for outcome in run.outcomes:
            self._follow(outcome)
            if not outcome.ok and outcome.operation != "snapshot":
                raise self.link.located(InstructionFailed(outcome))
        self._at_entry = self._snapshots.take(run.records)

    def close(self) -> None:
        """Give the machine back: the lab's next case undoes what is set up. May be called again."""
        self.link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        """The engine, and how far VMX has got."""
        if not self.link.alive:
            state = "gone: restart()"
        elif not self._has_vmx:
            state = "no VMX"
        elif not self._in_vmx:
            state = "outside of VMX operation"
        elif self._current is None:
            state = "in VMX operation, no current VMCS"
        else:
            launched = "launched" if self.launched else "clear"
            state = f"VMCS {self._current:#x} {launched}"
        return f"<LiveMachine {self.info.title()}: {state}>"

    # --- what it is ------------------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        """Engine, version, processor model and why."""
        return self._lab.info

    @property
    def capabilities(self) -> Capabilities:
        """The capability MSRs. Raises MissingCapability where the processor has no VMX."""
        return self._lab.capabilities

    @property
    def has_vmx(self) -> bool:
        """Whether the processor has VMX."""
        return self._has_vmx

    @property
    def case(self) -> Case:
        """What it was set up with; the bitmaps and the EPT are its copies, not the machine's."""
        return self._case

    @property
    def log_path(self) -> Path | None:
        """The serial log."""
        return self._lab.log_path

    @property
    def launched(self) -> bool:
        """Whether the current VMCS is launched, so that VMRESUME enters it (SDM Vol. 3C, 25.1)."""
        return self._current in self._launched

    @property
    def entries(self) -> int:
        """How many VM entries have taken place."""
        return self._entries

    @property
    def last_exit(self) -> Exit | None:
        """The last exit."""
        return self._last_exit

    # --- structures ------------------------------------------------------------------------------------

    @property
    def io_bitmap(self) -> IOBitmap:
        """The I/O bitmaps. What is set in them, or assigned, holds from the next entry on."""
        return _there(self._structures.io_bitmap, PrimaryControls.USE_IO_BITMAPS, self)

    @io_bitmap.setter
    def io_bitmap(self, bitmap: IOBitmap) -> None:
        _there(self._structures.io_bitmap, PrimaryControls.USE_IO_BITMAPS, self)
        self._structures.io_bitmap = bitmap

    @property
    def msr_bitmap(self) -> MsrBitmap:
        """The MSR bitmap, in the same way."""
        return _there(self._structures.msr_bitmap, PrimaryControls.USE_MSR_BITMAPS, self)

    @msr_bitmap.setter
    def msr_bitmap(self, bitmap: MsrBitmap) -> None:
        _there(self._structures.msr_bitmap, PrimaryControls.USE_MSR_BITMAPS, self)
        self._structures.msr_bitmap = bitmap

    @property
    def ept(self) -> Ept:
        """The EPT paging structures; after a change INVEPT is executed, where the processor has it."""
        return _there(self._structures.ept, SecondaryControls.ENABLE_EPT, self)

    @ept.setter
    def ept(self, ept: Ept) -> None:
        _there(self._structures.ept, SecondaryControls.ENABLE_EPT, self)
        self._structures.ept = ept

    # --- state of L2 -----------------------------------------------------------------------------------

    @property
    def rip(self) -> int:
        """GUEST_RIP."""
        return self.vmread(Field.GUEST_RIP)

    @rip.setter
    def rip(self, value: int) -> None:
        self.vmwrite(Field.GUEST_RIP, value)

    @property
    def rsp(self) -> int:
        """GUEST_RSP."""
        return self.vmread(Field.GUEST_RSP)

    @rsp.setter
    def rsp(self, value: int) -> None:
        self.vmwrite(Field.GUEST_RSP, value)

    @property
    def rflags(self) -> int:
        """GUEST_RFLAGS."""
        return self.vmread(Field.GUEST_RFLAGS)

    @rflags.setter
    def rflags(self, value: int) -> None:
        self.vmwrite(Field.GUEST_RFLAGS, value)

    def enable(self, *controls: BitFlags) -> None:
        """Set controls: PrimaryControls.RDTSC_EXITING, ... and what activates their set.

        Raises MissingCapability for what the processor lacks; then nothing is changed.
        """
        for flag in controls:
            self.capabilities.require(flag)
        self.vmwrite_all(control_values(self, controls, on=True))

    def disable(self, *controls: BitFlags) -> None:
        """Clear controls. Raises MissingCapability for what the processor can't do without."""
        for flag in controls:
            self.capabilities.require_clear(flag)
        self.vmwrite_all(control_values(self, controls, on=False))

    def vmwrite_all(self, values: Mapping[Field, int]) -> None:
        """Write several fields in one exchange. InstructionFailed for the last that fails."""
        if not values:
            return
        self._require_vmx()
        run = self._send(script.vmwrites([(int(field), int(value)) for field, value in values.items()]))
        self._succeeded(last_outcome(run, "vmwrite"))

    # --- L2 --------------------------------------------------------------------------------------------

    def load(self, program: str | bytes) -> int:
        """Put a guest program, and a HLT behind it, where programs start; how many bytes it has.

        Text is assembled for the mode of the case. Raises ProgramError.
        """
        length, units = self._loading(program)
        self._send(units)
        return length

    def _loading(self, program: str | bytes) -> tuple[int, list[bytes]]:
        """How many bytes a program has, and the operations that load it with a HLT behind it."""
        self._require_vmx()
        (code,) = assemble_programs([Case(program=program, mode=self._case.mode)])
        length, room = len(code), PROGRAM_LIMIT - PROGRAM - len(code)
        code += _HLT[:room]
        parts = self.guest_memory.parts(PROGRAM, code)
        assert self._compiled is not None
        self._code = LoadedCode.of(code, self._case.data, self._compiled.fields)
        return length, [unit for part in parts for unit in part]

    @overload
    def enter(
        self,
        program: str | bytes | None = None,
        handler: None = None,
        *,
        limit: int = EXIT_LIMIT,
        resume: bool | None = None,
    ) -> Exit: ...
    @overload
    def enter(
        self,
        program: str | bytes | None = None,
        *,
        handler: Handler,
        limit: int = EXIT_LIMIT,
        resume: bool | None = None,
    ) -> list[Exit]: ...
    def enter(
        self,
        program: str | bytes | None = None,
        handler: Handler | None = None,
        *,
        limit: int = EXIT_LIMIT,
        resume: bool | None = None,
    ) -> Exit | list[Exit]:
        """Enter L2: its next exit, or with a `handler` all exits until that one stops.

        With a `program` it is loaded, and L2 starts there: GUEST_RIP, and nothing else, is set. VMLAUNCH or
        VMRESUME is taken by the launch state, unless `resume` says which. `limit`: after so many exits a
        handler that still goes on is an ExitLimit.

        Raises EntryFailed, with the broken rules of VM entry, where the entry fails, be it late.
        """
        self._require_vmx()
        before: list[bytes] = []
        if program is not None:
            _, before = self._loading(program)
            before += script.vmwrites([(int(Field.GUEST_RIP), PROGRAM)])
        if handler is None:
            return self.enter_once(before, resume=resume)[0]
        return list(self._handled(handler, before, limit, resume))

    def resume(self) -> Exit:
        """Enter L2 where it is: its next exit. As `enter()`."""
        return self.enter()

    def skip(self) -> None:
        """Go behind the instruction that exited, without entering.

        GUEST_RIP is advanced by the exit's instruction length, and blocking by STI and MOV SS ends.
        """
        self._require_vmx()
        self._send([script.op(Op.SKIP)])

    def step(self, n: int = 1, by: StepBy | None = None) -> Stepped:
        """Have L2 execute one instruction, or `n`; fewer where one of them exits by itself.

        By the monitor trap flag, where the processor has it and is not known to leave the exit out; else by
        RFLAGS.TF and the exit of #DB. `Stepped.by` says which, and `by` asks for one. Controls, exception
        bitmap and TF are put back. By TF, an instruction that stores or loads RFLAGS sees it set, and behind
        MOV SS and POP SS the step takes the next instruction, too (SDM Vol. 3A, 6.8.3).
        """
        self._require_vmx()
        return step(self, n, by)

    def _handled(
        self, handler: Handler, before: Sequence[bytes], limit: int, resume: bool | None
    ) -> Sequence[Exit]:
        exits: list[Exit] = []
        for number in itertools.count():
            try:
                exit = replace(self.enter_once(before, resume=resume)[0], number=number)
            except EntryFailed as error:
                error.exits = tuple(exits)
                raise
            exits.append(exit)
            resume = None
            decision = handler(exit, self)
            kind = decision if isinstance(decision, type) else type(decision)
            if decision is None or kind is Stop:
                return exits
            if kind not in (Resume, Skip):
                raise CaseError(
                    f"the handler decided {decision!r} at {exit}",
                    advice="Resume, Skip, Stop, or None, which stops",
                )
            if len(exits) == limit:
                raise self.link.located(ExitLimit(tuple(exits)))
            before = [script.op(Op.SKIP)] if kind is Skip else []
        raise AssertionError("unreachable")

    def enter_once(
        self,
        before: Sequence[bytes] = (),
        *,
        resume: bool | None = None,
        after: Sequence[bytes] = (),
        since: Snapshot | None = None,
    ) -> tuple[Exit, Snapshot | None]:
        """`enter()` with operations of the script `before` the entry, and others `after` it in any case.

        With the exit comes the snapshot that one of those after it takes. `changes` are to be those `since`
        this snapshot, where there is one, instead of what the operations before the entry left.
        """
        resume = self.launched if resume is None else resume
        watched = [as_field(field) for field in self._case.watch]
        units = [
            *before,
            *([script.watch(watched)] if watched else []),
            script.snapshot(all_=not self._snapshots.knows_all, go_on=True),
            script.enter(resume=resume, max_exits=1, go_on=bool(after)),
            *after,
        ]
        run = self._send(units, self._code)
        entry = next((i for i, record in enumerate(run.records) if record.kind == "exit"), len(run.records))
        at_entry = self._snapshots.take(run.records[:entry])
        self._at_entry = since or at_entry or self._at_entry
        if not run.exits:
            raise self._failed_entry(run)
        (exit,) = run.exits
        self._last_exit = exit
        self.registers.take(exit.registers)
        if exit.entry_failed:
            raise self.link.located(EntryFailed(None, exit, broken=self._broken_rules(run)))
        self._entries += 1
        if self._current is not None:
            self._launched.add(self._current)
        return exit, self._snapshots.take(run.records[entry:])

    def _read_or_none(self, address: int, length: int) -> bytes | None:
        """The machine's memory as it is, for the rules of VM entry that look into it."""
        try:
            return self.memory.read(address, length)
        except LiveError:
            return None

    def _broken_rules(self, run: Run) -> tuple[Broken, ...]:
        if self._compiled is None:
            return ()
        return broken_rules(run, self._compiled, self._current, self._read_or_none)

    def _failed_entry(self, run: Run) -> LiveError:
        failed = next(outcome for outcome in reversed(run.outcomes) if not outcome.ok)
        if failed.operation in ("vmlaunch", "vmresume"):
            return self.link.located(EntryFailed(failed, None, broken=self._broken_rules(run)))
        return self.link.located(InstructionFailed(failed, advice=_NO_VMCS))

    # --- snapshots -------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """The VMCS and L2's registers, all of them. Raises InstructionFailed without a current VMCS."""
        self._require_vmx()
        run = self._send([script.snapshot(all_=not self._snapshots.knows_all)])
        taken = self._snapshots.take(run.records)
        if taken is None:
            self._succeeded(last_outcome(run, "snapshot"), _NO_VMCS)
            raise AssertionError("a snapshot without a record")
        return taken

    @property
    def changes(self) -> Changes:
        """What changed in the VMCS and L2's registers since the last entry began; before one, the set-up."""
        now = self.snapshot()
        return Changes() if self._at_entry is None else diff(self._at_entry, now)

    # --- inside ----------------------------------------------------------------------------------------

    @property
    def _deadline_s(self) -> float | None:
        return self._case.limits.seconds

    def _send(self, units: Sequence[bytes], code: LoadedCode | None = None) -> Run:
        """Run a script, behind what brings the machine up to date with Python's structures."""
        changed = self._structures.changed()
        update = [*self._structures.units(changed), *self.registers.units()]
        if any(map(is_ept_table, changed)):
            update += self._invept()
        run = self.link.send([*update, *units], self._deadline_s, code)
        self._structures.arrived(changed)
        self.registers.arrived()
        return run

    def _invept(self) -> list[bytes]:
        """A changed EPT entry is seen for sure only after it (SDM Vol. 3C, 29.4.3.1)."""
        ept_vpid = self.capabilities.ept_vpid
        if not self._in_vmx or not ept_vpid.invept:
            return []
        if ept_vpid.invept_all_context:
            return [script.with_u64(Op.INVEPT, InveptType.GLOBAL, 0, 0, go_on=True)]
        return [script.with_u64(Op.INVEPT, InveptType.SINGLE_CONTEXT, self._eptp(), 0, go_on=True)]

    def _eptp(self) -> int:
        if self._compiled is None or self._compiled.eptp is None:
            raise CaseError("the live machine was set up without EPT")
        return self._compiled.eptp

    def _require_vmx(self) -> None:
        if not self._has_vmx:
            raise MissingCapability(*_MISSING_VMX).locate(engine=self.info.title())


def _live_case(case: Case | None) -> Case:
    """The case without its entry. Raises CaseError for what a live machine does in another way."""
    case = Case() if case is None else case
    if case.reactions:
        raise CaseError(
            "a live machine has no reactions", advice="enter(handler=...) calls a function at each exit"
        )
    steps = tuple(itertools.takewhile(lambda step: not isinstance(step, Enter | Sweep), case.steps))
    return replace(case, steps=steps or STANDARD[:-1])


def _with_bitmaps(case: Case, capabilities: Capabilities) -> Case:
    """The case with bitmaps that let everything through, where it gives none."""
    io_bitmap, msr_bitmap = case.io_bitmap, case.msr_bitmap
    if io_bitmap is None and capabilities.supports(PrimaryControls.USE_IO_BITMAPS):
        io_bitmap = IOBitmap.passthrough_all()
    if msr_bitmap is None and capabilities.supports(PrimaryControls.USE_MSR_BITMAPS):
        msr_bitmap = MsrBitmap.passthrough_all()
    return replace(case, io_bitmap=io_bitmap, msr_bitmap=msr_bitmap)


def _there(structure: _T | None, control: BitFlags, vm: LiveMachine) -> _T:
    if structure is None:
        vm.capabilities.require(control)
        raise CaseError(f"the live machine was set up without {control.describe()}")
    return structure
