"""Nothing outlives the harness, whatever ends it."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vmxlab import errors
from vmxlab.engines import process
from vmxlab.engines.loopback import accept_from, is_held_by, listen_on_loopback

from .conftest import is_gone, read_to_end

_HARNESS = """
import pathlib, sys, time
from vmxlab.engines import ENGINES
machine = ENGINES[sys.argv[1]]().open(pathlib.Path(sys.argv[2]), log_dir=pathlib.Path(sys.argv[3]))
if sys.argv[4] == "paused":
    machine.pause()
print(machine.pid, flush=True)
if sys.argv[4] != "ends":
    time.sleep(1000)
"""


def wait_until_gone(pid):
    deadline = time.monotonic() + 10
    while not is_gone(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.005)


@pytest.mark.parametrize("name", ["bochs", "tcg"])
@pytest.mark.parametrize("state", ["running", "paused", "ends"])
def test_machine_ends_with_the_harness(engine, rom, tmp_path, name, state):
    engine(name)
    harness = subprocess.Popen(
        [sys.executable, "-c", _HARNESS, name, rom("spin"), tmp_path, state], stdout=subprocess.PIPE
    )
    with harness:
        pid = int(harness.stdout.readline())
        if state != "ends":
            assert not is_gone(pid)
            harness.kill()
    wait_until_gone(pid)


@pytest.fixture
def spawned(tmp_path):
    """spawned(command, ...) -> a child whose output goes to tmp_path/out; killed in the end."""
    children = []

    def start(*command, **options):
        child = process.spawn(command, engine="test", output=tmp_path / "out", **options)
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.close()


def test_child_outlives_the_thread_that_asked_for_it(spawned):
    children = []
    thread = threading.Thread(target=lambda: children.append(spawned("sleep", "1000")))
    thread.start()
    thread.join()
    assert children[0].wait(0.2) is None


def test_child_has_its_own_session_no_input_and_its_output_in_the_file(spawned, tmp_path):
    child = spawned("sh", "-c", "readlink /proc/self/fd/0; echo to stderr >&2; sleep 1000")
    assert os.getsid(child.pid) == child.pid
    deadline = time.monotonic() + 10
    while (tmp_path / "out").read_text() != "/dev/null\nto stderr\n":
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_kill_ends_the_children_of_the_child_too(spawned, tmp_path):
    child = spawned("sh", "-c", "sleep 1000 & echo $! > grandchild.new; mv grandchild.new grandchild; wait")
    deadline = time.monotonic() + 10
    while not (tmp_path / "grandchild").exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.kill()
    assert child.poll() == -signal.SIGKILL
    wait_until_gone(int((tmp_path / "grandchild").read_text()))


def test_program_does_not_run_if_the_harness_died_in_between(tmp_path):
    command, _ = process._tied_to_us(["touch", tmp_path / "ran"])
    assert command[-3] == str(os.getpid())
    command[-3] = "1"
    assert subprocess.run(command).returncode != 0
    assert not (tmp_path / "ran").exists()


def test_without_setpriv_the_child_is_tied_to_us_all_the_same(spawned, monkeypatch):
    monkeypatch.setattr(process.shutil, "which", lambda name: None)
    child = spawned("/bin/sleep", "1000")
    assert child.poll() is None
    # The same call in a harness that is killed: the kernel's own view of it is not to be read from outside.
    script = (
        "import pathlib, sys, time, shutil\n"
        "shutil.which = lambda name: None\n"
        "from vmxlab.engines import process\n"
        "child = process.spawn(['/bin/sleep', '1000'], engine='t', output=pathlib.Path(sys.argv[1]))\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(1000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, "/dev/null"], stdout=subprocess.PIPE) as harness:
        pid = int(harness.stdout.readline())
        assert not is_gone(pid)
        harness.kill()
    wait_until_gone(pid)


def test_program_that_can_not_be_executed_is_told(spawned, tmp_path, monkeypatch):
    monkeypatch.setattr(process.shutil, "which", lambda name: None)
    with pytest.raises(errors.EngineUnavailable, match="can't be started"):
        spawned(str(tmp_path / "missing"))


def test_fork_of_the_harness_starts_its_own_children(spawned, tmp_path):
    spawned("true").wait(10)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            child = process.spawn(["true"], engine="test", output=tmp_path / "out2")
            status = child.wait(10)
        finally:
            os._exit(status if status is not None else 2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


_CONNECT = """
import socket, sys, time
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
time.sleep(1000)
"""


# 4 is netlink's sock_diag; 31 is no protocol, so that /proc has to tell.
@pytest.mark.parametrize("protocol", [4, 31], ids=["netlink", "proc"])
def test_only_the_childs_connection_is_taken(spawned, monkeypatch, protocol):
    monkeypatch.setattr("vmxlab.engines.loopback._NETLINK_SOCK_DIAG", protocol)
    with listen_on_loopback() as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            child = spawned(sys.executable, "-c", _CONNECT, str(port))
            with accept_from(listener, child, 20) as connection:
                assert is_held_by(child.pid, connection)
                assert not is_held_by(os.getpid(), connection)
                assert connection.getpeername() != stranger.getsockname()
                stranger.settimeout(20)
                assert stranger.recv(1) == b""


def test_last_word_of_a_child_that_ends_at_once_is_taken(spawned):
    for _ in range(10):
        with listen_on_loopback() as listener:
            port = listener.getsockname()[1]
            child = spawned("bash", "-c", f"exec 3<>/dev/tcp/127.0.0.1/{port}; echo -n word >&3")
            with accept_from(listener, child, 20) as connection:
                connection.settimeout(20)
                assert read_to_end(connection) == b"word"


def test_child_that_never_connects_is_a_timeout_and_one_that_ends_is_none(spawned):
    with listen_on_loopback() as listener:
        with pytest.raises(TimeoutError):
            accept_from(listener, spawned("sleep", "1000"), 0.05)
        assert accept_from(listener, spawned("true"), 20) is None


def test_child_without_pidfd_is_waited_for_all_the_same(spawned, monkeypatch):
    def missing(pid):
        raise OSError

    monkeypatch.setattr(process.os, "pidfd_open", missing)
    assert spawned("sh", "-c", "exit 3").wait(20) == 3
    assert spawned("sleep", "1000").wait(0.02) is None


def test_answer_of_a_program_is_asked_again_when_the_program_changes(tmp_path):
    program = tmp_path / "program"
    for answer in ("one", "second"):
        program.write_text(f"#!/bin/sh\necho {answer}; echo x >> {tmp_path}/asked\n")
        program.chmod(0o755)
        for _ in range(2):
            assert process.ask(program, "-version", packages="none") == f"{answer}\n"
    assert Path(tmp_path / "asked").read_text() == "x\nx\n"
