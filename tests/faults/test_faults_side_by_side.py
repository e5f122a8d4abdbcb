"""Labs and suites at once: none disturbs another, and no stranger gets between a lab and its machine."""

import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from vmxlab.console.records import encode_record
from vmxlab.engines import bochs
from vmxlab.engines.loopback import listen_on_loopback

from .conftest import KILLS_L1, PATIENCE_S, assert_good, good

CHECKOUT = Path(__file__).resolve().parents[2]


def test_two_labs_in_one_process_take_turns(open_lab):
    one, two = open_lab(), open_lab()
    for number in range(4):
        assert_good(one.run(good(number)), number)
        assert_good(two.run(good(number + 0x100)), number + 0x100)
    assert one.machine.pid != two.machine.pid


def test_two_labs_that_share_a_folder_keep_their_logs_apart(open_lab):
    one, two = open_lab(), open_lab()
    runs = {"one": one.run(good(1)), "two": two.run(good(2))}
    assert runs["one"].log_path != runs["two"].log_path
    assert b"name=good-1*" in runs["one"].log_path.read_bytes()
    assert b"name=good-2*" in runs["two"].log_path.read_bytes()
    assert b"name=good-2*" not in runs["one"].log_path.read_bytes()


def test_later_lab_overwrites_no_log_of_an_earlier_one(open_lab):
    first = open_lab()
    path = first.run(good(1)).log_path
    first.close()
    kept = path.read_bytes()
    assert open_lab().run(good(2)).log_path != path
    assert path.read_bytes() == kept


def test_labs_in_threads_do_not_mix_and_a_dead_machine_is_its_own_labs_only(open_lab):
    labs = [open_lab() for _ in range(2)]
    runs = {}

    def work(which):
        base = which * 0x1000
        cases = [KILLS_L1 if number % 4 == 2 else good(base + number) for number in range(8)]
        runs[which] = labs[which].run_all(cases)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    for which in range(2):
        verdicts = [run.verdict.name for run in runs[which]]
        assert verdicts == ["PASS", "PASS", "CRASH", "PASS", "PASS", "PASS", "CRASH", "PASS"]
        for number in (0, 1, 3, 4, 5, 7):
            assert_good(runs[which][number], which * 0x1000 + number)


def test_stranger_on_the_port_of_the_machine_gets_nothing_and_says_nothing(lab, monkeypatch):
    """Whoever connects to the harness's port before Bochs does is turned away; its words are no records."""
    strangers = []
    lie = encode_record("boot", {"protocol": 1, "build": 0, "vmx": 0}).encode() + b"\r\nvmx> "

    def listen():
        listener = listen_on_loopback()
        stranger = socket.create_connection(listener.getsockname())
        stranger.sendall(lie)
        strangers.append(stranger)
        return listener

    monkeypatch.setattr(bochs, "listen_on_loopback", listen)
    assert_good(lab.run(good(7)), 7)
    assert len(strangers) == 1
    with strangers[0] as stranger:
        stranger.settimeout(PATIENCE_S)
        heard = b""
        try:
            while piece := stranger.recv(4096):
                heard += piece
        except ConnectionResetError:
            pass  # what it said was thrown away unread
    assert heard == b""
    assert lie not in lab.log_text()


_SUITE = """
import pytest
from vmxlab import Case, ExitReason

@pytest.mark.parametrize("number", range(6))
def test_each(vmxlab, number):
    run = vmxlab.run(Case(name=f"MARK-{number}", program=f"mov eax, {number}; hlt"))
    assert run.reasons == [ExitReason.HLT]
    assert run.exits[0].registers["rax"] == number
"""


@pytest.mark.slow
def test_two_suites_at_once_in_one_checkout_do_not_disturb_each_other(tmp_path):
    suites = {}
    for mark in ("one", "two"):
        file = tmp_path / f"test_{mark}.py"
        file.write_text(_SUITE.replace("MARK", mark))
        command = [sys.executable, "-m", "pytest", "--vmx-keep"]
        command += ["-n", "2"] if mark == "one" else []
        # The plugins are of no use here, and slow to start.
        command += ["-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
        command += ["--vmx-engine", "bochs", "-c", CHECKOUT / "pyproject.toml", "--rootdir", CHECKOUT, file]
        outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        suites[mark] = subprocess.Popen(
            command,
            cwd=CHECKOUT,
            env=outside | {"TMPDIR": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    said = {mark: suite.communicate(timeout=2 * PATIENCE_S)[0] for mark, suite in suites.items()}
    folders = {}
    for mark, other in (("one", "two"), ("two", "one")):
        assert suites[mark].returncode == 0, said[mark]
        assert "6 passed" in said[mark]
        assert re.search(r"vmxlab: bochs \S+ \(\S+\) ran 6 cases with 6 exits in 6 tests", said[mark])
        folder = Path(re.search(r"vmxlab: logs are in (\S+)", said[mark])[1])
        logs = b"".join(log.read_bytes() for log in folder.glob("serial-*.log"))
        assert sorted(re.findall(rb"name=(\w+)-(\d)", logs)) == [
            (mark.encode(), str(number).encode()) for number in range(6)
        ]
        assert f"name={other}-".encode() not in logs
        folders[mark] = folder
    assert folders["one"] != folders["two"]
