"""`vmxlab decode`: what stands in a serial log, and the exit status a script goes by."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmxlab import Case
from vmxlab.console.records import encode_record
from vmxlab.reports.story import Kind, Storyteller

REPORTS = Path(__file__).parents[1] / "reports"
WHOLE, DIED = REPORTS / "serial.log", REPORTS / "serial-died.log"
COMMAND = [sys.executable, "-m", "vmxlab.cli", "decode", "-"]


def cut(folder: Path, until: bytes) -> Path:
    log = WHOLE.read_bytes()
    path = folder / "cut.log"
    path.write_bytes(log[: log.index(until)])
    return path


# --- the exit status ----------------------------------------------------------------------------------------


def test_whole_log_in_which_nothing_died_is_0(vmxlab_cli):
    result = vmxlab_cli("decode", WHOLE)
    assert (result.status, result.err) == (0, "")
    assert "0  0x8000  in al, 0x60" in result.out
    assert result.out.endswith("whole  7 cases, 7 exits; it ends at the monitor's prompt\n")


def test_machine_that_died_is_4(vmxlab_cli):
    result = vmxlab_cli("decode", DIED)
    assert result.status == 4
    assert "died  in case 7 kill" in result.out


@pytest.mark.parametrize("until", [b"@exit n=0x0", b"\n@case id=0x1", b"x0 name=ports"])
def test_log_that_ends_early_is_4(vmxlab_cli, folder, until):
    assert vmxlab_cli("decode", cut(folder, until)).status == 4


def test_damaged_log_is_3_though_it_is_told(vmxlab_cli, folder):
    path = folder / "damaged.log"
    path.write_bytes(WHOLE.read_bytes().replace(b"rax=0x1c", b"rax=0x1d"))
    result = vmxlab_cli("decode", path)
    assert result.status == 3
    assert "broken line  line 10: the checksum does not fit: @exit n=0x1" in result.out


def test_monitor_that_refused_what_it_was_given_is_3(vmxlab_cli, folder):
    path = folder / "refused.log"
    path.write_text(encode_record("error", {"what": "frame-crc"}) + "\nvmx> ")
    result = vmxlab_cli("decode", path)
    assert result.status == 3
    assert "damaged on its way" in result.out


@pytest.mark.parametrize("content", [b"", b"nothing of the kind\n", bytes(range(256)) * 999])
def test_what_is_no_log_is_3(vmxlab_cli, folder, content):
    path = folder / "other"
    path.write_bytes(content)
    result = vmxlab_cli("decode", path)
    assert result.status == 3
    assert "no log  " in result.out


@pytest.mark.parametrize(("name", "why"), [("missing", "No such file"), (".", "Is a directory")])
def test_what_can_not_be_read_is_3(vmxlab_cli, folder, name, why):
    result = vmxlab_cli("decode", name)
    assert (result.status, result.out) == (3, "")
    assert f"the log {name} can't be read: {why}" in result.err


def test_no_log_named_is_2(vmxlab_cli):
    assert vmxlab_cli("decode").status == 2


# --- json ---------------------------------------------------------------------------------------------------


def test_json_has_every_passage_with_its_line_and_its_data(vmxlab_cli):
    result = vmxlab_cli("decode", "--json", DIED)
    assert result.status == result.json["status"] == 4
    story = result.json["story"]
    assert story[-1]["state"] == "the machine died"
    assert story[-1]["machine"] == "TRIPLE_FAULT"
    lines = DIED.read_text().splitlines()
    (case,) = [passage for passage in story if passage["kind"] == "case"]
    assert lines[case["line"] - 1].startswith("@case id=0x7 name=kill")
    assert (case["case"], case["name"], case["live"]) == (7, "kill", False)


def test_json_of_an_exit_is_that_of_the_exit_table(vmxlab_cli):
    story = vmxlab_cli("decode", "--json", WHOLE).json["story"]
    first = next(passage for passage in story if passage["kind"] == "exit")
    assert first["reason"] == "IO_INSTRUCTION"
    assert first["qualification"]["port"] == "0x60"
    assert first["instruction"] == "in al, 0x60"
    assert first["details"]["watched"] == {"GUEST_CR0": "0x80000031"}


# --- a stream -----------------------------------------------------------------------------------------------


class Stream:
    """decode at the other end of a pipe that stays open."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            # A suite that runs in the background of a shell has it ignored, and would hand that down.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            env={**os.environ, "COLUMNS": "80"},
        )

    def send(self, log: bytes) -> None:
        self.process.stdin.write(log)

    def read_until(self, text: bytes) -> bytes:
        """What it prints up to a text; the test's own deadline ends a wait in vain."""
        seen = b""
        while text not in seen:
            piece = os.read(self.process.stdout.fileno(), 4096)
            assert piece, seen
            seen += piece
        return seen


@pytest.fixture
def stream() -> Iterator[Stream]:
    made = Stream()
    yield made
    made.process.kill()
    made.process.wait()
    for pipe in (made.process.stdin, made.process.stdout, made.process.stderr):
        pipe.close()


def test_stream_is_told_while_it_comes_and_ends_with_it(stream):
    log = WHOLE.read_bytes()
    half = log.index(b"@exit n=0x1")
    stream.send(log[:half])
    assert b"IN port 0x60" in stream.read_until(b"GUEST_CR0=0x80000031\n")
    assert stream.process.poll() is None
    stream.send(log[half:])
    stream.process.stdin.close()
    assert b"at the monitor's prompt" in stream.read_until(b"whole  7 cases") + stream.process.stdout.read()
    assert stream.process.wait(30) == 0


def test_ctrl_c_ends_a_stream_without_a_word(stream):
    stream.send(WHOLE.read_bytes())
    stream.read_until(b"case 6  fault")
    stream.process.send_signal(signal.SIGINT)
    assert stream.process.wait(30) == 130
    assert stream.process.stderr.read() == b""


def test_reader_that_has_seen_enough_ends_a_stream_without_a_word(stream):
    stream.send(WHOLE.read_bytes())
    stream.read_until(b"case 0")
    stream.process.stdout.close()
    deadline = time.monotonic() + 30
    while stream.process.poll() is None and time.monotonic() < deadline:
        try:
            stream.send(b"some text\n" * 1000)
        except BrokenPipeError:
            break
    assert stream.process.wait(30) == 141
    assert stream.process.stderr.read() == b""


# --- the log of a lab ---------------------------------------------------------------------------------------


def test_log_of_the_harness_holds_the_code_though_the_monitor_says_none(vmxlab):
    run = vmxlab.run(Case(name="remarked", program="cpuid; hlt", data={0x10000: b"\xcc\0\0"}))
    assert all(record.kind != "code" for record in run.records)
    log = run.log_path.read_bytes()
    log = log[log.rindex(b"# @code id=", 0, log.rindex(b"name=remarked") - 60) :]
    teller = Storyteller()
    exits = [p for p in [*teller.feed(log), *teller.close()] if p.kind is Kind.EXIT]
    assert [exit_.place for exit_ in exits] == ["0x8000  cpuid", "0x8002  hlt"]
    assert f"@code id={run.number:#x} mode=long at=0x10000 data=cc*".encode() in log
