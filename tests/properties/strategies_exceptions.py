"""Cases about exceptions: exception bitmap, page-fault mask and match, an IDT with and without gates."""

from __future__ import annotations

import struct
from functools import cache

from hypothesis import strategies as st

from vmxlab import ExitReason, Field, Mode, on
from vmxlab.cases.memory import DATA, IDT, PROGRAM, UNMAPPED
from vmxlab.sdm.controls import SecondaryControls
from vmxlab.sdm.registers import RFLAGS, Vector
from vmxlab.structures import Capabilities

from .drawing import Drawn, Snippet, hlt, merged, modes, mov, plain, some, some_bits_of
from .privilege import USER_TABLES, privileges

Parts = list[tuple[str, int] | str]
"""Instructions, and what registers hold before them."""

_V = Vector
_VECTORS = (_V.DE, _V.DB, _V.BP, _V.OF, _V.BR, _V.UD, _V.DF, _V.TS, _V.NP, _V.SS, _V.GP, _V.PF, _V.AC)
_BITS = sum(1 << vector for vector in _VECTORS)
_EVERY = 0xFFFF_FFFF
_HANDLERS = 0x1A000
_NON_CANONICAL = 0x8000_0000_0000
_GATE_RIGHTS = (0x8E00, 0xEE00, 0x8F00, 0xEF00, 0x0E00, 0x8C00)
"""Interrupt and trap gates of DPL 0 and 3; one that is not present, one that is no gate for 64-bit mode."""

ALIAS = {Mode.LONG: 0x20_0000, Mode.PROTECTED: 0x40_0000}
"""Where the second page of L2's page directory begins."""
_HLT = 0x40
"""Behind DATA: an instruction to jump to."""

_FAULTS_ANYWHERE = ("ud2", "int3", "int1", "div cl", "hlt", "nop", "cli", "rsm")


def _in_long_mode() -> list[Parts]:
    alias = ALIAS[Mode.LONG] + DATA
    found: list[Parts] = [["int 0x20"], ["int 3"], ["int 13"], [("rsp", _NON_CANONICAL), "push rax"]]
    for target in (alias + _HLT, 0x4000_0000, _NON_CANONICAL):
        found.append([("rbx", target), "jmp rbx"])
    for value in (alias, alias, UNMAPPED, _NON_CANONICAL, 0x4000_0000, 0x1F_FFFC, DATA + 1, 1 << 47):
        for text in ("mov rax, [rbx]", "push qword ptr [rbx]", "inc dword ptr [rbx]", "mov [rbx], al"):
            found.append([("rbx", value), text])
        found.append([("rbp", value), "mov rax, [rbp]"])
    return found


def _in_protected_mode() -> list[Parts]:
    alias = ALIAS[Mode.PROTECTED] + DATA
    found: list[Parts] = [["into"], [("rbx", DATA), ("rax", 7), "bound eax, [ebx]"]]
    for target in (alias + _HLT, 0x4000_0000):
        found.append([("rbx", target), "jmp ebx"])
    for value in (alias, alias, UNMAPPED, 0x4000_0000, 0x3F_FFFE, DATA + 1, 0xFFFF_FFFE):
        for text in ("mov eax, [ebx]", "inc dword ptr [ebx]", "mov al, [ebx]", "mov [ebx], ax"):
            found.append([("rbx", value), text])
    return found


def _in_real_mode() -> list[Parts]:
    texts = ("mov ax, [bx]", "mov [bx], eax")
    return [["into"], *([("rbx", value), text] for value in (0x7400, 0xFFFF, 0xFFFD) for text in texts)]


@cache
def _faulting(mode: Mode) -> st.SearchStrategy[list[Snippet]]:
    found: list[Parts] = [[text] for text in _FAULTS_ANYWHERE]
    match mode:
        case Mode.LONG:
            found += _in_long_mode()
        case Mode.PROTECTED:
            found += _in_protected_mode()
        case Mode.REAL:
            found += _in_real_mode()
    if mode is not Mode.REAL:
        found.append([("rax", 0x28), "mov ss, ax"])  # beyond the limit of the GDT

    def made(parts: Parts) -> list[Snippet]:
        return [plain(mode, part) if isinstance(part, str) else mov(mode, *part) for part in parts]

    return st.sampled_from(found).map(made)


def _gate(handler: int, rights: int, selector: int) -> bytes:
    return struct.pack("<HHHHII", handler & 0xFFFF, selector, rights, handler >> 16, 0, 0)


@cache
@st.composite
def _table(draw: st.DrawFn) -> dict[str, dict]:
    """An IDT for 64-bit mode: gates for some vectors, each handler a HLT of its own."""
    vectors = draw(st.lists(st.sampled_from((*_VECTORS, 0x20)), max_size=4, unique=True))
    data: dict[int, bytes] = {}
    for vector in vectors:
        rights = draw(st.sampled_from(_GATE_RIGHTS))
        selector = draw(st.sampled_from((0x08, 0x08, 0x08, 0x10, 0, 0x28)))
        data[IDT + 16 * vector] = _gate(_HANDLERS + 16 * vector, rights, selector)
        data[_HANDLERS + 16 * vector] = b"\xf4"
    limit = draw(st.sampled_from((0xFFF, 0xFFF, 0, 16 * 14 - 1)))
    return {"data": data, "fields": {Field.GUEST_IDTR_LIMIT: limit}}


@st.composite
def _go_on(draw: st.DrawFn, lines: list[Snippet]) -> tuple[object, ...]:
    """L1 has L2 go on with another line of its program after the first exceptions."""
    reactions = []
    for number in range(draw(st.integers(0, 2))):
        line = draw(st.integers(0, len(lines)))
        where = PROGRAM + sum(len(snippet.code) for snippet in lines[:line])
        reaction = on(ExitReason.EXCEPTION_OR_NMI, first=number, times=1)
        reactions.append(reaction.vmwrite(Field.GUEST_RIP, where).resume())
    return tuple(reactions)


@cache
@st.composite
def exception_cases(draw: st.DrawFn, capabilities: Capabilities) -> Drawn:
    """A few instructions that may fault, with what decides where the fault goes."""
    mode = draw(modes(capabilities))
    with_ept = capabilities.supports(SecondaryControls.ENABLE_EPT)
    lines = [line for group in draw(some(_faulting(mode), 4)) for line in group]
    few = some_bits_of(_BITS)
    bitmap = draw(st.one_of(st.just(_EVERY), few, few.map(lambda bits: _EVERY ^ bits)))
    if mode is Mode.REAL:
        bitmap = _EVERY  # its interrupt vector table is all zeros: L2 would run through its memory
    fields = {Field.EXCEPTION_BITMAP: bitmap} if bitmap != _EVERY else {}
    if draw(st.booleans()):
        fields[Field.PAGE_FAULT_ERROR_CODE_MASK] = draw(some_bits_of(0x1F))
        fields[Field.PAGE_FAULT_ERROR_CODE_MATCH] = draw(some_bits_of(0x1F))
    parts: list[dict[str, object]] = [dict(draw(privileges(mode, capabilities)))]
    if mode is Mode.LONG and draw(st.booleans()):
        parts.append(dict(draw(_table())))
    if mode is not Mode.REAL and with_ept and draw(st.booleans()):
        parts.append(draw(_tables_with_faults(mode)))
    rest: dict[str, object] = {
        "fields": fields,
        "data": {DATA + _HLT: b"\xf4"},
        "reactions": draw(_go_on(lines)),
    }
    if draw(st.booleans()):
        have = parts[0].get("fields", {}).get(Field.GUEST_RFLAGS, 0x2)  # type: ignore[attr-defined]
        flag = draw(st.sampled_from((RFLAGS.OF, RFLAGS.AC, RFLAGS.CF)))
        fields[Field.GUEST_RFLAGS] = have | int(flag)
    return Drawn(mode, (*lines, hlt(mode)), merged(*parts, rest))


@cache
@st.composite
def _tables_with_faults(draw: st.DrawFn, mode: Mode) -> dict[str, object]:
    """L2's own page tables (another set), where one entry lacks rights, or has a reserved bit."""
    wide = mode is Mode.LONG
    flags = draw(st.sampled_from((0x83, 0x87, 0x81, 0x80, 0x83 | 1 << 13, 0x83 | 1 << 63 if wide else 0x83)))
    size = 8 if wide else 4
    data: dict[int, bytes] = {}
    if wide:
        data[USER_TABLES] = (USER_TABLES + 0x1000 | 7).to_bytes(8, "little")
        data[USER_TABLES + 0x1000] = (USER_TABLES + 0x2000 | 7).to_bytes(8, "little")
    directory = USER_TABLES + (0x2000 if wide else 0)
    # Linear ALIAS is L2's memory a second time, by other rights.
    data[directory] = (0x87).to_bytes(size, "little") + flags.to_bytes(size, "little")
    return {"data": data, "fields": {Field.GUEST_CR3: USER_TABLES}}
