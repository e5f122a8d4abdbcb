"""Labs whose machines can be hurt, and the check that nothing of them stays behind."""

import contextlib
import re
import socket
import threading
import time
from pathlib import Path

import pytest

from vmxlab import Case, Limits
from vmxlab.console.lab import Lab
from vmxlab.console.records import parse_log
from vmxlab.console.run import Verdict
from vmxlab.engines import ENGINES
from vmxlab.errors import VmxlabError
from vmxlab.sdm.controls import PinControls
from vmxlab.sdm.exit_reasons import ExitReason
from vmxlab.sdm.fields import Field

PATIENCE_S = 60
"""How long anything may take that takes milliseconds on a quiet machine."""

LOG_FILES = re.compile(r"serial-\d+\.log|(bochs|tcg)-\d+\.(log|out|bochsrc|debugger)")

# Exits without end, as fast as the serial line takes their records.
STREAM = Case(
    name="stream", program="again: cpuid; jmp again", limits=Limits(exits=10_000_000, seconds=PATIENCE_S)
)
# L1 has no page tables after the exit: its first instruction is a #PF, which is a #DF, which is the end.
KILLS_L1 = Case(name="kills-l1", fields={Field.HOST_CR3: 0x3F00000})
HANGS = Case(
    name="hangs",
    program="cpuid; jmp .",
    disable=PinControls.ACTIVATE_PREEMPTION_TIMER,
    limits=Limits(seconds=1),
)


def good(number=0):
    """A case whose one exit tells which case it was."""
    return Case(name=f"good-{number}", program=f"mov eax, {number:#x}; hlt", expect=[ExitReason.HLT])


def assert_good(run, number=0):
    assert run.verdict is Verdict.PASS, run.error
    assert run.reasons == [ExitReason.HLT]
    assert run.exits[0].registers["rax"] == number


def is_gone(pid):
    """Whether a process has ended (a zombie has: nobody may have waited for it)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def processes_in(folder):
    """The living processes whose current directory is this one or below it: an emulator's is its log's."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and str((entry / "cwd").readlink()).startswith(str(folder)):
                found += [] if is_gone(int(entry.name)) else [int(entry.name)]
    return found


def wait_until(condition):
    """Wait for something that must come. What it is tells the traceback."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.002)


class WatchedLab(Lab):
    """A lab that remembers its machines. `on_open` may hurt each one as soon as it runs."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.machines = []
        self.on_open = lambda machine: None
        real_open = self.engine.open

        def opened(*arguments, **more):
            machine = real_open(*arguments, **more)
            self.machines.append(machine)
            self.on_open(machine)
            return machine

        self.engine.open = opened

    @property
    def machine(self):
        return self.machines[-1]

    def log_text(self):
        return self.log_path.read_bytes() if self.log_path is not None else b""


@contextlib.contextmanager
def labs_in(folder):
    """A function that makes a WatchedLab; in the end of all of them only the logs in folder/logs stay."""
    labs = []

    def start(engine="bochs", **options):
        state = ENGINES[engine]().availability()
        if not state.ok:
            pytest.skip(f"{engine}: {state.problem}")
        options.setdefault("log_dir", folder / "logs")
        labs.append(WatchedLab(engine, **options))
        return labs[-1]

    try:
        yield start
    finally:
        for lab in labs:
            lab.close()
    assert [m.pid for lab in labs for m in lab.machines if not is_gone(m.pid)] == []
    assert [f.name for f in (folder / "logs").glob("*") if not LOG_FILES.fullmatch(f.name)] == []
    assert processes_in(folder) == []


@pytest.fixture
def open_lab(tmp_path):
    """open_lab(engine="bochs", ...) -> a WatchedLab with its logs in tmp_path/logs."""
    with labs_in(tmp_path) as start:
        yield start


@pytest.fixture
def lab(open_lab):
    """A lab on Bochs."""
    return open_lab()


@pytest.fixture(scope="module")
def lasting_lab(tmp_path_factory):
    """A lab on Bochs that all tests of a file share: what one does to it, the next must not notice."""
    with labs_in(tmp_path_factory.mktemp("lasting")) as start:
        yield start()


@contextlib.contextmanager
def meddling(condition, act):
    """Do something from another thread as soon as a condition holds."""
    over = threading.Event()
    failures = []

    def wait():
        try:
            while not condition():
                if over.wait(0.002):
                    raise AssertionError("the condition never held")
            act()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    for failure in failures:
        raise failure


def exits_in(log):
    """How many whole exit records a serial log holds."""
    return sum(record.kind == "exit" for record in parse_log(log)[0])


def assert_crash(lab, error, kind, *, exits=None):
    """What each error of a dead machine says, whatever killed it; and that the lab goes on without it."""
    assert type(error) is kind
    assert error.engine == lab.machine.info.title()
    log = error.log_path.read_bytes()
    assert str(error.log_path) in str(error)
    if error.last_record is not None:
        assert error.last_record.encode() in log
    run = error.run
    assert run.verdict is Verdict.CRASH
    assert run.error is error
    assert run.log_path == error.log_path
    assert run.engine == error.engine
    last_case = log[log.rindex(b"@case ") :] if b"@case " in log else b""
    assert len(run.exits) == exits_in(last_case)
    if exits is not None:
        assert len(run.exits) == exits
    dead = lab.machine.pid
    assert is_gone(dead)
    return dead


def assert_goes_on(lab):
    """The next case runs, on a new machine."""
    before = len(lab.machines)
    assert_good(lab.run(good(0x77)), 0x77)
    assert len(lab.machines) == before + 1


def caught(lab, case):
    """The error that a case ends with."""
    with pytest.raises(VmxlabError) as info:
        lab.run(case)
    return info.value


def tap(machine, down=None, up=None, rest=None):
    """Put a wire between machine and harness that may change what passes.

    Each takes what was sent and gives what arrives: `down` a whole line of the machine, `rest` what no line
    end follows (a prompt; only what starts with '@' is waited for), `up` a piece that the harness sent.
    """
    real, (ours, theirs) = machine.serial, socket.socketpair()
    machine.serial = ours

    def to_harness():
        held = b""
        while piece := _received(real):
            *lines, held = (held + piece).split(b"\n")
            for line in lines:
                _send(theirs, down(line + b"\n") if down else line + b"\n")
            if not held.startswith(b"@"):
                _send(theirs, rest(held) if rest else held)
                held = b""
        _send(theirs, down(held) if down and held else held)
        for sock in (theirs, real):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # the other thread may be waiting there
            sock.close()

    def to_machine():
        while piece := _received(theirs):
            _send(real, up(piece) if up else piece)

    for work in (to_harness, to_machine):
        threading.Thread(target=work, daemon=True).start()


def _received(sock):
    try:
        piece = sock.recv(1 << 16)
        if sock.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        return piece
    except OSError:
        return b""


def _send(sock, data):
    with contextlib.suppress(OSError):
        sock.sendall(data)
