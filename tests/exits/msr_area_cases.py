"""What the tests of MSR areas share: MSRs that no part of the monitor uses, and entries that must fail."""

from __future__ import annotations

from vmxlab import Msr, MsrArea, MsrEntry
from vmxlab.cases.steps import STANDARD, Rdmsr, Step

FREE = (Msr.IA32_STAR, Msr.IA32_LSTAR, Msr.IA32_CSTAR, Msr.IA32_FMASK, Msr.IA32_KERNEL_GS_BASE)
"""MSRs of SYSCALL and SWAPGS: every processor with 64-bit mode has them, and they take such values."""
_SOME = (0x0023_0010_1111_2222, 0x7000_1234, 0x7000_5678, 0x4_7700, 0xFFFF_8000_0000_1000)
VALUES = dict(zip(FREE, _SOME, strict=True))
OTHERS = dict(zip(FREE, (0x1111_0000_0000_0001, 0x1000, 0x2000, 0x200, 0x3000), strict=True))
ZEROS = MsrArea.of_msrs(FREE)

NOT_ALLOWED = {
    "bit 32 set": MsrEntry(Msr.IA32_STAR, reserved=1),
    "bit 63 set": MsrEntry(Msr.IA32_STAR, reserved=1 << 31),
    "FS base": MsrEntry(Msr.IA32_FS_BASE),
    "GS base": MsrEntry(Msr.IA32_GS_BASE),
    "first of x2APIC": MsrEntry(0x800),
    "x2APIC task priority": MsrEntry(0x808),
    "last of x2APIC": MsrEntry(0x8FF),
    "written in SMM alone": MsrEntry(0x9B),  # IA32_SMM_MONITOR_CTL
    "no such MSR": MsrEntry(0xC000_1FFF),
    "address not canonical": MsrEntry(Msr.IA32_LSTAR, 1 << 63),
    "reserved memory type": MsrEntry(Msr.IA32_PAT, 2),
    "reserved bits of EFER": MsrEntry(Msr.IA32_EFER, 0xFF00_0000_0000),
}
"""Entries whose processing fails when they are to be loaded (SDM Vol. 3C, 27.4 and 28.6)."""


def area(values: dict[Msr, int]) -> MsrArea:
    return MsrArea(values.items())


def and_read(*msrs: int, steps: tuple[Step, ...] = STANDARD) -> tuple[Step, ...]:
    """The steps, and RDMSR of each in L1 behind them."""
    return (*steps, *(Rdmsr(msr) for msr in msrs))


def values_read(run) -> dict[int, int]:
    """What the RDMSR steps read, by MSR."""
    return {outcome.msr: outcome.value for outcome in run.outcomes if outcome.operation == "rdmsr"}
