"""A serial line with flipped bytes: what is damaged is counted and told, never taken for data."""

import pytest

from vmxlab import Case, ExitReason, Limits, on
from vmxlab.console.records import parse_log
from vmxlab.console.run import Verdict
from vmxlab.errors import MachineHung, ProtocolError

from .conftest import assert_crash, assert_goes_on, assert_good, caught, good, tap

# Five exits, one of them answered with a value.
CASE = Case(
    name="five",
    program="mov eax, 3; cpuid; cpuid; cpuid; cpuid; hlt",
    reactions=[on(ExitReason.CPUID).set("rbx", 0x1234).skip()],
)


def flip_once(beginning, place, mask=1):
    """Change one byte of the first line that starts so; a negative `place` counts from the line's end."""
    done = []

    def down(line):
        if done or not line.startswith(beginning):
            return line
        done.append(line)
        index = place % len(line)
        return line[:index] + bytes([line[index] ^ mask]) + line[index + 1 :]

    return down


# The line ends with CR LF, the checksum before it has four digits behind a '*'.
LINE_END, CHECKSUM, STAR = -1, -4, -7
PLACES = [
    pytest.param(0, 1, id="first-byte"),
    pytest.param(1, 1, id="kind"),
    pytest.param(8, 1, id="value"),
    pytest.param(8, 0x80, id="value-not-ascii"),
    pytest.param(STAR, 1, id="star"),
    pytest.param(CHECKSUM, 1, id="checksum"),
    pytest.param(LINE_END, 1, id="line-end"),
]
RECORDS = [
    pytest.param(b"@case ", id="case"),
    pytest.param(b"@vmx ", id="vmx"),
    pytest.param(b"@exit n=0x0 ", id="first-exit"),
    pytest.param(b"@exit n=0x2 ", id="an-exit"),
    pytest.param(b"@exit n=0x4 ", id="last-exit"),
    pytest.param(b"@end ", id="end"),
]


@pytest.mark.parametrize(("place", "mask"), PLACES)
def test_record_with_a_flipped_bit_is_an_error_and_no_wrong_data(lab, place, mask):
    flip = flip_once(b"@exit n=0x2 ", place, mask)
    lab.on_open = lambda machine: tap(machine, down=flip)
    error = caught(lab, CASE)
    assert_damage_is_told(lab, error)


@pytest.mark.parametrize("record", RECORDS)
def test_each_kind_of_record_is_missed_when_it_is_damaged(lab, record):
    flip = flip_once(record, 8)
    lab.on_open = lambda machine: tap(machine, down=flip)
    error = caught(lab, CASE)
    assert_damage_is_told(lab, error)


def assert_damage_is_told(lab, error):
    assert type(error) is ProtocolError
    assert "damaged" in error.message
    assert error.engine == lab.machine.info.title()
    assert error.case == "five"
    log = error.log_path.read_bytes()
    records, broken = parse_log(log)
    assert len(broken) == 1
    assert error.last_record in [record.line for record in records]
    assert repr(broken[0].text) in error.message
    # The wire is good again for the next case, on this machine or another.
    assert_good(lab.run(good(5)), 5)
    assert lab.run(CASE).reasons == [ExitReason.CPUID] * 4 + [ExitReason.HLT]


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("place", [pytest.param(0, id="first-byte"), pytest.param(8, id="value")])
def test_damaged_record_of_an_image_costs_its_own_case_only(lab, record, place):
    lab.session()
    lines = []

    def of_the_second(line):
        lines.append(line)
        second = [seen for seen in lines if b"@case id=0x1 " in seen]
        return flip(line) if second else line

    flip = flip_once(record, place)
    lab.on_open = lambda machine: tap(machine, down=of_the_second)
    runs = lab.run_image([good(0), CASE, good(2)])
    assert [run.verdict for run in runs] == [Verdict.PASS, Verdict.ERROR, Verdict.PASS]
    assert_good(runs[0])
    assert_good(runs[2], 2)
    assert type(runs[1].error) is ProtocolError
    assert "damaged" in runs[1].error.message
    assert len(parse_log(runs[1].error.log_path.read_bytes())[1]) == 1


def test_case_whose_damaged_end_and_next_beginning_run_together_is_told(lab):
    lab.session()
    first, second = flip_once(b"@end ", 8), flip_once(b"@case id=0x1 ", 8)
    lab.on_open = lambda machine: tap(machine, down=lambda line: second(first(line)))
    runs = lab.run_image([good(0), good(1), good(2)])
    assert [run.verdict for run in runs] == [Verdict.ERROR, Verdict.ERROR, Verdict.PASS]
    assert_good(runs[2], 2)


@pytest.mark.slow
def test_damaged_prompt_is_a_hang_with_all_that_came_before_it(lab):
    def down(line):
        ended.append(line.startswith(b"@end "))
        return line

    def after(text):
        return text.replace(b"x", b"y") if any(ended) else text  # it may come byte by byte

    ended = []
    lab.on_open = lambda machine: tap(machine, down=down, rest=after)
    error = caught(lab, Case(name="five", program=CASE.program, limits=Limits(seconds=2)))
    assert_crash(lab, error, MachineHung, exits=5)
    assert error.last_record.startswith("@end ")
    lab.on_open = lambda machine: None
    assert_goes_on(lab)


@pytest.mark.parametrize("place", [pytest.param(20, id="operations"), pytest.param(9, id="checksum")])
def test_case_that_is_damaged_on_its_way_to_the_monitor_is_refused_by_it(lab, place):
    """Place 0 is the byte that announces a frame; its header has 16 bytes."""
    lab.on_open = lambda machine: tap(
        machine, up=lambda piece: piece[:place] + bytes([piece[place] ^ 1]) + piece[place + 1 :]
    )
    error = caught(lab, CASE)
    assert type(error) is ProtocolError
    assert "frame-crc" in error.message
    assert "@error what=frame-crc*" in error.log_path.read_text()
    lab.on_open = lambda machine: None
    assert_goes_on(lab)


def test_text_that_is_no_record_is_no_damage(lab):
    """What people read on the line, and what a firmware might print there, is kept and passed over."""
    noise = b"hello, 100% @home *1234 \x1b[2J \xff\xfe\r\n"
    lab.on_open = lambda machine: tap(machine, down=lambda line: noise + line)
    run = lab.run(CASE)
    assert run.reasons == [ExitReason.CPUID] * 4 + [ExitReason.HLT]
    assert noise in run.log_path.read_bytes()
    assert parse_log(run.log_path.read_bytes())[1] == []


def test_every_flipped_bit_of_a_log_is_noticed(lab):
    """No single flipped bit gives other data, nor loses a record without a word."""
    run = lab.run(Case(program="hlt"))
    log = "".join(record.line + "\r\n" for record in run.records).encode()
    true = [(record.kind, record.values) for record in run.records]
    for place in range(len(log)):
        for bit in range(8):
            changed = log[:place] + bytes([log[place] ^ 1 << bit]) + log[place + 1 :]
            records, broken = parse_log(changed)
            seen = [(record.kind, record.values) for record in records]
            assert [data for data in seen if data not in true] == [], (place, bit)
            assert seen == true or broken, (place, bit, changed)
