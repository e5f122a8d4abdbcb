"""From a case to a script: everything that VMX will see is laid out here, as final bytes.

Where the SDM wants an address in the VMCS, the structure's place comes from `vmxlab.image.layout`; where it
wants a control, from the capability MSRs of the target. What the case says in `fields` and `raw_controls`
replaces the baseline's value; it is never adjusted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from vmxlab.cases import steps as s
from vmxlab.cases.case import Case
from vmxlab.cases.controls import compute_controls
from vmxlab.cases.guest_state import guest_efer, guest_memory, guest_state
from vmxlab.cases.memory import L2_MEMORY, L2_MEMORY_BYTES, PROGRAM, PROGRAM_SYMBOLS, guest_ept
from vmxlab.cases.program import Mode, Request, assemble_many
from vmxlab.cases.reactions import Reaction, SetMemory, WriteApic
from vmxlab.cases.second_processor import HALT, SECOND_PROGRAM_SYMBOLS
from vmxlab.cases.sweep import Sweep, Swept
from vmxlab.errors import CaseError, OutOfRange, OverlappingPages
from vmxlab.image import layout, script
from vmxlab.image.areas import areas_of
from vmxlab.image.code import LoadedCode
from vmxlab.image.host_state import host_efer, host_state
from vmxlab.image.monitor import Monitor
from vmxlab.image.protocol import Op
from vmxlab.sdm.apic import APIC_DEFAULT_BASE
from vmxlab.sdm.controls import (
    ControlSet,
    EntryControls,
    ExitControls,
    PinControls,
    PrimaryControls,
    SecondaryControls,
)
from vmxlab.sdm.fields import Field, FieldType
from vmxlab.structures import Capabilities, Ept, EPTPointer, IOBitmap, MsrBitmap, VmxRegion
from vmxlab.structures.region import SHADOW_INDICATOR

PREEMPTION_TIMER_MAX = 0xFFFF_FFFF
_L2_ZEROS = bytes(L2_MEMORY_BYTES)


@dataclass(frozen=True, slots=True)
class Target:
    """What a case is compiled for: a processor's capabilities, a monitor, and how long L2 may run."""

    capabilities: Capabilities
    monitor: Monitor
    l2_tsc: int
    physical_address_width: int = 52
    """MAXPHYADDR."""


@dataclass(frozen=True, slots=True)
class CompiledCase:
    """A case as the monitor gets it, and what went into it."""

    case: Case
    units: tuple[bytes, ...]
    """The script, in pieces (`vmxlab.image.frames.Units`)."""
    controls: Mapping[ControlSet, int]
    fields: Mapping[Field, int]
    """All VMWRITEs, in order."""
    eptp: int | None
    target: Target
    contents: tuple[tuple[int, bytes], ...]
    """The machine's memory when the case starts, by its addresses; later ones lie over earlier ones. A region
    that the monitor gives the processor's revision identifier has it here, too."""
    code: LoadedCode
    """What L2 may execute of it."""


def ept_tables(ept: Ept) -> list[tuple[int, bytes]]:
    """The EPT's paging structures, each with its address. OutOfRange for more than there is room for."""
    tables = ept.tables(layout.EPT_TABLES)
    if len(tables) > layout.EPT_TABLES_MAX:
        raise OutOfRange(
            "number of EPT paging structures", len(tables), f"at most {layout.EPT_TABLES_MAX:#x} pages"
        )
    return tables


def compile_cases(cases: Sequence[Case], target: Target, *, first_number: int = 0) -> list[CompiledCase]:
    """Compile cases in one go: their programs share calls of the assembler.

    Raises CaseError (ProgramError, OverlappingPages, ...) and MissingCapability.
    """
    programs = assemble_programs(cases)
    return [
        compile_case(case, target, number=first_number + i, program=program)
        for i, (case, program) in enumerate(zip(cases, programs, strict=True))
    ]


def assemble_programs(cases: Sequence[Case]) -> list[bytes]:
    """The machine code of each case's program."""
    texts = {
        i: Request(case.program, case.mode, PROGRAM, PROGRAM_SYMBOLS)
        for i, case in enumerate(cases)
        if isinstance(case.program, str)
    }
    code = dict(zip(texts, (p.code for p in assemble_many(list(texts.values()))), strict=True))
    return [code[i] if i in code else bytes(case.program) for i, case in enumerate(cases)]  # type: ignore[arg-type]


def compile_case(
    case: Case,
    target: Target,
    *,
    number: int = 0,
    program: bytes | None = None,
    report_code: bool = False,
) -> CompiledCase:
    """Compile one case; `number` identifies it in the records.

    `report_code`: the monitor says the program's bytes when the case starts (`vmxlab.image.code`), for an
    image that boots where no harness writes them into the log.
    """
    if program is None:
        (program,) = assemble_programs([case])
    return _Compiler(case, target, number, program, report_code).compile()


def _second_program(case: Case) -> bytes | None:
    """The machine code of what the second processor does."""
    if case.second_program is None or isinstance(case.second_program, bytes):
        return case.second_program
    (program,) = assemble_many(
        [Request(case.second_program, Mode.PROTECTED, layout.SECOND_PROGRAM, SECOND_PROGRAM_SYMBOLS)]
    )
    return program.code


def _require_own(address: int, length: int, what: str) -> None:
    """A case writes to its own memory only: not over the monitor, nor over the cases still to come."""
    if not layout.CASE_BASE <= address <= layout.CASE_LIMIT - length:
        raise OutOfRange(
            f"address of {what} ({length:#x} bytes)",
            address,
            f"a case owns {layout.CASE_BASE:#x} to {layout.CASE_LIMIT - 1:#x}",
        )


class _Pages:
    """The machine's memory as a case fills it; two things at one place are refused."""

    def __init__(self) -> None:
        self._claims: list[tuple[int, int, str]] = []
        self._contents: list[tuple[int, bytes]] = []

    def claim(self, address: int, length: int, what: str) -> None:
        """Take a range. Raises OutOfRange outside of what a case owns, OverlappingPages where it is taken."""
        _require_own(address, length, what)
        for start, size, name in self._claims:
            if address < start + size and start < address + length:
                raise OverlappingPages(
                    f"{what} at {address:#x} ({length:#x} bytes) overlaps "
                    f"{name} at {start:#x} ({size:#x} bytes)",
                    advice=f"machine addresses from {layout.FREE_PAGES:#x} on are free",
                )
        self._claims.append((address, length, what))

    def add(self, address: int, content: bytes, what: str) -> None:
        """Take a range and say what it holds."""
        self.claim(address, len(content), what)
        self._contents.append((address, content))

    def contents(self) -> tuple[tuple[int, bytes], ...]:
        """What lies where."""
        return tuple(self._contents)

    def units(self, *, zeroed: bool = False) -> list[bytes]:
        """The operations that fill it; `zeroed` memory needs no zeros."""
        return [unit for at, content in self._contents for unit in script.page(at, content, zeroed=zeroed)]


@dataclass(slots=True)
class _Compiler:
    case: Case
    target: Target
    number: int
    program: bytes
    report_code: bool = False
    pages: _Pages = field(default_factory=_Pages)
    regions: list[bytes] = field(default_factory=list)
    revisions: list[tuple[int, bytes]] = field(default_factory=list)
    l2_parts: _Pages = field(default_factory=_Pages)
    eptp: int | None = None

    def compile(self) -> CompiledCase:
        case = self.case
        controls = compute_controls(case, self.target.capabilities)
        secondary = controls.get(ControlSet.SECONDARY, 0) if self._secondary_active(controls) else 0
        with_ept = bool(secondary & SecondaryControls.ENABLE_EPT)
        self._lay_out_regions()
        structure_fields = self._lay_out_structures(controls, secondary, with_ept=with_ept)
        l2 = self._l2_memory(with_ept=with_ept)
        fields = self._fields(controls, structure_fields, with_ept=with_ept)
        self.pages.claim(L2_MEMORY, L2_MEMORY_BYTES, "L2's memory")
        for address, content in case.memory.items():
            self.pages.add(address, bytes(content), f"the case's memory at {address:#x}")
        code = LoadedCode.of(self.program, case.data, fields)
        second = _second_program(case)
        if second is not None:
            self.pages.add(layout.SECOND_PROGRAM, second + HALT, "the second processor's program")
        units = [
            script.case(self.number, case.name),
            *self.pages.units(),
            *self.regions,
            *l2,
            *self._code_report(code),
            script.registers({k: v for k, v in case.registers.items() if k != "rsp"}),
            script.defaults(),
            *(self._reaction(reaction) for reaction in case.reactions),
            script.watch(tuple(case.watch)),
        ]
        if self._may_use_apic():
            units.append(script.op(Op.APIC_USED))
        if second is not None:
            units.append(script.with_u32(Op.SECOND_PROCESSOR, layout.SECOND_PROGRAM))
        for step in case.steps:
            units += self._step(step, fields)
        units.append(script.op(Op.END))
        contents = (
            *self.pages.contents(),
            *self.revisions,
            (L2_MEMORY, _L2_ZEROS),
            *self.l2_parts.contents(),
        )
        return CompiledCase(case, tuple(units), controls, fields, self.eptp, self.target, contents, code)

    def _secondary_active(self, controls: Mapping[ControlSet, int]) -> bool:
        return bool(controls[ControlSet.PRIMARY] & PrimaryControls.ACTIVATE_SECONDARY_CONTROLS)

    # --- memory -------------------------------------------------------------------------------------------

    def _lay_out_regions(self) -> None:
        case = self.case
        self._region(layout.VMXON_REGION, case.vmxon_region, "VMXON region")
        self._region(layout.VMCS_REGION, case.vmcs_region, "VMCS region")
        if case.shadow_vmcs:
            self._region(layout.SHADOW_VMCS_REGION, None, "shadow VMCS region", SHADOW_INDICATOR)

    def _region(self, address: int, region: VmxRegion | None, what: str, flags: int = 0) -> None:
        self.pages.add(address, VmxRegion.uninit().to_bytes() if region is None else region.to_bytes(), what)
        if region is None:
            self.regions.append(script.revision(address, flags))
            revision = self.target.capabilities.basic.revision_id | flags
            self.revisions.append((address, revision.to_bytes(4, "little")))

    def _lay_out_structures(
        self, controls: Mapping[ControlSet, int], secondary: int, *, with_ept: bool
    ) -> dict[Field, int]:
        case = self.case
        fields: dict[Field, int] = {}
        # A bitmap that is used and not given is all zeros: not what another case left in its place.
        primary = controls[ControlSet.PRIMARY]
        io_bitmap, msr_bitmap = case.io_bitmap, case.msr_bitmap
        if io_bitmap is None and primary & PrimaryControls.USE_IO_BITMAPS:
            io_bitmap = IOBitmap()
        if msr_bitmap is None and primary & PrimaryControls.USE_MSR_BITMAPS:
            msr_bitmap = MsrBitmap()
        if io_bitmap is not None:
            self.pages.add(layout.IO_BITMAP_A, io_bitmap.a, "I/O bitmap A")
            self.pages.add(layout.IO_BITMAP_B, io_bitmap.b, "I/O bitmap B")
            fields |= {Field.IO_BITMAP_A: layout.IO_BITMAP_A, Field.IO_BITMAP_B: layout.IO_BITMAP_B}
        if msr_bitmap is not None:
            self.pages.add(layout.MSR_BITMAP, msr_bitmap.to_bytes(), "MSR bitmap")
            fields[Field.MSR_BITMAP] = layout.MSR_BITMAP
        for bitmap, address, name in (
            (case.vmread_bitmap, layout.VMREAD_BITMAP, Field.VMREAD_BITMAP),
            (case.vmwrite_bitmap, layout.VMWRITE_BITMAP, Field.VMWRITE_BITMAP),
        ):
            if bitmap is not None or secondary & SecondaryControls.VMCS_SHADOWING:
                self.pages.add(address, bytes(4096) if bitmap is None else bitmap, name.name)
                fields[name] = address
        areas = areas_of(case, controls, secondary)
        for address, content, what in areas.memory:
            self.pages.add(address, content, what)
        fields |= areas.fields
        if with_ept:
            fields[Field.EPT_POINTER] = self._lay_out_ept()
        return fields

    def _lay_out_ept(self) -> int:
        ept = self.case.ept
        tables = _default_tables() if ept is None else ept_tables(ept)
        for address, content in tables:
            self.pages.add(address, content, "EPT paging structure")
        own = self.case.eptp
        if own is None:
            pointer = EPTPointer(address=layout.EPT_TABLES)
            self.eptp = pointer.bits
        else:
            self.eptp = own if isinstance(own, int) else own.bits
        return self.eptp

    def _l2_memory(self, *, with_ept: bool) -> list[bytes]:
        """L2's memory: zeros, then its tables, its program and the case's data, which may not overlap."""
        parts = self.l2_parts
        for gpa, content in guest_memory(self.case.mode, with_ept=with_ept).items():
            parts.add(L2_MEMORY + gpa, content, "L2's descriptor and page tables")
        if self.program:
            parts.add(L2_MEMORY + PROGRAM, self.program, "the guest program")
        for gpa, content in self.case.data.items():
            if content:
                parts.add(L2_MEMORY + gpa, bytes(content), f"data at L2 address {gpa:#x}")
        return [script.fill(L2_MEMORY, L2_MEMORY_BYTES), *parts.units(zeroed=True)]

    def _code_report(self, code: LoadedCode) -> list[bytes]:
        """The program's bytes only: those of the data would take long on a serial line."""
        if not (self.report_code and self.program):
            return []
        machine = L2_MEMORY + PROGRAM
        return [script.code(code.mode.bits, code.cs_base, PROGRAM, machine, len(self.program))]

    # --- the local APIC ------------------------------------------------------------------------------------

    def _may_use_apic(self) -> bool:
        """Whether the case, L2 or the second processor may send interrupts, or set up the APIC.

        L2 can if a paging structure, its own or EPT's, holds the APIC's address: whatever the case puts into
        memory is looked through for that. Too often costs a little time, too seldom the next case's truth.
        """
        if self.case.second_program is not None:
            return True
        if any(isinstance(step, s.ApicRead | s.ApicWrite) for step in self.case.steps):
            return True
        actions = [action for reaction in self.case.reactions for action in reaction.actions]
        if any(isinstance(action, WriteApic) for action in actions):
            return True
        contents = [content for _, content in self.pages.contents()]
        contents += [bytes(content) for content in self.case.data.values()]
        contents += [action.data for action in actions if isinstance(action, SetMemory)]
        contents += [step.data for step in self.case.steps if isinstance(step, s.Store)]
        return any(entry in content for content in contents for entry in _ENTRIES_OF_APIC)

    # --- fields -------------------------------------------------------------------------------------------

    def _fields(
        self, controls: Mapping[ControlSet, int], structures: Mapping[Field, int], *, with_ept: bool
    ) -> dict[Field, int]:
        case, capabilities = self.case, self.target.capabilities
        fields = {which.field: value for which, value in controls.items()}
        fields |= _CONTROL_FIELDS
        fields |= structures
        fields |= guest_state(case.mode, capabilities, with_ept=with_ept)
        fields |= host_state(self.target.monitor, capabilities)
        fields |= self._optional_fields(controls)
        if case.shadow_vmcs:
            fields[Field.VMCS_LINK_POINTER] = layout.SHADOW_VMCS_REGION
        if "rsp" in case.registers:
            fields[Field.GUEST_RSP] = case.registers["rsp"]
        return fields | dict(case.fields)

    def _optional_fields(self, controls: Mapping[ControlSet, int]) -> dict[Field, int]:
        """Fields that exist only with the control that uses them."""
        fields: dict[Field, int] = {}
        exit_, entry = controls[ControlSet.EXIT], controls[ControlSet.ENTRY]
        if entry & EntryControls.LOAD_IA32_EFER or exit_ & ExitControls.SAVE_IA32_EFER:
            fields[Field.GUEST_IA32_EFER] = guest_efer(self.case.mode)
        if exit_ & ExitControls.LOAD_IA32_EFER:
            fields[Field.HOST_IA32_EFER] = host_efer()
        if controls[ControlSet.PIN] & PinControls.ACTIVATE_PREEMPTION_TIMER:
            fields[Field.VMX_PREEMPTION_TIMER_VALUE] = self._timer()
        return fields

    def _timer(self) -> int:
        """The preemption timer counts down once in 2^MISC[4:0] TSC ticks (SDM Vol. 3C, 26.5.1)."""
        ticks = self.case.limits.l2_tsc or self.target.l2_tsc
        value = max(1, ticks // self.target.capabilities.misc.preemption_timer_tsc_ticks)
        if self.case.limits.l2_tsc is not None and value > PREEMPTION_TIMER_MAX:
            raise OutOfRange("Limits.l2_tsc", ticks, "the preemption timer has 32 bits")
        return min(value, PREEMPTION_TIMER_MAX)

    # --- reactions and steps ------------------------------------------------------------------------------

    def _reaction(self, reaction: Reaction) -> bytes:
        for action in reaction.actions:
            if isinstance(action, SetMemory):
                _require_own(action.address, len(action.data), "a reaction's write")
        return script.reaction(reaction, self.eptp)

    def _step(self, step: s.Step, fields: Mapping[Field, int]) -> list[bytes]:
        go_on = step.go_on
        match step:
            case s.Vmxon(region=region):
                return [self._region_step(Op.VMXON, region, layout.VMXON_REGION, go_on)]
            case s.Vmclear(region=region):
                return [self._region_step(Op.VMCLEAR, region, layout.VMCS_REGION, go_on)]
            case s.Vmptrld(region=region):
                return [self._region_step(Op.VMPTRLD, region, layout.VMCS_REGION, go_on)]
            case s.WriteVmcs():
                return script.vmwrites([(int(f), v) for f, v in fields.items()], go_on=go_on)
            case s.Vmwrite(field=field, value=value):
                return [b"".join(script.vmwrites([(int(field), value)], go_on=go_on))]
            case s.Vmread(field=field):
                return [script.with_u32(Op.VMREAD, int(field), go_on=go_on)]
            case s.Enter(resume=resume, report_vmcs=report_vmcs):
                most = self.case.limits.exits
                return [script.enter(resume=resume, max_exits=most, report_vmcs=report_vmcs, go_on=go_on)]
            case s.Invept(type=kind, eptp=eptp):
                return [script.with_u64(Op.INVEPT, kind, self._eptp_for(eptp), 0, go_on=go_on)]
            case s.Invvpid(type=kind, vpid=vpid, linear_address=address):
                return [script.with_u64(Op.INVVPID, kind, vpid, address, go_on=go_on)]
            case s.Rdmsr(msr=msr):
                return [script.with_u32(Op.RDMSR, msr, go_on=go_on)]
            case s.Wrmsr(msr=msr, value=value):
                return [script.wrmsr(msr, value, go_on=go_on)]
            case s.ApicRead(register=register):
                return [script.with_u32(Op.APIC_READ, register)]
            case s.ApicWrite(register=register, value=value):
                return [script.apic_write(register, value)]
            case s.SetCr0(value=value):
                return [script.with_u64(Op.CR0, value, go_on=go_on)]
            case s.SetCr4(value=value):
                return [script.with_u64(Op.CR4, value, go_on=go_on)]
            case s.Store(address=address, data=content):
                _require_own(address, len(content), "a Store step")
                return [script.data(address, content)]
            case s.ReportMemory(address=address, length=length):
                return [script.report_memory(address, length)]
            case s.Vmxoff():
                return [script.op(Op.VMXOFF, go_on=go_on)]
            case s.Vmptrst():
                return [script.op(Op.VMPTRST, go_on=go_on)]
            case s.Vmcall():
                return [script.op(Op.VMCALL, go_on=go_on)]
            case Sweep():
                return [self._sweep(step)]
        raise CaseError(f"{step!r} is no step the monitor knows")

    def _sweep(self, step: Sweep) -> bytes:
        """A sweep's exits come thick and fast: the monitor relies on the host-state area being its own."""
        own = [field for field in self.case.fields if field.type is FieldType.HOST_STATE]
        if own:
            raise CaseError(f"a case with a sweep can't change the host-state area: {own[0].name}")
        bits = {Swept.IO: layout.IO_BITMAP_A, Swept.MSR: layout.MSR_BITMAP}
        return script.sweep(step, bits[step.walk.bitmap] if step.walk else 0)

    def _region_step(self, code: Op, region: int | None, default: int, go_on: bool) -> bytes:
        return script.with_u64(code, default if region is None else region, go_on=go_on)

    def _eptp_for(self, eptp: int | None) -> int:
        chosen = self.eptp if eptp is None else eptp
        if chosen is None:
            raise CaseError("the case executes INVEPT without an EPTP, and runs without EPT")
        return chosen


# Bits 47:16 of an entry that maps the page, or the 2 MiB or 1 GiB around it.
_ENTRIES_OF_APIC = tuple(
    (APIC_DEFAULT_BASE >> shift << shift >> 16).to_bytes(4, "little") for shift in (12, 21, 30)
)


@lru_cache(maxsize=1)
def _default_tables() -> list[tuple[int, bytes]]:
    return guest_ept().tables(layout.EPT_TABLES)


_CONTROL_FIELDS: dict[Field, int] = {
    # Every exception exits: a fault in L2 is seen, with its vector and error code, not turned into a triple
    # fault. Mask and match 0 make that true for #PF too (SDM Vol. 3C, 26.2).
    Field.EXCEPTION_BITMAP: 0xFFFF_FFFF,
    Field.PAGE_FAULT_ERROR_CODE_MASK: 0,
    Field.PAGE_FAULT_ERROR_CODE_MATCH: 0,
    Field.CR3_TARGET_COUNT: 0,
    Field.EXIT_MSR_STORE_COUNT: 0,
    Field.EXIT_MSR_LOAD_COUNT: 0,
    Field.ENTRY_MSR_LOAD_COUNT: 0,
    Field.ENTRY_INTERRUPTION_INFORMATION: 0,
    Field.ENTRY_EXCEPTION_ERROR_CODE: 0,
    Field.ENTRY_INSTRUCTION_LENGTH: 0,
    Field.TSC_OFFSET: 0,
    Field.CR0_GUEST_HOST_MASK: 0,
    Field.CR4_GUEST_HOST_MASK: 0,
    Field.CR0_READ_SHADOW: 0,
    Field.CR4_READ_SHADOW: 0,
}
