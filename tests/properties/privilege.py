"""L2 at privilege level 3: segments, and page tables that let it."""

from __future__ import annotations

from functools import cache

from hypothesis import strategies as st

from vmxlab import Field, Mode, SecondaryControls
from vmxlab.structures import Capabilities

USER_TABLES = 0x1C000
"""Three pages of L2's memory: they map its first 2 MiB (4 MiB in 32-bit mode) one to one, for CPL 3 too."""

_DATA_SEGMENTS = ("SS", "DS", "ES", "FS", "GS")
_USER_TABLE, _USER_PAGE = 0x07, 0x87


@cache
def user_mode(mode: Mode) -> dict[str, dict]:
    """Case arguments `data` and `fields`; needs EPT."""
    wide = mode is Mode.LONG
    fields = {
        Field.GUEST_CR3: USER_TABLES,
        Field.GUEST_CS_SELECTOR: 0x0B,
        Field.GUEST_CS_ACCESS_RIGHTS: 0xA0FB if wide else 0xC0FB,
    }
    for name in _DATA_SEGMENTS:
        fields[Field[f"GUEST_{name}_SELECTOR"]] = 0x13
        fields[Field[f"GUEST_{name}_ACCESS_RIGHTS"]] = 0xC0F3
    entries = [USER_TABLES + 0x1000 | _USER_TABLE, USER_TABLES + 0x2000 | _USER_TABLE] if wide else []
    tables = {
        USER_TABLES + 0x1000 * level: entry.to_bytes(8 if wide else 4, "little")
        for level, entry in enumerate([*entries, _USER_PAGE])
    }
    return {"data": tables, "fields": fields}


_LEVELS = st.sampled_from((None, None, None, 0, 3))
"""CPL 0; or CPL 3, with this IOPL."""


@cache
def privileges(mode: Mode, capabilities: Capabilities) -> st.SearchStrategy[dict[str, dict]]:
    """Mostly CPL 0, else CPL 3. Drawn alike in each mode: a failing case can be tried in a simpler one."""
    possible = mode is not Mode.REAL and capabilities.supports(SecondaryControls.ENABLE_EPT)

    def at_level(iopl: int | None) -> dict[str, dict]:
        if iopl is None or not possible:
            return {}
        user = user_mode(mode)
        return {"data": user["data"], "fields": {**user["fields"], Field.GUEST_RFLAGS: 0x2 | iopl << 12}}

    return _LEVELS.map(at_level)
