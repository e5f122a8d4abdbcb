"""What a processor's VMX can do, as tables: each capability MSR by field, each control by what it may be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vmxlab.reports.tables import Column, Table, Value
from vmxlab.sdm.controls import ControlSet
from vmxlab.sdm.flags import BitFlags
from vmxlab.sdm.msrs import Msr
from vmxlab.sdm.registers import CR0, CR4
from vmxlab.structures.capabilities import Capabilities
from vmxlab.structures.control_capability import ControlCapability
from vmxlab.structures.register import Bit, Bits, Register

FIXED_0, FIXED_1, FREE = "fixed 0", "fixed 1", "free"

_SETTING = Column("setting", "setting", styles={FIXED_1: "bold yellow", FREE: "bold green", FIXED_0: "dim"})
_FIELD_COLUMNS = (
    Column("bits", "bits", right=True),
    Column("field", "field"),
    Column("value", "value", right=True, styles={"yes": "bold green", "no": "dim"}),
    Column("meaning", "meaning", fold=True),
)


def capability_tables(capabilities: Capabilities) -> list[Table]:
    """Everything that Appendix A of the SDM (Vol. 3D) says of this processor, in its order.

    Raises MissingCapability where it has no VMX.
    """
    registers: list[Register] = [
        capabilities.basic,
        capabilities.misc,
        capabilities.ept_vpid,
        capabilities.vmfunc,
    ]
    basic, *others = (_register_table(register) for register in registers)
    return [
        basic,
        *(control_table(capabilities, controls) for controls in ControlSet),
        others[0],
        _control_register_table("CR0 in VMX operation", capabilities.cr0, CR0),
        _control_register_table("CR4 in VMX operation", capabilities.cr4, CR4),
        *others[1:],
        *_other_table(capabilities),
    ]


def control_table(capabilities: Capabilities, controls: ControlSet) -> Table:
    """A set of controls: each by name, what it must or may be.

    Bits without a name follow in one row for each setting; those that must be 0, as reserved ones do, are
    left out.
    """
    capability = capabilities.control(controls)
    msr = capabilities.control_msr(controls)
    if capability.allowed1 == 0:
        title = f"{controls.value}\nthis processor has none of them"
    else:
        title = f"{controls.value}\n{msr.name} = {capabilities.raw[msr]:#018x}"
    columns = (Column("bit", "bit", right=True), Column("control", "control", fold=True), _SETTING)
    return Table(columns, list(_settings(capability, controls.flags)), title)


def difference_table(one: Capabilities, other: Capabilities, names: tuple[str, str]) -> Table:
    """What two processors can do differently: a row for each control, field and bit that is not the same."""
    first, second = (dict(_facts(capabilities)) for capabilities in (one, other))
    # A bit that is said of one only can't be set on the other; of a processor without VMX nothing is said.
    absent = (FIXED_0 if one.raw else None, FIXED_0 if other.raw else None)
    rows = [
        (*fact, first.get(fact, absent[0]), second.get(fact, absent[1]))
        for fact in dict.fromkeys((*first, *second))
        if first.get(fact) != second.get(fact)
    ]
    columns = (
        Column("msr", "MSR"),
        Column("what", "control or field", fold=True),
        Column("first", names[0], styles=_SETTING.styles),
        Column("second", names[1], styles=_SETTING.styles),
    )
    return Table(columns, rows)


def _facts(capabilities: Capabilities) -> Iterator[tuple[tuple[str, str], Value]]:
    """Everything there is to say of a processor, as (MSR, what) and a value; nothing of one without VMX."""
    if not capabilities.raw:
        return
    for register in (capabilities.basic, capabilities.misc, capabilities.ept_vpid, capabilities.vmfunc):
        for field in register.table():
            value = field.__get__(register, type(register))
            yield (register.MSR.name, field.name), _value(field, value)
    for controls in ControlSet:
        capability = capabilities.control(controls)
        for bit in range(capability.width):
            state = setting(capability, bit)
            if state != FIXED_0:  # what is missing on both sides is no row
                yield (controls.msr.name, capability.name_of(bit)), state
    for name, capability, flags in (
        ("CR0", capabilities.cr0, CR0),
        ("CR4", capabilities.cr4, CR4),
    ):
        for bit in range(capability.width):
            state = setting(capability, bit)
            if state != FIXED_0:
                yield (f"{name} in VMX operation", flags(1 << bit).name or f"bit {bit}"), state


def setting(capability: ControlCapability, bit: int) -> str:
    """What one bit may be: "fixed 0", "fixed 1" or "free"."""
    if not capability.allowed1 >> bit & 1:
        return FIXED_0
    return FIXED_1 if capability.allowed0 >> bit & 1 else FREE


def _settings(capability: ControlCapability, flags: type[BitFlags]) -> Iterator[tuple[Value, ...]]:
    names = {int(flag).bit_length() - 1: flag.name for flag in flags}
    for bit, name in sorted(names.items()):
        yield bit, name, setting(capability, bit)
    for state in (FIXED_1, FREE):
        unnamed = [
            bit for bit in range(capability.width) if bit not in names and setting(capability, bit) == state
        ]
        if unnamed:
            yield "", f"bits {spans(unnamed)} (reserved)", state


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers, neighbours as a range: "1-2, 4"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _control_register_table(title: str, capability: ControlCapability, flags: type[BitFlags]) -> Table:
    columns = (Column("bit", "bit", right=True), Column("flag", "flag", fold=True), _SETTING)
    title += f"\nFIXED0 = {capability.allowed0:#x}, FIXED1 = {capability.allowed1:#x}"
    return Table(columns, list(_settings(capability, flags)), title)


def _register_table(register: Register) -> Table:
    rows: list[tuple[Value, ...]] = []
    for field in register.table():
        value = field.__get__(register, type(register))
        span = str(field.low) if field.low == field.high else f"{field.high}:{field.low}"
        rows.append((span, field.name, _value(field, value), field.feature))
    if register.undefined:
        rows.append(("", "(undefined)", f"{register.undefined:#x}", "bits that the manual does not define"))
    return Table(_FIELD_COLUMNS, rows, f"{register.MSR.name} = {register.raw:#018x}")


def _value(field: Bits, value: int) -> Value:
    if isinstance(field, Bit):
        return bool(value)
    return str(value) if value < 10 else f"{value:#x}"


_SHOWN = frozenset(
    {
        Msr.IA32_VMX_BASIC,
        Msr.IA32_VMX_MISC,
        Msr.IA32_VMX_EPT_VPID_CAP,
        Msr.IA32_VMX_VMFUNC,
        Msr.IA32_VMX_CR0_FIXED0,
        Msr.IA32_VMX_CR0_FIXED1,
        Msr.IA32_VMX_CR4_FIXED0,
        Msr.IA32_VMX_CR4_FIXED1,
    }
)


def _other_table(capabilities: Capabilities) -> list[Table]:
    """The MSRs that no table above decodes: those that the TRUE ones replace, and what else was read."""
    decoded = _SHOWN | {capabilities.control_msr(controls) for controls in ControlSet}
    rows = [
        (Msr(msr).name if msr in Msr.__members__.values() else "(unknown)", f"{msr:#x}", f"{value:#018x}")
        for msr, value in capabilities.raw.items()
        if msr not in decoded
    ]
    columns = (
        Column("name", "MSR"),
        Column("number", "number", right=True),
        Column("value", "value", right=True),
    )
    return [Table(columns, rows, "other MSRs that were read")] if rows else []
