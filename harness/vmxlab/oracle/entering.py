"""VM entry and VM exit as loads and saves: from the VMCS into L2, and back (SDM Vol. 3C, 27.3 and 28.3)."""

from __future__ import annotations

from collections.abc import Mapping

from vmxlab.oracle.cached import Cached
from vmxlab.oracle.entry_checks import NotEntered, entry_checks, refuse_unknown_controls
from vmxlab.oracle.exits import VmExit
from vmxlab.oracle.memory import MachineMemory
from vmxlab.oracle.prediction import PredictedExit
from vmxlab.oracle.processor.state import (
    GUEST_SEGMENTS,
    UNUSABLE,
    Carried,
    Fault,
    Processor,
    Segment,
    segment_fields,
)
from vmxlab.oracle.rules.control_registers import load_pdptes
from vmxlab.oracle.values import NOTHING_KNOWN, UNDEFINED, Bits, CannotTell, Rule, Value, as_value
from vmxlab.oracle.vmcs import ModelVmcs
from vmxlab.sdm.controls import EntryControls, ExitControls, PinControls, SecondaryControls
from vmxlab.sdm.exit_reasons import ENTRY_FAILURE_BIT
from vmxlab.sdm.fields import Field
from vmxlab.sdm.msrs import Msr
from vmxlab.sdm.registers import (
    CR0,
    CR4,
    EFER,
    GENERAL_REGISTERS,
    RFLAGS,
    ActivityState,
    InterruptibilityState,
)

_U64 = (1 << 64) - 1
_RSP = 4
_SYSENTER = {
    Msr.IA32_SYSENTER_CS: Field.GUEST_IA32_SYSENTER_CS,
    Msr.IA32_SYSENTER_ESP: Field.GUEST_IA32_SYSENTER_ESP,
    Msr.IA32_SYSENTER_EIP: Field.GUEST_IA32_SYSENTER_EIP,
}
_CR0_OF_L1 = int(CR0.NW | CR0.CD)
"""Bits of CR0 that VM entry leaves as they are (27.3.2.1): the monitor has them 0 (guest/vmx/operation.c)."""
DR7_AFTER_EXIT = 0x400
UNMODIFIED = Rule("an entry failure writes exit reason and qualification alone", "Vol. 3C, 27.8")


def enter(
    vmcs: ModelVmcs,
    *,
    width: int,
    memory: MachineMemory,
    carried: Carried,
    cached: Cached,
    registers: list[Bits],
    current: int,
    valid: Mapping[Field, Bits],
) -> Processor | NotEntered:
    """What a VM entry makes of a VMCS: L2 ready to run, or how the entry fails. Raises CannotTell.

    `current`, `valid`: see `entry_checks`.
    """
    not_entered = entry_checks(vmcs, width=width, memory=memory, current=current, valid=valid)
    if not_entered is not None:
        return not_entered
    _refuse_unknown_state(vmcs)
    if not vmcs.secondary() & SecondaryControls.ENABLE_VPID:
        cached.drop()  # 29.4.3.1: entries and exits without VPIDs invalidate linear mappings
    return _load(vmcs, width, memory, carried, cached, registers)


def _refuse_unknown_state(vmcs: ModelVmcs) -> None:
    refuse_unknown_controls(vmcs)
    for field, what in (
        (Field.GUEST_PENDING_DEBUG_EXCEPTIONS, "pending debug exceptions"),
        (Field.ENTRY_MSR_LOAD_COUNT, "a VM-entry MSR-load area"),
        (Field.EXIT_MSR_STORE_COUNT, "a VM-exit MSR-store area"),
        (Field.EXIT_MSR_LOAD_COUNT, "a VM-exit MSR-load area"),
    ):
        if vmcs.get(field):
            raise CannotTell(what)
    if vmcs.get(Field.GUEST_ACTIVITY_STATE) not in (ActivityState.ACTIVE, ActivityState.HLT):
        raise CannotTell("the shutdown or wait-for-SIPI state")


def _load(
    vmcs: ModelVmcs,
    width: int,
    memory: MachineMemory,
    carried: Carried,
    cached: Cached,
    registers: list[Bits],
) -> Processor:
    entry = vmcs.get(Field.ENTRY_CONTROLS)
    registers = list(registers)
    registers[_RSP] = vmcs.read(Field.GUEST_RSP)
    cr0, cr4 = vmcs.get(Field.GUEST_CR0), vmcs.get(Field.GUEST_CR4)
    processor = Processor(
        vmcs=vmcs,
        capabilities=vmcs.capabilities,
        width=width,
        memory=memory,
        carried=carried,
        pin=vmcs.get(Field.PIN_BASED_CONTROLS),
        primary=vmcs.get(Field.PRIMARY_PROCESSOR_BASED_CONTROLS),
        secondary=vmcs.secondary(),
        exit_controls=vmcs.get(Field.EXIT_CONTROLS),
        registers=registers,
        rip=vmcs.get(Field.GUEST_RIP),
        rflags=vmcs.read(Field.GUEST_RFLAGS),
        cr0=cr0 & ~_CR0_OF_L1 | int(CR0.ET),
        cr3=vmcs.get(Field.GUEST_CR3),
        cr4=cr4,
        efer=_efer(vmcs, entry, cr0),
        dr7=vmcs.read(Field.GUEST_DR7) if entry & EntryControls.LOAD_DEBUG_CONTROLS else NOTHING_KNOWN,
        debugctl=(
            vmcs.read(Field.GUEST_IA32_DEBUGCTL)
            if entry & EntryControls.LOAD_DEBUG_CONTROLS
            else NOTHING_KNOWN
        ),
        segments={name: _segment(vmcs, name) for name in GUEST_SEGMENTS},
        gdtr=(vmcs.get(Field.GUEST_GDTR_BASE), vmcs.get(Field.GUEST_GDTR_LIMIT)),
        idtr=(vmcs.get(Field.GUEST_IDTR_BASE), vmcs.get(Field.GUEST_IDTR_LIMIT)),
        sysenter={int(msr): vmcs.read(f) for msr, f in _SYSENTER.items()},
        interruptibility=vmcs.get(Field.GUEST_INTERRUPTIBILITY_STATE),
        cached=cached,
        halted=vmcs.get(Field.GUEST_ACTIVITY_STATE) == ActivityState.HLT,
    )
    if cr0 & CR0.PG and cr4 & CR4.PAE and not processor.efer & EFER.LMA:
        if processor.on(SecondaryControls.ENABLE_EPT):
            processor.pdptes = tuple(vmcs.get(Field[f"GUEST_PDPTE{i}"]) for i in range(4))
        else:
            _load_pdptes(processor)
    return processor


def _load_pdptes(processor: Processor) -> None:
    """27.3.2.4: without EPT from the memory that CR3 points to."""
    try:
        load_pdptes(processor, processor.cr3)
    except Fault:
        raise CannotTell("PDPTEs with reserved bits, which an earlier VM entry did not meet") from None


def _segment(vmcs: ModelVmcs, name: str) -> Segment:
    """A segment register; of an unusable one base and limit need not be known."""
    selector, base, limit, rights = segment_fields(name)
    access_rights = vmcs.read(rights)
    if access_rights.bit(UNUSABLE):
        return Segment(vmcs.get(selector), vmcs.read(base).value, vmcs.read(limit).value, access_rights.value)
    return Segment(vmcs.get(selector), vmcs.get(base), vmcs.get(limit), vmcs.get(rights))


def _efer(vmcs: ModelVmcs, entry: int, cr0: int) -> int:
    """IA32_EFER after VM entry (27.3.2.1)."""
    if entry & EntryControls.LOAD_IA32_EFER:
        return vmcs.get(Field.GUEST_IA32_EFER)
    if not entry & EntryControls.IA32E_MODE_GUEST and cr0 & CR0.PG:
        return 0  # of LME and LMA; L1 sets no other bit (guest/boot)
    return int(EFER.LME | EFER.LMA) if entry & EntryControls.IA32E_MODE_GUEST else int(EFER.LME)


# --- VM exit -----------------------------------------------------------------------------------------------


def leave(processor: Processor, exit_: VmExit, number: int, watch: tuple[Field, ...]) -> PredictedExit:
    """Save L2 into its VMCS and record the exit; the VMCS then holds what VMREAD will find."""
    vmcs = processor.vmcs
    _record(vmcs, exit_)
    _save(processor, exit_)
    if not processor.on(SecondaryControls.ENABLE_VPID):
        processor.cached.drop()
    watched = {field: _watched(vmcs, field) for field in watch}
    return PredictedExit(
        number=number,
        full_reason=int(exit_.reason),
        raw_qualification=exit_.qualification,
        instruction_length=exit_.length,
        raw_instruction_information=exit_.information,
        guest_linear_address=exit_.linear,
        guest_physical_address=_physical(vmcs, exit_),
        raw_interruption_information=exit_.interruption,
        interruption_error_code=exit_.error_code,
        raw_idt_vectoring_information=exit_.idt_vectoring,
        idt_vectoring_error_code=exit_.idt_vectoring_error_code,
        rip=vmcs.get(Field.GUEST_RIP),
        rflags=as_value(vmcs.read(Field.GUEST_RFLAGS), 64, "flags that are undefined or unknown"),
        registers={
            name: as_value(bits, 64, f"{name} is unknown")
            for name, bits in zip(GENERAL_REGISTERS, processor.registers, strict=True)
        },
        watched=watched,
        rules=exit_.rules,
        field_rules=exit_.field_rules,
    )


def failed_entry(
    vmcs: ModelVmcs, how: NotEntered, number: int, registers: list[Bits], watch: tuple[Field, ...]
) -> PredictedExit:
    """The record of a VM-entry failure: exit reason and qualification alone are written (27.8)."""
    assert how.reason is not None
    vmcs.put(Field.EXIT_REASON, how.reason | ENTRY_FAILURE_BIT)
    vmcs.put(Field.EXIT_QUALIFICATION, as_bits(how.qualification))
    unwritten = {
        name: as_value(vmcs.read(field), field.bits, "an entry failure leaves the field as it was")
        for name, field in _INFORMATION_FIELDS.items()
        if vmcs.has(field)
    }
    return PredictedExit(
        number=number,
        full_reason=how.reason | ENTRY_FAILURE_BIT,
        raw_qualification=how.qualification,
        rip=as_value(vmcs.read(Field.GUEST_RIP), 64, "RIP was not written"),
        rflags=as_value(vmcs.read(Field.GUEST_RFLAGS), 64, "RFLAGS was not written"),
        registers={
            name: as_value(vmcs.read(Field.GUEST_RSP) if name == "rsp" else bits, 64, f"{name} is unknown")
            for name, bits in zip(GENERAL_REGISTERS, registers, strict=True)
        },
        watched={field: _watched(vmcs, field) for field in watch},
        rules=how.rules,
        field_rules=dict.fromkeys(unwritten, (UNMODIFIED,)),
        **unwritten,
    )


_INFORMATION_FIELDS = {
    "instruction_length": Field.EXIT_INSTRUCTION_LENGTH,
    "raw_instruction_information": Field.EXIT_INSTRUCTION_INFORMATION,
    "guest_linear_address": Field.GUEST_LINEAR_ADDRESS,
    "guest_physical_address": Field.GUEST_PHYSICAL_ADDRESS,
    "raw_interruption_information": Field.EXIT_INTERRUPTION_INFORMATION,
    "interruption_error_code": Field.EXIT_INTERRUPTION_ERROR_CODE,
    "raw_idt_vectoring_information": Field.IDT_VECTORING_INFORMATION,
    "idt_vectoring_error_code": Field.IDT_VECTORING_ERROR_CODE,
}


def _watched(vmcs: ModelVmcs, field: Field) -> Value:
    """A field that the monitor reads after the exit: 0 where the processor does not have it."""
    from vmxlab.oracle.vmcs import exists

    try:
        if not exists(field, vmcs.capabilities):
            return 0
    except CannotTell as end:
        return end.unknown
    return as_value(vmcs.read(field), field.bits, f"{field.name} is not known")


def _physical(vmcs: ModelVmcs, exit_: VmExit) -> Value:
    if not vmcs.has(Field.GUEST_PHYSICAL_ADDRESS):
        return 0
    return exit_.physical


_RECORDED = (
    (Field.EXIT_QUALIFICATION, "qualification"),
    (Field.EXIT_INSTRUCTION_LENGTH, "length"),
    (Field.EXIT_INSTRUCTION_INFORMATION, "information"),
    (Field.GUEST_LINEAR_ADDRESS, "linear"),
    (Field.GUEST_PHYSICAL_ADDRESS, "physical"),
    (Field.EXIT_INTERRUPTION_INFORMATION, "interruption"),
    (Field.EXIT_INTERRUPTION_ERROR_CODE, "error_code"),
    (Field.IDT_VECTORING_INFORMATION, "idt_vectoring"),
    (Field.IDT_VECTORING_ERROR_CODE, "idt_vectoring_error_code"),
)


def _record(vmcs: ModelVmcs, exit_: VmExit) -> None:
    """The VM-exit information fields (28.2)."""
    vmcs.put(Field.EXIT_REASON, int(exit_.reason))
    for field, name in _RECORDED:
        vmcs.put(field, as_bits(getattr(exit_, name)))
    # 28.2: the valid bit of the VM-entry interruption-information field is cleared on every VM exit.
    old = vmcs.values.get(Field.ENTRY_INTERRUPTION_INFORMATION, NOTHING_KNOWN)
    vmcs.put(Field.ENTRY_INTERRUPTION_INFORMATION, old.with_bits(1 << 31, Bits(0, 1 << 31)))


def as_bits(value: Value) -> Bits:
    """A statement as bits: what is unknown or undefined has none that are known."""
    if isinstance(value, Bits):
        return value
    return Bits(value) if isinstance(value, int) else NOTHING_KNOWN


def _save(processor: Processor, exit_: VmExit) -> None:
    """The guest-state area (28.3)."""
    vmcs, put = processor.vmcs, processor.vmcs.put
    put(Field.GUEST_CR0, processor.cr0)
    put(Field.GUEST_CR3, processor.cr3)
    put(Field.GUEST_CR4, processor.cr4)
    put(Field.GUEST_RSP, processor.registers[_RSP])
    put(Field.GUEST_RIP, processor.rip if exit_.rip is None else exit_.rip)
    flags = processor.rflags
    if exit_.rf is UNDEFINED:
        flags = flags.with_bits(int(RFLAGS.RF), NOTHING_KNOWN)
    elif exit_.rf is not None:
        flags = flags.with_bits(int(RFLAGS.RF), Bits(int(RFLAGS.RF) if exit_.rf else 0, int(RFLAGS.RF)))
    put(Field.GUEST_RFLAGS, flags)
    if processor.on(ExitControls.SAVE_DEBUG_CONTROLS):
        put(Field.GUEST_DR7, processor.dr7)
        put(Field.GUEST_IA32_DEBUGCTL, processor.debugctl)
    if processor.on(ExitControls.SAVE_IA32_EFER):
        put(Field.GUEST_IA32_EFER, processor.efer)
    for control, field in (
        (ExitControls.SAVE_IA32_PAT, Field.GUEST_IA32_PAT),
        (ExitControls.SAVE_PREEMPTION_TIMER_VALUE, Field.VMX_PREEMPTION_TIMER_VALUE),
        (ExitControls.SAVE_IA32_PERF_GLOBAL_CTRL, Field.GUEST_IA32_PERF_GLOBAL_CTRL),
    ):
        if processor.on(control):
            put(field, NOTHING_KNOWN)
    for name in GUEST_SEGMENTS:
        _save_segment(vmcs, name, processor.segments[name])
    put(Field.GUEST_GDTR_BASE, processor.gdtr[0])
    put(Field.GUEST_GDTR_LIMIT, processor.gdtr[1])
    put(Field.GUEST_IDTR_BASE, processor.idtr[0])
    put(Field.GUEST_IDTR_LIMIT, processor.idtr[1])
    for msr, field in _SYSENTER.items():
        put(field, processor.sysenter[int(msr)])
    put(Field.GUEST_ACTIVITY_STATE, 1 if processor.halted else 0)
    put(Field.GUEST_INTERRUPTIBILITY_STATE, _interruptibility(processor))
    put(Field.GUEST_PENDING_DEBUG_EXCEPTIONS, 0)
    _save_pdptes(processor)
    if not vmcs.capabilities.misc.stores_efer_lma:
        return
    entry = vmcs.values[Field.ENTRY_CONTROLS]
    lma = int(EntryControls.IA32E_MODE_GUEST) if processor.efer & EFER.LMA else 0
    put(Field.ENTRY_CONTROLS, entry.with_bits(int(EntryControls.IA32E_MODE_GUEST), Bits(lma)))


def _save_pdptes(processor: Processor) -> None:
    """28.3.4: undefined without EPT or PAE paging."""
    saved = processor.pdptes if processor.on(SecondaryControls.ENABLE_EPT) else None
    for i in range(4):
        if processor.vmcs.has(Field[f"GUEST_PDPTE{i}"]):
            processor.vmcs.put(Field[f"GUEST_PDPTE{i}"], NOTHING_KNOWN if saved is None else saved[i])


def _interruptibility(processor: Processor) -> Bits:
    """28.3.4: with NMIs not virtual, bit 3 says of the processor's own blocking, which L1 may have left."""
    value = processor.interruptibility
    if processor.on(PinControls.VIRTUAL_NMIS) or value & InterruptibilityState.BLOCKING_BY_NMI:
        return Bits(value)
    return Bits(value)


def _save_segment(vmcs: ModelVmcs, name: str, segment: Segment) -> None:
    """28.3.2: of an unusable register base, limit and most access rights are undefined, with exceptions."""
    selector, base, limit, rights = segment_fields(name)
    vmcs.put(selector, segment.selector)
    if segment.usable:
        vmcs.put(base, segment.base)
        vmcs.put(limit, segment.limit)
        vmcs.put(rights, segment.rights & 0xF0FF)
        return
    known_base = {"cs": _U64, "fs": _U64, "gs": _U64, "ss": _U64 << 32, "ds": _U64 << 32, "es": _U64 << 32}
    vmcs.put(base, Bits(segment.base, known_base.get(name, 0) & _U64))
    vmcs.put(limit, Bits(segment.limit) if name == "cs" else NOTHING_KNOWN)
    known = _U64 & ~0xF0FF
    if name == "cs":
        known |= 0xE000  # L, D and G
    if name == "ss":
        known |= 0x60  # DPL
    vmcs.put(rights, Bits(segment.rights & (UNUSABLE | 0xF0FF), known))
