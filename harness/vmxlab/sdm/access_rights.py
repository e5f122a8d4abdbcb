"""The access rights of a segment register, as the VMCS holds them (SDM Vol. 3C, Table 25-2), in words."""

from __future__ import annotations

from vmxlab.sdm.flags import BitFlags

TYPE_MASK = 0xF

# Types of system segments (Vol. 3A, Table 3-2) that an LDTR or a TR may have, and all others by number.
_SYSTEM_TYPES = {1: "16-bit TSS", 2: "LDT", 3: "16-bit busy TSS", 9: "64- or 32-bit TSS", 11: "busy TSS"}
_EXECUTABLE, _CONFORMING_OR_EXPAND_DOWN, _READABLE_OR_WRITABLE, _ACCESSED = 8, 4, 2, 1


class AccessRights(BitFlags):
    """The bits of the field, but for the type (3:0) and DPL (6:5)."""

    CODE_OR_DATA = 1 << 4
    PRESENT = 1 << 7
    AVL = 1 << 12
    L = 1 << 13
    DB = 1 << 14
    GRANULARITY = 1 << 15
    UNUSABLE = 1 << 16


def describe_access_rights(value: int) -> str:
    """Such as "code, readable, accessed, DPL 0, present, L, G"; "unusable" where bit 16 says so."""
    if value == AccessRights.UNUSABLE:
        return "unusable"
    words = ["unusable"] if value & AccessRights.UNUSABLE else []
    words += _type_words(value & TYPE_MASK, bool(value & AccessRights.CODE_OR_DATA))
    words.append(f"DPL {value >> 5 & 3}")
    words.append("present" if value & AccessRights.PRESENT else "not present")
    for bit, word in (
        (AccessRights.L, "L"),
        (AccessRights.DB, "D/B"),
        (AccessRights.GRANULARITY, "G"),
        (AccessRights.AVL, "AVL"),
    ):
        words += [word] if value & bit else []
    reserved = value & 0xFFFE_0F00
    words += [f"reserved {reserved:#x}"] if reserved else []
    return ", ".join(words)


def _type_words(kind: int, code_or_data: bool) -> list[str]:
    """Vol. 3A, 3.4.5.1."""
    if not code_or_data:
        return [_SYSTEM_TYPES.get(kind, f"system type {kind}")]
    if kind & _EXECUTABLE:
        words = ["code", "conforming" if kind & _CONFORMING_OR_EXPAND_DOWN else ""]
        words.append("readable" if kind & _READABLE_OR_WRITABLE else "execute-only")
    else:
        words = ["data", "expand-down" if kind & _CONFORMING_OR_EXPAND_DOWN else ""]
        words.append("writable" if kind & _READABLE_OR_WRITABLE else "read-only")
    words.append("accessed" if kind & _ACCESSED else "")
    return [word for word in words if word]
