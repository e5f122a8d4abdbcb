"""Pairs of cases for the rules on the rest of guest state; see `entry_pairs`."""

from __future__ import annotations

from typing import Any

from vmxlab import Field, Mode
from vmxlab.cases.memory import L2_MEMORY
from vmxlab.image import layout
from vmxlab.sdm.controls import EntryControls, PinControls, PrimaryControls, SecondaryControls
from vmxlab.sdm.registers import CR4, RFLAGS

from .entry_pairs import PAGE, Pair, Processor, Settings, bits, fixed, merged, pair, with_field
from .entry_pairs_guest import baseline, ring, seg, virtual_8086
from .entry_pairs_state import EXCEPTION, EXTERNAL, IF, INT_N, NMI, OTHER, canonical_pair, event

_AT_ONCE = {Field.VMX_PREEMPTION_TIMER_VALUE: 0}
"""For a state in which nothing else ends L2."""

_PROTECTED: Settings = {"mode": Mode.PROTECTED}


# --- descriptor tables, RIP, RFLAGS ------------------------------------------------------------------------
for _register in ("GDTR", "IDTR"):
    canonical_pair(f"guest-{_register.lower()}-base-canonical", Field[f"GUEST_{_register}_BASE"])
    _limit = Field[f"GUEST_{_register}_LIMIT"]
    fixed(
        f"guest-{_register.lower()}-limit",
        with_field(_limit, *(1 << i for i in range(16, 32))),
        with_field(_limit, 0, 0xFFFF),
    )
_COMPATIBILITY = seg("CS", access_rights=0xC09B)
fixed(
    "guest-rip-32-bit",
    with_field(Field.GUEST_RIP, 1 << 32, 1 << 63, **_PROTECTED)
    + with_field(Field.GUEST_RIP, 1 << 32, 1 << 63, fields=_COMPATIBILITY),
    with_field(Field.GUEST_RIP, 0x8000, **_PROTECTED)
    + with_field(Field.GUEST_RIP, 0x8000, fields=_COMPATIBILITY)
    + with_field(Field.GUEST_RIP, 1 << 32),
)


@pair("guest-rip-64-bit")
def _(processor: Processor) -> Pair:
    width = 57 if processor.target.capabilities.cr4_fixed1 & CR4.LA57 else 48
    return Pair(
        with_field(Field.GUEST_RIP, 1 << width, 1 << 63),
        with_field(Field.GUEST_RIP, (1 << width - 1) - 1, (1 << 64) - (1 << width - 1), 1 << width - 1),
    )


_RESERVED_FLAGS = (3, 5, 15, *range(22, 64))
fixed(
    "guest-rflags-reserved",
    with_field(Field.GUEST_RFLAGS, *(2 | 1 << i for i in _RESERVED_FLAGS), 0),
    with_field(Field.GUEST_RFLAGS, 2, 0x3C_7CD7 | IF),
)
fixed(
    "guest-rflags-vm",
    [virtual_8086(Mode.LONG), virtual_8086(Mode.REAL)],
    [virtual_8086()],
)
fixed(
    "guest-rflags-if",
    [merged(event(32, EXTERNAL), fields={Field.GUEST_RFLAGS: 2})],
    [event(32, EXTERNAL), merged(event(2, NMI), fields={Field.GUEST_RFLAGS: 2})],
)
_CET: Settings = {
    "enable": (EntryControls.LOAD_CET_STATE,),
    "fields": {Field[f"GUEST_{name}"]: 0 for name in ("IA32_S_CET", "SSP", "IA32_INTERRUPT_SSP_TABLE_ADDR")},
}
fixed(
    "guest-ssp-address",
    with_field(Field.GUEST_SSP, 1 << 63, **_CET)
    + with_field(Field.GUEST_SSP, 1 << 32, mode=Mode.PROTECTED, **_CET),
    with_field(Field.GUEST_SSP, 8, 1 << 32, **_CET),
)

# --- non-register state ------------------------------------------------------------------------------------
_STATE, _BLOCKED = Field.GUEST_ACTIVITY_STATE, Field.GUEST_INTERRUPTIBILITY_STATE
_HLT, _SHUTDOWN, _WAIT_FOR_SIPI = 1, 2, 3
_STI, _MOV_SS, _BY_SMI, _BY_NMI, _ENCLAVE = 1, 2, 4, 8, 16


@pair("guest-activity-state-supported")
def _(processor: Processor) -> Pair:
    can = processor.target.capabilities.misc.activity_states
    good = [state for state in (0, _HLT, _SHUTDOWN) if state in can]
    bad = [state for state in range(4) if state not in can]
    return Pair(
        with_field(_STATE, *bad, 4, 8, 0xFFFF_FFFF, fields=_AT_ONCE),
        with_field(_STATE, *good, fields=_AT_ONCE),
    )


@pair("guest-hlt-needs-cpl-0")
def _(processor: Processor) -> Pair:
    outside: Settings = {"fields": {**ring(3), _STATE: _SHUTDOWN, **_AT_ONCE}}
    can = processor.target.capabilities.misc.activity_states
    return Pair(
        [{"fields": {**ring(3), _STATE: _HLT, **_AT_ONCE}}, virtual_8086(fields={_STATE: _HLT, **_AT_ONCE})],
        [{"fields": {_STATE: _HLT, **_AT_ONCE}}, *([outside] if _SHUTDOWN in can else [])],
    )


def _in(state: int, blocked: int = 0, flags: int = IF) -> dict[Field, int]:
    return {_STATE: state, _BLOCKED: blocked, Field.GUEST_RFLAGS: flags}


fixed(
    "guest-inactive-excludes-blocking",
    [{"fields": {**_in(state, blocked), **_AT_ONCE}} for state in (_HLT,) for blocked in (_STI, _MOV_SS)],
    [{"fields": _in(0, _STI)}, {"fields": {**_in(_HLT, _BY_NMI), **_AT_ONCE}}],
)
_TAKEN = {
    _HLT: [(32, EXTERNAL), (2, NMI), (1, EXCEPTION), (18, EXCEPTION)],
    _SHUTDOWN: [(2, NMI), (18, EXCEPTION)],
    _WAIT_FOR_SIPI: [],
}
_EVENTS = [(32, EXTERNAL), (2, NMI), (1, EXCEPTION), (18, EXCEPTION), (6, EXCEPTION), (0x80, INT_N)]


@pair("guest-activity-state-takes-event")
def _(processor: Processor) -> Pair:
    made = Pair()
    mtf = processor.target.capabilities.supports(PrimaryControls.MONITOR_TRAP_FLAG)
    can = processor.target.capabilities.misc.activity_states
    for state, taken in _TAKEN.items():
        if state not in can:
            continue  # that breaks a rule by itself
        if mtf:
            case = merged(event(0, OTHER), fields={**_in(state), **_AT_ONCE})
            (made.good if state == _HLT else made.bad).append(case)
        for what in _EVENTS:
            case = merged(event(*what), fields={**_in(state), **_AT_ONCE})
            (made.good if what in taken else made.bad).append(case)
    return made


fixed(
    "guest-interruptibility-reserved",
    with_field(_BLOCKED, *(1 << i for i in range(5, 32))),
    with_field(_BLOCKED, 0, _BY_NMI),
)
fixed(
    "guest-blocking-by-sti-and-mov-ss",
    [{"fields": _in(0, _STI | _MOV_SS)}],
    [{"fields": _in(0, _STI)}, {"fields": _in(0, _MOV_SS)}],
)
fixed(
    "guest-blocking-by-sti-needs-if",
    [{"fields": _in(0, _STI, 2)}],
    [{"fields": _in(0, _STI)}, {"fields": _in(0, _MOV_SS, 2)}],
)
fixed(
    "guest-injected-interrupt-is-not-blocked",
    [merged(event(32, EXTERNAL), fields=_in(0, blocked)) for blocked in (_STI, _MOV_SS)],
    [merged(event(32, EXTERNAL), fields=_in(0, _BY_NMI)), merged(event(6, EXCEPTION), fields=_in(0, _STI))],
)
fixed(
    "guest-injected-nmi-is-not-blocked-by-mov-ss",
    [merged(event(2, NMI), fields=_in(0, _MOV_SS))],
    [merged(event(2, NMI), fields=_in(0)), merged(event(6, EXCEPTION), fields=_in(0, _MOV_SS))],
)
fixed(
    "guest-blocking-by-smi", with_field(_BLOCKED, _BY_SMI, _BY_SMI | _BY_NMI), with_field(_BLOCKED, _BY_NMI)
)
_VIRTUAL_NMIS = {"enable": (PinControls.VIRTUAL_NMIS, PinControls.NMI_EXITING)}
fixed(
    "guest-injected-nmi-is-not-blocked-by-nmi",
    [merged(event(2, NMI), fields=_in(0, _BY_NMI), **_VIRTUAL_NMIS)],
    [merged(event(2, NMI), fields=_in(0), **_VIRTUAL_NMIS), merged(event(2, NMI), fields=_in(0, _BY_NMI))],
)
fixed(
    "guest-enclave-interruption-excludes-mov-ss",
    with_field(_BLOCKED, _ENCLAVE | _MOV_SS),
    with_field(_BLOCKED, _MOV_SS),
)

# --- pending debug exceptions ------------------------------------------------------------------------------
_PENDING = Field.GUEST_PENDING_DEBUG_EXCEPTIONS
_BS, _RTM, _ENABLED = 1 << 14, 1 << 16, 1 << 12
_STEP = int(IF | RFLAGS.TF)
fixed(
    "guest-pending-debug-reserved",
    with_field(_PENDING, *(1 << i for i in (*range(4, 11), 13, 15, *range(17, 64)))),
    with_field(_PENDING, 0xF, _ENABLED | 1, _BS),
)
fixed(
    "guest-pending-single-step-missing",
    [{"fields": _in(0, blocked, _STEP)} for blocked in (_STI, _MOV_SS)]
    + [{"fields": {**_in(_HLT, 0, _STEP), **_AT_ONCE}}],
    [{"fields": {**_in(0, blocked, _STEP), _PENDING: _BS}} for blocked in (_STI, _MOV_SS)]
    + [{"fields": {**_in(_HLT, 0, _STEP), _PENDING: _BS, **_AT_ONCE}}]
    + [{"fields": {**_in(0, _STI, _STEP), Field.GUEST_IA32_DEBUGCTL: 2}}]
    + [{"fields": _in(0, 0, _STEP)}],
)
fixed(
    "guest-pending-single-step-without-reason",
    [{"fields": {**_in(0, blocked), _PENDING: _BS}} for blocked in (_STI, _MOV_SS)]
    + [{"fields": {**_in(_HLT), _PENDING: _BS, **_AT_ONCE}}]
    + [{"fields": {**_in(0, _STI, _STEP), Field.GUEST_IA32_DEBUGCTL: 2, _PENDING: _BS}}],
    [{"fields": {**_in(0), _PENDING: _BS}}, {"fields": {**_in(0, _STI, _STEP), _PENDING: _BS}}],
)
fixed(
    "guest-pending-rtm",
    [
        *with_field(_PENDING, _RTM, *(_RTM | _ENABLED | 1 << i for i in (0, 1, 2, 3, 11, 14))),
        {"fields": {**_in(0, _MOV_SS), _PENDING: _RTM | _ENABLED}},
    ],
    with_field(_PENDING, _ENABLED | 1),
)

# --- VMCS link pointer -------------------------------------------------------------------------------------
_LINK = Field.VMCS_LINK_POINTER
_SHADOW = 1 << 31


def _link(processor: Processor, word: int = 0, address: int = PAGE, **settings: Any) -> Settings:
    """A link to a region that begins with the processor's revision identifier, or with another."""
    revision = processor.target.capabilities.basic.revision_id ^ word
    return {"fields": {_LINK: address}, "memory": {PAGE: revision.to_bytes(4, "little")}, **settings}


_SHADOWING = {"enable": (SecondaryControls.VMCS_SHADOWING,)}


@pair("vmcs-link-pointer-alignment")
def _(processor: Processor) -> Pair:
    bad = [_link(processor, address=PAGE | 1 << i) for i in range(12)]
    return Pair([*bad, _link(processor, address=(1 << 64) - 2)][:12], [{}, _link(processor)])


@pair("vmcs-link-pointer-width")
def _(processor: Processor) -> Pair:
    return Pair([_link(processor, address=PAGE | bit) for bit in processor.beyond], [_link(processor)])


@pair("linked-vmcs-revision")
def _(processor: Processor) -> Pair:
    wrong = [_link(processor, word) for word in (1, 2, 0x40, 1 << 30)]
    return Pair(
        wrong + [_link(processor, word | _SHADOW, **_SHADOWING) for word in (1, 1 << 30)],
        [_link(processor), _link(processor, _SHADOW, **_SHADOWING)],
    )


@pair("linked-vmcs-shadow-indicator")
def _(processor: Processor) -> Pair:
    return Pair(
        [_link(processor, _SHADOW), _link(processor, **_SHADOWING)],
        [_link(processor), _link(processor, _SHADOW, **_SHADOWING)],
    )


fixed("linked-vmcs-is-not-current", [{"fields": {_LINK: layout.VMCS_REGION}}], [{}])

# --- PDPTEs ------------------------------------------------------------------------------------------------
_PDPT, _DIRECTORY = 0x10000, 0x11000


def _pae(processor: Processor, number: int, entry: int, *, ept: bool) -> Settings:
    """PAE paging, with one of the PDPTEs changed: `entry` is xored into its bits."""
    base = 0 if ept else L2_MEMORY
    pdptes = [base + _DIRECTORY | 1 if i in (0, number) else 0 for i in range(4)]
    pdptes[number] ^= entry
    page = base | 0x83  # 2 MiB: present, writable
    fields = {
        Field.GUEST_CR3: base + _PDPT,
        Field.GUEST_CR4: baseline(processor, Field.GUEST_CR4, Mode.PROTECTED) | CR4.PAE,
    }
    if ept:
        fields |= {Field[f"GUEST_PDPTE{i}"]: value for i, value in enumerate(pdptes)}
    memory = b"".join(value.to_bytes(8, "little") for value in pdptes)
    settings: Settings = {
        "mode": Mode.PROTECTED,
        "fields": fields,
        "data": {_PDPT: memory, _DIRECTORY: page.to_bytes(8, "little")},
    }
    which = "enable" if ept else "disable"
    return {**settings, which: (SecondaryControls.ENABLE_EPT,)}


def _pdpte_pair(number: int) -> None:
    @pair(f"guest-pdpte{number}-reserved")
    def make(processor: Processor) -> Pair:
        wrong = [*bits(0x1E6), *processor.beyond]
        both = (True, False)
        return Pair(
            [_pae(processor, number, bit, ept=ept) for bit in wrong for ept in both],
            [_pae(processor, number, bit, ept=ept) for bit in (0, 0xE00) for ept in both]
            + ([_pae(processor, number, 0x1E7, ept=ept) for ept in both] if number else []),
        )


for _number in range(4):
    _pdpte_pair(_number)
