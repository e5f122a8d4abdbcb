"""Whatever is typed, the prompt answers and lives. On bochs and on tcg; each text is made from a seed."""

from __future__ import annotations

import random

import pytest

from vmxlab.image.protocol import CONSOLE_FRAME

LINES = 10_000
KILOBYTES = 100

WORDS = (
    *(
        b"vmread",
        b"vmwrite",
        b"vmxon",
        b"vmxoff",
        b"vmclear",
        b"vmptrld",
        b"port",
        b"msr",
        b"ept",
        b"map",
        b"show",
    ),
    *(
        b"mem",
        b"reg",
        b"code",
        b"at",
        b"on",
        b"off",
        b"=",
        b"u32",
        b"u64",
        b"gpa:",
        b"gla:0x8000",
        b"load",
        b"step",
    ),
    *(
        b"skip",
        b"exit",
        b"caps",
        b"vmcs",
        b"host",
        b"state",
        b"decode",
        b"help",
        b"fault",
        b"ud",
        b"cases",
        b"rdmsr",
    ),
    *(
        b"GUEST_RIP",
        b"EPT_POINTER",
        b"IA32_EFER",
        b"-1",
        b"0x",
        b"0xfee00000",
        b"0x100000",
        b"0xffffffffffffffff",
    ),
)
"""Commands, operands and pieces of them. Not what may end the machine by right: 'reset', 'launch'."""


@pytest.fixture(scope="module", params=["bochs", "tcg"])
def prompt(request, open_prompt):
    """On each."""
    yield from open_prompt(request.param)


def alive(prompt):
    """It answers in a known way, and its stream holds no half record."""
    prompt.type(b"")
    assert prompt("decode 12") == "reason         HLT\n"


def no_frame(data):
    """Without what announces a frame at the beginning of a line."""
    return data.replace(bytes([CONSOLE_FRAME]), b"")


@pytest.mark.slow
def test_ten_thousand_lines_of_garbage(prompt):
    """Every byte there is, in short lines."""
    source = random.Random(1)
    lines = (bytes(source.choices(range(256), k=source.randrange(5))) for _ in range(LINES))
    said = prompt.type(no_frame(b"\r".join(lines)))
    assert said.count("vmx> ") > LINES
    alive(prompt)


def test_lines_of_words_in_no_order(prompt):
    """Commands with operands that may fit. The monitor's own memory and its records outlive them."""
    source = random.Random(2)
    lines = (b" ".join(source.choices(WORDS, k=source.randrange(1, 6))) for _ in range(400))
    prompt.type(b"\r".join(lines))
    alive(prompt)


def test_hundred_kilobytes_in_one_line(prompt):
    source = random.Random(3)
    printable = bytes(source.choices(range(0x20, 0x7F), k=KILOBYTES * 1024))
    assert "that line is longer than 1023 characters: nothing was done" in prompt.type(printable)
    alive(prompt)


def test_every_byte_by_itself(prompt):
    prompt.type(b"\r".join(bytes([byte]) for byte in range(256) if byte != CONSOLE_FRAME))
    alive(prompt)


def test_escape_sequences_cut_anywhere(prompt):
    source = random.Random(4)
    pieces = (
        b"\x1b",
        b"[",
        b"O",
        b"1",
        b";",
        b"~",
        b"A",
        b"D",
        b"H",
        b"\x7f",
        b"\t",
        b"x",
        b"\x1b[200~",
        b"\x03",
    )
    prompt.type(b"".join(source.choices(pieces, k=4000)))
    alive(prompt)


def test_a_frame_that_is_garbage(prompt):
    """Ctrl-A and what can't be a header. (tests/exits/test_monitor.py has one that stops in the middle.)"""
    source = random.Random(5)
    for _ in range(20):
        header = bytes([*source.randbytes(3), 0xFF, *source.randbytes(12)])
        assert "@error what=frame-too-long*" in prompt.type(bytes([CONSOLE_FRAME]) + header)
    alive(prompt)
