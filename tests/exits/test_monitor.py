"""The monitor's prompt: it answers, whatever it is sent, and cases run from it afterwards as before.

These tests have a machine of their own: what they send may leave a conversation in disorder.
"""

from __future__ import annotations

import random
import select
import socket
import time
import zlib
from collections.abc import Iterator

import pytest

from vmxlab import Case, ExitReason, Lab
from vmxlab.cases.memory import PROGRAM
from vmxlab.console.session import Session
from vmxlab.errors import MachineDied
from vmxlab.image.compiler import compile_case
from vmxlab.image.frames import FRAME_HEADER, encode_frame
from vmxlab.image.layout import FRAME_BUFFER_BYTES, MONITOR_BASE, SCRIPT_BUFFER_BYTES
from vmxlab.image.protocol import CONSOLE_FRAME, CONSOLE_PROMPT
from vmxlab.sdm.msrs import Msr

DEADLINE_S = 60.0

PROMPT = CONSOLE_PROMPT.encode()
SYNC = b"in-sync"
"""A word that is no command: its refusal shows where the answers to what was sent before it end."""
SYNC_ANSWER = b"there is no command 'in-sync'"


@pytest.fixture(scope="module")
def own_lab(vmxlab, request, tmp_path_factory) -> Iterator[Lab]:
    """A lab on the same engine and model as `vmxlab`, with a machine that nobody else uses."""
    model = request.config.option.vmx_model
    with Lab(vmxlab.engine, model=model, log_dir=tmp_path_factory.mktemp("monitor")) as lab:
        yield lab


@pytest.fixture
def prompt(own_lab) -> Iterator[Session]:
    """A session at its prompt; after a failed test the machine is started anew."""
    session = own_lab.session()
    yield session
    try:
        in_order = SYNC_ANSWER.decode() in session.command(SYNC.decode(), DEADLINE_S)
    except Exception:
        in_order = False
    if not in_order:
        own_lab.close()


def read_until(stream: socket.socket, end: bytes) -> bytes:
    """What the machine says up to `end` and the prompt behind it."""
    limit = time.monotonic() + DEADLINE_S
    said = b""
    while end not in said or not said.endswith(PROMPT):
        ready, _, _ = select.select([stream], [], [], max(0.0, limit - time.monotonic()))
        if not ready:
            raise AssertionError(f"no {end!r} and prompt within {DEADLINE_S} s; last: {said[-200:]!r}")
        chunk = stream.recv(65536)
        assert chunk, f"the machine ended; last: {said[-200:]!r}"
        said += chunk
    return said


def send(session: Session, data: bytes) -> str:
    """Send bytes as they are, then make sure that the prompt still answers; everything that was said."""
    stream = session.machine.serial
    stream.settimeout(DEADLINE_S)
    stream.sendall(data + b"\r" + SYNC + b"\r")
    return read_until(stream, SYNC_ANSWER).decode("latin-1")


# --- commands ----------------------------------------------------------------------------------------------


def value_of(answer: str) -> int:
    """Of "IA32_APIC_BASE (0x1b) = 0xfee00900"."""
    return int(answer.rpartition(" = ")[2], 16)


def test_rdmsr_shows_a_value(prompt):
    """The local APIC is enabled after reset (SDM Vol. 3A, 11.4.4)."""
    assert value_of(prompt.command(f"rdmsr {int(Msr.IA32_APIC_BASE):#x}", DEADLINE_S)) & 1 << 11


def test_wrmsr_writes_what_rdmsr_reads(prompt):
    msr = int(Msr.IA32_SYSENTER_CS)
    assert "fault" not in prompt.command(f"wrmsr {msr:#x} 0x1234", DEADLINE_S)
    assert value_of(prompt.command(f"rdmsr {msr}", DEADLINE_S)) == 0x1234
    prompt.command(f"wrmsr {msr:#x} 0", DEADLINE_S)
    assert value_of(prompt.command(f"rdmsr {msr:#x}", DEADLINE_S)) == 0


@pytest.mark.parametrize("command", ["rdmsr 0xdead", "wrmsr 0xdead 1", "wrmsr 0x480 0"])
def test_an_msr_that_is_not_there_or_read_only_is_shown_as_the_fault_it_is(prompt, vmxlab, command):
    """SDM Vol. 2B, RDMSR and WRMSR: #GP(0) for a reserved or read-only MSR."""
    assert vmxlab.capabilities  # TCG reads MSRs that it does not know as 0
    assert "fault: #GP (13), error code 0x0" in prompt.command(command, DEADLINE_S)


def test_caps_is_a_record_of_the_capability_msrs(prompt, vmxlab):
    raw = vmxlab.capabilities.raw
    answer = prompt.command("caps", DEADLINE_S).splitlines()[0]
    assert answer.startswith("@caps ")
    values = dict(pair.split("=") for pair in answer.removeprefix("@caps ").rsplit("*", 1)[0].split())
    assert {int(key[1:], 16): int(value, 16) for key, value in values.items()} == raw


def test_mem_shows_memory(prompt):
    """The monitor's own first bytes: its multiboot header, in the first page."""
    answer = prompt.command(f"mem {MONITOR_BASE:#x} 256", DEADLINE_S)
    memory = bytes.fromhex("".join(line.partition(":")[2] for line in answer.splitlines()))
    assert len(memory) == 256
    assert b"\x02\xb0\xad\x1b" in memory
    assert prompt.command(f"mem {MONITOR_BASE:#x}", DEADLINE_S) == answer.splitlines(keepends=True)[0]


@pytest.mark.parametrize("address", ["0x7fffdead0000", "0xffff800000000000", "0x100000000"])
def test_mem_at_what_is_not_mapped_is_a_fault_that_is_survived(prompt, address):
    """The monitor maps 4 GiB; beyond, a page fault is shown, and the prompt lives."""
    assert "fault: #PF (14), error code 0x0" in prompt.command(f"mem {address}", DEADLINE_S)
    assert "help" in prompt.command("help", DEADLINE_S)


def test_run_without_cases_says_so(prompt):
    assert "no cases" in prompt.command("run", DEADLINE_S)
    assert "no cases" in prompt.command("run 0", DEADLINE_S)


@pytest.mark.parametrize(
    "line",
    [
        "rdmsr",
        "rdmsr 0x",
        "rdmsr --1",
        "rdmsr 12g",
        "rdmsr 0x100000000",
        "rdmsr 1 2",
        "wrmsr 1",
        "wrmsr 1 2 3",
        "wrmsr 0x100000000 1",
        "mem",
        "mem 0 4097",
        "mem 0 18446744073709551616",
        "run 1 2",
        "help me please",
    ],
)
def test_operands_that_make_no_sense_show_the_usage(prompt, line):
    assert f"usage: {line.split()[0]}" in prompt.command(line, DEADLINE_S)


@pytest.mark.parametrize("line", ["nonsense", "HELP", "help;", "rdmsr0", "=" * 100, "nonsense 1 2 3"])
def test_an_unknown_command_is_named(prompt, line):
    answer = prompt.command(line, DEADLINE_S)
    assert f"there is no command '{line.split()[0]}'" in answer


def test_an_empty_line_and_spaces_do_nothing(prompt):
    for line in ("", " ", " " * 200):
        assert prompt.command(line, DEADLINE_S).strip() == ""


def test_words_may_stand_apart(prompt):
    plain = prompt.command("rdmsr 0x1b", DEADLINE_S)
    assert prompt.command("   rdmsr    0x1b   ", DEADLINE_S) == plain


def test_more_words_than_a_command_has_are_refused(prompt):
    assert "usage: help" in prompt.command("help " * 200, DEADLINE_S)
    assert "usage" in prompt.command("rdmsr 1 2 3 4 5", DEADLINE_S)


@pytest.mark.parametrize("length", [1023, 1024, 5000])
def test_a_long_line_is_refused_whole(prompt, length):
    """Up to 1023 characters are a line; nothing is done with the rest, nor with the start of a longer one."""
    answer = prompt.command("x" * length, DEADLINE_S)
    if length <= 1023:
        assert f"there is no command '{'x' * length}'" in answer
    else:
        assert "that line is longer than 1023 characters: nothing was done" in answer
        assert "no command" not in answer


# --- raw bytes ---------------------------------------------------------------------------------------------


def test_a_line_can_be_edited(prompt):
    """Backspace, delete and Ctrl-U, as people type."""
    assert "usage: rdmsr" in send(prompt, b"rdxx\x7f\x7fmsr")
    assert "usage: rdmsr" in send(prompt, b"rdxx\b\bmsr")
    answer = send(prompt, b"some nonsense\x15rdmsr")
    assert "usage: rdmsr" in answer
    assert "no command 'some" not in answer


def test_erasing_more_than_there_is_does_no_harm(prompt):
    assert "usage: rdmsr" in send(prompt, b"\x7f" * 600 + b"ab" + b"\b" * 600 + b"rdmsr")


def test_ctrl_u_makes_a_line_too_long_good_again(prompt):
    answer = send(prompt, b"y" * 1400 + b"\x15rdmsr")
    assert "usage: rdmsr" in answer
    assert "longer than" not in answer


@pytest.mark.parametrize("end", [b"\r", b"\n", b"\r\n"])
def test_lines_end_with_cr_lf_or_both(prompt, end):
    """The empty line between CR and LF does nothing."""
    assert send(prompt, b"rdmsr" + end + b"wrmsr").count("usage: ") == 2


def test_control_characters_that_mean_nothing_are_not_part_of_a_line(prompt):
    ignored = bytes(set(range(0x20)) - set(b"\x01\x02\x03\x04\x05\x06\b\t\n\x0b\x0c\r\x0e\x10\x15\x17\x1b"))
    assert "usage: rdmsr" in send(prompt, b"rd" + ignored + b"msr")


def test_ten_thousand_bytes_of_garbage_are_survived(prompt):
    """Anything but SOH, which announces a frame: many lines, answered each in some way."""
    source = random.Random(20_000)
    garbage = bytes(source.choice([b for b in range(256) if b != CONSOLE_FRAME]) for _ in range(10_000))
    send(prompt, garbage)
    assert "usage: rdmsr" in send(prompt, b"rdmsr")


def test_ten_thousand_printable_characters_in_one_line_are_survived(prompt):
    source = random.Random(10_000)
    assert "longer than" in send(prompt, bytes(source.randrange(0x20, 0x7F) for _ in range(10_000)))


# --- frames ------------------------------------------------------------------------------------------------


@pytest.fixture
def frame(own_lab, vmxlab) -> bytes:
    """A good frame that needs no frame before it."""
    assert vmxlab.capabilities
    case = Case(program="cpuid; hlt")
    return encode_frame(compile_case(case, own_lab.target).units).data


def framed(frame: bytes) -> bytes:
    return bytes([CONSOLE_FRAME]) + frame


def test_a_good_frame_runs(prompt, frame):
    """So that the tests below fail for what they break, and for nothing else."""
    said = send(prompt, framed(frame))
    assert said.count("@exit ") == 2
    assert "@error" not in said


def test_a_frame_with_a_flipped_bit_is_refused(prompt, frame):
    """Anywhere behind the header: an error record, no exit, and the prompt lives."""
    for offset in (FRAME_HEADER.size, len(frame) // 2, len(frame) - 1):
        for bit in (0, 7):
            broken = bytearray(frame)
            broken[offset] ^= 1 << bit
            said = send(prompt, framed(bytes(broken)))
            assert "@error what=frame-" in said, (offset, bit)
            assert "@exit" not in said
    assert "@exit" in send(prompt, framed(frame))


def with_header(operations: bytes, script_bytes: int, *, count: int | None = None, base: int = 0) -> bytes:
    """Operations as they are, with a header whose checksum is good."""
    length = len(operations) if count is None else count
    return framed(FRAME_HEADER.pack(length, script_bytes, zlib.crc32(operations), base) + operations)


IMPOSSIBLE_FRAMES = {
    "checksum": (framed(FRAME_HEADER.pack(0, 0, 1, 0)), "frame-crc"),
    "huge": (with_header(b"", 4, count=1 << 31), "frame-too-long"),
    "too long": (with_header(b"", 4, count=FRAME_BUFFER_BYTES + 1), "frame-too-long"),
    "script too long": (with_header(b"\x00", SCRIPT_BUFFER_BYTES + 1), "script-too-long"),
    "no such base": (with_header(b"\x02\x00", 1, base=0x1234_5678), "frame-base"),
    "script shorter than said": (with_header(b"\x02\x00", 2), "frame-operations"),
    "script longer than said": (with_header(b"\x04\x00\x00", 1), "frame-operations"),
    "varint without an end": (with_header(b"\x80", 4), "frame-operations"),
    "varint of more than 32 bits": (with_header(b"\xff\xff\xff\xff\xff\x7f", 4), "frame-operations"),
    "literal beyond the frame": (with_header(b"\x20\x00", 16), "frame-operations"),
    "copy from nothing": (with_header(b"\x09\x00", 4), "frame-operations"),
}


@pytest.mark.parametrize(
    ("data", "what"), IMPOSSIBLE_FRAMES.values(), ids=[name.replace(" ", "-") for name in IMPOSSIBLE_FRAMES]
)
def test_a_frame_that_can_not_be_is_refused(prompt, data, what):
    said = send(prompt, data)
    assert f"@error what={what}" in said
    assert "@case" not in said


@pytest.mark.slow
def test_a_frame_that_stops_in_the_middle_is_given_up(own_lab, frame):
    """The prompt comes back after the monitor's patience, without anyone's help."""
    session = own_lab.session()
    stream = session.machine.serial
    stream.sendall(framed(frame[: len(frame) // 2]))
    limit = time.monotonic() + 60
    said = b""
    while b"frame-stopped" not in said or not said.endswith(PROMPT):
        ready, _, _ = select.select([stream], [], [], max(0.0, limit - time.monotonic()))
        assert ready, said
        said += stream.recv(65536)
    assert "help" in session.command("help", DEADLINE_S)


def test_a_script_with_an_operation_that_does_not_exist_ends_as_such(prompt):
    """A frame with a good checksum may hold a bad script: "@end why=script", and the prompt lives."""
    for script in (b"\xee", b"\x01", b"\x01\x00\x00\x00\x00\xff"):
        said = send(prompt, framed(encode_frame([script]).data))
        assert "why=script" in said, script


def test_cases_run_as_before_after_all_that(own_lab, vmxlab):
    """The last word: a case on the machine that took all of the above."""
    assert vmxlab.capabilities
    run = own_lab.run(Case(program="cpuid; hlt"))
    assert run.reasons == [ExitReason.CPUID, ExitReason.HLT]
    assert run.exits[0].rip == PROGRAM


def test_reset_does_not_hang(own_lab):
    """By port 0CF9H: it boots again, ends, or says that it can't; it does not hang."""
    session = own_lab.session()
    try:
        answer = session.command("reset", DEADLINE_S)
    except MachineDied:
        pass
    else:
        assert "@boot " in answer or "this machine resets neither by" in answer
    assert "help" in own_lab.session().command("help", DEADLINE_S)
