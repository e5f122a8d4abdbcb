"""The rules of VM entry asked about a case, as it is compiled for a processor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vmxlab.image import layout
from vmxlab.image.compiler import CompiledCase
from vmxlab.oracle.entry.rule import EntryRule
from vmxlab.oracle.entry.verdict import RULES, EntryVerdict, check_entry
from vmxlab.oracle.entry.vmcs import Environment
from vmxlab.sdm.registers import CR4


def check_case(compiled: CompiledCase, rules: Sequence[EntryRule] = RULES) -> EntryVerdict:
    """What the rules say about the VM entry of a case whose steps are the standard ones.

    The fields are those that the case writes, the memory is what it is when the case starts.
    """
    return check_entry(compiled.fields, environment_of(compiled), rules)


def environment_of(compiled: CompiledCase) -> Environment:
    """The processor that a case was compiled for, in the state in which the monitor enters."""
    capabilities = compiled.target.capabilities
    return Environment(
        capabilities=capabilities,
        maxphyaddr=compiled.target.physical_address_width,
        # A processor lets CR4.LA57 be 1 in VMX operation where it has 5-level paging.
        linear_address_width=57 if capabilities.cr4_fixed1 & CR4.LA57 else 48,
        current_vmcs=layout.VMCS_REGION,
        read=_reader(compiled.contents),
    )


def _reader(contents: Sequence[tuple[int, bytes]]) -> Callable[[int, int], bytes | None]:
    """Later contents lie over earlier ones; a case's memory that it does not fill may hold anything."""

    def read(address: int, length: int) -> bytes | None:
        for start, content in reversed(contents):
            if start <= address and address + length <= start + len(content):
                return content[address - start : address - start + length]
            if start < address + length and address < start + len(content):
                return None  # over the edge of what is known: no structure of a VM entry lies so
        return None

    return read
