"""The rules of VM entry: which of them a VMCS breaks, and so what VMLAUNCH does (SDM Vol. 3C, chapter 27)."""

from __future__ import annotations

from vmxlab.oracle.entry.rule import Area, EntryQualification, EntryRule
from vmxlab.oracle.entry.verdict import (
    RULES,
    Broken,
    EntryOutcome,
    EntryVerdict,
    Unchecked,
    check_entry,
)
from vmxlab.oracle.entry.vmcs import Environment

__all__ = [
    "RULES",
    "Area",
    "Broken",
    "EntryOutcome",
    "EntryQualification",
    "EntryRule",
    "EntryVerdict",
    "Environment",
    "Unchecked",
    "check_entry",
]
