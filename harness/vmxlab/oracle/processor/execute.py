"""Running L2 from a VM entry to the exit that ends it, one instruction after the other."""

from __future__ import annotations

from iced_x86 import Code, Decoder, DecoderError, Instruction

from vmxlab.oracle.exits import VmExit
from vmxlab.oracle.processor import access, arithmetic, data, jumps
from vmxlab.oracle.processor.arithmetic import Handler
from vmxlab.oracle.processor.state import (
    Fault,
    Mode,
    Processor,
    canonical,
    general_protection,
    undefined_opcode,
)
from vmxlab.oracle.rules import (
    control_registers,
    debug_registers,
    descriptor_tables,
    exceptions,
    instructions,
    io_instructions,
    msrs,
    vmx_instructions,
)
from vmxlab.oracle.rules.windows import before_instruction, in_halt
from vmxlab.oracle.values import CannotTell, Rule
from vmxlab.sdm.controls import PinControls
from vmxlab.sdm.exit_reasons import ExitReason

MAX_INSTRUCTION_BYTES = 15
# Later ones go before earlier ones: MOV is looked at for debug and control registers first.
_HANDLERS: dict[int, Handler] = {
    **arithmetic.HANDLERS,
    **data.HANDLERS,
    **jumps.HANDLERS,
    **instructions.HANDLERS,
    **io_instructions.HANDLERS,
    **msrs.HANDLERS,
    **descriptor_tables.HANDLERS,
    **vmx_instructions.HANDLERS,
    **exceptions.HANDLERS,
    **control_registers.HANDLERS,
    **debug_registers.HANDLERS,
}


def run_until_exit(processor: Processor) -> VmExit:
    """The exit that ends this stay in VMX non-root operation. Raises CannotTell."""
    try:
        while True:
            before_instruction(processor)
            if processor.halted:
                in_halt(processor)
            before = _state(processor)
            step(processor)
            if _state(processor) == before:
                raise _endless(processor)
            processor.spend()
    except VmExit as exit_:
        return exit_


def _state(processor: Processor) -> tuple[object, ...]:
    """All that a jump to itself leaves as it is."""
    return (
        processor.rip,
        processor.memory.version,
        processor.rflags,
        processor.interruptibility,
        processor.cr0,
        processor.cr3,
        processor.cr4,
        processor.halted,
        *processor.registers,
    )


def _endless(processor: Processor) -> VmExit | CannotTell:
    """An instruction that jumps to itself for ever: the VMX-preemption timer alone can end it."""
    if not processor.on(PinControls.ACTIVATE_PREEMPTION_TIMER):
        return CannotTell("an endless loop, and no timer")
    rule = Rule("the VMX-preemption timer exits when it has counted down to 0", "Vol. 3C, 26.5.1")
    return VmExit(ExitReason.PREEMPTION_TIMER, (rule,))


def step(processor: Processor) -> None:
    """One instruction, or the event that it raises. Raises VmExit, CannotTell."""
    processor.keep_progress()
    processor.next_rip = processor.rip
    processor.blocks_next = False
    length = 0
    try:
        instruction = fetch_instruction(processor)
        length = instruction.len
        handler = _HANDLERS.get(instruction.mnemonic)
        if handler is None:
            raise CannotTell(f"what the instruction at {processor.rip:#x} ({instruction}) does")
        processor.next_rip = processor.rip + length & (
            (1 << 64) - 1 if processor.mode is Mode.LONG else 0xFFFF_FFFF
        )
        processor.keeps_rf = False
        handler(processor, instruction)
        if not processor.keeps_rf:
            processor.set_flags(rf=False)
    except Fault as fault:
        processor.undo()
        exceptions.raise_event(processor, fault, length)
    except VmExit:
        processor.undo()
        raise
    processor.rip = processor.next_rip
    if not processor.blocks_next:
        processor.interruptibility &= ~3


def fetch_instruction(processor: Processor) -> Instruction:
    """The instruction at RIP; fetched once while nothing changes that could make it another."""
    cs = processor.segments["cs"]
    key = (
        processor.rip,
        processor.memory.version,
        processor.cr0,
        processor.cr3,
        processor.cr4,
        processor.efer,
        processor.cpl,
        cs.base,
        cs.limit,
        cs.rights,
    )
    found = processor.fetched.get(key)
    if found is None:
        found = _fetch(processor)
        if processor.memory.version == key[1]:
            processor.fetched[key] = found
    return found


def _fetch(processor: Processor) -> Instruction:
    """The instruction at RIP: its bytes are fetched one page after the other, as far as it needs them."""
    start = _code_address(processor, processor.rip)
    first = min(MAX_INSTRUCTION_BYTES, 4096 - start % 4096)
    code = access.fetch(processor, start, first)
    decoder = Decoder(processor.bitness, code, ip=processor.rip)
    instruction = decoder.decode()
    if decoder.last_error == DecoderError.NO_MORE_BYTES and len(code) < first:
        raise CannotTell(f"the code at linear address {start + len(code):#x}")
    if decoder.last_error == DecoderError.NO_MORE_BYTES and first < MAX_INSTRUCTION_BYTES:
        rest = _code_address(processor, processor.rip + first)
        code += access.fetch(processor, rest, MAX_INSTRUCTION_BYTES - first)
        decoder = Decoder(processor.bitness, code, ip=processor.rip)
        instruction = decoder.decode()
    if instruction.code == Code.INVALID:
        if decoder.last_error == DecoderError.NO_MORE_BYTES:
            raise general_protection("an instruction of more than 15 bytes")
        raise undefined_opcode("no instruction")
    if processor.mode is not Mode.LONG:
        access.check_code_limit(processor, processor.rip + instruction.len - 1)
    return instruction


def _code_address(processor: Processor, rip: int) -> int:
    if processor.mode is Mode.LONG:
        if not canonical(rip, processor.cr4):
            raise general_protection("RIP is not canonical")
        return rip
    access.check_code_limit(processor, rip)
    return processor.segments["cs"].base + rip & 0xFFFF_FFFF
