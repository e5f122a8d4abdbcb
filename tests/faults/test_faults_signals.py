"""Ctrl-C, SIGTERM and SIGKILL at any moment: the harness ends, and nothing of it stays behind."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from .conftest import PATIENCE_S, processes_in, wait_until

# Runs cases until it is ended. It says when the lab is there; the signals come some moments later: while the
# first machine starts or boots, in the middle of a case, between two, or when a dead machine is replaced.
_HARNESS = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background ignores it for us
from vmxlab import Case, Limits
from vmxlab.console.lab import Lab
from vmxlab.sdm.fields import Field

stream = Case(program="again: cpuid; jmp again", limits=Limits(exits=300))
dies = Case(fields={Field.HOST_CR3: 0x3F00000})
with Lab("bochs") as lab:
    print("here", flush=True)
    while True:
        getattr(lab, sys.argv[1])([Case(), stream, dies, Case(), stream])
"""

_random = random.Random(2)
# One while the first machine starts, one while it boots or soon after, the others anywhere.
MOMENTS_S = [_random.uniform(*span) for span in ((0, 0.03), (0.03, 0.15), (0.15, 0.35), (0.35, 0.6))]


@pytest.fixture
def harness(tmp_path):
    """harness(way) -> a process that runs cases, with its temporary files and emulator below tmp_path."""
    started = []

    def start(way):
        process = subprocess.Popen(
            [sys.executable, "-c", _HARNESS, way],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"TMPDIR": str(tmp_path)},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def end_after(process, moment_s, number):
    """Send the signal so long after the lab was there; give what the process says in the end."""
    here = process.stdout.readline()
    assert here == b"here\n", process.communicate()[1].decode()
    time.sleep(moment_s)
    process.send_signal(number)
    _, said = process.communicate(timeout=PATIENCE_S)
    return said.decode()


@pytest.mark.parametrize("way", ["run_all", "run_image"])
@pytest.mark.parametrize("moment_s", MOMENTS_S, ids=lambda s: f"{s * 1000:.0f}ms")
def test_ctrl_c_ends_all_and_leaves_nothing(harness, tmp_path, way, moment_s):
    process = harness(way)
    said = end_after(process, moment_s, signal.SIGINT)
    assert process.returncode == -signal.SIGINT
    assert said.rstrip().endswith("KeyboardInterrupt")
    assert "Exception ignored" not in said
    wait_until(lambda: processes_in(tmp_path) == [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
@pytest.mark.parametrize("moment_s", MOMENTS_S[::2], ids=lambda s: f"{s * 1000:.0f}ms")
def test_killed_harness_leaves_no_emulator(harness, tmp_path, number, moment_s):
    process = harness("run_all")
    end_after(process, moment_s, number)
    assert process.returncode == -number
    wait_until(lambda: processes_in(tmp_path) == [])


def test_emulator_of_the_harness_is_seen_by_this_test(harness, tmp_path):
    """The test of the tests above: there is an emulator while the harness runs."""
    process = harness("run_all")
    wait_until(lambda: processes_in(tmp_path) != [] or process.poll() is not None)
    assert process.poll() is None, process.communicate()[1].decode()
