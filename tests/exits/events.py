"""What tests of events share: interrupts that L1 or L2 sends itself, and handlers in L2 that say what came.

L2 reaches the local APIC of L1's processor at APIC, by the EPT of `with_apic`. Its handlers, made by
`handlers`, load what was pushed into registers and execute VMCALL, so that each delivery is an exit.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from vmxlab import Ept, Exit, ExitReason, Field, MemoryType, Mode, guest_ept
from vmxlab.cases.memory import IDT, PROGRAM
from vmxlab.cases.steps import STANDARD, ApicWrite, Enter, Step
from vmxlab.sdm.apic import (
    APIC_DEFAULT_BASE,
    ApicDeliveryMode,
    ApicDestinationShorthand,
    ApicRegister,
    InterruptCommandFlags,
    SpuriousVectorFlags,
)
from vmxlab.sdm.interruption import InterruptionInformation, InterruptionType

APIC = 0x20_0000
"""L2's address of the local APIC."""

NMI = ApicDeliveryMode.NMI.bits | InterruptCommandFlags.LEVEL_ASSERT
INIT = ApicDeliveryMode.INIT.bits | InterruptCommandFlags.LEVEL_ASSERT
"""Values of the interrupt command register. These two go to the processor that its upper half names."""

SWITCH_ON = ApicWrite(ApicRegister.SPURIOUS_INTERRUPT_VECTOR, SpuriousVectorFlags.SOFTWARE_ENABLE | 0xFF)
"""The APIC takes interrupts only after this (SDM Vol. 3A, 11.4.7.2); INIT, NMI and SIPI it always takes."""


def startup(vector: int) -> int:
    """The command of a SIPI."""
    return ApicDeliveryMode.START_UP.bits | InterruptCommandFlags.LEVEL_ASSERT | vector


def to_self(vector: int) -> int:
    """The command of an external interrupt to the processor that sends it."""
    return ApicDestinationShorthand.SELF.bits | InterruptCommandFlags.LEVEL_ASSERT | vector


def interrupt(vector: int) -> ApicWrite:
    """L1 sends itself an interrupt. As it runs with interrupts disabled, it stays pending."""
    return ApicWrite(ApicRegister.INTERRUPT_COMMAND_LOW, to_self(vector))


def sends(command: int) -> str:
    """Instructions by which L2 sends what the command says; the last one's length is LENGTH_OF_SEND."""
    low, high = APIC + ApicRegister.INTERRUPT_COMMAND_LOW, APIC + ApicRegister.INTERRUPT_COMMAND_HIGH
    return f"mov dword ptr [{high:#x}], 0; mov dword ptr [{low:#x}], {int(command):#x}"


LENGTH_OF_SENDING = 2 * 11
"""Bytes of what `sends` gives, in 64-bit mode."""


def with_apic() -> Ept:
    """L2's own memory, and the local APIC."""
    ept = guest_ept()
    ept.map(APIC, APIC_DEFAULT_BASE, memory_type=MemoryType.UC)
    return ept


def before_entry(*steps: Step) -> tuple[Step, ...]:
    """The standard sequence, with `steps` right before VMLAUNCH."""
    return (*STANDARD[:-1], *steps, Enter())


def injected(vector: int, type_: InterruptionType, *, error_code: bool = False) -> int:
    """VM-entry interruption information."""
    return InterruptionInformation(vector, type_, error_code_valid=error_code).bits


# --- handlers in L2 -----------------------------------------------------------------------------------------

_FIRST = 0x400
_STRIDE = 0x40
_FRAME = {
    # Registers that a handler loads with what lies at its stack pointer, lowest address first.
    Mode.LONG: ("r8", "r9", "r10", "r11", "r12", "r13"),
    Mode.PROTECTED: ("ebx", "ecx", "edx", "esi"),
    Mode.REAL: ("bx", "cx", "dx"),
}
_WIDTH = {Mode.LONG: 8, Mode.PROTECTED: 4, Mode.REAL: 2}
_RETURN = {Mode.LONG: "iretq", Mode.PROTECTED: "iretd", Mode.REAL: "iret"}
INTERRUPT_GATE, TRAP_GATE, TASK_GATE = 0x8E, 0x8F, 0x85


def handlers(
    program: str,
    vectors: Iterable[int],
    *,
    mode: Mode = Mode.LONG,
    gate: int = INTERRUPT_GATE,
    fields: dict[Field, int] | None = None,
    **case: object,
) -> dict[str, object]:
    """Arguments of a Case: `program`, with a handler for each vector; exceptions do not exit.

    A handler loads AL with its vector and registers with its stack (see `frame`), executes VMCALL, and then
    IRET to where the stack pointer is. `gate` is the type of its gate.
    """
    vectors = list(vectors)
    stack = {Mode.LONG: "rsp", Mode.PROTECTED: "esp", Mode.REAL: "bp"}[mode]
    loads = "; ".join(f"mov {name}, [{stack} + {i * _WIDTH[mode]}]" for i, name in enumerate(_FRAME[mode]))
    parts = [program]
    for number, vector in enumerate(vectors):
        prologue = "mov bp, sp; " if mode is Mode.REAL else ""
        parts += [
            f".org {_FIRST + number * _STRIDE:#x}",
            f"{prologue}mov al, {vector}; {loads}; vmcall; {_RETURN[mode]}",
        ]
    data = {at: content for i, v in enumerate(vectors) for at, content in [_gate(mode, v, _address(i), gate)]}
    more = dict(case.pop("data", {}))  # type: ignore[call-overload]
    idtr = {} if mode is Mode.REAL else {Field.GUEST_IDTR_LIMIT: 0x7FF if mode is Mode.PROTECTED else 0xFFF}
    return {
        "program": "; ".join(parts),
        "mode": mode,
        "data": data | more,
        "fields": {Field.EXCEPTION_BITMAP: 0} | idtr | (fields or {}),
        **case,
    }


def _address(number: int) -> int:
    return PROGRAM + _FIRST + number * _STRIDE


def _gate(mode: Mode, vector: int, handler: int, gate: int) -> tuple[int, bytes]:
    """(L2's address, content) of a gate (SDM Vol. 3A, 6.11, 6.14.1; Vol. 3B, 21.1.4)."""
    if mode is Mode.REAL:
        return 4 * vector, struct.pack("<HH", handler, 0)
    if mode is Mode.PROTECTED:
        return IDT + 8 * vector, struct.pack("<HHBBH", handler & 0xFFFF, 0x08, 0, gate, handler >> 16)
    return IDT + 16 * vector, struct.pack("<HHBBHII", handler & 0xFFFF, 0x08, 0, gate, handler >> 16, 0, 0)


def delivered(exit_: Exit) -> int:
    """The vector by which L2 came to the handler whose VMCALL this exit is."""
    assert exit_.full_reason == ExitReason.VMCALL, exit_
    assert exit_.rip >= PROGRAM + _FIRST, exit_
    return exit_.registers["rax"] & 0xFF


def frame(exit_: Exit, mode: Mode = Mode.LONG) -> list[int]:
    """What lay on the handler's stack, lowest address first."""
    names = {"ebx": "rbx", "ecx": "rcx", "edx": "rdx", "esi": "rsi", "bx": "rbx", "cx": "rcx", "dx": "rdx"}
    mask = (1 << 8 * _WIDTH[mode]) - 1
    return [exit_.registers[names.get(name, name)] & mask for name in _FRAME[mode]]


# --- exits --------------------------------------------------------------------------------------------------


def check_plain(exit_: Exit, reason: ExitReason, rip: int) -> None:
    """An exit by an event: there is no qualification, no event that was being delivered, nothing else.

    SDM Vol. 3C, 28.2.1 (the qualification is cleared where nothing is said), 28.2.2, 28.2.4.
    """
    assert exit_.full_reason == reason, exit_
    assert exit_.raw_qualification == 0
    assert not exit_.interruption.valid
    assert not exit_.idt_vectoring.valid
    assert exit_.rip == rip
