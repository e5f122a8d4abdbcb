"""A carrier that does not come up: what stands in the way is named, and nothing stays behind."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vmxlab import errors
from vmxlab.engines.carrier.running import refuse_unknown_parameters
from vmxlab.engines.carrier.start_info import COMMAND_LINE
from vmxlab.engines.kvm_in_bochs import KvmInBochsEngine

from .conftest import (
    is_gone,
    open_descriptors,
)

pytestmark = pytest.mark.slow

PATIENCE_S = 90


def skip_where_there_is_none() -> None:
    state = KvmInBochsEngine().availability()
    if not state.ok:
        pytest.skip(f"kvm-in-bochs: {state.problem}")


@pytest.fixture
def damaged(tmp_path):
    """damaged(change) -> an engine whose carrier has another memory image, changed by that function."""
    skip_where_there_is_none()
    engines = []

    def make(change):
        engine = KvmInBochsEngine()
        engine.prepare()
        memory = tmp_path / "memory.img"
        memory.write_bytes(change(engine._image.memory.read_bytes()))
        engine._image = dataclasses.replace(engine._image, memory=memory)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        assert engine._carrier is None


def threads_of_ours() -> list[str]:
    """All but the one that starts processes, which stays as long as this process does."""
    return sorted(thread.name for thread in threading.enumerate() if thread.name != "vmxlab-spawner")


def failed_boot(engine, image, log_dir, **options):
    """What is said of a carrier that does not come up; nothing of it stays but its logs."""
    before = open_descriptors(), threads_of_ours()
    with pytest.raises(errors.EngineUnavailable) as caught:
        engine.open(image, log_dir=log_dir, **options)
    assert (open_descriptors(), threads_of_ours()) == before
    assert caught.value.log_path == log_dir / "kvm-in-bochs-1.log"
    assert {path.suffix for path in log_dir.iterdir()} == {".log", ".out", ".bochsrc", ".debugger"}
    assert processes_in(log_dir) == []
    return caught.value


def processes_in(folder):
    """The living processes whose current directory is this one: Bochs's is that of its logs."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and (entry / "cwd").readlink() == folder:
                found += [] if is_gone(int(entry.name)) else [int(entry.name)]
    return found


def test_panic_of_linux_in_the_carrier_is_told(damaged, rom, tmp_path):
    def without_init(memory):
        assert memory.count(b"rdinit=/init") == 1
        return memory.replace(b"rdinit=/init", b"rdinit=/none")

    assert "rdinit=/init" in COMMAND_LINE
    error = failed_boot(damaged(without_init), rom("idle"), tmp_path / "logs")
    assert "Linux in the carrier: Kernel panic - not syncing: " in error.message
    assert "Kernel panic" in error.log_path.read_text()


def test_carrier_of_garbage_is_an_error_with_what_bochs_says(damaged, rom, tmp_path):
    """ud2 at every entry: no interrupt table, a triple fault."""
    error = failed_boot(damaged(lambda memory: b"\x0f\x0b" * 4096), rom("idle"), tmp_path / "logs")
    assert "Bochs gave up" in error.message
    assert "exception" in error.message


def test_carrier_that_hangs_is_an_error_at_the_deadline(damaged, rom, tmp_path):
    """jmp . at every entry."""
    before = time.monotonic()
    error = failed_boot(
        damaged(lambda memory: b"\xeb\xfe" * (len(memory) // 2)),
        rom("idle"),
        tmp_path / "logs",
        start_deadline_s=3,
    )
    assert 3 <= time.monotonic() - before < 15
    assert "took more than" in error.message


# --- things that need no carrier ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "switch",
    ["kvm_intel.ept", "kvm_intel.=1", "kvm_intel.ept=", "vfio.x=1", "kvm_intel.ept=0 nested=0", ".x=1"],
)
def test_malformed_parameter_is_an_error_before_anything_is_started(rom, tmp_path, switch):
    engine = KvmInBochsEngine()
    with pytest.raises(errors.EngineUnavailable, match="no parameter of a module") as caught:
        engine.open(rom("idle"), log_dir=tmp_path / "logs", model=f"host,{switch}")
    assert repr(switch) in caught.value.message
    assert "kvm_intel.ept=0" in caught.value.advice
    assert not (tmp_path / "logs").exists()


def test_parameter_that_kvm_has_not_got_is_refused_though_linux_ignores_it(tmp_path):
    console = tmp_path / "console.log"
    console.write_text("[    1.067856] irqbypass: module verification failed: tainting kernel\n")
    refuse_unknown_parameters(console)
    with console.open("a") as file:
        file.write("[    1.194375] kvm_intel: unknown parameter 'no_such' ignored\n")
    with pytest.raises(errors.EngineUnavailable, match="unknown parameter 'no_such'") as caught:
        refuse_unknown_parameters(console)
    assert caught.value.log_path == console


# A shell in the background ignores SIGINT for us.
_CLI = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from vmxlab.cli import main
sys.exit(main())
"""


def test_ctrl_c_while_the_carrier_boots_ends_all(tmp_path):
    skip_where_there_is_none()
    logs = tmp_path / "logs"
    process = subprocess.Popen(
        [sys.executable, "-c", _CLI, "run", "--engine", "kvm-in-bochs", "--log-dir", str(logs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=tmp_path,
    )
    try:
        end = time.monotonic() + PATIENCE_S
        while not (list(logs.glob("*.bochs.log")) and processes_in(logs)):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert b"Traceback" not in said
    assert processes_in(logs) == []
    assert {path.suffix for path in logs.iterdir()} <= {".log", ".out", ".bochsrc", ".debugger"}
