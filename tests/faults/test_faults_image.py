"""Images: a case that kills the machine costs itself only, and a damaged image is told, not run."""

import struct
import zlib

import pytest

from vmxlab.console.run import End, Verdict
from vmxlab.errors import EngineUnavailable, ImageError, MachineDied, MachineHung, ProtocolError
from vmxlab.image.frames import FRAME_HEADER, PAYLOAD_HEADER, pack_payload
from vmxlab.image.layout import MONITOR_BASE
from vmxlab.image.monitor import load_monitor
from vmxlab.image.rom import pack_rom

from .conftest import HANGS, KILLS_L1, assert_goes_on, assert_good, good, is_gone


def test_dead_and_hung_cases_of_an_image_cost_no_other_case(lab):
    runs = lab.run_image([good(0), KILLS_L1, good(2), HANGS, good(4), good(5)])
    assert [run.verdict.name for run in runs] == ["PASS", "CRASH", "PASS", "CRASH", "PASS", "PASS"]
    assert [run.end for run in runs] == [End.STOP, End.DIED, End.STOP, End.HUNG, End.STOP, End.STOP]
    assert [run.number for run in runs] == [0, 1, 2, 3, 4, 5]
    assert [run.name for run in runs] == ["good-0", "kills-l1", "good-2", "hangs", "good-4", "good-5"]
    for number in (0, 2, 4, 5):
        assert_good(runs[number], number)
    for run, kind in ((runs[1], MachineDied), (runs[3], MachineHung)):
        assert type(run.error) is kind
        assert run.error.engine.startswith("bochs ")
        assert run.error.case == run.name
        assert run.error.last_record.encode() in run.log_path.read_bytes()
    assert "triple fault" in runs[1].error.message
    assert len(runs[3].exits) == 1
    # The first image, the one behind case 1, the one behind case 3; one more told the capabilities.
    assert len(lab.machines) == 4
    assert len({run.log_path for run in runs}) == 3
    assert all(is_gone(machine.pid) for machine in lab.machines)
    assert_goes_on(lab)


@pytest.mark.parametrize("place", ["first", "last", "only"])
def test_case_that_kills_the_machine_may_stand_anywhere(lab, place):
    cases = {"first": [KILLS_L1, good(1)], "last": [good(0), KILLS_L1], "only": [KILLS_L1]}[place]
    runs = lab.run_image(cases)
    assert [run.verdict for run in runs] == [
        Verdict.CRASH if case is KILLS_L1 else Verdict.PASS for case in cases
    ]


# --- damage ------------------------------------------------------------------------------------------------


def changed_header(payload, **changes):
    names = ("magic", "version", "cases", "bytes", "crc32", "flags")
    values = dict(zip(names, PAYLOAD_HEADER.unpack_from(payload), strict=True)) | changes
    return PAYLOAD_HEADER.pack(*values.values()) + payload[PAYLOAD_HEADER.size :]


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def frame_that_lies(payload, **changes):
    """Another header of the first frame, and the payload's checksum right again."""
    names = ("bytes", "decoded_bytes", "crc32", "base")
    body = payload[PAYLOAD_HEADER.size :]
    values = dict(zip(names, FRAME_HEADER.unpack_from(body), strict=True)) | changes
    body = FRAME_HEADER.pack(*values.values()) + body[FRAME_HEADER.size :]
    return changed_header(payload[: PAYLOAD_HEADER.size] + body, crc32=zlib.crc32(body))


DAMAGE = [
    ("payload-crc", "cut-in-the-middle", lambda p: p[: len(p) // 2]),
    ("payload-crc", "tail-cut", lambda p: p[:-8]),
    ("payload-crc", "first-byte-of-a-case", lambda p: flipped(p, PAYLOAD_HEADER.size)),
    ("payload-crc", "last-byte", lambda p: flipped(p, len(p) - 1)),
    ("payload-crc", "checksum", lambda p: changed_header(p, crc32=struct.unpack("<5I", p[:20])[4] ^ 1)),
    ("payload-crc", "length-too-long", lambda p: changed_header(p, bytes=0xFFFF_FFFF)),
    ("payload-version", "version", lambda p: changed_header(p, version=0x77)),
    ("frame-crc", "checksum-of-a-case", lambda p: frame_that_lies(p, crc32=0)),
    ("payload-cut", "case-too-long", lambda p: frame_that_lies(p, bytes=0xFFFF_FFF0)),
    ("script-too-long", "script-too-long", lambda p: frame_that_lies(p, decoded_bytes=0xFFFF_FFFF)),
    ("frame-operations", "script-too-short", lambda p: frame_that_lies(p, decoded_bytes=5)),
]


@pytest.mark.parametrize(("word", "damage"), [pytest.param(w, d, id=i) for w, i, d in DAMAGE])
def test_damaged_cases_of_an_image_are_refused_by_the_monitor(lasting_lab, monkeypatch, word, damage):
    with monkeypatch.context() as patch:
        patch.setattr("vmxlab.console.lab.pack_payload", lambda scripts: damage(pack_payload(scripts)))
        runs = lasting_lab.run_image([good(0), good(1)])
    assert [run.verdict for run in runs] == [Verdict.ERROR] * 2
    for run in runs:
        assert type(run.error) is ProtocolError
        assert word in run.error.message
        assert "make it again" in run.error.advice
        assert f"@error what={word}*" in run.error.log_path.read_text()


def test_image_without_its_cases_is_an_error_of_each_case(lab, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("vmxlab.console.lab.pack_payload", lambda scripts: b"")
        runs = lab.run_image([good(0), good(1)])
    assert [run.verdict for run in runs] == [Verdict.ERROR] * 2
    assert all("left no records of this case" in run.error.message for run in runs)
    assert_goes_on(lab)


@pytest.mark.parametrize(
    "cut", [lambda rom: rom[:-1000], lambda rom: rom[: len(rom) // 2 - 1], lambda rom: b""]
)
def test_image_file_that_is_cut_short_is_refused_before_it_boots(lab, monkeypatch, cut):
    lab.session()
    with monkeypatch.context() as patch:
        patch.setattr("vmxlab.console.lab.pack_rom", lambda *parts: cut(pack_rom(*parts)))
        runs = lab.run_image([good(0), good(1)])
    assert [run.verdict for run in runs] == [Verdict.ERROR] * 2
    for run in runs:
        assert type(run.error) is ImageError
        assert "cut short" in run.error.advice
    assert len(lab.machines) == 1
    assert_goes_on(lab)


@pytest.mark.parametrize("where", ["start", "vm-exit"])
def test_image_with_a_hole_in_it_is_an_error_of_each_case_not_a_stuck_run(open_lab, monkeypatch, where):
    """The monitor's own code damaged: whatever that does, the run ends with a typed error."""
    lab = open_lab(case_deadline_s=1)
    lab.session()
    hole = {"start": 0, "vm-exit": load_monitor().exit_entry - MONITOR_BASE}[where]

    def damaged(*parts):
        rom = bytearray(pack_rom(*parts))
        rom[hole : hole + 4096] = bytes(4096)
        return bytes(rom)

    with monkeypatch.context() as patch:
        patch.setattr("vmxlab.console.lab.pack_rom", damaged)
        (run,) = lab.run_image([good(0)])
    assert run.verdict in (Verdict.CRASH, Verdict.ERROR)
    assert run.error.log_path.exists()
    assert is_gone(lab.machine.pid)


def test_engine_that_can_start_no_more_leaves_what_ran_and_an_error_for_the_rest(lab):
    real = lab.engine.open
    opened = []

    def open_two(*arguments, **options):
        opened.append(1)
        if len(opened) > 2:
            raise EngineUnavailable("engine bochs: it is gone")
        return real(*arguments, **options)

    lab.engine.open = open_two
    runs = lab.run_image([good(0), KILLS_L1, good(2), good(3)])
    assert [run.verdict.name for run in runs] == ["PASS", "CRASH", "ERROR", "ERROR"]
    assert "it is gone" in str(runs[3].error)
    lab.engine.open = real


def test_case_too_large_for_any_image_is_an_error_of_its_own(lab, monkeypatch):
    def pack(scripts):
        payload = pack_payload(scripts)
        if b"too-large" in payload:
            raise ImageError("the image needs more than there is")
        return payload

    big = good(1)
    big = type(big)(name="too-large", program=big.program)
    monkeypatch.setattr("vmxlab.console.lab.pack_payload", pack)
    runs = lab.run_image([good(0), big, good(2)])
    assert [run.verdict.name for run in runs] == ["PASS", "ERROR", "PASS"]
    assert_good(runs[2], 2)
