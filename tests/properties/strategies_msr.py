"""Cases about RDMSR and WRMSR: MSR bitmaps, both ranges and what lies outside, values, privilege.

A WRMSR that does not exit is executed: only of MSRs that VM exits load again, or that nobody uses.
"""

from __future__ import annotations

from functools import cache

from hypothesis import strategies as st

from vmxlab import ExitReason, Mode, MsrBitmap, on
from vmxlab.cases.sweep_questions import HARMLESS_MSR_WRITES
from vmxlab.sdm.msrs import Msr
from vmxlab.structures import Capabilities

from .drawing import Drawn, Snippet, hlt, merged, modes, mov, plain, some, spread
from .privilege import privileges

_HARMLESS = sorted(set(HARMLESS_MSR_WRITES) - {int(Msr.IA32_FMASK)})
_READABLE = (*_HARMLESS, int(Msr.IA32_EFER))
_EDGES = (0x0, 0x1FFF, 0x2000, 0xBFFF_FFFF, 0xC000_0000, 0xC000_1FFF, 0xC000_2000, 0x4000_0000, 0xFFFF_FFFF)
_LOW, _HIGH = range(0x2000), range(0xC000_0000, 0xC000_2000)

msrs = st.one_of(
    st.sampled_from(_READABLE),
    st.sampled_from(_EDGES),
    st.integers(_LOW.start, _LOW.stop - 1),
    st.integers(_HIGH.start, _HIGH.stop - 1),
)


@cache
def _values(msr: int) -> st.SearchStrategy[int]:
    if msr == Msr.IA32_STAR:
        return spread(32).map(lambda value: value << 32)
    if msr == Msr.IA32_SYSENTER_CS:
        return spread(16)
    return st.one_of(spread(47), spread(47).map(lambda value: ~value & (1 << 64) - 1), spread(64))


def _may_pass(msr: int, *, write: bool) -> bool:
    return msr in (_HARMLESS if write else _READABLE)


@cache
@st.composite
def _access(draw: st.DrawFn, mode: Mode) -> tuple[list[Snippet], int, bool]:
    msr, write = draw(msrs), draw(st.booleans())
    upper = draw(st.sampled_from((0, 1 << 63)))
    lines = [mov(mode, "rcx", msr | (upper if mode is Mode.LONG else 0))]
    if write:
        value = draw(_values(msr))
        lines += [mov(mode, "rax", value & 0xFFFF_FFFF), mov(mode, "rdx", value >> 32)]
    return [*lines, plain(mode, "wrmsr" if write else "rdmsr")], msr, write


@cache
@st.composite
def msr_cases(draw: st.DrawFn, capabilities: Capabilities) -> Drawn:
    """A few accesses, with a bitmap or without."""
    mode = draw(modes(capabilities))
    accesses = draw(some(_access(mode)))
    rest: dict[str, object] = {}
    if draw(st.booleans()):
        rest["msr_bitmap"] = draw(_bitmap([(msr, write) for _, msr, write in accesses]))
    if draw(st.booleans()):
        reason = draw(st.sampled_from((ExitReason.RDMSR, ExitReason.WRMSR)))
        rest["reactions"] = (on(reason, first=0, times=1).set("rdx", draw(spread(64))).skip(),)
    lines = [line for access in accesses for line in access[0]]
    return Drawn(mode, (*lines, hlt(mode)), merged(draw(privileges(mode, capabilities)), rest))


@st.composite
def _bitmap(draw: st.DrawFn, accesses: list[tuple[int, bool]]) -> MsrBitmap:
    """All bits 0 or 1; then, of the MSRs accessed or their neighbours, some changed."""
    start = draw(st.booleans())
    bitmap = MsrBitmap.intercept_all() if start else MsrBitmap.passthrough_all()
    for msr, write in accesses:
        where = msr + draw(st.integers(-1, 1))
        if (where in _LOW or where in _HIGH) and draw(st.booleans()):
            _set(bitmap, where, write ^ draw(st.booleans()), not start)
    for msr, write in accesses:
        # Outside the ranges every access exits.
        passes = (msr in _LOW or msr in _HIGH) and not bitmap.intercepts(msr, write=write)
        if passes and not _may_pass(msr, write=write):
            _set(bitmap, msr, write, True)
    return bitmap


def _set(bitmap: MsrBitmap, msr: int, write: bool, intercept: bool) -> None:
    if write:
        bitmap.set_write_intercept(msr, intercept)
    else:
        bitmap.set_read_intercept(msr, intercept)
