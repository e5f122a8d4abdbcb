"""One protocol for two languages: the C header says what the Python tables say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from vmxlab.cases import memory
from vmxlab.console.run import End
from vmxlab.image import layout, protocol
from vmxlab.image.protocol import Action, Op, build_id, c_header
from vmxlab.image.script import EXIT_REASONS, MAX_ACTION_BYTES

MEMORY_OF_THE_MONITOR = (
    *("SCRIPT_BUFFER_0", "SCRIPT_BUFFER_1", "SCRIPT_BUFFER_BYTES"),
    *("FRAME_BUFFER", "FRAME_BUFFER_BYTES", "PAYLOAD_BASE", "PAYLOAD_BYTES"),
)

GUEST = Path(__file__).parents[2] / "guest"


@pytest.mark.parametrize("table", [Op, Action])
def test_no_number_means_two_things(table):
    assert len({member.value for member in table}) == len(table.__members__)
    assert all(0 <= member < 0x80 for member in table), "bit 7 of an operation says: go on"


def test_the_header_compiles_and_agrees_with_every_constant(tmp_path):
    header = c_header(0xCAFE_F00D)
    named = {
        name: getattr(protocol, name, None) or getattr(layout, name)
        for name in re.findall(r"^#define (\w+) 0x\w+u$", header, re.MULTILINE)
        if name != "BUILD_ID"
    }
    assert {"PROTOCOL_VERSION", "PAYLOAD_MAGIC", "CONSOLE_FRAME", *MEMORY_OF_THE_MONITOR} <= set(named)
    facts = {
        **named,
        **{f"OP_{op.name}": op for op in Op},
        **{f"ACTION_{action.name}": action for action in Action},
        "OP_GO_ON": protocol.OP_GO_ON,
        "BUILD_ID": 0xCAFE_F00D,
    }
    (tmp_path / "protocol.h").write_text(header)
    checks = [f'_Static_assert({name} == {int(value):#x}u, "{name}");' for name, value in facts.items()]
    prompt = f'_Static_assert(sizeof(CONSOLE_PROMPT) == {len(protocol.CONSOLE_PROMPT) + 1}, "prompt");'
    source = '#include "protocol.h"\n#include "protocol.h"\n' + "\n".join([*checks, prompt])
    done = subprocess.run(
        ["gcc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-I", tmp_path, "-xc", "-"],
        input=source,
        text=True,
        capture_output=True,
        env={**os.environ, "LC_ALL": "C"},
    )
    assert done.returncode == 0, done.stderr


def test_the_module_writes_the_header_for_the_build():
    """guest/Makefile runs it; the build id is a digest of the files it is given."""
    sources = [GUEST / "monitor" / "script.c", GUEST / "Makefile"]
    done = subprocess.run(
        [sys.executable, "-m", "vmxlab.image.protocol", *sources], capture_output=True, text=True, check=True
    )
    assert done.stdout == c_header(build_id(sources))


def test_the_build_id_changes_with_every_byte_name_and_order(tmp_path):
    one, other, renamed = (tmp_path / name for name in ("a.c", "b.c", "c.c"))
    one.write_bytes(b"int x;")
    other.write_bytes(b"int y;")
    renamed.write_bytes(b"int x;")
    ids = [build_id(files) for files in ([one, other], [other, one], [renamed, other], [one])]
    one.write_bytes(b"int z;")
    assert len({*ids, build_id([one, other])}) == 5
    assert all(0 <= i < 1 << 32 for i in ids)


def mentioned(source: str, prefix: str) -> set[str]:
    text = (GUEST / "monitor" / source).read_text()
    return set(re.findall(rf"\bcase {prefix}([A-Z0-9_]+):", text))


def test_the_monitor_has_a_branch_for_every_operation_and_action():
    said = mentioned("script.c", "OP_") | mentioned("operations.c", "OP_")
    assert said == {op.name for op in Op}
    assert mentioned("exits.c", "ACTION_") == {action.name for action in Action}


def test_the_monitors_limits_are_those_of_the_harness():
    from vmxlab.cases.case import MAX_NAME, MAX_REACTIONS, MAX_WATCHED

    text = (GUEST / "monitor" / "exits.h").read_text() + (GUEST / "monitor" / "script.h").read_text()
    for name, value in (
        ("MAX_REACTIONS", MAX_REACTIONS),
        ("MAX_WATCHED_FIELDS", MAX_WATCHED),
        ("EXIT_REASONS", EXIT_REASONS),
        ("NAME_BYTES", MAX_NAME),
    ):
        assert re.search(rf"\b{name} = {value}\b", text), name
    assert MAX_ACTION_BYTES == 0xFFFF, "a u16 in the REACTION operation"


def test_each_word_of_the_monitor_for_an_end_is_known():
    text = "".join((GUEST / "monitor" / name).read_text() for name in ("script.c", "exits.c"))
    words = set(re.findall(r'\bwhy = "(\w+)"', text)) | set(re.findall(r'\breturn "(\w+)"', text))
    assert {"stop", "done", "limit", "vmfail", "fault", "script"} <= words
    assert words <= {end.value for end in End}


# --- who owns which addresses -------------------------------------------------------------------------------

REGIONS = [
    ("monitor", layout.MONITOR_BASE, layout.MONITOR_LIMIT),
    ("script 0", layout.SCRIPT_BUFFER_0, layout.SCRIPT_BUFFER_0 + layout.SCRIPT_BUFFER_BYTES),
    ("script 1", layout.SCRIPT_BUFFER_1, layout.SCRIPT_BUFFER_1 + layout.SCRIPT_BUFFER_BYTES),
    ("frame", layout.FRAME_BUFFER, layout.FRAME_BUFFER + layout.FRAME_BUFFER_BYTES),
    ("payload", layout.PAYLOAD_BASE, layout.PAYLOAD_BASE + layout.PAYLOAD_BYTES),
    ("VMXON region", layout.VMXON_REGION, layout.VMXON_REGION + 0x1000),
    ("VMCS region", layout.VMCS_REGION, layout.VMCS_REGION + 0x1000),
    ("shadow VMCS", layout.SHADOW_VMCS_REGION, layout.SHADOW_VMCS_REGION + 0x1000),
    ("I/O bitmap A", layout.IO_BITMAP_A, layout.IO_BITMAP_A + 0x1000),
    ("I/O bitmap B", layout.IO_BITMAP_B, layout.IO_BITMAP_B + 0x1000),
    ("MSR bitmap", layout.MSR_BITMAP, layout.MSR_BITMAP + 0x1000),
    ("VMREAD bitmap", layout.VMREAD_BITMAP, layout.VMREAD_BITMAP + 0x1000),
    ("VMWRITE bitmap", layout.VMWRITE_BITMAP, layout.VMWRITE_BITMAP + 0x1000),
    ("virtual APIC", layout.VIRTUAL_APIC_PAGE, layout.VIRTUAL_APIC_PAGE + 0x1000),
    ("APIC access", layout.APIC_ACCESS_PAGE, layout.APIC_ACCESS_PAGE + 0x1000),
    ("posted interrupts", layout.POSTED_INTERRUPT_DESCRIPTOR, layout.POSTED_INTERRUPT_DESCRIPTOR + 0x1000),
    ("EPT", layout.EPT_TABLES, layout.EPT_TABLES + layout.EPT_TABLES_MAX * 4096),
    ("MSRs loaded at entry", layout.ENTRY_MSR_LOAD_AREA, layout.ENTRY_MSR_LOAD_AREA + layout.MSR_AREA_BYTES),
    ("MSRs stored at exit", layout.EXIT_MSR_STORE_AREA, layout.EXIT_MSR_STORE_AREA + layout.MSR_AREA_BYTES),
    ("MSRs loaded at exit", layout.EXIT_MSR_LOAD_AREA, layout.EXIT_MSR_LOAD_AREA + layout.MSR_AREA_BYTES),
    ("second program", layout.SECOND_PROGRAM, layout.SECOND_PROGRAM + layout.SECOND_PROGRAM_BYTES),
    ("L2's memory", memory.L2_MEMORY, memory.L2_MEMORY + memory.L2_MEMORY_BYTES),
    ("free pages", layout.FREE_PAGES, layout.CASE_LIMIT),
]


def test_nothing_in_the_machines_memory_overlaps():
    for (what, _, end), (next_, start, _) in pairwise(REGIONS):
        assert end <= start, f"{what} runs into {next_}"
    assert REGIONS[-1][2] == layout.MEMORY_BYTES == 64 << 20


def test_structures_lie_on_pages_and_in_the_cases_part():
    for what, start, end in REGIONS[5:]:
        assert start % 0x1000 == end % 0x1000 == 0, what
        assert layout.CASE_BASE <= start < end <= layout.CASE_LIMIT, what
