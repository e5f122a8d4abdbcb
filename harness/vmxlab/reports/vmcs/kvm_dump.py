"""The text that Linux's KVM prints to the kernel log on a failed VM entry (kvm_intel.dump_invalid_vmcs=1).

It comes in sections, a line for several fields, and has changed with the versions of Linux: the items are
looked for one by one within their section, whatever the line they stand in. Time stamps, "kvm_intel:" and the
">" of a quoted mail before them don't matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vmxlab.reports.vmcs.text import FieldCollector, VmcsText
from vmxlab.sdm.fields import Field

FORMAT = "KVM's dump of a VMCS"
LIMITS = (
    "KVM does not print the addresses of bitmaps and of MSR areas, the CR3-target count, the VMCS link "
    "pointer, the PML address, VM-function controls, nor PKRS and the like, S_CET only of late; fields of "
    "MSRs only where the control that loads them is 1. It reads the VMCS after the failure."
)

_SECTION = re.compile(r"\*\*\* (Guest|Host|Control) State \*\*\*")
_START = re.compile(r"VMCS \S+, last attempted VM-entry on CPU (\d+)")
_PREFIX = re.compile(
    r"^(?:> ?)*(?:<\d>)?(?:[\w: .+-]*?\bkernel:\s*)?(?:\[\s*[\d.]+\](?:\[\s*[CT]\d+\])?\s*)?"
    r"(?:kvm(?:_intel)?(?: \[\d+\])?:\s*)?"
)
_DIGITS = r"(0x)?([0-9a-fA-F]*)"
_HOLE = re.compile(r"\{(\w*):(\d+)\}")


@dataclass(frozen=True, slots=True)
class _Item:
    """Words around one or more numbers: which fields these are, and how many digits each is printed with."""

    pattern: re.Pattern[str]
    fields: tuple[Field | None, ...]
    digits: tuple[int, ...]

    @classmethod
    def of(cls, template: str) -> _Item:
        """From text with {FIELD:digits} in it; without a name the number is skipped."""
        holes = _HOLE.findall(template)
        words = _HOLE.split(template)[::3]
        first, *more = (_lenient(part) for part in words)
        # A line may be cut off between its numbers: what comes after one is there or not.
        *between, last = more
        pattern = r"\b" + first + _DIGITS + "".join(f"(?:{part}{_DIGITS}" for part in between)
        pattern += last + ")?" * len(between)
        fields = tuple(Field[name] if name else None for name, _ in holes)
        return cls(re.compile(pattern), fields, tuple(int(digits) for _, digits in holes))


def _lenient(words: str) -> str:
    """Words as a pattern, with any space where they have some, and around an equals sign."""
    return re.sub(r"(?:\\ )*=(?:\\ )*", r"\\s*=\\s*", re.escape(words)).replace(r"\ ", r"\s*")


def _segment(name: str) -> str:
    return (
        f"{name}: sel={{GUEST_{name}_SELECTOR:4}}, attr={{GUEST_{name}_ACCESS_RIGHTS:5}}, "
        f"limit={{GUEST_{name}_LIMIT:8}}, base={{GUEST_{name}_BASE:16}}"
    )


def _shadow_stacks(whose: str) -> str:
    return (
        f"S_CET = {{{whose}_IA32_S_CET:16}}, SSP = {{{whose}_SSP:16}}, "
        f"SSP TABLE = {{{whose}_IA32_INTERRUPT_SSP_TABLE_ADDR:16}}"
    )


def _items(*templates: str) -> tuple[_Item, ...]:
    return tuple(_Item.of(template) for template in templates)


_GUEST = _items(
    "CR0: actual={GUEST_CR0:16}, shadow={CR0_READ_SHADOW:16}, gh_mask={CR0_GUEST_HOST_MASK:16}",
    "CR4: actual={GUEST_CR4:16}, shadow={CR4_READ_SHADOW:16}, gh_mask={CR4_GUEST_HOST_MASK:16}",
    "CR3 ={GUEST_CR3:16}",
    *(f"PDPTR{n} ={{GUEST_PDPTE{n}:16}}" for n in range(4)),
    "RFLAGS ={GUEST_RFLAGS:8}",
    "DR7 ={GUEST_DR7:16}",
    "Sysenter RSP ={GUEST_IA32_SYSENTER_ESP:16} "
    "CS:RIP={GUEST_IA32_SYSENTER_CS:4}:{GUEST_IA32_SYSENTER_EIP:16}",
    "RSP ={GUEST_RSP:16}",
    "RIP ={GUEST_RIP:16}",
    *(_segment(name) for name in ("CS", "DS", "SS", "ES", "FS", "GS", "LDTR", "TR")),
    "GDTR: limit={GUEST_GDTR_LIMIT:8}, base={GUEST_GDTR_BASE:16}",
    "IDTR: limit={GUEST_IDTR_LIMIT:8}, base={GUEST_IDTR_BASE:16}",
    "EFER={:16} (autoload)",
    "EFER={:16} (effective)",
    "EFER ={GUEST_IA32_EFER:16}",
    "PAT ={GUEST_IA32_PAT:16}",
    "DebugCtl ={GUEST_IA32_DEBUGCTL:16}",
    "DebugExceptions ={GUEST_PENDING_DEBUG_EXCEPTIONS:16}",
    "PerfGlobCtl ={GUEST_IA32_PERF_GLOBAL_CTRL:16}",
    "BndCfgS ={GUEST_IA32_BNDCFGS:16}",
    "Interruptibility ={GUEST_INTERRUPTIBILITY_STATE:8}",
    "ActivityState ={GUEST_ACTIVITY_STATE:8}",
    "InterruptStatus ={GUEST_INTERRUPT_STATUS:4}",
    _shadow_stacks("GUEST"),
)
_HOST = _items(
    "Sysenter RSP ={HOST_IA32_SYSENTER_ESP:16} CS:RIP={HOST_IA32_SYSENTER_CS:4}:{HOST_IA32_SYSENTER_EIP:16}",
    "RIP ={HOST_RIP:16}",
    "RSP ={HOST_RSP:16}",
    "CS={HOST_CS_SELECTOR:4} SS={HOST_SS_SELECTOR:4} DS={HOST_DS_SELECTOR:4} ES={HOST_ES_SELECTOR:4} "
    "FS={HOST_FS_SELECTOR:4} GS={HOST_GS_SELECTOR:4} TR={HOST_TR_SELECTOR:4}",
    "FSBase={HOST_FS_BASE:16} GSBase={HOST_GS_BASE:16} TRBase={HOST_TR_BASE:16}",
    "GDTBase={HOST_GDTR_BASE:16} IDTBase={HOST_IDTR_BASE:16}",
    "CR0={HOST_CR0:16} CR3={HOST_CR3:16} CR4={HOST_CR4:16}",
    "EFER ={HOST_IA32_EFER:16}",
    "PAT ={HOST_IA32_PAT:16}",
    "PerfGlobCtl ={HOST_IA32_PERF_GLOBAL_CTRL:16}",
    _shadow_stacks("HOST"),
)
_CONTROL = _items(
    "PinBased={PIN_BASED_CONTROLS:8}",
    "CPUBased={PRIMARY_PROCESSOR_BASED_CONTROLS:8}",
    "SecondaryExec={SECONDARY_PROCESSOR_BASED_CONTROLS:8}",
    "TertiaryExec={TERTIARY_PROCESSOR_BASED_CONTROLS:16}",
    "EntryControls={ENTRY_CONTROLS:8}",
    "ExitControls={EXIT_CONTROLS:8}",
    "ExceptionBitmap={EXCEPTION_BITMAP:8}",
    "PFECmask={PAGE_FAULT_ERROR_CODE_MASK:8}",
    "PFECmatch={PAGE_FAULT_ERROR_CODE_MATCH:8}",
    "VMEntry: intr_info={ENTRY_INTERRUPTION_INFORMATION:8} errcode={ENTRY_EXCEPTION_ERROR_CODE:8} "
    "ilen={ENTRY_INSTRUCTION_LENGTH:8}",
    "VMExit: intr_info={EXIT_INTERRUPTION_INFORMATION:8} errcode={EXIT_INTERRUPTION_ERROR_CODE:8} "
    "ilen={EXIT_INSTRUCTION_LENGTH:8}",
    "reason={EXIT_REASON:8} qualification={EXIT_QUALIFICATION:16}",
    "IDTVectoring: info={IDT_VECTORING_INFORMATION:8} errcode={IDT_VECTORING_ERROR_CODE:8}",
    "TSC Offset ={TSC_OFFSET:16}",
    "TSC Multiplier ={TSC_MULTIPLIER:16}",
    "SVI|RVI = {:2}|{:2}",
    "TPR Threshold ={TPR_THRESHOLD:2}",
    "APIC-access addr ={APIC_ACCESS_ADDRESS:16}",
    "virt-APIC addr ={VIRTUAL_APIC_ADDRESS:16}",
    "PostedIntrVec ={POSTED_INTERRUPT_NOTIFICATION_VECTOR:2}",
    "EPT pointer ={EPT_POINTER:16}",
    "PLE Gap={PLE_GAP:8} Window={PLE_WINDOW:8}",
    "Virtual processor ID ={VPID:4}",
)
_SECTIONS = {"Guest": _GUEST, "Host": _HOST, "Control": _CONTROL}
# Printed among the fields, and no fields: the MSRs that are loaded and stored by areas.
_MSRS = re.compile(r"^(?:MSR (?:guest|host) \w+:|\s*\d+: msr=0x[0-9a-f]+ value=0x[0-9a-f]+)")


def is_meant(text: str) -> bool:
    """Whether a section of KVM's begins in it."""
    return _SECTION.search(text) is not None


def read(text: str) -> list[VmcsText]:
    """Every dump in the text, in order."""
    found: list[VmcsText] = []
    for title, lines in _dumps(text):
        collector = _read_dump(lines)
        if collector.fields:
            found.append(VmcsText(title, FORMAT, collector.fields, tuple(collector.oddities), LIMITS))
    return found


def _dumps(text: str) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """The numbered lines of each dump: a new one begins with KVM's first line, or with a guest section."""
    title, lines, count = "", list[tuple[int, str]](), 0
    for number, raw in enumerate(text.splitlines(), 1):
        line = _PREFIX.sub("", raw.rstrip("\r"), count=1)
        start, section = _START.search(line), _SECTION.search(line)
        again = section is not None and section[1] == "Guest" and any("*** Guest" in old for _, old in lines)
        if start is not None or again:
            if lines:
                yield title, lines
            lines = []
        if start is not None or (section is not None and not lines):
            count += 1
            title = f"dump {count}" + (f", CPU {start[1]}" if start else "")
        if start is not None or lines or section is not None:
            lines.append((number, line))
    if lines:
        yield title, lines


def _read_dump(lines: Sequence[tuple[int, str]]) -> FieldCollector:
    collector = FieldCollector()
    items: Sequence[_Item] = ()
    sections = set()
    for number, line in lines:
        section = _SECTION.search(line)
        if section is not None:
            items = _SECTIONS[section[1]]
            sections.add(section[1])
            continue
        rest = _take_items(collector, number, line, items).strip()
        if items and rest and not _MSRS.match(rest) and (_is_part(rest) or number == lines[-1][0]):
            collector.odd(number, f"not known, and left out: {rest[:80]!r}")
    for missing in [name for name in _SECTIONS if name not in sections]:
        collector.odd(lines[-1][0], f'the dump ends here without its section "{missing} State"')
    return collector


def _is_part(text: str) -> bool:
    """Whether a rest of a line looks like a part of a dump, rather than other words of the kernel log."""
    return re.search(r"[\w)]\s*=\s*(?:0x)?[0-9a-f]|^\w+:?\s*sel", text) is not None


def _take_items(collector: FieldCollector, number: int, line: str, items: Sequence[_Item]) -> str:
    """Take every item that stands in the line; what is left of it."""
    for item in items:
        match = item.pattern.search(line)
        if match is None:
            continue
        values = match.groups()[1::2]
        for field, digits, value in zip(item.fields, item.digits, values, strict=True):
            if field is None:
                continue
            if value is None or len(value) < digits:
                collector.odd(number, f"{field.name} is cut off: {value or ''!r} has not its {digits} digits")
            else:
                collector.take(number, field, int(value, 16))
        line = line[: match.start()] + " " + line[match.end() :]
    return line
