"""Cases about EPT: maps with rights, memory types and page sizes; reads, writes, fetches and walks by them.

L2's page tables map 1 GiB one to one; the pages that are accessed lie at TARGET, where the case's EPT maps
them as it likes, and in L2's own memory, whose rights it may take away.
"""

from __future__ import annotations

from functools import cache

from hypothesis import strategies as st

from vmxlab import EPTPointer, ExitReason, Field, MemoryType, Mode, SecondaryControls, guest_ept, on
from vmxlab.cases.memory import DATA, L2_MEMORY, PAGE_TABLES, PROGRAM
from vmxlab.image import layout
from vmxlab.structures import Capabilities, Ept

from .drawing import Drawn, Snippet, hlt, merged, modes, mov, plain, some
from .privilege import USER_TABLES

TARGET = 0x4000_0000 - 0x40_0000
"""Guest-physical: the last 4 MiB of the gigabyte that L2's page tables map."""
_FREE = layout.FREE_PAGES
_PAGE = 0x1000
_READ, _WRITE, _EXECUTE = 1, 2, 4
_FLAGGED_TABLES = USER_TABLES
_CODE = 0x80
"""In each target page: HLT, to jump to."""

_RIGHTS = tuple(range(8))
_MEMORY_TYPES = (6, 0, 6, 6, 1, 2, 3, 4, 5, 7)


def _pages_of(tables: int) -> tuple[int, ...]:
    return tuple(tables + _PAGE * level for level in range(3))


def _flagged_tables(mode: Mode) -> dict[str, dict]:
    """L2's page tables with accessed and dirty flags set: what an access may set before it fails is set."""
    wide = mode is Mode.LONG
    size, large, first = (8, 21, _FLAGGED_TABLES + 2 * _PAGE) if wide else (4, 22, _FLAGGED_TABLES)
    data = {}
    if wide:
        for level in (0, 1):
            entry = _FLAGGED_TABLES + (level + 1) * _PAGE | 0x27
            data[_FLAGGED_TABLES + level * _PAGE] = entry.to_bytes(8, "little")
    for page in sorted({0, *(TARGET + n * 0x20_0000 >> large for n in range(2))}):
        data[first + page * size] = (page << large | 0xE7).to_bytes(size, "little")
    return {"data": data, "fields": {Field.GUEST_CR3: _FLAGGED_TABLES}}


def _accesses(mode: Mode) -> tuple[str, ...]:
    pointer = {Mode.LONG: "rbx", Mode.PROTECTED: "ebx", Mode.REAL: "bx"}[mode]
    texts = [
        f"mov al, [{pointer}]",
        f"mov [{pointer}], al",
        f"inc dword ptr [{pointer}]",
        f"mov eax, [{pointer}]",
        f"mov [{pointer}], eax",
        f"jmp {pointer}",
        f"xchg [{pointer}], eax",
        f"push word ptr [{pointer}]",
    ]
    return tuple(texts)


@cache
@st.composite
def _entry(draw: st.DrawFn) -> int:
    """An EPT entry without its address: rights, memory type, ignore PAT, flags; seldom a reserved bit."""
    rights = draw(st.sampled_from(_RIGHTS[::-1]))
    kind = draw(st.sampled_from(_MEMORY_TYPES))
    flags = draw(st.sampled_from((0, 0, 1 << 6, 3 << 8, 1 << 8)))
    return rights | kind << 3 | flags | draw(st.sampled_from((0, 0, 0, 0, 0, 0, 1 << 51, 1 << 62)))


@st.composite
def _mapped(draw: st.DrawFn, capabilities: Capabilities, mode: Mode, tables: int) -> tuple[Ept, list[int]]:
    """An EPT with pages at TARGET, and the guest-physical addresses to access."""
    ept = guest_ept()
    where: list[int] = []
    sizes = [1] + [2] * capabilities.ept_vpid.page_2m
    if mode is not Mode.REAL:
        for number in range(draw(st.integers(1, 3))):
            level = draw(st.sampled_from(sizes))
            size = _PAGE if level == 1 else 0x20_0000
            gpa = TARGET + number * (_PAGE if level == 1 else 0) + (0x20_0000 if level == 2 else 0)
            hpa = _FREE + (number * _PAGE if level == 1 else 0x40_0000)
            if level == 2 and any(other >= TARGET + 0x20_0000 for other in where):
                continue
            ept.map(gpa, hpa, size)
            large = 1 << 7 if level == 2 else 0
            ept.set_raw_entry(gpa, level, draw(_entry()) | large | hpa)
            where.append(gpa)
    else:
        where.append(0x7000)
    own = (0x7000,) if mode is Mode.REAL else (DATA, *_pages_of(tables), 0x7000)
    for page in draw(st.lists(st.sampled_from(own), max_size=1)):
        ept.set_raw_entry(page, 1, draw(_entry()) | L2_MEMORY + page)
        where.append(page)
    return ept, where


@st.composite
def _access(draw: st.DrawFn, mode: Mode, where: list[int], tables: int) -> list[Snippet]:
    page = draw(st.sampled_from(where))
    offsets = (0x10, _CODE, 0xFFE, 0x0)
    text = draw(st.sampled_from(_accesses(mode)))
    offset = _CODE if text.startswith("jmp") else draw(st.sampled_from(offsets))
    if text.startswith("jmp") and page in _pages_of(tables):
        text = _accesses(mode)[0]  # what a page table means as code is another question
    address = page + offset
    if page in _pages_of(tables) and not text.startswith("mov al,"):
        address = page + 0x800  # not an entry that the program needs
    return [mov(mode, "rbx", address & (0xFFFF if mode is Mode.REAL else 0xFFFF_FFFF)), plain(mode, text)]


@cache
@st.composite
def ept_cases(draw: st.DrawFn, capabilities: Capabilities) -> Drawn:
    """A few accesses by one EPT; after a violation L1 may go on elsewhere, with another entry."""
    mode = draw(modes(capabilities))
    flagged = mode is not Mode.REAL and draw(st.booleans())
    tables = _FLAGGED_TABLES if flagged else PAGE_TABLES
    ept, where = draw(_mapped(capabilities, mode, tables))
    accesses = draw(some(_access(mode, where, tables), 4))
    lines = [line for access in accesses for line in access]
    lines.append(hlt(mode))
    memory = {_FREE + n * _PAGE + _CODE: b"\xf4" for n in range(3)} | {_FREE + 0x40_0000 + _CODE: b"\xf4"}
    rest: dict[str, object] = {
        "ept": ept,
        "memory": memory,
        "data": {page + _CODE: b"\xf4" for page in (DATA, 0x7000)},
    }
    flags = capabilities.ept_vpid.accessed_dirty and draw(st.booleans())
    if flags:
        rest["eptp"] = EPTPointer(memory_type=MemoryType.WB, accessed_dirty=True, address=layout.EPT_TABLES)
    rest["reactions"] = draw(_reactions(lines))
    if draw(st.booleans()):
        rest["enable"] = (SecondaryControls.ENABLE_VPID,)
        rest["fields"] = {Field.VPID: draw(st.integers(1, 3))}
    return Drawn(mode, tuple(lines), merged(rest, _flagged_tables(mode) if flagged else {}))


@st.composite
def _reactions(draw: st.DrawFn, lines: list[Snippet]) -> tuple[object, ...]:
    """L1 has L2 go on with another line of its program."""
    reactions = []
    for reason in (ExitReason.EPT_VIOLATION, ExitReason.EPT_MISCONFIGURATION):
        for number in range(draw(st.integers(0, 2))):
            line = draw(st.integers(0, len(lines) - 1))
            address = PROGRAM + sum(len(snippet.code) for snippet in lines[:line])
            reaction = on(reason, first=number, times=1)
            reactions.append(reaction.vmwrite(Field.GUEST_RIP, address).resume())
    return tuple(reactions)
