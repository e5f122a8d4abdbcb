"""The baseline of L2: guest-state area and the memory that goes with it (SDM Vol. 3C, 25.4 and 27.3.1)."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

from vmxlab.cases import memory
from vmxlab.cases.program import Mode
from vmxlab.sdm.fields import Field
from vmxlab.sdm.registers import CR0, CR4, EFER
from vmxlab.structures import PAGE_SIZE, Capabilities

RFLAGS_FIXED_1 = 0x2
DR7_RESET = 0x400
UNUSABLE = 1 << 16
NO_LINK = (1 << 64) - 1

_CODE_SELECTOR, _DATA_SELECTOR, _TSS_SELECTOR = 0x08, 0x10, 0x18
_TSS_LIMIT = 0x67

# Access rights: SDM Vol. 3C, table 25-2.
_CODE_64, _CODE_32, _CODE_16 = 0xA09B, 0xC09B, 0x009B
_DATA_32, _DATA_16 = 0xC093, 0x0093
_BUSY_TSS = 0x8B

_PRESENT_WRITE_USER_FREE = 0x003
_LARGE_PAGE = 0x080
_2MIB = 1 << 21
_4MIB = 1 << 22

_PML4 = memory.PAGE_TABLES
_PDPT = memory.PAGE_TABLES + PAGE_SIZE
_DIRECTORY = memory.PAGE_TABLES + 2 * PAGE_SIZE
_TABLE = memory.PAGE_TABLES + 3 * PAGE_SIZE


@lru_cache(maxsize=64)
def guest_state(mode: Mode, capabilities: Capabilities, *, with_ept: bool) -> Mapping[Field, int]:
    """Every guest-state field that each processor with VMX has, in a state that passes all entry checks."""
    state = {
        Field.GUEST_CR0: _cr0(mode, capabilities),
        Field.GUEST_CR3: _cr3(mode, with_ept=with_ept),
        Field.GUEST_CR4: _cr4(mode, capabilities),
        Field.GUEST_DR7: DR7_RESET,
        Field.GUEST_RSP: memory.STACK_TOP,
        Field.GUEST_RIP: memory.PROGRAM,
        Field.GUEST_RFLAGS: RFLAGS_FIXED_1,
        Field.GUEST_GDTR_BASE: memory.GDT,
        Field.GUEST_GDTR_LIMIT: len(_gdt(mode)) - 1,
        Field.GUEST_IDTR_BASE: 0 if mode is Mode.REAL else memory.IDT,
        Field.GUEST_IDTR_LIMIT: 0x3FF if mode is Mode.REAL else 0,
        Field.VMCS_LINK_POINTER: NO_LINK,
    }
    state |= dict.fromkeys(_ZERO, 0)
    return MappingProxyType(state | _segments(mode))


_ZERO = (
    Field.GUEST_IA32_DEBUGCTL,
    Field.GUEST_IA32_SYSENTER_CS,
    Field.GUEST_IA32_SYSENTER_ESP,
    Field.GUEST_IA32_SYSENTER_EIP,
    Field.GUEST_INTERRUPTIBILITY_STATE,
    Field.GUEST_ACTIVITY_STATE,
    Field.GUEST_PENDING_DEBUG_EXCEPTIONS,
)


def guest_efer(mode: Mode) -> int:
    """IA32_EFER as "load IA32_EFER" wants it: LME and LMA agree with "IA-32e mode guest"."""
    return int(EFER.LME | EFER.LMA) if mode is Mode.LONG else 0


def _cr0(mode: Mode, capabilities: Capabilities) -> int:
    fixed = (CR0.ET | CR0.NE | capabilities.cr0_fixed0) & capabilities.cr0_fixed1
    if mode is Mode.REAL:
        # With "unrestricted guest" PE and PG are free (SDM Vol. 3C, 27.3.1.1).
        return int(fixed & ~(CR0.PE | CR0.PG))
    return int(fixed | CR0.PE | CR0.PG)


def _cr4(mode: Mode, capabilities: Capabilities) -> int:
    wanted = {Mode.LONG: CR4.PAE, Mode.PROTECTED: CR4.PSE, Mode.REAL: CR4(0)}[mode]
    return int((wanted | capabilities.cr4_fixed0) & capabilities.cr4_fixed1)


def _cr3(mode: Mode, *, with_ept: bool) -> int:
    if mode is Mode.REAL:
        return 0
    root = _PML4 if mode is Mode.LONG else _DIRECTORY
    return root if with_ept else memory.machine_address(root)


def _segments(mode: Mode) -> dict[Field, int]:
    code = {Mode.LONG: _CODE_64, Mode.PROTECTED: _CODE_32, Mode.REAL: _CODE_16}[mode]
    data = _DATA_16 if mode is Mode.REAL else _DATA_32
    limit = 0xFFFF if mode is Mode.REAL else 0xFFFF_FFFF
    state: dict[Field, int] = {}
    for name in ("ES", "CS", "SS", "DS", "FS", "GS"):
        selector = _CODE_SELECTOR if name == "CS" else _DATA_SELECTOR
        state[Field[f"GUEST_{name}_SELECTOR"]] = 0 if mode is Mode.REAL else selector
        state[Field[f"GUEST_{name}_BASE"]] = 0
        state[Field[f"GUEST_{name}_LIMIT"]] = limit
        state[Field[f"GUEST_{name}_ACCESS_RIGHTS"]] = code if name == "CS" else data
    for name, selector, base, size, rights in (
        ("LDTR", 0, 0, 0, UNUSABLE),
        ("TR", 0 if mode is Mode.REAL else _TSS_SELECTOR, memory.TSS, _TSS_LIMIT, _BUSY_TSS),
    ):
        state[Field[f"GUEST_{name}_SELECTOR"]] = selector
        state[Field[f"GUEST_{name}_BASE"]] = base
        state[Field[f"GUEST_{name}_LIMIT"]] = size
        state[Field[f"GUEST_{name}_ACCESS_RIGHTS"]] = rights
    return state


@lru_cache(maxsize=8)
def guest_memory(mode: Mode, *, with_ept: bool) -> Mapping[int, bytes]:
    """What L2 finds in its memory besides its program: descriptor table and page tables, by L2 address."""
    pages = {memory.GDT: _gdt(mode)}
    if mode is Mode.LONG:
        pages |= _long_mode_tables(with_ept=with_ept)
    elif mode is Mode.PROTECTED:
        pages |= _protected_mode_tables(with_ept=with_ept)
    return MappingProxyType(pages)


def _gdt(mode: Mode) -> bytes:
    code = 0x00AF9B000000FFFF if mode is Mode.LONG else 0x00CF9B000000FFFF
    data = 0x00CF93000000FFFF
    tss = _TSS_LIMIT | (memory.TSS & 0xFFFFFF) << 16 | _BUSY_TSS << 40
    return struct.pack("<5Q", 0, code, data, tss, 0)


def _long_mode_tables(*, with_ept: bool) -> dict[int, bytes]:
    base = 0 if with_ept else memory.L2_MEMORY
    entry = _PRESENT_WRITE_USER_FREE
    tables = {
        _PML4: struct.pack("<Q", base + _PDPT | entry),
        _PDPT: struct.pack("<Q", base + _DIRECTORY | entry),
    }
    if with_ept:
        # 1 GiB, one to one: what L2 may reach of it the EPT says.
        large = entry | _LARGE_PAGE
        tables[_DIRECTORY] = array("Q", range(large, large + 512 * _2MIB, _2MIB)).tobytes()
    else:
        tables[_DIRECTORY] = struct.pack("<Q", base + _TABLE | entry)
        tables[_TABLE] = array("Q", range(base | entry, base + memory.L2_MEMORY_BYTES, PAGE_SIZE)).tobytes()
    return tables


def _protected_mode_tables(*, with_ept: bool) -> dict[int, bytes]:
    base = 0 if with_ept else memory.L2_MEMORY
    entry = _PRESENT_WRITE_USER_FREE
    if with_ept:
        large = entry | _LARGE_PAGE
        return {_DIRECTORY: array("I", range(large, large + 256 * _4MIB, _4MIB)).tobytes()}
    return {
        _DIRECTORY: struct.pack("<I", base + _TABLE | entry),
        _TABLE: array("I", range(base | entry, base + memory.L2_MEMORY_BYTES, PAGE_SIZE)).tobytes(),
    }
