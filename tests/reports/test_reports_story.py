"""A serial log told as a story: whole, cut at any byte, damaged, and of machines that died."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from vmxlab.console.records import encode_record, parse_line
from vmxlab.engines.base import MachineEnd
from vmxlab.image.protocol import PROTOCOL_VERSION
from vmxlab.reports.story import Kind, Passage, State, Storyteller, case
from vmxlab.reports.story.layout import lay_out

LOG = Path(__file__).with_name("serial.log").read_bytes()
"""A session of Bochs, as the harness logged it: seven cases and a command, ended at the prompt."""

DIED = Path(__file__).with_name("serial-died.log").read_bytes()
"""One whose last case sends the first VM exit to an address without code."""

BOOT = LOG[: LOG.index(b"\n# @code")]


def tell(log: bytes, **about: bool) -> tuple[Storyteller, list[Passage]]:
    teller = Storyteller(**about)
    return teller, [*teller.feed(log), *teller.close()]


def line(kind: str, **values: str | int) -> bytes:
    return encode_record(kind, values).encode() + b"\r\n"


def of_kind(passages: list[Passage], kind: Kind) -> list[Passage]:
    return [passage for passage in passages if passage.kind is kind]


def words(passages: list[Passage], width: int | None = None) -> list[str]:
    lines = [line for passage in passages for line in lay_out(passage, width)]
    return ["".join(text for text, _ in line).rstrip() for line in lines]


# --- a whole log --------------------------------------------------------------------------------------------


def test_whole_log_is_told_in_its_order():
    teller, passages = tell(LOG)
    heads = [passage.head for passage in passages if passage.head]
    assert heads[:4] == ["engine", "monitor", "VMX", "case 0"]
    assert [p.text for p in of_kind(passages, Kind.CASE)] == [
        "ports",
        "wrong-revision",
        "ept",
        "bad-guest",
        "steps",
        "",
        "fault",
    ]
    assert (teller.state, teller.damaged, teller.deaths) == (State.WHOLE, 0, 0)
    assert passages[-1].text == "7 cases, 7 exits; it ends at the monitor's prompt"


def test_each_exit_has_its_reason_its_qualification_its_instruction_and_what_changed():
    _, passages = tell(LOG, with_data=True)
    first, second, violation = of_kind(passages, Kind.EXIT)[:3]
    assert (first.head, first.place) == ("exit 0 IO_INSTRUCTION", "0x8000  in al, 0x60")
    assert first.text == "IN port 0x60, 1 byte"
    assert second.notes == ("rax=0x1c GUEST_CR0=0x80000031",)
    assert violation.text == "write, EPT allows ---; GPA 0x100000; linear 0x100000"
    assert violation.data["details"]["guest_physical_address"] == "0x100000"


def test_outcomes_tell_a_failure_from_a_success():
    _, passages = tell(LOG)
    assert [p.text for p in of_kind(passages, Kind.FAILURE)] == [
        "VMPTRLD: VMfailInvalid",
        "WRMSR of IA32_VMX_BASIC (0x480): #GP(0x0)",
    ]
    outcomes = [p.text for p in of_kind(passages, Kind.OUTCOME)]
    assert outcomes[0] == "VMXON, VMCLEAR, VMPTRLD, VMWRITE of 95 fields: VMsucceed"
    assert "RDMSR of IA32_VMX_BASIC (0x480): VMsucceed, 0xd810000000002b" in outcomes


def test_failed_entry_names_the_broken_rule_and_shows_no_instruction():
    _, passages = tell(LOG)
    (rules,) = of_kind(passages, Kind.RULES)
    assert rules.data["broken_rules"] == ["guest-rflags-reserved"]
    assert "27.3.1.4" in rules.notes[0]
    (failed,) = [p for p in of_kind(passages, Kind.EXIT) if "FAILURE" in p.head]
    assert failed.place == "0x8000"
    assert failed.text.endswith("L2 executed nothing")


def test_without_what_the_log_says_of_the_processor_no_rule_is_named():
    _, passages = tell(b"".join(part for part in LOG.splitlines(keepends=True) if b"@caps" not in part))
    (rules,) = of_kind(passages, Kind.RULES)
    assert "not known" in rules.text
    assert rules.notes == ()


def test_fault_in_l1_is_explained():
    _, passages = tell(LOG)
    (fault,) = of_kind(passages, Kind.FAULT)
    assert fault.text.startswith("#SS(0x0) in L1")
    assert "lives on" in fault.notes[0]


def test_text_of_the_monitor_is_part_of_the_story_and_a_bare_prompt_is_not():
    _, passages = tell(LOG)
    assert [p.text for p in of_kind(passages, Kind.TEXT)] == ["vmx> rdmsr 0x480", "0xd810000000002b"]


def test_lines_may_end_as_they_like():
    unix = LOG.replace(b"\r\n", b"\n")
    dos = unix.replace(b"\n", b"\r\n")
    told = [[p.to_json() for p in tell(log)[1]] for log in (LOG, unix, dos)]
    assert told[0] == told[1] == told[2]


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_how_the_stream_is_cut_into_pieces_changes_nothing(size):
    teller = Storyteller()
    passages = [p for at in range(0, len(LOG), size) for p in teller.feed(LOG[at : at + size])]
    assert [*passages, *teller.close()] == tell(LOG)[1]


def test_passages_come_as_soon_as_their_lines_are_complete():
    teller = Storyteller()
    at = LOG.index(b"\n@exit n=0x1") + 1
    before = list(teller.feed(LOG[:at]))
    assert before[-1].head == "exit 0 IO_INSTRUCTION"
    exit_line = LOG[at : LOG.index(b"\n", at) + 1]
    assert list(teller.feed(exit_line[:-1])) == []
    assert [p.head for p in teller.feed(exit_line[-1:])] == ["exit 1 HLT"]


# --- cut at any byte ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head", "log"), [(b"", LOG), (BOOT, DIED[len(BOOT) :])], ids=["whole", "died"])
def test_log_that_is_cut_at_any_byte_is_explained(head, log, monkeypatch):
    """What came before the cut line is told once; then each cut of that line ends the story."""
    check, known = case.check_entry, {}
    monkeypatch.setattr(  # it takes longer than all the rest, and is asked the same again and again
        case, "check_entry", lambda f, e: known.get(len(f)) or known.setdefault(len(f), check(f, e))
    )
    before = Storyteller()
    list(before.feed(head))
    for whole in log.splitlines(keepends=True):
        state = pickle.dumps(before)
        for length in range(len(whole)):
            teller = pickle.loads(state)
            passages = [*teller.feed(whole[:length]), *teller.close()]
            assert_explained(teller, passages, whole[:length])
        list(before.feed(whole))
        assert words(passages, 100)


def assert_explained(teller: Storyteller, passages: list[Passage], rest: bytes) -> None:
    end = passages[-1]
    assert end.kind is Kind.CLOSE
    assert teller.damaged == 0, "what is cut at the end is no damage"
    if teller.state is State.EARLY:
        assert end.head == "ends early"
        assert end.text
        assert any("Nothing in the log says why" in note for note in end.notes)
        if rest.strip() and not rest.startswith(b"# ") and parse_line(rest.rstrip()) is None:
            assert any(f"Line {end.line} is cut" in note for note in end.notes)
    elif teller.state is State.WHOLE:
        assert rest.startswith((b"vmx> ", b"# ")) or not rest.strip()


def test_telling_from_the_start_is_the_same_as_going_on():
    for length in range(0, len(LOG), 331):
        teller = Storyteller()
        pieces = [*teller.feed(LOG[: length // 2]), *teller.feed(LOG[length // 2 : length]), *teller.close()]
        assert pieces == tell(LOG[:length])[1]


@pytest.mark.parametrize(
    ("until", "where", "place"),
    [
        (b"@boot", "before the monitor's first record", None),
        (b"\n@caps", "after the monitor had started, before its first case or prompt", None),
        (b"@vmx ok=", "in case 0 ports, at its start", "laid out"),
        (b"@exit n=0x0", "in case 0 ports, after VMWRITE of 95 fields", "at the VM entry"),
        (b"@exit n=0x1", "in case 0 ports, after exit 0 (IO_INSTRUCTION)", "in L2 after it"),
        (b"@vmx op=vmptrld", "in case 1 wrong-revision, after VMCLEAR", "at the VM entry"),
        (b"@end id=0x1", "in case 1 wrong-revision, after VMPTRLD, which failed", "between VMX instructions"),
        (b"@vmcs f280c", "in case 3 bad-guest, while the VMCS was reported", "VM exit"),
        (b"@memory", "in case 4 steps, after exit 0 (EXCEPTION_OR_NMI)", "in L2 after it"),
        (b"@end id=0x6", "in case 6 fault, after a fault in L1", "took the case down"),
    ],
)
def test_where_a_log_ends_is_said(until, where, place):
    _, passages = tell(LOG[: LOG.index(until)])
    assert passages[-1].text.startswith(where)
    if place is not None:
        assert place in passages[-1].notes[0]


def test_open_list_says_what_had_succeeded():
    cut = LOG.index(b",vmptrld")
    _, passages = tell(LOG[:cut])
    *_, quoted, explained = passages[-1].notes
    assert quoted.endswith("is cut: @vmx ok=vmxon,vmclear")
    assert "still open" in explained


def test_case_that_was_sent_and_never_began_is_not_a_whole_log():
    teller, passages = tell(LOG[: LOG.index(b"\r\n@case id=0x0")])
    assert teller.state is State.EARLY
    assert passages[-1].text.startswith("at the prompt: case 0 was sent")


def test_prompt_or_the_images_end_makes_a_log_whole():
    record = line("case", id=0) + line("end", id=0, why="done", exits=0)
    assert tell(BOOT + b"\n" + record)[0].state is State.EARLY
    assert tell(BOOT + b"\n" + record + b"vmx> ")[0].state is State.WHOLE
    assert tell(BOOT + b"\n" + record + line("done", cases=1) + b"vm")[0].state is State.WHOLE


# --- how a machine died -------------------------------------------------------------------------------------


def test_triple_fault_after_a_vm_entry_points_at_the_host_state():
    teller, passages = tell(DIED)
    assert teller.state is State.DIED
    notes = " ".join(passages[-1].notes)
    assert passages[-1].text.startswith("in case 7 kill, after VMWRITE of 95 fields")
    assert "triple fault" in notes
    assert "HOST_RIP" in notes
    assert "RIP=000000000dead000" in notes, "what the engine says of it"


def test_what_l2_would_execute_is_shown_where_the_log_ends_in_it():
    _, passages = tell(LOG[: LOG.index(b"@exit n=0x0")])
    assert "L2 has at 0x8000: in al, 0x60; hlt" in passages[-1].notes
    _, passages = tell(LOG[: LOG.index(b"@vmx ok")])
    assert not any("L2 has" in note for note in passages[-1].notes)


@pytest.mark.parametrize("end", [end for end in MachineEnd if end is not MachineEnd.RUNNING])
def test_each_end_of_a_machine_is_explained(end):
    log = LOG[: LOG.index(b"@exit n=0x0")] + f"# engine 1.0 (model): {end.value}\n".encode()
    teller, passages = tell(log)
    asked = end in (MachineEnd.STOPPED, MachineEnd.SHUTDOWN)
    assert teller.state is (State.EARLY if asked else State.DIED)
    assert any(end.value[1:] in note for note in passages[-1].notes)
    assert len(passages[-1].notes) > 4
    assert passages[-1].data["machine"] == end.name


def test_engines_last_words_are_no_damage_and_what_was_being_said_is_quoted():
    log = (
        LOG[: LOG.index(b",vmptrld")]
        + b"\n# engine 1.0 (m): the processor shut down (VMX abort)\n# CR0=0x1 CR2=0x2\n"
    )
    teller, passages = tell(log)
    assert teller.damaged == 0
    assert "28.7" in " ".join(passages[-1].notes)
    assert "still open" in passages[-1].notes[-1]


def test_deadline_in_l2_names_the_usual_causes():
    log = (
        LOG[: LOG.index(b"@exit n=0x0")] + b"# deadline: nothing more came; the harness waited for the end\n"
    )
    teller, passages = tell(log)
    assert teller.state is State.DIED
    assert "preemption timer" in " ".join(passages[-1].notes)


def test_panic_ends_the_story():
    panic = line("panic", vector=8, code=0, rip=0x1000, rsp=0, rflags=2, cr2=0)
    log = LOG[: LOG.index(b"@exit n=0x0")] + panic + b"# bochs 2.7 (model): is running\n"
    teller, passages = tell(log)
    assert (teller.state, teller.deaths) == (State.DIED, 2)
    assert of_kind(passages, Kind.DEATH)[0].text == "#DF(0x0) in L1 at 0x1000, CR2 0x0"
    assert "double fault" in passages[-1].notes[2]


def test_restart_in_the_middle_of_a_case_is_a_death_though_the_log_goes_on():
    boot = line("boot", protocol=PROTOCOL_VERSION, vmx=1)
    teller, passages = tell(LOG[: LOG.index(b"@exit n=0x0")] + boot + b"vmx> ")
    assert (teller.state, teller.deaths) == (State.WHOLE, 1)
    (restart,) = of_kind(passages, Kind.DEATH)
    assert restart.text.startswith("in case 0 ports")
    assert tell(LOG + b"\r\n" + boot + b"vmx> ")[0].deaths == 0, "a reset at the prompt was asked for"


@pytest.mark.parametrize("what", ["frame-crc", "payload-crc", "something-new"])
def test_what_the_monitor_refused_is_explained(what):
    teller, passages = tell(BOOT + b"\n" + line("error", what=what) + b"vmx> ")
    assert teller.refused == 1
    (error,) = of_kind(passages, Kind.TROUBLE)
    assert error.text.startswith(f"{what}: ")


# --- damage -------------------------------------------------------------------------------------------------


def test_broken_line_is_shown_as_broken_with_its_number_and_why():
    teller, passages = tell(LOG.replace(b"rax=0x1c", b"rax=0x1d"))
    broken, missing = of_kind(passages, Kind.TROUBLE)
    number = LOG[: LOG.index(b"rax=0x1c")].count(b"\n") + 1
    assert broken.text.startswith(f"line {number}: the checksum does not fit: @exit n=0x1")
    assert "the case had 2 exits, records of 1 arrived" in missing.text
    assert teller.state is State.WHOLE
    assert teller.damaged


@pytest.mark.parametrize("gone", [b"@case id=0x2", b"@exit n=0x0", b"@end id=0x2"])
def test_line_that_is_missing_is_said_and_the_rest_is_told(gone):
    lines = LOG.splitlines(keepends=True)
    index = next(i for i, text in enumerate(lines) if text.startswith(gone))
    teller, passages = tell(b"".join(lines[:index] + lines[index + 1 :]))
    assert teller.damaged
    assert any(p.head == "missing" for p in of_kind(passages, Kind.TROUBLE))
    assert passages[-1].head == "whole"
    assert teller.cases == 7


def test_exits_behind_a_missing_one_are_still_told():
    exits = b"".join(line("exit", n=n, reason=12, rip=0x8000 + n) for n in (0, 1, 4, 5))
    log = BOOT + b"\n" + line("case", id=0) + exits + line("end", id=0, why="stop", exits=6) + b"vmx> "
    _, passages = tell(log)
    assert [p.head for p in of_kind(passages, Kind.EXIT)] == [f"exit {n} HLT" for n in (0, 1, 4, 5)]
    assert "exit 2 is missing" in of_kind(passages, Kind.TROUBLE)[0].text


@pytest.mark.parametrize(
    "record",
    [
        line("exit", n="x", reason=12),
        line("exit", reason=12),
        line("exit", n=0, reason=0, intr=1 << 40),
        line("vmx", op="vmxon", rc="maybe"),
        line("vmx"),
        line("vmcs", fzzzz=1),
        line("vmcs", f0001=1),
        line("memory", at=0, data="xyz"),
        line("fault", vector=1),
        line("end", why="because", exits=0),
        line("end"),
        line("case"),
        line("boot"),
        line("caps", zz="1"),
        line("code", id=0, mode="sideways", at=0, data="90"),
        line("code", id=0, mode="long", at=0, data="9"),
        line("done"),
        line("error"),
        line("panic"),
        line("sweep", n=0),
        line("live"),
    ],
    ids=lambda record: record.decode().split("*")[0],
)
def test_record_that_makes_no_sense_is_said_and_nothing_raises(record):
    start = BOOT + b"\n" + line("case", id=0)
    teller, passages = tell(start + record + line("end", id=0, why="stop", exits=0) + b"vmx> ")
    assert teller.damaged
    assert any("makes no sense" in p.text or p.head == "missing" for p in of_kind(passages, Kind.TROUBLE))


def test_record_of_a_kind_that_is_not_known_is_shown():
    _, passages = tell(BOOT + b"\n" + line("news", a=1) + b"vmx> ")
    assert "@news a=0x1" in of_kind(passages, Kind.TEXT)[0].text


def test_other_version_of_the_protocol_is_said():
    _, passages = tell(line("boot", protocol=99, vmx=0) + b"vmx> ")
    (boot,) = of_kind(passages, Kind.BOOT)
    assert "no VMX" in boot.text
    assert "protocol 99" in boot.notes[0]


@pytest.mark.parametrize("log", [b"", b"\n\n", b"hello\nworld\n", bytes(range(256)) * 64, b"\xff" * 5000])
def test_what_is_no_log_is_said_to_be_none(log):
    teller, passages = tell(log)
    assert teller.state is State.NO_LOG
    assert passages[-1].head == "no log"
    assert words(passages, 80)


def test_line_without_an_end_is_not_held_whole_and_what_is_not_shown_is_counted():
    _, passages = tell(b"x" * (3 << 20) + b"\n" + BOOT)
    (text,) = of_kind(passages, Kind.TEXT)
    assert len(text.text) < 3000
    assert text.text.endswith(f"({(3 << 20) - 2000} more)")


def test_text_does_nothing_to_a_terminal():
    _, passages = tell(BOOT + b"\n\x1b[31mred\x07\x00\n")
    assert of_kind(passages, Kind.TEXT)[0].text == "\\x1b[31mred\\x07\\x00"


# --- code ---------------------------------------------------------------------------------------------------


def one_exit(*code: bytes, rip: int = 0x8000, inside: bool = False) -> str:
    case = line("case", id=0)
    before, after = (case, b"".join(code)) if inside else (b"".join(code), case)
    exit_ = line("exit", n=0, reason=12, rip=rip)
    _, passages = tell(BOOT + b"\n" + before + after + exit_)
    return of_kind(passages, Kind.EXIT)[0].place


@pytest.mark.parametrize("inside", [False, True], ids=["by the harness", "by the monitor"])
def test_code_is_that_of_the_case_whose_number_it_has(inside):
    mine = line("code", id=0, mode="long", at=0x8000, data="e460f4")
    others = line("code", id=1, mode="long", at=0x8000, data="0fa2")
    assert one_exit(mine, others, inside=inside) == "0x8000  in al, 0x60"


def test_code_decodes_by_its_mode_and_lies_at_the_base_of_cs():
    code = line("code", id=0, mode="real", base=0x7000, at=0x8000, data="b83412")
    assert one_exit(code, rip=0x1000) == "0x1000  mov ax, 0x1234"


def test_code_in_two_records_is_one_piece():
    first, second = (
        line("code", id=0, mode="long", at=at, data=data) for at, data in ((0x8000, "e4"), (0x8001, "60"))
    )
    assert one_exit(first, second) == "0x8000  in al, 0x60"


def test_no_instruction_is_invented():
    code = line("code", id=0, mode="long", at=0x8000, data="ffff")
    assert one_exit(code) == "0x8000  (bad) 0xff"
    assert one_exit(code, rip=0x9000) == "0x9000  (its bytes are not in the log)"
    assert one_exit() == "0x8000", "the log has no code at all"


def test_live_command_is_a_case_without_a_name_and_l2s_memory_and_registers_stay():
    log = BOOT + b"\n" + line("code", id=4, mode="long", at=0x8000, data="0fa2f4")
    for number, reason, rip in ((4, 10, 0x8000), (5, 12, 0x8002)):
        log += line("live", id=number) + line("exit", n=0, reason=reason, rip=rip, rax=7, rbx=number)
        log += line("end", id=number, why="stop", exits=1) + b"vmx> "
    teller, passages = tell(log, keep=True)
    assert [p.head for p in of_kind(passages, Kind.CASE)] == ["live command 4", "live command 5"]
    first, second = of_kind(passages, Kind.EXIT)
    assert (first.place, second.place) == ("0x8000  cpuid", "0x8002  hlt")
    assert "rax=0x7 rbx=0x4" in first.notes[0]
    assert second.notes == ("rbx=0x5",), "RAX was 7 before"
    assert [told.title for told in teller.told] == ["live command 4", "live command 5"]
    assert teller.state is State.WHOLE


# --- the layout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 60, 100, 160])
def test_lines_fold_at_the_width_of_the_terminal(width):
    _, passages = tell(LOG)
    lines = words(passages, width)
    assert max(map(len, lines)) <= width
    assert "".join(lines).count("cpuid") == 1


def test_nothing_is_folded_where_there_is_no_width():
    _, passages = tell(LOG)
    assert len(words(passages)) == sum(
        1 + (p.kind in (Kind.CASE, Kind.CLOSE)) + len(p.notes) for p in passages
    )
    assert "    0  0x8000  in al, 0x60             IO_INSTRUCTION  IN port 0x60, 1 byte" in words(passages)
