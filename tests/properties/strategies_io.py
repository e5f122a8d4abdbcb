"""Cases about IN, OUT, INS and OUTS: I/O bitmaps, ports, sizes, repetitions, segments, privilege.

A port that is not intercepted is accessed: OUT only at ports where that is harmless, IN only away from the
harness's own UART.
"""

from __future__ import annotations

from functools import cache

from hypothesis import strategies as st

from vmxlab import ExitReason, IOBitmap, Mode, on
from vmxlab.cases.memory import DATA
from vmxlab.cases.sweep_questions import HARMFUL_READS, HARMLESS_WRITES
from vmxlab.structures import Capabilities

from .drawing import Drawn, Snippet, hlt, merged, modes, mov, one_of_texts, some, spread
from .privilege import privileges

_ACCUMULATORS = {1: "al", 2: "ax", 4: "eax"}
_POINTERS = {Mode.LONG: ("rsi", "esi"), Mode.PROTECTED: ("esi", "si"), Mode.REAL: ("si", "esi")}
_SEGMENTS = ("ds", "es", "cs", "ss", "fs", "gs")
_WRITABLE = sorted(HARMLESS_WRITES)
_UNREADABLE = frozenset(port for left_out in HARMFUL_READS for port in left_out.ports) | {0x5658}
_INTERESTING = (0x80, 0x60, 0x0, 0x7FFF, 0x8000, 0xFFFF, 0xFFFE, 0xFFFD, 0xFF, 0x100)
ports = st.one_of(st.sampled_from(_INTERESTING), st.integers(0, 0xFFFF))


_KINDS = st.sampled_from(("register", "immediate", "string"))
_DISTANCES = st.one_of(st.integers(-3, 3), st.none())
"""From the port that all accesses of a case are near; or none of it."""
_WRITABLE_PORTS = st.sampled_from(_WRITABLE)


def _may_pass(port: int, size: int, *, is_in: bool) -> bool:
    """Whether an access may reach the devices. One that passes the end of the port space never does."""
    covered = range(port, port + size)
    if covered[-1] > 0xFFFF:
        return True  # it exits
    if is_in:
        return not any(p in _UNREADABLE for p in covered)
    return all(p in HARMLESS_WRITES for p in covered)


@cache
def _string_texts(mode: Mode) -> tuple[str, ...]:
    texts = []
    for rep in ("", "rep "):
        for pointer in _POINTERS[mode]:
            target = pointer.replace("si", "di")
            for name in ("byte", "word", "dword"):
                texts.append(f"{rep}ins {name} ptr es:[{target}], dx")
                texts += [f"{rep}outs dx, {name} ptr {segment}:[{pointer}]" for segment in _SEGMENTS]
    return tuple(texts)


def _size_of(text: str) -> int:
    for size, name in ((1, "byte"), (4, "dword"), (2, "word")):
        if f"{name} ptr" in text:
            return size
    return next(size for size, name in _ACCUMULATORS.items() if f" {name}" in text)


_PLAIN_TEXTS = tuple(
    text for name in _ACCUMULATORS.values() for text in (f"in {name}, dx", f"out dx, {name}")
)


def _immediate(mode: Mode, size: int, port: int, *, is_in: bool) -> Snippet:
    """IN and OUT with the port in the instruction (Vol. 2A, IN)."""
    wide = (size == 4) if mode is Mode.REAL else (size == 2)
    code = bytes([0x66] * wide + [(0xE4 if is_in else 0xE6) + (size > 1), port])
    name = _ACCUMULATORS[size]
    return Snippet(f"in {name}, {port:#x}" if is_in else f"out {port:#x}, {name}", code)


@st.composite
def _access(draw: st.DrawFn, mode: Mode, near: int) -> tuple[list[Snippet], int, int, bool]:
    """An access with what must stand before it; its port, size, direction."""
    kind = draw(_KINDS)
    distance = draw(_DISTANCES)
    port = near + distance & 0xFFFF if distance is not None else draw(_WRITABLE_PORTS)
    if kind == "immediate":
        size, is_in = draw(st.sampled_from((1, 2, 4))), draw(st.booleans())
        port &= 0xFF
        return [_immediate(mode, size, port, is_in=is_in)], port, size, is_in
    texts = _PLAIN_TEXTS if kind == "register" else _string_texts(mode)
    instruction = draw(one_of_texts(mode, texts))
    is_in = instruction.text.removeprefix("rep ").startswith("in")
    before = [mov(mode, "rdx", port | draw(st.sampled_from((0, 0xABCD_0000))))]
    if kind == "string":
        offset = draw(st.sampled_from((DATA if mode is not Mode.REAL else 0x7400, 0x7FFE, 0x1FFF)))
        before.append(mov(mode, "rdi" if is_in else "rsi", offset))
        if instruction.text.startswith("rep "):
            before.append(mov(mode, "rcx", draw(st.integers(0, 3))))
    return [*before, instruction], port, _size_of(instruction.text), is_in


@cache
@st.composite
def io_cases(draw: st.DrawFn, capabilities: Capabilities) -> Drawn:
    """A few accesses near one port, with a bitmap that is set or clear near it, or none."""
    mode = draw(modes(capabilities))
    near = draw(ports)
    accesses = draw(some(_access(mode, near)))
    lines = [line for access in accesses for line in access[0]]
    bitmap = draw(st.one_of(_bitmap(near), st.none()))
    if bitmap is not None:
        for _, port, size, is_in in accesses:
            # Not the port itself wherever the access may pass: the bits beside it are as interesting.
            if not bitmap.intercepts(port, size) and not _may_pass(port, size, is_in=is_in):
                bitmap.set_intercept(port, True)
    rest: dict[str, object] = {} if bitmap is None else {"io_bitmap": bitmap}
    if draw(st.booleans()):
        value = draw(spread(64))
        rest["reactions"] = (on(ExitReason.IO_INSTRUCTION, first=0, times=1).set("rax", value).skip(),)
    return Drawn(mode, (*lines, hlt(mode)), merged(draw(privileges(mode, capabilities)), rest))


@st.composite
def _bitmap(draw: st.DrawFn, near: int) -> IOBitmap:
    bitmap = draw(st.sampled_from((IOBitmap.passthrough_all, IOBitmap.intercept_all)))()
    start = bitmap.intercepts(0)
    for port in draw(st.lists(st.integers(-4, 8), max_size=4, unique=True)):
        bitmap.set_intercept(near + port & 0xFFFF, not start)
    return bitmap
