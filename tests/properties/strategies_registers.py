"""Cases about control and debug registers: masks, shadows, targets, controls, and all ways to access them."""

from __future__ import annotations

from functools import cache

from hypothesis import strategies as st

from vmxlab import ExitReason, Field, Mode, PrimaryControls, on
from vmxlab.cases.guest_state import guest_state
from vmxlab.cases.memory import DATA
from vmxlab.sdm.controls import SecondaryControls
from vmxlab.sdm.registers import CR0, CR4, DR7
from vmxlab.structures import Capabilities

from .drawing import (
    Drawn,
    Snippet,
    hlt,
    merged,
    modes,
    mov,
    plain,
    register_names,
    settings_of,
    some,
    some_bits_of,
    spread,
    what_differs,
)
from .privilege import privileges

_P = PrimaryControls
_CR_CONTROLS = (
    _P.CR3_LOAD_EXITING,
    _P.CR3_STORE_EXITING,
    _P.CR8_LOAD_EXITING,
    _P.CR8_STORE_EXITING,
)
# What may change while a program goes on: no paging, no mode.
_CR0_FREE = int(CR0.MP | CR0.EM | CR0.TS | CR0.WP | CR0.AM | CR0.NW | CR0.CD)
_CR0_MASKABLE = _CR0_FREE | int(CR0.PE | CR0.PG | CR0.NE | CR0.ET)
_CR4_FREE = int(
    CR4.TSD | CR4.DE | CR4.MCE | CR4.PCE | CR4.OSFXSR | CR4.OSXMMEXCPT | CR4.VME | CR4.PVI | CR4.PGE
)
_CR4_MASKABLE = _CR4_FREE | int(CR4.PAE | CR4.PSE | CR4.VMXE | CR4.SMXE | CR4.UMIP)
_OPERAND = DATA + 0x10


@cache
def _register(mode: Mode) -> st.SearchStrategy[str]:
    """Any but the stack pointer, which stays what it is."""
    return st.sampled_from([name for name in register_names(mode) if name not in ("rsp", "esp")])


def _wide(mode: Mode, name: str) -> str:
    """The name by which `mov` of `drawing` knows it."""
    return name if mode is Mode.LONG else f"r{name[1:]}"


@cache
def _values(base: int, free: int, maskable: int) -> st.SearchStrategy[int]:
    """The value that is there with some bits changed; seldom one that may not be."""
    return st.one_of(
        some_bits_of(free).map(lambda bits: base ^ bits),
        some_bits_of(free).map(lambda bits: base ^ bits),
        some_bits_of(maskable).map(lambda bits: base ^ bits),
    )


_CR_ACCESSES = ("read", "cr0", "cr4", "cr3", "clts", "lmsw", "smsw", "lmsw-memory", "cr8", "cr2")


@cache
@st.composite
def _cr_access(draw: st.DrawFn, mode: Mode, base0: int, base3: int, base4: int) -> list[Snippet]:
    kind = draw(st.sampled_from(_CR_ACCESSES))
    register = draw(_register(mode))
    if kind == "clts":
        return [plain(mode, "clts")]
    if kind in ("lmsw", "smsw"):
        name = draw(st.sampled_from(("ax", "cx", "dx", "bx", "bp", "si", "di")))
        if kind == "smsw":
            return [plain(mode, f"smsw {name}")]
        value = base0 & 0xFFFF ^ draw(some_bits_of(0xF))
        return [mov(mode, f"r{name}", value), plain(mode, f"lmsw {name}")]
    if kind == "lmsw-memory":
        value = base0 & 0xFFFF ^ draw(some_bits_of(0xF))
        pointer = {Mode.LONG: "rbx", Mode.PROTECTED: "ebx", Mode.REAL: "bx"}[mode]
        where = _OPERAND if mode is not Mode.REAL else 0x7400
        store = plain(mode, f"mov word ptr [{pointer}], ax")
        return [
            mov(mode, "rbx", where),
            mov(mode, "rax", value),
            store,
            plain(mode, f"lmsw word ptr [{pointer}]"),
        ]
    numbers = (0, 3, 4, 2, 8) if mode is Mode.LONG else (0, 3, 4, 2)
    if kind == "read":
        number = draw(st.sampled_from(numbers))
        return [plain(mode, f"mov {register}, cr{number}")]
    number = int(kind[2:])
    if number not in numbers:
        number = 0
    value = draw(
        {
            0: _values(base0, _CR0_FREE, _CR0_MASKABLE),
            2: spread(64 if mode is Mode.LONG else 32),
            3: st.one_of(st.just(base3), st.sampled_from((8, 0x10, 0x18)).map(lambda bits: base3 ^ bits)),
            4: _values(base4, _CR4_FREE, _CR4_MASKABLE),
            8: st.sampled_from((0, 0x10, 1 << 63)),  # another priority would stay with L1
        }[number]
    )
    return [mov(mode, _wide(mode, register), value), plain(mode, f"mov cr{number}, {register}")]


@cache
def _masks(base: int, maskable: int) -> st.SearchStrategy[tuple[int, int]]:
    """A guest/host mask and a read shadow."""
    everything = (1 << 32) - 1
    mask = st.one_of(some_bits_of(maskable), some_bits_of(maskable).map(lambda bits: everything ^ bits))
    shadow = st.one_of(some_bits_of(maskable).map(lambda bits: base ^ bits), spread(32))
    return st.tuples(mask, shadow)


def _targets(capabilities: Capabilities) -> int:
    """How many CR3-target values there may be."""
    return min(4, capabilities.misc.cr3_target_count)


@cache
@st.composite
def control_register_cases(draw: st.DrawFn, capabilities: Capabilities) -> Drawn:
    """A few accesses with masks, shadows, CR3-target values and controls."""
    mode = draw(modes(capabilities))
    with_ept = capabilities.supports(SecondaryControls.ENABLE_EPT)
    state = guest_state(mode, capabilities, with_ept=with_ept)
    base0, base3, base4 = (state[f] for f in (Field.GUEST_CR0, Field.GUEST_CR3, Field.GUEST_CR4))
    free4 = capabilities.cr4_fixed1
    base4 ^= draw(some_bits_of(_CR4_FREE & free4))
    accesses = draw(some(_cr_access(mode, base0, base3, base4)))
    mask0, shadow0 = draw(_masks(base0, _CR0_MASKABLE))
    mask4, shadow4 = draw(_masks(base4, _CR4_MASKABLE))
    fields = {
        Field.GUEST_CR4: base4,
        Field.CR0_GUEST_HOST_MASK: mask0,
        Field.CR0_READ_SHADOW: shadow0,
        Field.CR4_GUEST_HOST_MASK: mask4,
        Field.CR4_READ_SHADOW: shadow4,
    }
    target = st.sampled_from((0, base3, base3 ^ 8, base3 ^ 0x10))
    targets = draw(st.lists(target, max_size=_targets(capabilities)))
    given = {Field[f"CR3_TARGET_VALUE_{number}"]: value for number, value in enumerate(targets)}
    given[Field.CR3_TARGET_COUNT] = len(targets)
    rest: dict[str, object] = {
        "fields": {**what_differs(fields, state), **given},
        "watch": (Field.GUEST_CR0, Field.GUEST_CR3, Field.GUEST_CR4),
    }
    if draw(st.booleans()):
        which = Field.CR0_READ_SHADOW if draw(st.booleans()) else Field.CR0_GUEST_HOST_MASK
        reaction = on(ExitReason.CONTROL_REGISTER_ACCESS, first=0, times=1).vmwrite(which, draw(spread(32)))
        rest["reactions"] = (reaction.skip(),)
    lines = [line for access in accesses for line in access]
    controls = draw(settings_of(capabilities, _CR_CONTROLS))
    return Drawn(mode, (*lines, hlt(mode)), merged(draw(privileges(mode, capabilities)), rest, controls))


@cache
@st.composite
def _dr_access(draw: st.DrawFn, mode: Mode) -> list[Snippet]:
    register = draw(_register(mode))
    number = draw(st.integers(0, 7))
    if draw(st.booleans()):
        return [plain(mode, f"mov {register}, dr{number}")]
    width = 64 if mode is Mode.LONG else 32
    if number in (5, 7):
        # Breakpoints would be the next thing: only what enables none.
        bits = some_bits_of(int(DR7.GD) | 0xFFFF_0000)
        value = st.one_of(st.just(0x400), bits.map(lambda value: value | 0x400))
        value = st.one_of(value, st.just(1 << 40)) if mode is Mode.LONG else value
    elif number in (4, 6):
        value = st.sampled_from((0xFFFF_0FF0, 0, 0xFFFF_0FF1))
    else:
        value = spread(width)
    return [mov(mode, _wide(mode, register), draw(value)), plain(mode, f"mov dr{number}, {register}")]


@cache
@st.composite
def debug_register_cases(draw: st.DrawFn, capabilities: Capabilities) -> Drawn:
    """Some MOV DR, with and without MOV-DR exiting, CR4.DE, DR7.GD, privilege."""
    mode = draw(modes(capabilities))
    with_ept = capabilities.supports(SecondaryControls.ENABLE_EPT)
    state = guest_state(mode, capabilities, with_ept=with_ept)
    lines = [line for access in draw(some(_dr_access(mode))) for line in access]
    fields = {
        Field.GUEST_CR4: state[Field.GUEST_CR4] | draw(st.sampled_from((0, int(CR4.DE)))),
        Field.GUEST_DR7: 0x400 | draw(st.sampled_from((0, 0, int(DR7.GD)))),
    }
    controls = draw(settings_of(capabilities, (_P.MOV_DR_EXITING,)))
    rest = {"fields": what_differs(fields, state), "watch": (Field.GUEST_DR7,)}
    return Drawn(mode, (*lines, hlt(mode)), merged(draw(privileges(mode, capabilities)), rest, controls))
