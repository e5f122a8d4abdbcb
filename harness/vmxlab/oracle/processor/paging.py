"""Accesses of L2 to linear addresses, by `vmxlab.oracle.translation`: where they go, or which exit or fault.

The translation knows what memory says now. What the processor may still have cached of it is kept here
(SDM Vol. 3A, 4.10; Vol. 3C, 29.4): where memory says something else than it did, the oracle can't tell.
"""

from __future__ import annotations

from collections.abc import Iterator

from vmxlab.oracle import translation
from vmxlab.oracle.accesses import (
    Access,
    AccessKind,
    EptMisconfiguration,
    EptViolation,
    PageFault,
    PagingState,
    PmlFull,
    Translated,
    Translation,
)
from vmxlab.oracle.ept import LOG
from vmxlab.oracle.exits import SAVED_RF, VmExit
from vmxlab.oracle.processor.state import Fault, Processor
from vmxlab.oracle.values import UNDEFINED, Bits, CannotTell, Rule, Unknown
from vmxlab.sdm.controls import PinControls, SecondaryControls, TertiaryControls
from vmxlab.sdm.exit_reasons import ExitReason
from vmxlab.sdm.fields import Field
from vmxlab.sdm.registers import RFLAGS, Vector

READ = AccessKind.READ
WRITE = AccessKind.WRITE
FETCH = AccessKind.FETCH
READ_WRITE = AccessKind.READ_MODIFY_WRITE

_PAGE = 4096
_NMI_UNBLOCKING = 1 << 12
_VIOLATION = Rule("EPT violation", "Vol. 3C, 29.3.3.2 and 28.2.1, table 28-7")
_MISCONFIGURATION = Rule("EPT misconfiguration", "Vol. 3C, 29.3.3.1")
CONVERTED = Rule("an EPT violation that is a virtualization exception", "Vol. 3C, 26.5.7.2")
EPTP_INDEX = Rule("#VE stores the EPTP index", "Vol. 3C, 26.5.7.2 and 25.6.20")
_LOG_FULL = Rule("page-modification log-full event", "Vol. 3C, 29.3.6")


def translate(processor: Processor, linear: int, kind: AccessKind, *, implicit: bool = False) -> int:
    """The machine address of an access within one page. Raises Fault (#PF), VmExit, CannotTell.

    `implicit`: an access of the processor's own to a table, with supervisor rights.
    """
    key = (
        linear // _PAGE,
        int(kind),
        processor.cpl == 3 and not implicit,
        implicit,
        processor.cr0,
        processor.cr3,
        processor.cr4,
        processor.efer,
        processor.rflags.value & RFLAGS.AC,
        processor.memory.tables_version,
    )
    page = processor.translated.get(key)
    if page is None:
        page, lasts = _translate(processor, linear, kind, implicit=implicit)
        if lasts:
            processor.translated[key] = page
    return page + linear % _PAGE


def _translate(processor: Processor, linear: int, kind: AccessKind, *, implicit: bool) -> tuple[int, bool]:
    """The machine address of the page, and whether the same access would do nothing else again."""
    access = Access(kind, user=processor.cpl == 3 and not implicit, implicit=implicit)
    state = paging_state(processor)
    ending = translation.translate(state, linear, access, processor.memory.read_table)
    if isinstance(ending, Unknown):
        raise CannotTell(ending.why)
    _set_flags(processor, ending, linear)
    match ending:
        case Translated():
            _remember(processor, ending)
            return ending.hpa & -_PAGE, not (ending.writes or ending.possible_flags or ending.logged)
        case PageFault():
            _refuse_cached(processor, processor.cached.linear, linear)
            raise Fault(Vector.PF, int(ending.error_code), linear=ending.linear)
        case EptViolation():
            raise _violation(processor, ending, linear)
        case EptMisconfiguration():
            _refuse_cached(processor, processor.cached.linear, linear)
            _refuse_cached(processor, processor.cached.physical, ending.gpa)
            raise VmExit(
                ExitReason.EPT_MISCONFIGURATION,
                (_MISCONFIGURATION, *ending.rules),
                physical=ending.gpa,
                rf=True,
                field_rules={"rflags": (SAVED_RF,)},
            )
        case PmlFull():
            known = ~_nmi_bit(processor) & (1 << 64) - 1
            raise VmExit(
                ExitReason.PML_FULL,
                (_LOG_FULL, *ending.rules),
                qualification=Bits(0, known),
                rf=True,
                field_rules={"rflags": (SAVED_RF,)},
            )
    raise AssertionError(ending)


def _violation(processor: Processor, ending: EptViolation, linear: int) -> VmExit:
    _refuse_cached(processor, processor.cached.linear, linear)
    _refuse_cached(processor, processor.cached.physical, ending.gpa)
    known = ending.qualification.known & ~_nmi_bit(processor)
    qualification = Bits(ending.qualification.value, known)
    if processor.on(SecondaryControls.EPT_VIOLATION_VE) and ending.convertible and not processor.delivering:
        _convert(processor, ending, qualification)
    return VmExit(
        ExitReason.EPT_VIOLATION,
        (_VIOLATION, *ending.rules),
        qualification=qualification,
        linear=UNDEFINED if ending.linear is None else ending.linear,
        physical=ending.gpa,
        rf=True,
        field_rules={"rflags": (SAVED_RF,)},
    )


def _convert(processor: Processor, ending: EptViolation, qualification: Bits) -> None:
    """#VE instead of the exit, if the information area is free (26.5.7.1 and 26.5.7.2)."""
    area = processor.vmcs.get(Field.VIRTUALIZATION_EXCEPTION_INFORMATION_ADDRESS)
    in_use = processor.memory.read(area + 4, 4)
    if in_use is None:
        raise CannotTell("the virtualization-exception information area")
    if in_use:
        return
    if ending.linear is None:
        raise CannotTell("a virtualization exception without a linear address")
    words = (0xFFFF_FFFF << 32 | ExitReason.EPT_VIOLATION, qualification.value, ending.linear, ending.gpa)
    for i, word in enumerate(words):
        processor.memory.write_by(CONVERTED, area + 8 * i, word.to_bytes(8, "little"))
    for i in range(8):
        if qualification.known >> 8 * i & 0xFF != 0xFF:
            processor.memory.forget(area + 8 + i, 1)
    index = processor.vmcs.get(Field.EPTP_INDEX)
    processor.memory.write_by(EPTP_INDEX, area + 32, index.to_bytes(2, "little"))
    raise Fault(Vector.VE, why="an EPT violation that is converted")


def _nmi_bit(processor: Processor) -> int:
    """Bit 12 where it is undefined (Vol. 3C, 28.2.1, table 28-7)."""
    undefined = processor.on(PinControls.NMI_EXITING) and not processor.on(PinControls.VIRTUAL_NMIS)
    return _NMI_UNBLOCKING if undefined else 0


def paging_state(processor: Processor) -> PagingState:
    """What decides about a translation, as it is now."""
    with_ept = processor.on(SecondaryControls.ENABLE_EPT)
    with_pml = with_ept and processor.on(SecondaryControls.ENABLE_PML)
    pdptes = processor.pdptes
    return PagingState(
        cr0=processor.cr0,
        cr3=processor.cr3,
        cr4=processor.cr4,
        efer=processor.efer,
        rflags=processor.rflags.value,
        pdptes=pdptes if pdptes is None else (pdptes[0], pdptes[1], pdptes[2], pdptes[3]),
        pkru=None,
        pkrs=None,
        maxphyaddr=processor.width,
        eptp=processor.vmcs.get(Field.EPT_POINTER) if with_ept else None,
        ept_features=processor.capabilities.ept_vpid if with_ept else None,
        secondary=SecondaryControls(processor.secondary),
        tertiary=TertiaryControls(processor.vmcs.tertiary()),
        pml_index=processor.vmcs.get(Field.PML_INDEX) if with_pml else None,
    )


def _set_flags(processor: Processor, ending: Translation, linear: int) -> None:
    """What the walk wrote: accessed and dirty flags, and the page-modification log."""
    assert not isinstance(ending, Unknown)
    for address, size, value in ending.writes:
        processor.memory.set_flags(address, value.to_bytes(size, "little"))
    for address, size, flags in ending.possible_flags:
        for i in range(size):
            if flags >> 8 * i & 0xFF:
                processor.memory.forget_flags(address + i, 1)
    for gpa in ending.logged:
        index = processor.vmcs.get(Field.PML_INDEX)
        log = processor.vmcs.get(Field.PML_ADDRESS)
        processor.memory.write_by(LOG, log + 8 * index, gpa.to_bytes(8, "little"))
        processor.vmcs.put(Field.PML_INDEX, index - 1 & 0xFFFF)


# --- what may be cached ------------------------------------------------------------------------------------


def _remember(processor: Processor, ending: Translated) -> None:
    """Keep a translation. Raises CannotTell where an older one says something else."""
    if ending.page_size is not None:
        _keep(processor.cached.linear, ending.linear, ending.hpa, min(ending.page_size, _PAGE))
    if ending.ept_page_size is not None:
        _keep(processor.cached.physical, ending.gpa, ending.hpa, ending.ept_page_size)


def _keep(cached: dict[tuple[int, int], int], address: int, hpa: int, size: int) -> None:
    for old in _cached_at(cached, address):
        if old != hpa:
            raise CannotTell(f"whether an older translation of {address:#x} is still cached")
    cached[address & -size, size] = hpa & -size


def _refuse_cached(processor: Processor, cached: dict[tuple[int, int], int], address: int) -> None:
    if processor.memory.tables_changed and any(True for _ in _cached_at(cached, address)):
        raise CannotTell(f"whether an older translation of {address:#x}, by which it is allowed, is cached")


def _cached_at(cached: dict[tuple[int, int], int], address: int) -> Iterator[int]:
    """Where `address` lies by each cached translation that covers it."""
    for size in (_PAGE, 1 << 21, 1 << 22, 1 << 30):
        base = cached.get((address & -size, size))
        if base is not None:
            yield base + (address & size - 1)
