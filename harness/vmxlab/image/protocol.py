"""What the harness and the monitor say to each other: one table for both languages.

`python -m vmxlab.image.protocol SOURCE...` writes the C header (guest/Makefile); its BUILD_ID is a digest of
the named files. `Op` and `Action` are the numbers a script is made of (`vmxlab.image.script` writes scripts,
guest/monitor/script.c runs them).
"""

from __future__ import annotations

import hashlib
import sys
from enum import IntEnum
from pathlib import Path

from vmxlab.image import layout

PROTOCOL_VERSION = 2
PAYLOAD_MAGIC = int.from_bytes(b"VMXP", "little")
PAYLOAD_WAITS = 1
"""A flag of a payload: its cases are for the prompt, and don't run when the image boots."""
CONSOLE_PROMPT = "vmx> "
CONSOLE_FRAME = 0x01
"""A line that starts with this byte (SOH) is a frame, not text."""
FRAME_PATIENCE_LOOKS = 1 << 22
"""How often the monitor looks for the next byte of a frame before it gives the frame up."""


class Op(IntEnum):
    """Operations of a script, with their operands (little-endian, unaligned)."""

    END = 0
    """No operands."""
    CASE = 1
    """id u32, length u8, name: starts the records of a case."""
    FILL = 2
    """address u64, bytes u32, value u8."""
    DATA = 3
    """address u64, bytes u32, data."""
    SEQUENCE = 4
    """address u64, count u32, first u64, stride u64: 64-bit values in arithmetic progression."""
    REVISION = 5
    """address u64, flags u32: the processor's VMCS revision identifier, ORed with flags."""
    LIVE = 6
    """id u32, as the first operation: a live command. It goes on with what was left by the one before, or the
    prompt (VMX operation, the current VMCS, L2's registers), and nothing is undone at its end."""
    CODE = 7
    """bits u8, base of CS u64, linear address u64, address u64, bytes u32: reports L2's code."""
    VMXON = 16
    """region u64."""
    VMXOFF = 17
    VMCLEAR = 18
    """region u64."""
    VMPTRLD = 19
    """region u64."""
    VMPTRST = 20
    VMREAD = 21
    """field u32."""
    VMWRITES = 22
    """count u16, then field u32 and value u64 each."""
    INVEPT = 23
    """type u64, descriptor 2 x u64."""
    INVVPID = 24
    """type u64, descriptor 2 x u64."""
    VMCALL = 25
    RDMSR = 32
    """msr u32."""
    WRMSR = 33
    """msr u32, value u64."""
    CR0 = 34
    """value u64."""
    CR4 = 35
    """value u64."""
    APIC_USED = 36
    """The case may use the local APIC: its setup is kept, and put back when the case ends."""
    APIC_WRITE = 37
    """register u32, value u32: of L1's local APIC."""
    APIC_READ = 38
    """register u32."""
    SECOND_PROCESSOR = 39
    """program u32: the second processor runs what lies there, until the case ends."""
    CPUID = 40
    """leaf u32, subleaf u32: in L1."""
    REGISTERS = 48
    """mask u16, then a u64 for each set bit: L2's general registers."""
    WATCH = 49
    """count u8, then field u32 each: fields that every exit record shows as well."""
    DEFAULTS = 50
    """128 x action u8: what to do on an exit that no reaction is for."""
    REACTION = 51
    """reason u16, from_match u32, match_count u32, qualification mask u64, value u64, bytes u16, actions."""
    ENTER = 52
    """resume u8, max_exits u32: VMLAUNCH (or VMRESUME) and all that follows."""
    MEMORY = 53
    """address u64, bytes u32: reports memory."""
    SWEEP = 54
    """Enter once for each value of a register, digest the exits; operands: `vmxlab.image.script.sweep`."""
    SKIP = 55
    """As the action of that name, outside of an entry: RIP past the instruction that exited."""
    SNAPSHOT = 56
    """all u8: reports every field of the current VMCS, and L2's general registers; where `all` is 0, only
    what is not as the last snapshot said."""


OP_GO_ON = 0x80
"""ORed to an operation: its failure does not end the case."""

ENTER_RESUME, ENTER_WITHOUT_VMCS_REPORT = 1, 2
"""Bits of the first operand of ENTER."""


class Action(IntEnum):
    """What the monitor does on an exit. Only STOP, SKIP and RESUME can be defaults."""

    STOP = 0
    SKIP = 1
    """Advance RIP past the instruction."""
    RESUME = 2
    SET_REGISTER = 3
    """index u8, value u64."""
    SET_FIELD = 4
    """field u32, value u64."""
    SET_MEMORY = 5
    """address u64, bytes u32, data."""
    INVEPT = 6
    """type u64, EPTP u64."""
    APIC_WRITE = 7
    """register u32, value u32."""


def c_header(build_id: int) -> str:
    """The text of protocol.h. `build_id` is what the boot record shows: 32 bits."""
    defines: list[tuple[str, int]] = [
        ("PROTOCOL_VERSION", PROTOCOL_VERSION),
        ("BUILD_ID", build_id),
        ("PAYLOAD_MAGIC", PAYLOAD_MAGIC),
        ("PAYLOAD_WAITS", PAYLOAD_WAITS),
        ("CONSOLE_FRAME", CONSOLE_FRAME),
        ("FRAME_PATIENCE_LOOKS", FRAME_PATIENCE_LOOKS),
        ("SCRIPT_BUFFER_0", layout.SCRIPT_BUFFER_0),
        ("SCRIPT_BUFFER_1", layout.SCRIPT_BUFFER_1),
        ("SCRIPT_BUFFER_BYTES", layout.SCRIPT_BUFFER_BYTES),
        ("FRAME_BUFFER", layout.FRAME_BUFFER),
        ("FRAME_BUFFER_BYTES", layout.FRAME_BUFFER_BYTES),
        ("PAYLOAD_BASE", layout.PAYLOAD_BASE),
        ("PAYLOAD_BYTES", layout.PAYLOAD_BYTES),
        ("SELECTOR_CODE", layout.SELECTOR_CODE),
        ("SELECTOR_DATA", layout.SELECTOR_DATA),
        ("SELECTOR_TSS", layout.SELECTOR_TSS),
        ("TRAMPOLINE", layout.TRAMPOLINE),
    ]
    lines = [
        "/* Made by vmxlab.image.protocol: do not edit. */",
        "#ifndef PROTOCOL_H",
        "#define PROTOCOL_H",
        "",
    ]
    lines += [f"#define {name} {value:#x}u" for name, value in defines]
    lines += [f'#define CONSOLE_PROMPT "{CONSOLE_PROMPT}"', ""]
    lines += [*_c_enum("op", "OP_", Op), f"#define OP_GO_ON {OP_GO_ON:#x}", ""]
    lines += [f"#define ENTER_RESUME {ENTER_RESUME:#x}"]
    lines += [f"#define ENTER_WITHOUT_VMCS_REPORT {ENTER_WITHOUT_VMCS_REPORT:#x}", ""]
    lines += _c_enum("action", "ACTION_", Action)
    return "\n".join([*lines, "#endif", ""])


def _c_enum(name: str, prefix: str, members: type[IntEnum]) -> list[str]:
    return [f"enum {name} {{", *(f"\t{prefix}{m.name} = {m.value}," for m in members), "};", ""]


def build_id(sources: list[Path]) -> int:
    """The first 32 bits of a SHA-256 over names and contents, in the order given."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return int.from_bytes(digest.digest()[:4], "big")


if __name__ == "__main__":
    sys.stdout.write(c_header(build_id([Path(name) for name in sys.argv[1:]])))
