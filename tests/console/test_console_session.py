"""The session: pexpect on a serial line whose other end is the test."""

from __future__ import annotations

import re
import socket

import pytest

from vmxlab.console.session import Session
from vmxlab.engines.base import MachineEnd
from vmxlab.errors import (
    CaseError,
    LogError,
    MachineDied,
    MachineError,
    MachineHung,
    ProtocolError,
    VmxlabError,
)
from vmxlab.image.protocol import PROTOCOL_VERSION

SOON_S = 10.0
"""A deadline that is not meant to be reached."""
NOW_S = 0.0
"""A deadline for what has arrived already."""

PROMPT = b"\r\nvmx> "


@pytest.fixture
def booted(session, peer, boot_text) -> Session:
    """At the first prompt."""
    peer.send(boot_text())
    session.boot(SOON_S)
    return session


def error_of(kind: type[VmxlabError], call, *arguments) -> VmxlabError:
    with pytest.raises(kind) as caught:
        call(*arguments)
    assert type(caught.value) is kind
    return caught.value


# --- boot ---------------------------------------------------------------------------------------------------


def test_boot_learns_what_the_monitor_says_of_the_processor(booted):
    assert booted.has_vmx
    assert booted.boot_record.number("maxphyaddr") == 40
    assert booted.capabilities.raw == {0x480: 0xDA_0400_0000_002B, 0x481: 0x7F_0000_0016}


def test_a_processor_without_vmx_has_no_capabilities(session, peer, boot_text):
    peer.send(boot_text(vmx=0))
    session.boot(SOON_S)
    assert (session.has_vmx, session.capabilities) == (False, None)


def test_before_boot_nothing_is_known(session):
    assert (session.has_vmx, session.boot_record, session.capabilities) == (False, None, None)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 50])
def test_the_prompt_is_found_in_pieces_of_any_size(session, peer, boot_text, size):
    text = boot_text()
    peer.send(*(text[i : i + size] for i in range(0, len(text), size)))
    session.boot(SOON_S)
    assert session.capabilities is not None


def test_an_image_of_another_protocol_is_refused_with_both_versions(session, peer, boot_text):
    peer.send(boot_text(protocol=0x77))
    error = error_of(ProtocolError, session.boot, SOON_S)
    assert "protocol 0x77" in error.message and f"this harness {PROTOCOL_VERSION:#x}" in error.message
    assert "make the image again" in error.advice


def test_a_prompt_without_a_boot_record_is_refused(session, peer):
    peer.send(b"Welcome to another program" + PROMPT)
    error = error_of(ProtocolError, session.boot, SOON_S)
    assert "without its boot record" in error.message
    assert error.log_path == session.log.path


@pytest.mark.parametrize("text", [b"\r\nnot at a line's start: vmx> ", b"vmx>", b"\r\nvmx>\r\n", b"\nvmx >"])
def test_text_that_looks_like_a_prompt_is_none(session, peer, text):
    peer.send(b"some" + text)
    assert error_of(MachineHung, session.boot, NOW_S)


def test_a_machine_that_never_says_anything_is_hung(session):
    error = error_of(MachineHung, session.boot, NOW_S)
    assert "the monitor's prompt" in error.message
    assert error.engine == "paper 1.0 (model-x)"
    assert error.last_record is None


# --- cases --------------------------------------------------------------------------------------------------


def test_a_frame_is_sent_behind_its_mark_and_the_records_of_its_case_come_back(booted, peer, case_text):
    peer.send(b"\r\n" + case_text(4, (30, 12)) + PROMPT)
    records = booted.run_frame(b"the frame", SOON_S)
    assert peer.received() == b"\x01the frame"
    assert [record.kind for record in records] == ["case", "vmx", "exit", "exit", "end"]


def test_one_case_after_the_other(booted, peer, case_text):
    for number in range(3):
        peer.send(b"\r\n" + case_text(number) + PROMPT)
        records = booted.run_frame(b"", SOON_S)
        assert [r.number("id") for r in records if r.kind in ("case", "end")] == [number, number]


def test_records_of_a_case_are_found_wherever_the_stream_is_split(booted, peer, case_text):
    """At every byte, in two pieces."""
    text = b"\r\n" + case_text(1, (30, 12)) + PROMPT
    for at in range(len(text) + 1):
        peer.send(text[:at], text[at:])
        assert len(booted.run_frame(b"", SOON_S)) == 5, at
        peer.received()


def test_records_of_a_case_are_found_byte_by_byte(booted, peer, case_text):
    text = b"\r\n" + case_text(1, (30, 12)) + PROMPT
    peer.send(*(text[i : i + 1] for i in range(len(text))))
    assert len(booted.run_frame(b"", SOON_S)) == 5


def test_what_the_monitor_refuses_is_a_protocol_error_with_its_word(booted, peer, record):
    peer.send(b"\r\n" + record("error", what="frame-crc") + PROMPT)
    error = error_of(ProtocolError, booted.run_frame, b"", SOON_S)
    assert "frame-crc" in error.message
    assert error.last_record.startswith("@error what=frame-crc")


@pytest.mark.parametrize("count", [0, 2])
def test_one_case_in_one_case_out(booted, peer, case_text, count):
    peer.send(b"\r\n" + b"".join(case_text(n) for n in range(count)) + PROMPT)
    error = error_of(ProtocolError, booted.run_frame, b"", SOON_S)
    assert f"records of {count} came back" in error.message


def test_a_damaged_record_is_an_error_and_not_a_shorter_run(booted, peer, case_text):
    text = case_text(0, (30, 12)).replace(b"reason=0x1e", b"reason=0x1f")
    peer.send(b"\r\n" + text + PROMPT)
    error = error_of(ProtocolError, booted.run_frame, b"", SOON_S)
    assert "1 lines of the serial stream are damaged" in error.message
    assert "reason=0x1f" in error.message


def test_damage_is_told_once(booted, peer, case_text):
    peer.send(b"\r\n@damaged\r\n" + case_text(0) + PROMPT)
    error_of(ProtocolError, booted.run_frame, b"", SOON_S)
    peer.send(b"\r\n" + case_text(1) + PROMPT)
    assert booted.run_frame(b"", SOON_S)


def test_the_cases_of_an_image_come_one_by_one_until_all_are_done(
    session, peer, boot_text, case_text, record
):
    peer.send(boot_text(prompt=b""), case_text(0), case_text(1, ()), record("done", cases=2) + PROMPT)
    got = [session.read_cases(SOON_S) for _ in range(3)]
    assert [[records[0].number("id") for records in cases] for cases in got] == [[0], [1], []]
    assert session.has_vmx and session.capabilities is not None


def test_cases_whose_end_was_damaged_come_with_the_next(session, peer, boot_text, case_text):
    damaged = case_text(0).replace(b"@end", b"@enb")
    peer.send(boot_text(prompt=b"") + damaged + case_text(1))
    first, second = session.read_cases(SOON_S)
    assert (first[0].number("id"), second[0].number("id")) == (0, 1)
    assert len(session.take_broken()) == 1
    assert session.take_broken() == []


def test_an_image_of_another_protocol_is_refused_before_its_first_case(session, peer, boot_text, case_text):
    peer.send(boot_text(protocol=PROTOCOL_VERSION + 1, prompt=b"") + case_text(0))
    message = error_of(ProtocolError, session.read_cases, SOON_S).message
    assert f"protocol {PROTOCOL_VERSION + 1:#x}" in message


def test_an_image_that_the_monitor_refuses_is_a_protocol_error(session, peer, boot_text, record):
    peer.send(boot_text(prompt=b"") + record("error", what="payload-crc") + PROMPT)
    assert "payload-crc" in error_of(ProtocolError, session.read_cases, SOON_S).message


# --- commands -----------------------------------------------------------------------------------------------


def test_a_command_gives_what_it_printed_without_its_echo(booted, peer):
    peer.send(b"rdmsr 0x480\r\n0x00da0400\r\nsecond line" + PROMPT)
    assert booted.command("rdmsr 0x480", SOON_S) == "0x00da0400\r\nsecond line\r\n"
    assert peer.received() == b"rdmsr 0x480\r"


def test_a_command_that_prints_nothing_gives_nothing(booted, peer):
    peer.send(b"wrmsr 0x10 0" + PROMPT)
    assert booted.command("wrmsr 0x10 0", SOON_S) == ""


# --- a machine that ends ------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [MachineEnd.TRIPLE_FAULT, MachineEnd.KILLED, MachineEnd.ENGINE_ERROR])
def test_a_machine_that_ended_is_dead_for_the_reason_it_has(booted, peer, end):
    peer.hang_up(end)
    error = error_of(MachineDied, booted.read_cases, SOON_S)
    assert end.value in error.message
    assert "the end of the next case" in error.message


def test_a_dead_machine_leaves_its_evidence_in_the_log(booted, peer):
    peer.hang_up()
    error = error_of(MachineDied, booted.read_cases, SOON_S)
    assert peer.machine.calls == ["postmortem"]
    assert booted.log.path.read_bytes().endswith(b"\n# the evidence\n# in two lines\n")
    assert error.log_path == booted.log.path


def test_a_stream_that_ends_anywhere_leaves_its_whole_records_and_counts_the_cut_one(
    open_session, boot_text, case_text
):
    """At every byte of a case's records."""
    whole = case_text(0, (30, 12)).partition(b"@end")[0]
    for length in range(len(whole)):
        session, peer = open_session()
        peer.send(whole[:length])
        peer.hang_up()
        error_of(MachineDied, session.read_cases, SOON_S)
        ended = whole[:length].count(b"\n")
        assert [r.line for r in session.records] == whole.decode().split("\r\n")[:ended]
        assert len(session.reader.broken) == (length > 0 and whole[length - 1 : length] != b"\n")


def test_what_came_before_the_end_is_kept(booted, peer, case_text, record):
    whole = case_text(0, (30, 12))
    peer.send(b"\r\n" + whole[: whole.index(b"@exit n=0x1") + 20])
    peer.hang_up()
    error = error_of(MachineDied, booted.read_cases, SOON_S)
    assert [r.kind for r in booted.records][-3:] == ["case", "vmx", "exit"]
    assert error.last_record.startswith("@exit n=0x0")
    (broken,) = booted.reader.broken
    assert (broken.why, broken.text[:11]) == ("cut short", "@exit n=0x1")


def test_a_connection_that_breaks_loses_no_record(paper, log, boot_text, case_text):
    """A peer that dies with input unread resets the connection: what it sent before is still data."""
    make_peer, make_machine = paper
    mine, theirs = socket.socketpair()
    with mine, theirs:
        peer = make_peer(mine, make_machine(theirs))
        session = Session(peer.machine, log)
        peer.send(boot_text(prompt=b"") + case_text(0, (30,)).partition(b"@end")[0])
        theirs.send(b"unread")
        peer.hang_up(MachineEnd.KILLED)
        error = error_of(MachineDied, session.read_cases, SOON_S)
    assert MachineEnd.KILLED.value in error.message
    assert [record.kind for record in session.records] == ["boot", "caps", "case", "vmx", "exit"]
    assert error.last_record.startswith("@exit")


@pytest.mark.parametrize("line", ["caps\r", "a\nb", "caps @end", "\u00e9", "\x01frame"])
def test_what_could_be_taken_for_something_else_is_no_command(booted, peer, line):
    error_of(CaseError, booted.command, line, SOON_S)
    with pytest.raises(BlockingIOError):
        peer.received()


def test_a_line_that_is_gone_when_something_is_sent_is_a_dead_machine(booted, peer):
    peer.hang_up(MachineEnd.EXITED)
    error = error_of(MachineDied, booted.run_frame, b"frame", SOON_S)
    assert MachineEnd.EXITED.value in error.message


def test_a_panic_is_told_at_once(booted, peer, record, case_text):
    peer.machine.ending = MachineEnd.RUNNING
    peer.send(b"\r\n" + case_text(0).partition(b"@end")[0] + record("panic", what="stack") + b"more")
    error = error_of(MachineDied, booted.read_cases, SOON_S)
    assert "the monitor panicked" in error.message
    assert error.last_record.startswith("@panic what=stack")


def test_a_case_that_says_nothing_more_is_hung_with_what_it_said(booted, peer, case_text):
    peer.send(b"\r\n" + case_text(0).partition(b"@end")[0])
    error = error_of(MachineHung, booted.run_frame, b"", NOW_S)
    assert "the end of the case" in error.message
    assert "Limits(seconds=...)" in error.advice
    assert error.last_record.startswith("@exit n=0x0")
    assert [record.kind for record in booted.records] == ["case", "vmx", "exit"]
    assert f"# deadline: {error.message}\n".encode() in booted.log.path.read_bytes()


def test_a_machine_that_takes_no_input_is_hung(booted, peer):
    peer.machine.serial.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    booted.machine.serial.settimeout(0)
    with pytest.raises(BlockingIOError):
        while True:
            booted.machine.serial.send(bytes(1024))
    error = error_of(MachineHung, booted.run_frame, b"frame", NOW_S)
    assert "does not take what it is sent" in error.message
    assert booted.machine.serial.gettimeout() is None


def test_errors_of_machines_are_of_one_kind():
    assert issubclass(MachineDied, MachineError) and issubclass(MachineHung, MachineError)


# --- the log ------------------------------------------------------------------------------------------------


def test_every_byte_that_came_is_in_the_log(booted, peer, boot_text, case_text):
    text = b"\r\n" + case_text(0) + PROMPT
    peer.send(*(bytes([a]) for a in text))
    booted.run_frame(b"", SOON_S)
    assert booted.log.path.read_bytes() == boot_text() + text


def test_a_log_that_can_not_be_written_stops_the_run(full_log, peer, boot_text):
    session = Session(peer.machine, full_log)
    peer.send(boot_text())
    error = error_of(LogError, session.boot, SOON_S)
    assert re.search("No space left", error.message)
    assert error.log_path == full_log.path


def test_a_log_without_space_does_not_hide_why_a_machine_died(full_log, peer):
    session = Session(peer.machine, full_log)
    peer.hang_up()
    assert "triple fault" in error_of(MachineDied, session.boot, SOON_S).message
