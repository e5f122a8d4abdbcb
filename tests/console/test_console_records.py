"""Records: what is read off a serial line, and what never is."""

from __future__ import annotations

import binascii
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmxlab.console.records import BrokenLine, Record, RecordReader, encode_record, parse_line, parse_log

LOG = Path(__file__).with_name("bochs.log").read_bytes()
"""A whole serial log, as Bochs and the monitor wrote it."""

RECORD = b"@exit n=0x0 by=vmlaunch reason=0x1e qual=0x600040 rip=0x8002 rax=0x5a*"


def line(body: bytes) -> bytes:
    """A record with its checksum, by a CRC of our own."""
    return b"@%s*%04x" % (body, crc16(body))


def crc16(data: bytes) -> int:
    """CRC-16/XMODEM, bit by bit: polynomial 1021H, initial value 0, nothing reflected."""
    crc = 0
    for byte in data:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1 ^ (0x1021 if crc & 0x8000 else 0)) & 0xFFFF
    return crc


def data_of(records: list[Record]) -> list[tuple[str, dict[str, str]]]:
    """What a reader of records goes by."""
    return [(record.kind, dict(record.values)) for record in records]


# --- one line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data", "crc"), [(b"123456789", 0x31C3), (b"", 0), (b"A", 0x58E5)])
def test_the_checksum_is_crc_16_xmodem(data, crc):
    """The check value of the catalogue of CRC algorithms, and two more."""
    assert crc16(data) == binascii.crc_hqx(data, 0) == crc


def test_a_record_has_a_kind_and_values():
    record = parse_line(line(b"exit n=0x0 reason=0x1e name=a-b,c:1"))
    assert record.kind == "exit"
    assert record.values == {"n": "0x0", "reason": "0x1e", "name": "a-b,c:1"}
    assert str(record) == record.line == "@exit n=0x0 reason=0x1e name=a-b,c:1*" + record.line[-4:]


def test_a_record_may_have_no_values_and_stand_behind_text_for_people():
    assert parse_line(line(b"done")).values == {}
    assert parse_line(b"vmx> " + line(b"done")) == parse_line(line(b"done"))


@pytest.mark.parametrize(
    ("text", "number"), [("0x1e", 30), ("1e", 30), ("0xffffffffffffffff", (1 << 64) - 1)]
)
def test_values_are_read_as_hexadecimal_numbers(text, number):
    assert parse_line(line(b"x a=%s" % text.encode())).number("a") == number


def test_a_value_that_is_not_there_is_a_key_error_or_the_default():
    record = parse_line(line(b"x a=0x1"))
    with pytest.raises(KeyError, match="b"):
        record.number("b")
    assert record.number("b", 7) == 7
    assert record.number("a", 7) == 1


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("boot", {}),
        ("exit", {"n": 0, "reason": 0x8000_0021, "by": "vmlaunch"}),
        ("memory", {"at": 1 << 63, "data": "00" * 256}),
    ],
)
def test_what_is_encoded_is_read_back(kind, values):
    record = parse_line(encode_record(kind, values).encode())
    assert record.kind == kind
    assert {
        k: record.number(k) if isinstance(v, int) else record.values[k] for k, v in values.items()
    } == values


def test_the_monitors_own_records_are_encoded_the_same_way():
    """The checksums of the log were made by guest/lib/crc.c."""
    records, broken = parse_log(LOG)
    assert not broken
    assert len(records) == 36
    for record in records:
        assert record.line.encode() == line(record.line[1:-5].encode()) == encode(record).encode()


def encode(record):
    return encode_record(record.kind, record.values)


NO_RECORDS = [
    b"",
    b"vmx> ",
    b"# engine: bochs 2.7 (corei7_skylake_x); named by --engine",
    b"# 00001788993i[CPU0  ] | CR0=0x80010031 CR2=0x0000000000000000",
    b"usage: rdmsr MSR",
    b"  @ a sign alone",
    b"someone@example.org",
    b"5 * 1234",
    b"=" * 300,
    bytes(range(0x80, 0x100)),
    b"\0" * 50,
]


@pytest.mark.parametrize("text", NO_RECORDS, ids=lambda text: repr(text[:20]))
def test_text_for_people_is_neither_record_nor_damage(text):
    records, broken = parse_log(text + b"\r\n" + line(b"done") + b"\r\n" + text)
    assert data_of(records) == [("done", {})]
    assert broken == []


@pytest.mark.parametrize(
    "text",
    [
        b"@exit n=0x0",
        RECORD + b"0000",
        RECORD[:-1],
        b"@exit n=0x0 reason=0x1e*12",
        line(b"exit n=0x0 reason=0x1e") + b"x",
        b"exit n=0x0 reason=0x1e*%04x" % crc16(b"exit n=0x0 reason=0x1e"),
        b"it n=0x0 reason=0x1e",
        b"vmx> @exit n=0x0",
        b"# @code id=0x0 mode=long",
        line(b"exit n=0x0 reason"),
        line(b"exit  n=0x0"),
        line("exit n=0x0 name=é".encode()),
    ],
)
def test_what_was_meant_as_a_record_and_does_not_check_is_damage(text):
    records, broken = parse_log(b"text\r\n" + text + b"\r\n" + line(b"done") + b"\r\n")
    assert data_of(records) == [("done", {})]
    (damage,) = broken
    assert damage.number == 2
    assert damage.text == text.decode("ascii", "backslashreplace")
    assert str(damage).startswith("line 2: ")


@pytest.mark.parametrize("digits", [b"0x%02x", b" %03x", b"+%03x", b"%X"])
def test_a_checksum_is_four_lower_case_digits(digits):
    """A line that Python's int() would take, and the monitor never writes."""
    for number in range(4096):
        body = b"x n=%d" % number
        crc = crc16(body)
        written = digits % crc
        if len(written) == 4 and written != b"%04x" % crc:
            assert parse_line(b"@" + body + b"*" + written) is None


def test_a_damaged_line_says_why():
    _, broken = parse_log(RECORD + b"0000\n@exit n\n@exit n=0x0")
    assert [damage.why for damage in broken] == [
        "the checksum does not fit",
        "not a whole record",
        "cut short",
    ]


# --- damage to a whole log ----------------------------------------------------------------------------------

WHOLE = data_of(parse_log(LOG)[0])


def is_subsequence(some: list, whole: list) -> bool:
    rest = iter(whole)
    return all(item in rest for item in some)


def test_no_flipped_bit_of_a_log_is_ever_data_and_none_in_a_record_goes_unnoticed():
    """Every bit of it. What is read is a part of what was sent; what is lost is counted."""
    starts = [0]
    for text in LOG.splitlines(keepends=True):
        starts.append(starts[-1] + len(text))
    lines = LOG.splitlines(keepends=True)
    for number, start in enumerate(starts[:-1]):
        # A flip can join a line with the next one, so both are read; no flip touches more.
        piece = b"".join(lines[number : number + 2])
        whole = data_of(parse_log(piece)[0])
        for bit in range(len(lines[number]) * 8):
            damaged = bytearray(piece)
            damaged[bit // 8] ^= 1 << bit % 8
            records, broken = parse_log(bytes(damaged))
            found = data_of(records)
            assert is_subsequence(found, whole), (start, bit, damaged)
            assert found == whole or broken, (start, bit, damaged)


def test_a_log_cut_anywhere_gives_its_whole_records_and_counts_the_cut_one():
    ends = [0]
    for text in LOG.splitlines(keepends=True):
        ends.append(ends[-1] + len(text))
    for length in range(len(LOG) + 1):
        records, broken = parse_log(LOG[:length])
        whole_lines = sum(end <= length for end in ends[1:])
        assert data_of(records) == WHOLE[: len(records)]
        assert len(records) == sum(text.startswith(b"@") for text in LOG.splitlines()[:whole_lines])
        rest = LOG[ends[whole_lines] : length]
        assert len(broken) == rest.startswith(b"@"), length


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.binary(max_size=300), st.integers(0, len(LOG)))
def test_rubbish_in_the_stream_costs_no_record_but_those_it_touches(rubbish, at):
    records, broken = parse_log(LOG[:at] + rubbish + LOG[at:])
    found = data_of(records)
    assert is_subsequence(found, WHOLE)
    assert len(found) >= len(WHOLE) - 1
    assert found == WHOLE or broken


# --- a stream in pieces -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_pieces_of_any_size_make_the_same_records(size):
    reader = RecordReader()
    found = [r for i in range(0, len(LOG), size) for r in reader.feed(LOG[i : i + size])]
    assert data_of(found) == WHOLE


def test_a_log_split_at_any_byte_is_the_same_log():
    damaged = LOG[:400] + b"\n@exit n=0x5\n" + LOG[400:1200] + b"@cut"
    records, broken = parse_log(damaged)
    assert len(broken) == 4
    for at in range(len(damaged) + 1):
        reader = RecordReader()
        found = [*reader.feed(damaged[:at]), *reader.feed(damaged[at:])]
        reader.close()
        assert (found, reader.broken, reader.last) == (records, broken, records[-1])


def test_the_last_record_and_the_number_of_lines_are_kept():
    reader = RecordReader()
    assert (reader.last, reader.lines) == (None, 0)
    list(reader.feed(b"text\n" + line(b"a") + b"\n" + line(b"b") + b"\nmore"))
    assert (reader.last.kind, reader.lines) == ("b", 3)


def test_a_line_without_its_end_is_no_record_even_if_it_checks():
    """Nothing says that it ended there; the sum of a longer line may have begun with these digits."""
    records, broken = parse_log(line(b"done"))
    assert records == []
    assert [damage.why for damage in broken] == ["cut short"]


def test_carriage_returns_do_not_belong_to_a_line():
    for end in (b"\n", b"\r\n", b"\r\r\n"):
        assert data_of(parse_log(line(b"done") + end)[0]) == [("done", {})]


def test_ten_thousand_records_are_read():
    log = b"".join(line(b"exit n=%#x reason=0xc" % number) + b"\r\n" for number in range(10_000))
    records, broken = parse_log(log)
    assert [record.number("n") for record in records] == list(range(10_000))
    assert broken == []


def test_broken_lines_are_values():
    assert BrokenLine(1, "x", "y") == BrokenLine(1, "x", "y")
