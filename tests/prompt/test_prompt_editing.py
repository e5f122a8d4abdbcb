"""Editing a line at the prompt: keys, history, completion. What counts is the line that is executed."""

from __future__ import annotations

import re

import pytest

from vmxlab.sdm.fields import Field

UP, DOWN, RIGHT, LEFT = b"\x1b[A", b"\x1b[B", b"\x1b[C", b"\x1b[D"
HOME, END, DELETE = b"\x1b[H", b"\x1b[F", b"\x1b[3~"
LINE_MOST = 1023


def executed(prompt, keys):
    """The line that these keys made, by the complaint about it as a command that does not exist."""
    answer = prompt.type(b"x-" + keys)
    return re.search(r"there is no command '(\S*)'; 'help' lists them\r\n", answer)[1]


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (b"abc", "x-abc"),
        (b"abd" + LEFT + b"c", "x-abcd"),
        (b"abc" + LEFT * 3 + DELETE, "x-bc"),
        (b"abc" + HOME + b"y", "yx-abc"),
        (b"abc" + HOME + END + b"d", "x-abcd"),
        (b"abc\x01y", "yx-abc"),
        (b"abc\x01\x05d", "x-abcd"),
        (b"abc\x02\x02\x04", "x-ac"),
        (b"abc\x01\x06\x06\x0b", "x-"),
        (b"abc\x15y", "y"),
        (b"abc\x17y", "y"),
        (b"abc\x7f\x08d", "x-ad"),
        (b"abc" + LEFT + b"\x7f", "x-ac"),
        (b"abc" + LEFT * 20 + b"y", "yx-abc"),
        (b"abc" + RIGHT * 20 + b"d", "x-abcd"),
        (b"abc\x1bOH" + b"y\x1bOFd", "yx-abcd"),
        (b"abc\x1b[1~y\x1b[4~d", "yx-abcd"),
        (b"abc\x1b[7~y\x1b[8~d", "yx-abcd"),
        (b"abc\x1bby", "yx-abc"),
        (b"abc\x1b[H\x1bfd", "x-abcd"),
        (b"abc\x1b[H\x1bdy", "y"),
        (b"ab\x0cc", "x-abc"),
    ],
)
def test_keys_edit_the_line(prompt, keys, line):
    assert executed(prompt, keys) == line


@pytest.mark.parametrize(
    "keys",
    [
        b"\x1b[15~",  # F5
        b"\x1b[1;5Q",
        b"\x1b[200~",  # a bracketed paste begins
        b"\x1b[?25h",
        b"\x1b[" + b"9" * 300 + b"~",
        b"\x1b[[",
        b"\x1bx",
        b"\x1bOQ",
        b"\x1b[<0;1;1M",
        bytes(
            c for c in range(0x20) if c not in b"\x01\x02\x03\x04\x05\x06\b\t\n\x0b\x0c\r\x0e\x10\x15\x17\x1b"
        ),
    ],
)
def test_keys_that_mean_nothing_change_nothing(prompt, keys):
    assert executed(prompt, b"a" + keys + b"b") == "x-ab"


@pytest.mark.parametrize("cut", [b"\x1b", b"\x1b[", b"\x1b[1", b"\x1b[1;", b"\x1bO"])
def test_an_escape_sequence_that_is_cut_ends_with_the_line(prompt, cut):
    assert executed(prompt, b"ab" + cut) == "x-ab"
    assert executed(prompt, b"cd") == "x-cd"


def test_a_control_key_ends_a_cut_sequence_and_counts(prompt):
    assert executed(prompt, b"abc\x1b[\x7fd") == "x-abd"


def test_control_characters_are_not_echoed(prompt):
    everything = bytes(c for c in range(1, 0x20) if c not in b"\x01\x03\t\n\r\x0c\x1b")
    shown = set(prompt.type(b"y" + everything).replace("\x1b[K", "")) - set("\r\n\b\x1b")
    assert all(c.isprintable() for c in shown)


def test_what_is_not_ascii_is_shown_and_refused(prompt):
    answer = prompt.type("caps \u2013 no".encode())
    assert "caps ??? no\r\nwhat is shown as '?' is not ASCII: nothing was done\r\n" in answer
    assert "usage: rdmsr" in prompt.type("\u00e9".encode() + b"\x7f\x7frdmsr")


def test_ctrl_c_abandons_a_line(prompt):
    answer = prompt.type(b"nonsense\x03")
    assert "nonsense^C\r\nvmx> " in answer
    assert "no command 'nonsense'" not in answer


@pytest.mark.parametrize("length", [74, 75, 76, 200, LINE_MOST - 2])
def test_a_long_line_is_edited_in_a_window_and_executed_whole(prompt, length):
    """The screen has 80 columns; the log has all of the line."""
    word = "".join(chr(ord("a") + n % 26) for n in range(length))
    keys = word.encode()[:-1] + HOME + b"\x1b[C" * 3 + b"\x7f-" + END + word.encode()[-1:]
    answer = prompt.type(b"x-" + keys)
    line = f"x--{word[1:]}"
    assert f"there is no command '{line}'" in answer
    assert f"vmx> {line}\r\n" in answer
    for redraw in re.findall(r"\r(vmx> [^\r\n\x1b]*)\x1b\[K", answer):
        assert len(redraw) < 80


def test_a_line_that_is_too_long_is_refused_whole_also_when_it_is_edited(prompt):
    answer = prompt.type(b"x" * (LINE_MOST + 1) + b"\x7f" * 500)
    assert f"that line is longer than {LINE_MOST} characters: nothing was done" in answer
    assert "no command 'x" not in answer


# --- history ------------------------------------------------------------------------------------------------


def test_lines_before_come_back(prompt):
    prompt("decode 10", "decode 12")
    assert "reason         HLT" in prompt.type(UP)
    prompt("decode 10", "decode 12")
    assert "reason         CPUID" in prompt.type(b"\x10\x10")
    prompt("decode 10", "decode 12")
    assert "reason         HLT" in prompt.type(UP + UP + UP + DOWN + DOWN)


def test_the_line_that_was_begun_waits_behind_the_history(prompt):
    assert "no command 'begun'" in prompt.type(b"begun" + UP + DOWN)
    assert "no command 'begun'" in prompt.type(b"begun" + UP * 200 + b"\x0e" * 200)
    assert "no command 'begun'" in prompt.type(b"begun" + DOWN)


def test_a_line_from_the_history_can_be_changed(prompt):
    prompt("decode 10")
    assert "reason         HLT" in prompt.type(UP + b"\x7f2")


def test_a_line_twice_is_one_in_the_history(prompt):
    prompt("decode 1", "decode 2", "decode 2", "decode 2")
    assert "reason         EXTERNAL_INTERRUPT" in prompt.type(UP + UP)


def test_the_oldest_lines_are_forgotten(prompt):
    prompt("decode 3", *(f"decode {n}" for n in range(100, 163)))
    assert "reason         INIT_SIGNAL" in prompt.type(UP * 64 + UP * 30)
    prompt("decode 3", *(f"decode {n}" for n in range(100, 164)))
    assert "reason         reason 100" in prompt.type(UP * 64 + UP * 30)


# --- completion ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("vmr\tGUEST_RIP", "vmread GUEST_RIP"),
        ("vmread guest_ri\t", "vmread GUEST_RIP "),
        ("vmread LINK_P\t", "vmread VMCS_LINK_POINTER "),
        ("vmread GUEST_RIP HOST_RI\t", "vmread GUEST_RIP HOST_RIP "),
        ("rdmsr EFE\t", "rdmsr IA32_EFER "),
        ("ept sh\t", "ept show "),
        ("help vmxof\t", "help vmxoff "),
        ("caps sec\t", "caps SECONDARY"),
        ("decode hl\t", "decode HLT "),
        ("reg ri\t", "reg rip "),
        ("  vmxof\t", "  vmxoff "),
    ],
)
def test_tab_completes(prompt, typed, line):
    answer = prompt.type(b"#" + b"\x7f" + typed.encode())
    shown = answer.replace("\x1b[K", "").split("\r\n")[0]
    assert shown.rpartition("\r")[2].removeprefix("vmx> ").endswith(line.lstrip()), answer


def test_tab_lists_what_there_is_and_the_line_goes_on(prompt):
    prompt("load")
    answer = prompt.type(b"vmread GUEST_ES_\tB\t")
    names = [field.name for field in Field if field.name.startswith("GUEST_ES_")]
    assert all(f"  {name}" in answer for name in names)
    assert "\r\n\rvmx> vmread GUEST_ES_" in answer
    assert "GUEST_ES_BASE (0x6806) = 0x0" in answer


def test_a_list_of_completions_is_no_answer_to_the_harness(prompt):
    """The prompt that is shown again does not begin a line: nobody takes it for the end of an answer."""
    answer = prompt.type(b"vmread \t\x15")
    assert answer.count("\nvmx> ") == 2  # behind Ctrl-U's empty line, and behind the last answer


def test_tab_in_the_middle_of_a_line(prompt):
    prompt("load")
    assert "GUEST_RIP (0x681e) = 0x8000" in prompt.type(b"vmread GUEST_RI HOST_RIP" + LEFT * 9 + b"\t")


def test_nothing_to_complete_changes_nothing(prompt):
    assert "no command 'nonsense'" in prompt.type(b"nonsense\t\t")
    assert "usage: mem" in prompt.type(b"mem zz\t")
    assert "usage: vmxoff" in prompt.type(b"vmxoff zz\t")
