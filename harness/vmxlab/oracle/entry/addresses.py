"""Rules that many fields share: addresses of pages and of MSR areas."""

from __future__ import annotations

from collections.abc import Iterable

from vmxlab.oracle.entry.rule import RuleTable
from vmxlab.oracle.entry.vmcs import Vmcs
from vmxlab.sdm.fields import Field
from vmxlab.sdm.flags import BitFlags

MSR_ENTRY_BYTES = 16


def structure_address(
    table: RuleTable,
    field: Field,
    what: str,
    *,
    alignment: int = 4096,
    when: Iterable[BitFlags] = (),
    name: str | None = None,
) -> None:
    """Two rules: the address of a structure is aligned, and lies within the physical-address width."""
    name = name or field.name.lower().replace("_", "-")
    low = alignment.bit_length() - 2

    def aligned(vmcs: Vmcs) -> bool:
        return not vmcs[field] % alignment

    def within(vmcs: Vmcs) -> bool:
        return vmcs.fits(vmcs[field])

    table.add(f"{name}-alignment", f"Bits {low}:0 of the {what} are 0.", aligned, [field], when=when)
    table.add(
        f"{name}-width",
        f"The {what} sets no bit beyond the physical-address width.",
        within,
        [field],
        when=when,
    )


def msr_area(table: RuleTable, address: Field, count: Field, what: str) -> None:
    """Three rules for an MSR area that is not empty: alignment, first and last byte."""
    name = address.name.lower().replace("_", "-")

    def aligned(vmcs: Vmcs) -> bool:
        return not vmcs[count] or not vmcs[address] % MSR_ENTRY_BYTES

    def begins(vmcs: Vmcs) -> bool:
        return not vmcs[count] or vmcs.fits(vmcs[address])

    def ends(vmcs: Vmcs) -> bool:
        size = vmcs[count] * MSR_ENTRY_BYTES
        # One that begins beyond the width breaks the rule above, and that one alone.
        return not size or not vmcs.fits(vmcs[address]) or vmcs.fits(vmcs[address] + size - 1)

    for suffix, sentence, holds in (
        ("alignment", f"Bits 3:0 of the {what} address are 0, where its count is not 0.", aligned),
        ("width", f"The {what} address sets no bit beyond the physical-address width.", begins),
        ("end", f"The {what} area ends within the physical-address width, where it begins there.", ends),
    ):
        table.add(f"{name}-{suffix}", sentence, holds, [address, count])
