"""The serial log: every byte is in it, and a log that can't be kept is an error at once."""

from __future__ import annotations

import pytest

from vmxlab import Mode
from vmxlab.console.log import SerialLog
from vmxlab.console.records import parse_log
from vmxlab.errors import LogError
from vmxlab.image.code import LoadedCode


def test_every_byte_is_in_the_log_as_it_came(log):
    log.write(b"\x00\xff\r\n")
    log.write(b"")
    log.write(bytes(range(256)))
    assert log.path.read_bytes() == b"\x00\xff\r\n" + bytes(range(256)), "nothing waits in a buffer"


@pytest.mark.parametrize(
    ("before", "remark", "after"),
    [
        (b"", "one", b"# one\n"),
        (b"a line\r\n", "one\ntwo", b"a line\r\n# one\n# two\n"),
        (b"a part", "one", b"a part\n# one\n"),
        (b"x\n", "", b"x\n"),
        (b"", "h\u00e9 \ud800", b"# h\xc3\xa9 ?\n"),
    ],
)
def test_a_remark_is_lines_of_its_own(log, before, remark, after):
    log.write(before)
    log.remark(remark)
    assert log.path.read_bytes() == after


def test_a_log_never_takes_the_place_of_another(tmp_path):
    folder = tmp_path / "new" / "folder"
    logs = [SerialLog(folder) for _ in range(3)]
    logs[1].write(b"second")
    for log in logs:
        log.close()
    again = SerialLog(folder)
    again.close()
    assert [log.path.name for log in (*logs, again)] == [f"serial-{n}.log" for n in (1, 2, 3, 4)]
    assert logs[1].path.read_bytes() == b"second"


def test_a_log_that_can_not_be_made_says_why_and_what_to_do(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LogError, match=r"can't be created: (File exists|Not a directory)") as caught:
        SerialLog(tmp_path / "file" / "logs")
    assert "--log-dir" in caught.value.advice
    assert caught.value.log_path


def test_a_log_without_space_says_so(full_log):
    with pytest.raises(LogError, match="can't be written: No space left on device") as caught:
        full_log.write(b"x")
    assert caught.value.log_path == full_log.path
    assert "free some space" in str(caught.value)
    full_log.write(b"")


def test_a_log_can_be_closed_twice(log):
    log.close()
    log.close()
    assert log.path.is_file()


def test_code_of_a_case_is_remarked_as_records_that_a_reader_finds(log):
    code = LoadedCode(Mode.LONG, 0, ((0x8000, b"\xe4\x60\xf4"), (0x10000, b"\xcc\0")))
    log.write(b"vmx> ")
    log.code(5, code)
    text = log.path.read_bytes()
    assert text.startswith(b"vmx> \n# @code id=0x5 mode=long at=0x8000 data=e460f4*")
    records, broken = parse_log(text)
    assert [record.values["data"] for record in records] == ["e460f4", "cc"]
    assert broken == []


def test_case_without_code_leaves_no_remark(log):
    log.write(b"vmx> ")
    log.code(5, LoadedCode(Mode.LONG, 0, ()))
    assert log.path.read_bytes() == b"vmx> "
