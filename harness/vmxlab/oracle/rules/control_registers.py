"""Accesses to control registers in L2 (SDM Vol. 3C, 25.6.6, 25.6.7, 26.1.3, 26.3; 28.2.1 with table 28-3)."""

from __future__ import annotations

from iced_x86 import Instruction, Mnemonic, Register

from vmxlab.oracle import translation
from vmxlab.oracle.accesses import PdptesLoaded, ReservedPdpte
from vmxlab.oracle.exits import VmExit, instruction_exit
from vmxlab.oracle.processor import access, operands
from vmxlab.oracle.processor.arithmetic import Handler
from vmxlab.oracle.processor.data import HANDLERS as DATA
from vmxlab.oracle.processor.paging import paging_state
from vmxlab.oracle.processor.state import Processor, general_protection, need, undefined_opcode
from vmxlab.oracle.values import UNDEFINED, Bits, CannotTell, Rule, Unknown, Value
from vmxlab.sdm.apic import ApicRegister
from vmxlab.sdm.controls import PrimaryControls, SecondaryControls
from vmxlab.sdm.exit_reasons import ExitReason
from vmxlab.sdm.fields import Field
from vmxlab.sdm.qualifications import CrAccessType
from vmxlab.sdm.registers import CR0, CR4, EFER, InterruptibilityState

_P = PrimaryControls
_TABLE = Rule("exit qualification of control-register accesses", "Vol. 3C, 28.2.1, table 28-3")
_BELOW_THRESHOLD = Rule("TPR virtualization exits below the TPR threshold", "Vol. 3C, 30.1.2 and 30.3")
_BLOCKING = int(InterruptibilityState.BLOCKING_BY_STI | InterruptibilityState.BLOCKING_BY_MOV_SS)
_MASKS = {
    0: (Field.CR0_GUEST_HOST_MASK, Field.CR0_READ_SHADOW),
    4: (Field.CR4_GUEST_HOST_MASK, Field.CR4_READ_SHADOW),
}
_CR3_TARGETS = (
    Field.CR3_TARGET_VALUE_0,
    Field.CR3_TARGET_VALUE_1,
    Field.CR3_TARGET_VALUE_2,
    Field.CR3_TARGET_VALUE_3,
)
_NUMBERS = {getattr(Register, f"CR{n}"): n for n in range(16)}

# Bits whose change neither starts nor ends paging or a mode, and needs nothing checked.
_CR0_FREE = int(CR0.MP | CR0.EM | CR0.TS | CR0.NE | CR0.WP | CR0.AM | CR0.NW | CR0.CD)
_CR4_FREE = int(
    CR4.VME | CR4.PVI | CR4.TSD | CR4.DE | CR4.MCE | CR4.PCE | CR4.OSFXSR | CR4.OSXMMEXCPT | CR4.UMIP
    | CR4.SMXE | CR4.FSGSBASE | CR4.OSXSAVE | CR4.SMAP
)  # fmt: skip
_CR4_FLUSHING = int(CR4.PSE | CR4.PGE | CR4.SMEP)


def _rule(text: str, instruction: str) -> Rule:
    return Rule(text, f"Vol. 3C, 26.1.3, {instruction}")


def _exit(
    instruction: Instruction,
    cr: int,
    kind: CrAccessType,
    rule: Rule,
    *,
    register: int = 0,
    memory: bool = False,
    source: int = 0,
    linear: Value = UNDEFINED,
) -> VmExit:
    return instruction_exit(
        ExitReason.CONTROL_REGISTER_ACCESS,
        instruction.len,
        rule,
        _TABLE,
        qualification=cr | kind << 4 | memory << 6 | register << 8 | source << 16,
        linear=linear,
    )


def _mask_and_shadow(processor: Processor, cr: int) -> tuple[int, int]:
    mask, shadow = _MASKS[cr]
    return processor.vmcs.get(mask), processor.vmcs.get(shadow)


def _move(processor: Processor, instruction: Instruction) -> None:
    """MOV to and from control registers; all other MOVs are elsewhere."""
    for operand in (0, 1):
        if operands.is_register(instruction, operand) and instruction.op_register(operand) in _NUMBERS:
            number = _NUMBERS[instruction.op_register(operand)]
            if number not in (0, 2, 3, 4, 8):
                raise undefined_opcode(f"there is no CR{number}")
            processor.require_cpl0()
            (_move_to if operand == 0 else _move_from)(processor, instruction, number)
            return
    DATA[Mnemonic.MOV](processor, instruction)


def _move_from(processor: Processor, instruction: Instruction, cr: int) -> None:
    register = operands.register_index(instruction.op_register(0))
    control = {3: _P.CR3_STORE_EXITING, 8: _P.CR8_STORE_EXITING}.get(cr)
    if control is not None and processor.on(control):
        rule = _rule(f"MOV from CR{cr} exits by its control", f"MOV from CR{cr}")
        raise _exit(instruction, cr, CrAccessType.MOV_FROM_CR, rule, register=register)
    processor.set(register, _read(processor, cr), 8 if processor.is_long else 4)


def _read(processor: Processor, cr: int) -> Bits:
    match cr:
        case 0 | 4:
            # 26.3: bits of the mask read as in the shadow.
            mask, shadow = _mask_and_shadow(processor, cr)
            own = processor.cr0 if cr == 0 else processor.cr4
            return Bits(own & ~mask | shadow & mask)
        case 2:
            return processor.carried.cr2
        case 3:
            return Bits(processor.cr3)
    if processor.on(_P.USE_TPR_SHADOW):
        return Bits(_vtpr(processor) >> 4 & 0xF)  # 30.3
    processor.note("MOV from CR8: the task priority")
    return Bits(0, ~0xF & (1 << 64) - 1)


def _move_to(processor: Processor, instruction: Instruction, cr: int) -> None:
    register = operands.register_index(instruction.op_register(1))
    size = 8 if processor.is_long else 4
    if cr == 2:
        processor.carried.cr2 = processor.get(register, size)
        return
    if cr == 8:
        _move_to_cr8(processor, instruction, register)
        return
    value = processor.number(register, size)
    if cr == 3:
        _move_to_cr3(processor, instruction, register, value)
        return
    mask, shadow = _mask_and_shadow(processor, cr)
    if (value ^ shadow) & mask & (1 << 8 * size) - 1:
        rule = _rule("exits unless the source matches the shadow in all bits of the mask", f"MOV to CR{cr}")
        raise _exit(instruction, cr, CrAccessType.MOV_TO_CR, rule, register=register)
    old = processor.cr0 if cr == 0 else processor.cr4
    new = old & mask | value & ~mask
    (_set_cr0 if cr == 0 else _set_cr4)(processor, new)


def _move_to_cr8(processor: Processor, instruction: Instruction, register: int) -> None:
    if processor.on(_P.CR8_LOAD_EXITING):
        rule = _rule("MOV to CR8 exits by its control", "MOV to CR8")
        raise _exit(instruction, 8, CrAccessType.MOV_TO_CR, rule, register=register)
    value = processor.number(register)
    if value >> 4:
        raise general_protection("reserved bits of CR8")
    if processor.on(_P.USE_TPR_SHADOW):
        _virtualize_task_priority(processor, value)


def _vtpr(processor: Processor) -> int:
    """The virtual task-priority register, on the virtual-APIC page (30.1.1)."""
    value = processor.memory.read(_where_vtpr(processor), 4)
    if value is None:
        raise CannotTell("VTPR on the virtual-APIC page")
    return value


def _where_vtpr(processor: Processor) -> int:
    return processor.vmcs.get(Field.VIRTUAL_APIC_ADDRESS) + ApicRegister.TASK_PRIORITY


def _virtualize_task_priority(processor: Processor, value: int) -> None:
    """MOV to CR8 with a TPR shadow: a trap-like exit where VTPR falls below the threshold (30.3, 30.1.2)."""
    processor.memory.write(_where_vtpr(processor), (value << 4).to_bytes(4, "little"))
    if value >= processor.vmcs.get(Field.TPR_THRESHOLD) & 0xF:
        return
    processor.interruptibility &= ~_BLOCKING
    raise VmExit(ExitReason.TPR_BELOW_THRESHOLD, (_BELOW_THRESHOLD,), rf=False, rip=processor.next_rip)


def _move_to_cr3(processor: Processor, instruction: Instruction, register: int, value: int) -> None:
    if processor.on(_P.CR3_LOAD_EXITING):
        count = processor.vmcs.get(Field.CR3_TARGET_COUNT)
        targets = [processor.vmcs.get(target) for target in _CR3_TARGETS[:count]]
        if value not in targets:
            rule = _rule("MOV to CR3 exits unless the source is a CR3-target value", "MOV to CR3")
            raise _exit(instruction, 3, CrAccessType.MOV_TO_CR, rule, register=register)
    if processor.cr4 & CR4.PCIDE:
        raise CannotTell("MOV to CR3 with process-context identifiers")
    if processor.is_long and value >> processor.width:
        raise general_protection("reserved bits of CR3 (Vol. 2B, MOV)")
    if processor.cr0 & CR0.PG and processor.cr4 & CR4.PAE and not processor.efer & EFER.LMA:
        load_pdptes(processor, value)
    processor.cr3 = value
    processor.cached.drop()


def load_pdptes(processor: Processor, cr3: int) -> None:
    """The PDPTE registers for PAE paging, from memory. Raises Fault (#GP(0)), CannotTell."""
    ending = translation.load_pdptes(paging_state(processor), cr3, processor.memory.read_table)
    match ending:
        case PdptesLoaded(pdptes=pdptes):
            processor.pdptes = pdptes
        case ReservedPdpte():
            raise general_protection("reserved bits of a PDPTE (Vol. 3A, 4.4.1)")
        case Unknown(why):
            raise CannotTell(why)
        case _:
            raise CannotTell("loading PDPTEs fails by EPT")


def _set_cr0(processor: Processor, new: int) -> None:
    """The checks of MOV to CR0 and LMSW (Vol. 2B, MOV; Vol. 3C, 24.8 and 26.3), and its effect."""
    old = processor.cr0
    new |= int(CR0.ET)
    if new >> 32 or (new & CR0.PG and not new & CR0.PE) or (new & CR0.NW and not new & CR0.CD):
        raise general_protection("CR0: a combination that can't be")
    free = int(CR0.PE | CR0.PG) if processor.on(SecondaryControls.UNRESTRICTED_GUEST) else 0
    fixed0 = processor.capabilities.cr0_fixed0 & ~free
    if fixed0 & ~new or new & ~processor.capabilities.cr0_fixed1 & _architectural_cr0():
        raise general_protection("CR0: a bit that is fixed in VMX operation")
    if (new ^ old) & ~_CR0_FREE & _architectural_cr0():
        raise CannotTell("MOV to CR0 that changes protection or paging")
    processor.cr0 = old & ~_CR0_FREE | new & _CR0_FREE


def _architectural_cr0() -> int:
    """Bits of CR0 that are not reserved: reserved ones are ignored below bit 32 (Vol. 3A, 2.5)."""
    return _CR0_FREE | int(CR0.PE | CR0.PG | CR0.ET)


def _set_cr4(processor: Processor, new: int) -> None:
    if not processor.capabilities.cr4.allows(new):
        raise general_protection("CR4: a bit that is fixed or reserved in VMX operation")
    changed = new ^ processor.cr4
    pae = processor.cr4 & CR4.PAE and processor.cr0 & CR0.PG and not processor.efer & EFER.LMA
    if changed & ~(_CR4_FREE | _CR4_FLUSHING) or (changed & _CR4_FLUSHING and pae):
        raise CannotTell("MOV to CR4 that changes paging")
    processor.cr4 = new
    processor.cached.drop()


# --- CLTS, LMSW, SMSW --------------------------------------------------------------------------------------


def _clts(processor: Processor, instruction: Instruction) -> None:
    processor.require_cpl0()
    mask, shadow = _mask_and_shadow(processor, 0)
    if mask & shadow & CR0.TS:
        rule = _rule("CLTS exits if CR0.TS is set in the mask and in the shadow", "CLTS")
        raise _exit(instruction, 0, CrAccessType.CLTS, rule)
    if not mask & CR0.TS:
        processor.cr0 &= ~int(CR0.TS)


def _lmsw(processor: Processor, instruction: Instruction) -> None:
    processor.require_cpl0()
    memory = operands.is_memory(instruction, 0)
    linear: Value = UNDEFINED
    if memory:
        linear = operands.operand_linear(processor, instruction, 2)
        assert isinstance(linear, int)
        source = need(access.read_linear(processor, linear, 2), 2, "the operand of LMSW")
    else:
        source = operands.read_number(processor, instruction, 0, 2)
    mask, shadow = _mask_and_shadow(processor, 0)
    others = int(CR0.MP | CR0.EM | CR0.TS)
    if mask & source & ~shadow & CR0.PE or (source ^ shadow) & mask & others:
        rule = _rule("LMSW exits if it would write a bit of the mask other than the shadow has it", "LMSW")
        raise _exit(instruction, 0, CrAccessType.LMSW, rule, memory=memory, source=source, linear=linear)
    writable = (others | source & CR0.PE) & ~mask  # it never clears CR0.PE
    _set_cr0(processor, processor.cr0 & ~writable | source & writable)


def _smsw(processor: Processor, instruction: Instruction) -> None:
    if processor.cr4 & CR4.UMIP and processor.cpl:
        raise general_protection("CR4.UMIP is 1 and CPL is above 0")
    value = _read(processor, 0)
    if operands.is_memory(instruction, 0):
        value = Bits(value.value & 0xFFFF)
    elif operands.operand_size(instruction, 0) == 4:
        value = Bits(value.value & 0xFFFF, 0xFFFF)  # Vol. 2B, SMSW: the upper half is undefined
    operands.write(processor, instruction, 0, value)


HANDLERS: dict[int, Handler] = {
    Mnemonic.MOV: _move,
    Mnemonic.CLTS: _clts,
    Mnemonic.LMSW: _lmsw,
    Mnemonic.SMSW: _smsw,
}
