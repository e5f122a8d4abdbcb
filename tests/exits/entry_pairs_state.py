"""Pairs of cases for the rules on event injection, host state and guest state; see `entry_pairs`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vmxlab import Field, Mode, MsrArea
from vmxlab.image import layout
from vmxlab.sdm.controls import (
    ControlSet,
    EntryControls,
    ExitControls,
    PrimaryControls,
)
from vmxlab.sdm.msrs import Msr
from vmxlab.sdm.registers import CR0, CR4, EFER, RFLAGS
from vmxlab.structures import MsrEntry

from .entry_pairs import (
    CANONICAL_48,
    NOT_CANONICAL_48,
    Pair,
    Processor,
    Settings,
    bits,
    fixed,
    lower,
    merged,
    pair,
    with_field,
)

# --- event injection ---------------------------------------------------------------------------------------
_EVENT = Field.ENTRY_INTERRUPTION_INFORMATION
_VALID, _ERROR_CODE = 1 << 31, 1 << 11
EXTERNAL, NMI, EXCEPTION, INT_N, ICEBP, INT3, OTHER = 0, 2, 3, 4, 5, 6, 7
# Delivery of an event in L2 finds an empty IDT: what follows is an exit for #GP, or a triple fault's.
IF = int(RFLAGS.FIXED1 | RFLAGS.IF)


def event(
    vector: int, kind: int, *, more: int = 0, error_code: int | None = None, **settings: Any
) -> Settings:
    """A case that injects an event."""
    fields = {_EVENT: _VALID | kind << 8 | vector | more | (0 if error_code is None else _ERROR_CODE)}
    if error_code is not None:
        fields[Field.ENTRY_EXCEPTION_ERROR_CODE] = error_code
    if kind in (INT_N, ICEBP, INT3):
        fields[Field.ENTRY_INSTRUCTION_LENGTH] = 1
    if kind == EXTERNAL:
        fields[Field.GUEST_RFLAGS] = IF
    return merged({"fields": fields}, **settings)


@pair("injected-type")
def _(processor: Processor) -> Pair:
    # Type 7 without "monitor trap flag" is a known difference's own test: the machine may die of it.
    mtf = processor.target.capabilities.supports(PrimaryControls.MONITOR_TRAP_FLAG)
    good = [event(6, EXCEPTION), {"fields": {_EVENT: 1 << 8}}]
    return Pair([event(0, 1), event(3, 1)], good + ([event(0, OTHER)] if mtf else []))


fixed("injected-nmi-vector", [event(v, NMI) for v in (0, 1, 3, 18, 255)], [event(2, NMI)])
fixed(
    "injected-exception-vector",
    [event(v, EXCEPTION) for v in (32, 64, 128, 255)],
    [event(v, EXCEPTION) for v in (0, 6, 31)],
)
fixed(
    "injected-other-event-vector",
    [event(v, OTHER, needs=(PrimaryControls.MONITOR_TRAP_FLAG,)) for v in (1, 2, 255)],
    [event(0, OTHER, needs=(PrimaryControls.MONITOR_TRAP_FLAG,))],
)
_WITH_CODE = (8, 10, 11, 12, 13, 14, 17)


@pair("injected-error-code-without-reason")
def _(processor: Processor) -> Pair:
    any_vector = processor.target.capabilities.basic.error_code_any_vector
    bad = [
        event(v, kind, error_code=0)
        for v, kind in ((32, EXTERNAL), (2, NMI), (128, INT_N), (1, ICEBP), (3, INT3))
    ]
    bad.append(event(13, EXCEPTION, error_code=0, mode=Mode.REAL))
    without = [event(v, EXCEPTION, error_code=0) for v in (0, 1, 3, 6, 7, 9, 15, 16, 18, 20, 31)]
    good = [event(v, EXCEPTION, error_code=0) for v in _WITH_CODE]
    return Pair(bad, good + without) if any_vector else Pair(bad + without, good)


@pair("injected-error-code-missing")
def _(processor: Processor) -> Pair:
    any_vector = processor.target.capabilities.basic.error_code_any_vector
    without = [event(v, EXCEPTION) for v in _WITH_CODE]
    good = [event(v, EXCEPTION, error_code=0) for v in _WITH_CODE]
    good.append(event(13, EXCEPTION, mode=Mode.REAL))
    return Pair([], good + without) if any_vector else Pair(without, good)


@pair("injected-reserved")
def _(processor: Processor) -> Pair:
    nested = processor.target.capabilities.basic.nested_exception
    reserved = [1 << i for i in range(12, 31) if not (nested and i == 13)]
    return Pair(
        [event(6, EXCEPTION, more=bit) for bit in reserved],
        [event(6, EXCEPTION), {"fields": {_EVENT: 0x7FFF_F000}}],
    )


fixed(
    "injected-error-code-reserved",
    [event(13, EXCEPTION, error_code=1 << i) for i in range(16, 32)],
    [event(13, EXCEPTION, error_code=code) for code in (0, 0x7FFF, 0x8000)],
)


def _length(length: int, kind: int) -> Settings:
    vector = {INT_N: 0x80, ICEBP: 1, INT3: 3}[kind]
    return merged(event(vector, kind), fields={Field.ENTRY_INSTRUCTION_LENGTH: length})


@pair("injected-instruction-length")
def _(processor: Processor) -> Pair:
    zero = processor.target.capabilities.misc.zero_length_injection
    kinds = (INT_N, ICEBP, INT3)
    bad = [_length(n, kind) for n in (16, 32, 0xFFFF_FFFF) for kind in kinds]
    edge = [_length(0, kind) for kind in kinds]
    good = [_length(n, kind) for n in (1, 15) for kind in kinds] + [
        merged(event(6, EXCEPTION), fields={Field.ENTRY_INSTRUCTION_LENGTH: 16})
    ]
    return Pair(bad, good + edge) if zero else Pair(bad + edge, good)


def _entry_bit(name: str, control: EntryControls) -> None:
    @pair(name)
    def make(processor: Processor) -> Pair:
        return Pair([processor.turned(ControlSet.ENTRY, int(control))], [{}])


_entry_bit("entry-to-smm-outside-smm", EntryControls.ENTRY_TO_SMM)
_entry_bit("deactivate-dual-monitor-outside-smm", EntryControls.DEACTIVATE_DUAL_MONITOR)


# --- host state --------------------------------------------------------------------------------------------
def _host_register(name: str, register: str) -> None:
    """Every fixed bit the other way; but for those of CR0 and CR4 that another rule is about."""
    field = Field[f"HOST_{register}"]

    @pair(name)
    def make(processor: Processor) -> Pair:
        can = getattr(processor.target.capabilities, register.lower())
        base = _host_value(processor, field)
        other = CR0.NW | CR0.CD if register == "CR0" else CR4.PAE
        wrong = [bit for bit in bits(can.allowed0 | ~can.allowed1 & (1 << 64) - 1) if not bit & other]
        good = [base] if register == "CR4" else [base, base | CR0.AM]
        return Pair(with_field(field, *(base ^ bit for bit in wrong)), with_field(field, *good))


def _host_value(processor: Processor, field: Field) -> int:
    from vmxlab.image.host_state import host_state

    return host_state(processor.target.monitor, processor.target.capabilities)[field]


_host_register("host-cr0-fixed", "CR0")
_host_register("host-cr4-fixed", "CR4")


@pair("host-cr3-width")
def _(processor: Processor) -> Pair:
    base = _host_value(processor, Field.HOST_CR3)
    return Pair(
        with_field(Field.HOST_CR3, *(base | bit for bit in processor.beyond)),
        with_field(Field.HOST_CR3, base),
    )


def canonical_pair(
    name: str, field: Field, *, good: Iterable[int] = CANONICAL_48, alignment: int = 1, **settings: Any
) -> None:
    """A field that holds a canonical address, of a processor with linear addresses of 48 or 57 bits."""
    good = list(good)

    @pair(name)
    def make(processor: Processor) -> Pair:
        wide = processor.target.capabilities.cr4_fixed1 & CR4.LA57
        bad = (1 << 56, (1 << 64) - (1 << 56) - 1, 1 << 63) if wide else NOT_CANONICAL_48
        values = [value - value % alignment for value in bad]
        return Pair(with_field(field, *values, **settings), with_field(field, *good, **settings))


for _name in ("ESP", "EIP"):
    canonical_pair(f"host-ia32-sysenter-{_name.lower()}-canonical", Field[f"HOST_IA32_SYSENTER_{_name}"])
for _name in ("FS", "GS"):
    canonical_pair(f"host-{_name.lower()}-base-canonical", Field[f"HOST_{_name}_BASE"])
for _name in ("GDTR", "IDTR", "TR"):  # the monitor loads its own again
    canonical_pair(f"host-{_name.lower()}-base-canonical", Field[f"HOST_{_name}_BASE"])


@pair("host-rip-canonical")
def _(processor: Processor) -> Pair:
    base = _host_value(processor, Field.HOST_RIP)
    return Pair(with_field(Field.HOST_RIP, *(base | bit for bit in NOT_CANONICAL_48[::2])), [{}])


for _register in ("ES", "CS", "SS", "DS", "FS", "GS", "TR"):
    _field = Field[f"HOST_{_register}_SELECTOR"]
    _selector = {"CS": layout.SELECTOR_CODE, "TR": layout.SELECTOR_TSS}.get(_register, layout.SELECTOR_DATA)
    _also_good = () if _register in ("CS", "TR") else (0,)
    fixed(
        f"host-{_register.lower()}-selector-rpl-ti",
        with_field(_field, *(_selector | n for n in range(1, 8))),
        with_field(_field, _selector, *_also_good),
    )
fixed("host-cs-is-not-null", with_field(Field.HOST_CS_SELECTOR, 0), [{}])
fixed("host-tr-is-not-null", with_field(Field.HOST_TR_SELECTOR, 0), [{}])


@pair("host-address-space-size-agrees")
def _(processor: Processor) -> Pair:
    # A 32-bit host with the monitor's own state: its EFER is not loaded, its RIP is below 4 GiB.
    settings: Settings = {
        "mode": Mode.PROTECTED,
        "disable": (ExitControls.LOAD_IA32_EFER, ExitControls.HOST_ADDRESS_SPACE_SIZE),
    }
    return Pair([settings], [{"mode": Mode.PROTECTED, "disable": (ExitControls.LOAD_IA32_EFER,)}])


@pair("host-pae")
def _(processor: Processor) -> Pair:
    base = _host_value(processor, Field.HOST_CR4)
    return Pair(with_field(Field.HOST_CR4, base & ~CR4.PAE), with_field(Field.HOST_CR4, base))


# --- what host and guest state share -----------------------------------------------------------------------
_LONG = int(EFER.LME | EFER.LMA)


def _msrs(side: str, load: Any, when_efer: Any) -> None:
    low = side.lower()
    fixed(
        f"{low}-ia32-perf-global-ctrl-reserved",
        with_field(
            Field[f"{side}_IA32_PERF_GLOBAL_CTRL"],
            *(1 << i for i in (*range(40, 48), *range(49, 64))),
            enable=(load.LOAD_IA32_PERF_GLOBAL_CTRL,),
        ),
        with_field(Field[f"{side}_IA32_PERF_GLOBAL_CTRL"], 0, enable=(load.LOAD_IA32_PERF_GLOBAL_CTRL,)),
    )
    fixed(
        f"{low}-ia32-pat-types",
        with_field(
            Field[f"{side}_IA32_PAT"],
            *(
                0x0606_0606_0606_0606 & ~(0xFF << 8 * i) | kind << 8 * i
                for i in range(8)
                for kind in (2, 3, 8, 0x86)
            ),
            enable=(load.LOAD_IA32_PAT,),
        ),
        with_field(
            Field[f"{side}_IA32_PAT"],
            0x0007_0406_0007_0406,
            0x0606_0606_0606_0506,
            enable=(load.LOAD_IA32_PAT,),
        ),
    )
    efer = Field[f"{side}_IA32_EFER"]
    reserved = bits(~0xD01 & (1 << 64) - 1)
    enable = {"enable": (load.LOAD_IA32_EFER,)}
    fixed(
        f"{low}-ia32-efer-reserved",
        with_field(efer, *(_LONG | bit for bit in reserved), **enable),
        with_field(efer, _LONG, _LONG | EFER.SCE, **enable),
    )
    fixed(
        f"{low}-ia32-s-cet-reserved",
        with_field(
            Field[f"{side}_IA32_S_CET"],
            *(1 << i for i in range(6, 10)),
            enable=(load.LOAD_CET_STATE,),
            **_cet(side),
        ),
        with_field(Field[f"{side}_IA32_S_CET"], 0, 0x3F, enable=(load.LOAD_CET_STATE,), **_cet(side)),
    )
    fixed(
        f"{low}-ia32-s-cet-tracker",
        with_field(Field[f"{side}_IA32_S_CET"], 3 << 10, enable=(load.LOAD_CET_STATE,), **_cet(side)),
        with_field(
            Field[f"{side}_IA32_S_CET"], 1 << 10, 1 << 11, enable=(load.LOAD_CET_STATE,), **_cet(side)
        ),
    )
    for field in ("IA32_S_CET", "IA32_INTERRUPT_SSP_TABLE_ADDR"):
        canonical_pair(
            f"{low}-{lower(field)}-canonical",
            Field[f"{side}_{field}"],
            good=(0, 0x1000),
            alignment=0x1000,
            enable=(load.LOAD_CET_STATE,),
            **_cet(side),
        )
    fixed(
        f"{low}-ssp-alignment",
        with_field(Field[f"{side}_SSP"], 1, 2, 3, enable=(load.LOAD_CET_STATE,), **_cet(side)),
        with_field(Field[f"{side}_SSP"], 0, 4, enable=(load.LOAD_CET_STATE,), **_cet(side)),
    )
    fixed(
        f"{low}-pkrs-reserved",
        with_field(Field[f"{side}_IA32_PKRS"], *(1 << i for i in range(32, 64)), enable=(load.LOAD_PKRS,)),
        with_field(Field[f"{side}_IA32_PKRS"], 0, 0xFFFF_FFFF, enable=(load.LOAD_PKRS,)),
    )


def _cet(side: str) -> Settings:
    names = ("IA32_S_CET", "SSP", "IA32_INTERRUPT_SSP_TABLE_ADDR")
    return {"fields": {Field[f"{side}_{name}"]: 0 for name in names}}


_msrs("HOST", ExitControls, ExitControls.HOST_ADDRESS_SPACE_SIZE)
_msrs("GUEST", EntryControls, EntryControls.IA32E_MODE_GUEST)
canonical_pair(
    "host-ssp-canonical",
    Field.HOST_SSP,
    good=(0, 8),
    alignment=8,
    enable=(ExitControls.LOAD_CET_STATE,),
    **_cet("HOST"),
)
_HOST_EFER = {"enable": (ExitControls.LOAD_IA32_EFER,)}
fixed(
    "host-efer-lma",
    with_field(Field.HOST_IA32_EFER, int(EFER.LME), **_HOST_EFER),
    with_field(Field.HOST_IA32_EFER, _LONG, **_HOST_EFER),
)
fixed(
    "host-efer-lme",
    with_field(Field.HOST_IA32_EFER, int(EFER.LMA), **_HOST_EFER),
    with_field(Field.HOST_IA32_EFER, _LONG, **_HOST_EFER),
)


def _wp_pair(name: str, side: str) -> None:
    @pair(name)
    def make(processor: Processor) -> Pair:
        capabilities = processor.target.capabilities
        cr0 = int((CR0.PG | CR0.NE | CR0.ET | CR0.PE | capabilities.cr0_fixed0) & capabilities.cr0_fixed1)
        cr4 = int(CR4.PAE | CR4.VMXE | CR4.CET)

        def of(with_cr0: int, with_cr4: int) -> Settings:
            fields = {Field[f"{side}_CR0"]: with_cr0, Field[f"{side}_CR4"]: with_cr4}
            return {"fields": fields, "needs": (CR4.CET,)}

        return Pair([of(cr0, cr4)], [of(cr0 | CR0.WP, cr4), of(cr0, cr4 & ~CR4.CET)])


_wp_pair("host-cet-needs-wp", "HOST")
_wp_pair("guest-cet-needs-wp", "GUEST")


# --- MSR loading -------------------------------------------------------------------------------------------
def load(*entries: tuple[int, int] | MsrEntry) -> Settings:
    """A case that loads MSRs on VM entry."""
    return {"entry_msr_load": MsrArea(list(entries))}


_STAR = (int(Msr.IA32_STAR), 0)
fixed(
    "loaded-msr-reserved",
    [load(MsrEntry(Msr.IA32_STAR, 0, 1 << i)) for i in range(32)]
    + [load(_STAR, MsrEntry(Msr.IA32_STAR, 0, 1))],
    [load(_STAR)],
)
fixed(
    "loaded-msr-is-no-segment-base",
    [load((Msr.IA32_FS_BASE, 0)), load((Msr.IA32_GS_BASE, 0)), load(_STAR, (Msr.IA32_FS_BASE, 0))],
    [load((Msr.IA32_KERNEL_GS_BASE, 0))],
)
fixed(
    "loaded-msr-is-no-x2apic-msr",
    [load((msr, 0)) for msr in (0x800, 0x808, 0x80B, 0x83F, 0x8FF)],
    [load((Msr.IA32_STAR, 0x808))],
)
fixed("loaded-msr-is-no-smm-msr", [load((Msr.IA32_SMM_MONITOR_CTL, 0))], [load(_STAR)])
fixed(
    "loaded-msr-takes-its-value",
    [load(_STAR, (msr, 1 << 63)) for msr in (Msr.IA32_LSTAR, Msr.IA32_KERNEL_GS_BASE, Msr.IA32_SYSENTER_ESP)]
    + [load((Msr.IA32_SYSENTER_EIP, 1 << 47)), load((Msr.IA32_PAT, 2)), load((Msr.IA32_VMX_BASIC, 0))]
    + [load((Msr.IA32_EFER, 0)), load((Msr.IA32_EFER, _LONG | 2))],
    [
        load((Msr.IA32_LSTAR, CANONICAL_48[0]), (Msr.IA32_KERNEL_GS_BASE, CANONICAL_48[1])),
        load((Msr.IA32_PAT, 0x0007_0406_0007_0406), (Msr.IA32_EFER, int(EFER.LME))),
        load((Msr.IA32_SYSENTER_ESP, 0), (Msr.IA32_SYSENTER_EIP, 0), (Msr.IA32_STAR, (1 << 64) - 1)),
    ],
)
