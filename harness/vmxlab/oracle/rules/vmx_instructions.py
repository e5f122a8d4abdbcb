"""VMX instructions in L2 (SDM Vol. 3C, 26.1.2, 26.1.3, 26.5.6; 31.3)."""

from __future__ import annotations

from iced_x86 import Instruction, Mnemonic

from vmxlab.oracle.exits import instruction_exit
from vmxlab.oracle.processor import operands
from vmxlab.oracle.processor.arithmetic import Handler
from vmxlab.oracle.processor.state import Processor, need, undefined_opcode
from vmxlab.oracle.rules import information
from vmxlab.oracle.rules.instructions import ALWAYS, refuse_real_mode
from vmxlab.oracle.values import CannotTell, Rule
from vmxlab.sdm.controls import SecondaryControls
from vmxlab.sdm.exit_reasons import ExitReason
from vmxlab.sdm.fields import Field

_M = Mnemonic
_SHADOWING = Rule("VMREAD and VMWRITE exit but for VMCS shadowing", "Vol. 3C, 26.1.3, VMREAD")
_VM_FUNCTIONS = Rule("VM functions", "Vol. 3C, 26.5.6.2")

_PLAIN = {
    _M.VMCALL: ExitReason.VMCALL,
    _M.VMLAUNCH: ExitReason.VMLAUNCH,
    _M.VMRESUME: ExitReason.VMRESUME,
    _M.VMXOFF: ExitReason.VMXOFF,
}
_WITH_MEMORY = {
    _M.VMCLEAR: ExitReason.VMCLEAR,
    _M.VMPTRLD: ExitReason.VMPTRLD,
    _M.VMPTRST: ExitReason.VMPTRST,
    _M.VMXON: ExitReason.VMXON,
}
_INVALIDATIONS = {_M.INVEPT: ExitReason.INVEPT, _M.INVVPID: ExitReason.INVVPID}


def _plain(processor: Processor, instruction: Instruction) -> None:
    if instruction.mnemonic != _M.VMCALL:  # which exits in every mode (31.3, VMCALL)
        refuse_real_mode(processor)
    raise instruction_exit(_PLAIN[instruction.mnemonic], instruction.len, ALWAYS)


def _with_memory(processor: Processor, instruction: Instruction) -> None:
    refuse_real_mode(processor)
    raise instruction_exit(
        _WITH_MEMORY[instruction.mnemonic],
        instruction.len,
        ALWAYS,
        operands.displacement_rule(instruction),
        qualification=operands.displacement(processor, instruction),
        information=information.memory_operand(processor, instruction),
    )


def _invalidation(processor: Processor, instruction: Instruction) -> None:
    refuse_real_mode(processor)
    cap = processor.capabilities.ept_vpid
    if not (cap.invept if instruction.mnemonic == _M.INVEPT else cap.invvpid):
        raise undefined_opcode("the processor lacks it (IA32_VMX_EPT_VPID_CAP)")
    raise instruction_exit(
        _INVALIDATIONS[instruction.mnemonic],
        instruction.len,
        ALWAYS,
        operands.displacement_rule(instruction),
        qualification=operands.displacement(processor, instruction),
        information=information.invalidation(processor, instruction),
    )


def _field_access(processor: Processor, instruction: Instruction) -> None:
    """VMREAD (data, field) and VMWRITE (field, data)."""
    refuse_real_mode(processor)
    is_read = instruction.mnemonic == _M.VMREAD
    data, field = (0, 1) if is_read else (1, 0)
    if processor.on(SecondaryControls.VMCS_SHADOWING):
        encoding = need(
            operands.read(processor, instruction, field), 8 if processor.is_long else 4, "a VMCS field"
        )
        if not encoding >> 15 and not _bitmap_bit(processor, encoding, is_read=is_read):
            raise CannotTell("an access to the shadow VMCS")
    raise instruction_exit(
        ExitReason.VMREAD if is_read else ExitReason.VMWRITE,
        instruction.len,
        _SHADOWING,
        operands.displacement_rule(instruction),
        qualification=operands.displacement(processor, instruction),
        information=information.field_access(processor, instruction, data, field),
    )


def _bitmap_bit(processor: Processor, encoding: int, *, is_read: bool) -> bool:
    where = processor.vmcs.get(Field.VMREAD_BITMAP if is_read else Field.VMWRITE_BITMAP)
    byte = processor.memory.read(where + encoding // 8, 1)
    if byte is None:
        raise CannotTell("a VMREAD or VMWRITE bitmap")
    return bool(byte >> encoding % 8 & 1)


def _vmfunc(processor: Processor, instruction: Instruction) -> None:
    """VMFUNC: #UD, an exit, or EPTP switching (26.5.6.2)."""
    if not processor.on(SecondaryControls.ENABLE_VM_FUNCTIONS):
        raise undefined_opcode('"enable VM functions" is 0')
    function = processor.number(0, 4)
    if function > 63:
        raise undefined_opcode("EAX is above 63")
    enabled = processor.vmcs.get(Field.VM_FUNCTION_CONTROLS) >> function & 1
    if not enabled or (function == 0 and processor.number(1, 4) >= 512):
        raise instruction_exit(ExitReason.VMFUNC, instruction.len, _VM_FUNCTIONS)
    raise CannotTell("a VM function that is carried out")


HANDLERS: dict[int, Handler] = {
    **dict.fromkeys(_PLAIN, _plain),
    **dict.fromkeys(_WITH_MEMORY, _with_memory),
    **dict.fromkeys(_INVALIDATIONS, _invalidation),
    **dict.fromkeys((_M.VMREAD, _M.VMWRITE), _field_access),
    _M.VMFUNC: _vmfunc,
}
