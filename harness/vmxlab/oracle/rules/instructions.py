"""Instructions that always exit, and those that exit by a control (SDM Vol. 3C, 26.1.2, 26.1.3 and 26.3).

The order of each function is that of 26.1.1: invalid opcode and privilege come first, then the exit, then
all other faults. That a control may be 1 is taken to say that the processor has the instruction it is for.
"""

from __future__ import annotations

from iced_x86 import Instruction, Mnemonic

from vmxlab.oracle.exits import instruction_exit
from vmxlab.oracle.processor import access, operands
from vmxlab.oracle.processor.arithmetic import Handler
from vmxlab.oracle.processor.state import (
    Mode,
    Processor,
    canonical,
    general_protection,
    need,
    undefined_opcode,
)
from vmxlab.oracle.rules import information
from vmxlab.oracle.values import NOTHING_KNOWN, CannotTell, Rule
from vmxlab.sdm.controls import PrimaryControls, SecondaryControls
from vmxlab.sdm.exit_reasons import ExitReason
from vmxlab.sdm.registers import CR0, CR4

_P, _S = PrimaryControls, SecondaryControls
_M = Mnemonic

ALWAYS = Rule("instructions that cause VM exits unconditionally", "Vol. 3C, 26.1.2")
PRIVILEGE_FIRST = Rule("faults based on privilege level go before VM exits", "Vol. 3C, 26.1.1")


def by_control(name: str) -> Rule:
    """The sentence about an instruction in 26.1.3."""
    return Rule(f"{name} exits by its control", f"Vol. 3C, 26.1.3, {name}")


def _cpuid(processor: Processor, instruction: Instruction) -> None:
    raise instruction_exit(ExitReason.CPUID, instruction.len, ALWAYS)


def _invd(processor: Processor, instruction: Instruction) -> None:
    processor.require_cpl0()
    raise instruction_exit(ExitReason.INVD, instruction.len, ALWAYS, PRIVILEGE_FIRST)


def _xsetbv(processor: Processor, instruction: Instruction) -> None:
    if not processor.cr4 & CR4.OSXSAVE:
        raise undefined_opcode("CR4.OSXSAVE is 0")
    processor.require_cpl0()
    raise instruction_exit(ExitReason.XSETBV, instruction.len, ALWAYS, PRIVILEGE_FIRST)


def _getsec(processor: Processor, instruction: Instruction) -> None:
    if not processor.cr4 & CR4.SMXE:
        raise undefined_opcode("CR4.SMXE is 0")
    raise instruction_exit(ExitReason.GETSEC, instruction.len, ALWAYS)


def _rsm(processor: Processor, instruction: Instruction) -> None:
    raise undefined_opcode("RSM outside SMM")


def _hlt(processor: Processor, instruction: Instruction) -> None:
    processor.require_cpl0()
    if processor.on(_P.HLT_EXITING):
        raise instruction_exit(ExitReason.HLT, instruction.len, by_control("HLT"), PRIVILEGE_FIRST)
    processor.halted = True


def _wbinvd(processor: Processor, instruction: Instruction) -> None:
    processor.require_cpl0()
    if processor.on(_S.WBINVD_EXITING):
        qualification = int(instruction.mnemonic == _M.WBNOINVD)
        raise instruction_exit(
            ExitReason.WBINVD, instruction.len, by_control("WBINVD"), qualification=qualification
        )


def _refuse_tsd(processor: Processor) -> None:
    if processor.cr4 & CR4.TSD and processor.cpl:
        raise general_protection("CR4.TSD is 1 and CPL is above 0")


def _rdtsc(processor: Processor, instruction: Instruction) -> None:
    _refuse_tsd(processor)
    if processor.on(_P.RDTSC_EXITING):
        raise instruction_exit(ExitReason.RDTSC, instruction.len, by_control("RDTSC"))
    _read_clock(processor, "RDTSC")


def _rdtscp(processor: Processor, instruction: Instruction) -> None:
    if not processor.on(_S.ENABLE_RDTSCP):
        raise undefined_opcode('"enable RDTSCP" is 0 (26.3)')
    _refuse_tsd(processor)
    if processor.on(_P.RDTSC_EXITING):
        raise instruction_exit(ExitReason.RDTSCP, instruction.len, by_control("RDTSCP"))
    _read_clock(processor, "RDTSCP")
    processor.set(1, NOTHING_KNOWN, 4)


def _read_clock(processor: Processor, name: str) -> None:
    processor.note(f"{name}: the value of the TSC")
    for index in (0, 2):
        processor.set(index, NOTHING_KNOWN, 4)


def _rdpmc(processor: Processor, instruction: Instruction) -> None:
    if not processor.cr4 & CR4.PCE and processor.cpl and processor.cr0 & CR0.PE:
        raise general_protection("CR4.PCE is 0 and CPL is above 0")
    if processor.on(_P.RDPMC_EXITING):
        raise instruction_exit(ExitReason.RDPMC, instruction.len, by_control("RDPMC"))
    raise CannotTell("RDPMC: which performance counters there are")


def _pause(processor: Processor, instruction: Instruction) -> None:
    if processor.on(_P.PAUSE_EXITING):
        raise instruction_exit(ExitReason.PAUSE, instruction.len, by_control("PAUSE"))
    if processor.on(_S.PAUSE_LOOP_EXITING) and not processor.cpl:
        raise CannotTell("PAUSE-loop exiting: it goes by time")


def _monitor(processor: Processor, instruction: Instruction) -> None:
    raise CannotTell("MONITOR and MWAIT: whether the processor has them is in CPUID")


def _invlpg(processor: Processor, instruction: Instruction) -> None:
    processor.require_cpl0()
    if processor.on(_P.INVLPG_EXITING):
        linear = operands.operand_linear(processor, instruction, 1, check=False)
        if not processor.segments[operands.segment_of(instruction)].usable and not processor.is_long:
            raise CannotTell("INVLPG with an unusable segment: its linear address is not architectural")
        raise instruction_exit(ExitReason.INVLPG, instruction.len, by_control("INVLPG"), qualification=linear)
    processor.cached.drop()


def _invpcid(processor: Processor, instruction: Instruction) -> None:
    if not processor.on(_S.ENABLE_INVPCID):
        raise undefined_opcode('"enable INVPCID" is 0 (26.3)')
    processor.require_cpl0()
    if processor.on(_P.INVLPG_EXITING):
        raise instruction_exit(
            ExitReason.INVPCID,
            instruction.len,
            by_control("INVPCID"),
            qualification=operands.displacement(processor, instruction),
            information=information.invalidation(processor, instruction),
        )
    _execute_invpcid(processor, instruction)


def _execute_invpcid(processor: Processor, instruction: Instruction) -> None:
    """INVPCID without an exit (Vol. 2A, INVPCID): the checks of its type and its descriptor."""
    linear = operands.operand_linear(processor, instruction, 16)
    descriptor = need(access.read_linear(processor, linear, 16), 16, "the descriptor of INVPCID")
    kind = operands.read_number(processor, instruction, 0, 8 if processor.is_long else 4)
    if kind > 3:
        raise general_protection("the type of INVPCID is above 3")
    if descriptor >> 12 & (1 << 52) - 1:
        raise general_protection("reserved bits of the INVPCID descriptor")
    if kind < 2 and descriptor & 0xFFF and not processor.cr4 & CR4.PCIDE:
        raise general_protection("INVPCID of a PCID, and CR4.PCIDE is 0")
    if kind == 0 and not canonical(descriptor >> 64, processor.cr4):
        raise general_protection("INVPCID of an address that is not canonical")
    processor.cached.drop()


def _random(processor: Processor, instruction: Instruction) -> None:
    is_seed = instruction.mnemonic == _M.RDSEED
    control = _S.RDSEED_EXITING if is_seed else _S.RDRAND_EXITING
    name = "RDSEED" if is_seed else "RDRAND"
    if not processor.capabilities.supports(control):
        raise CannotTell(f"{name}: whether the processor has it is in CPUID")
    if processor.on(control):
        raise instruction_exit(
            ExitReason.RDSEED if is_seed else ExitReason.RDRAND,
            instruction.len,
            by_control(name),
            information=information.random_number(processor, instruction),
        )
    processor.note(f"{name}: the number")
    operands.write(processor, instruction, 0, NOTHING_KNOWN)
    processor.set_flags(cf=None, of=False, sf=False, zf=False, af=False, pf=False)


def _wait(processor: Processor, instruction: Instruction) -> None:
    """UMWAIT and TPAUSE."""
    if not processor.on(_S.ENABLE_USER_WAIT_AND_PAUSE):
        raise undefined_opcode('"enable user wait and pause" is 0 (26.3)')
    _refuse_tsd(processor)
    if processor.on(_P.RDTSC_EXITING):
        is_umwait = instruction.mnemonic == _M.UMWAIT
        raise instruction_exit(
            ExitReason.UMWAIT if is_umwait else ExitReason.TPAUSE,
            instruction.len,
            by_control("UMWAIT" if is_umwait else "TPAUSE"),
            information=information.source_register(processor, instruction),
        )
    raise CannotTell("a wait: it goes by time")


def _undefined(processor: Processor, instruction: Instruction) -> None:
    """UD0, UD1, UD2 (Vol. 2B)."""
    raise undefined_opcode("UD2")


def refuse_real_mode(processor: Processor) -> None:
    """#UD outside protected mode and in compatibility mode: the VMX instructions (Vol. 3C, 31.3)."""
    if processor.mode in (Mode.REAL, Mode.COMPATIBILITY):
        raise undefined_opcode("VMX instructions are for protected and 64-bit mode")


HANDLERS: dict[int, Handler] = {
    _M.CPUID: _cpuid,
    _M.INVD: _invd,
    _M.XSETBV: _xsetbv,
    _M.GETSEC: _getsec,
    _M.RSM: _rsm,
    _M.HLT: _hlt,
    _M.WBINVD: _wbinvd,
    _M.WBNOINVD: _wbinvd,
    _M.RDTSC: _rdtsc,
    _M.RDTSCP: _rdtscp,
    _M.RDPMC: _rdpmc,
    _M.PAUSE: _pause,
    _M.MONITOR: _monitor,
    _M.MWAIT: _monitor,
    _M.INVLPG: _invlpg,
    _M.INVPCID: _invpcid,
    _M.RDRAND: _random,
    _M.RDSEED: _random,
    _M.UMWAIT: _wait,
    _M.TPAUSE: _wait,
    **dict.fromkeys((_M.UD0, _M.UD1, _M.UD2), _undefined),
}
