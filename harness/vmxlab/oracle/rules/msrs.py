"""RDMSR and WRMSR in L2 (SDM Vol. 3C, 26.1.3; Vol. 2)."""

from __future__ import annotations

from iced_x86 import Instruction, Mnemonic

from vmxlab.oracle.exits import instruction_exit
from vmxlab.oracle.msr import MSR_EXIT_SECTION, MSR_QUALIFICATION, MSR_QUALIFICATION_SECTION, msr_exits
from vmxlab.oracle.processor.arithmetic import Handler
from vmxlab.oracle.processor.state import Processor, Segment, canonical, general_protection, need
from vmxlab.oracle.values import Bits, CannotTell, Rule
from vmxlab.sdm.controls import PrimaryControls
from vmxlab.sdm.exit_reasons import ExitReason
from vmxlab.sdm.fields import Field
from vmxlab.sdm.msrs import Msr
from vmxlab.structures import MsrBitmap

_EXIT = Rule("RDMSR and WRMSR exit by the MSR bitmaps", MSR_EXIT_SECTION)
_QUALIFICATION = Rule("exit qualification of RDMSR and WRMSR", MSR_QUALIFICATION_SECTION)
_RAX, _RCX, _RDX = 0, 1, 2

_SYSENTER = (Msr.IA32_SYSENTER_CS, Msr.IA32_SYSENTER_ESP, Msr.IA32_SYSENTER_EIP)
_BASES = {Msr.IA32_FS_BASE: "fs", Msr.IA32_GS_BASE: "gs"}
# On every processor with Intel 64 architecture, and of no effect on what is predicted; canonical addresses.
_PLAIN_ADDRESSES = (Msr.IA32_LSTAR, Msr.IA32_KERNEL_GS_BASE)
_PLAIN = (Msr.IA32_STAR,)


def _msr_bitmap(processor: Processor) -> MsrBitmap | None:
    if not processor.on(PrimaryControls.USE_MSR_BITMAPS):
        return None
    content = processor.memory.read_bytes(processor.vmcs.get(Field.MSR_BITMAP), 4096)
    if content is None:
        raise CannotTell("the MSR bitmaps")
    return MsrBitmap.from_bytes(content)


def _exit_or_number(processor: Processor, instruction: Instruction, *, write: bool) -> int:
    processor.require_cpl0()
    msr = processor.number(_RCX, 4)
    if msr_exits(processor.primary, _msr_bitmap(processor), msr, write):
        raise instruction_exit(
            ExitReason.WRMSR if write else ExitReason.RDMSR,
            instruction.len,
            _EXIT,
            _QUALIFICATION,
            qualification=MSR_QUALIFICATION,
        )
    return msr


def _rdmsr(processor: Processor, instruction: Instruction) -> None:
    msr = _exit_or_number(processor, instruction, write=False)
    value = _read(processor, msr)
    processor.set(_RAX, Bits(value.value & 0xFFFF_FFFF, value.known & 0xFFFF_FFFF), 4)
    processor.set(_RDX, Bits(value.value >> 32, value.known >> 32), 4)


def _read(processor: Processor, msr: int) -> Bits:
    if msr in _SYSENTER:
        return processor.sysenter[msr]
    if msr in _BASES:
        return Bits(processor.segments[_BASES[Msr(msr)]].base)
    if msr == Msr.IA32_EFER:
        return Bits(processor.efer)
    if msr in (*_PLAIN_ADDRESSES, *_PLAIN):
        known = processor.carried.msrs.get(msr)
        if known is None:
            processor.note(f"RDMSR: what {Msr(msr).name} holds")
        return known if known is not None else Bits(0, 0)
    raise CannotTell(f"what MSR {msr:#x} holds, or whether it is there")


def _wrmsr(processor: Processor, instruction: Instruction) -> None:
    msr = _exit_or_number(processor, instruction, write=True)
    value = need(processor.get(_RDX, 4), 4, "EDX") << 32 | need(processor.get(_RAX, 4), 4, "EAX")
    if msr in (*_BASES, *_PLAIN_ADDRESSES, Msr.IA32_SYSENTER_ESP, Msr.IA32_SYSENTER_EIP) and not canonical(
        value, processor.cr4
    ):
        raise general_protection("WRMSR of a non-canonical address (Vol. 2D, WRMSR)")
    if msr == Msr.IA32_SYSENTER_CS:
        processor.sysenter[msr] = Bits(value & 0xFFFF_FFFF, (1 << 64) - 1 if not value >> 32 else 0xFFFF_FFFF)
    elif msr in _SYSENTER:
        processor.sysenter[msr] = Bits(value)
    elif msr in _BASES:
        name = _BASES[Msr(msr)]
        old = processor.segments[name]
        processor.segments[name] = Segment(old.selector, value, old.limit, old.rights)
    elif msr in (*_PLAIN_ADDRESSES, *_PLAIN):
        processor.carried.msrs[msr] = Bits(value)
    else:
        raise CannotTell(f"what WRMSR of MSR {msr:#x} does")


HANDLERS: dict[int, Handler] = {Mnemonic.RDMSR: _rdmsr, Mnemonic.WRMSR: _wrmsr}
