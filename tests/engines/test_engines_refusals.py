"""What can't run says so: which engine, what is missing, and what to do."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from vmxlab import errors
from vmxlab.engines import ENGINES, bochs, choose, logs
from vmxlab.engines.bochs import BochsEngine
from vmxlab.engines.kvm import KvmEngine
from vmxlab.engines.kvm_in_bochs import KvmInBochsEngine
from vmxlab.engines.rom import RomImage
from vmxlab.engines.tcg import TcgEngine

from .conftest import is_gone

every = pytest.mark.parametrize("name", sorted(ENGINES))
both = pytest.mark.parametrize("name", ["bochs", "tcg"])


@pytest.mark.parametrize(("size", "why"), [(0, "0 bytes"), (100, "100 bytes"), (3 << 20, "3145728 bytes")])
@every
def test_rom_of_a_bad_size_is_refused(name, size, why, tmp_path):
    image = tmp_path / "bad.rom"
    image.write_bytes(bytes(size))
    with pytest.raises(errors.ImageError, match=why):
        RomImage.check(image)
    if name != "kvm":  # which looks for VMX first
        with pytest.raises(errors.ImageError, match=why):
            ENGINES[name]().open(image, log_dir=tmp_path / "logs")
        assert not (tmp_path / "logs").exists()


def test_rom_that_is_missing_is_refused(tmp_path):
    with pytest.raises(errors.ImageError, match="No such file"):
        RomImage.check(tmp_path / "missing.rom")


def test_rom_ends_at_4_gib(tmp_path):
    image = tmp_path / "good.rom"
    image.write_bytes(bytes(128 << 10))
    assert RomImage.check(image).address == 0xFFFE0000


@pytest.mark.parametrize(("name", "package"), [("bochs", "bochs-term"), ("tcg", "qemu-system-x86")])
def test_missing_program_says_what_to_install(name, package, rom, tmp_path, monkeypatch):
    image = rom("idle")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(errors.EngineUnavailable, match="there is no program") as caught:
        ENGINES[name]().open(image, log_dir=tmp_path)
    assert "apt-get install" in caught.value.advice
    assert package in caught.value.advice
    state = ENGINES[name]().availability()
    assert not state.ok
    assert package in state.advice
    assert ENGINES[name]().models() == ()
    assert not state.problem.startswith("engine"), "the name stands before it, wherever it is shown"


def test_kvm_in_bochs_without_bochs_says_so_before_it_fetches_anything(rom, tmp_path, monkeypatch):
    image = rom("idle")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    engine = KvmInBochsEngine()
    needs = "it needs Bochs, which runs the Linux of its KVM: there is no program bochs-bin or bochs on PATH"
    state = engine.availability()
    assert (state.ok, state.problem) == (False, needs)
    assert "apt-get install bochs bochs-term" in state.advice
    for ask in (
        engine.require,
        lambda: choose("kvm-in-bochs"),
        lambda: engine.open(image, log_dir=tmp_path / "logs"),
    ):
        with pytest.raises(errors.EngineUnavailable) as caught:
            ask()
        assert caught.value.message == f"engine kvm-in-bochs: {needs}"
        assert caught.value.advice == state.advice
        assert caught.value.engine == "kvm-in-bochs"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["bochs", "tcg"])
def test_program_that_is_something_else_is_not_taken_for_the_engine(name, tmp_path, monkeypatch):
    for program in ("bochs-bin", "qemu-system-x86_64"):
        (tmp_path / program).symlink_to("/bin/echo")
    monkeypatch.setenv("PATH", str(tmp_path))
    state = ENGINES[name]().availability()
    assert not state.ok
    assert "does not answer as" in state.problem


@both
def test_log_directory_that_can_not_be_made_is_a_log_error(boot, name, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.LogError, match="Not a directory") as caught:
        boot(name, "idle", log_dir=tmp_path / "file" / "logs")
    assert caught.value.advice
    assert caught.value.log_path == tmp_path / "file" / "logs"


@pytest.mark.parametrize(
    ("number", "advice"), [(errno.EACCES, "writable"), (errno.ENOSPC, "free some space")]
)
def test_log_that_can_not_be_made_is_a_log_error_with_advice(boot, number, advice, monkeypatch):
    real = os.open

    def refuse(path, flags, *rest, **options):
        if str(path).endswith(".out"):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, flags, *rest, **options)

    monkeypatch.setattr("vmxlab.engines.process.os.open", refuse)
    with pytest.raises(errors.LogError, match=os.strerror(number)) as caught:
        boot("bochs", "idle")
    assert advice in caught.value.advice


def test_full_disk_is_a_log_error(boot, tmp_path):
    place = tmp_path / "full"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "vmxlab-test", place]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("can't mount a small file system here")
    try:
        (place / "filler").write_bytes(bytes(4096))
        with pytest.raises(errors.LogError, match="No space left") as caught:
            boot("bochs", "idle", log_dir=place)
        assert "free some space" in caught.value.advice
    finally:
        subprocess.run(["umount", place], check=True)


def test_bochs_that_ends_before_it_connects_is_an_error_with_its_last_words(boot, tmp_path):
    with pytest.raises(errors.EngineUnavailable, match="ended before it opened its serial line") as caught:
        boot("bochs", "idle", extra=["nonsense: value=1"])
    assert "nonsense" in str(caught.value)
    assert caught.value.log_path == tmp_path / "logs" / "bochs-1.log"


def test_host_without_a_port_to_listen_on_is_an_error(boot, monkeypatch):
    def refuse():
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))

    monkeypatch.setattr(bochs, "listen_on_loopback", refuse)
    with pytest.raises(errors.EngineUnavailable, match="Address already in use") as caught:
        boot("bochs", "idle")
    assert "loopback" in caught.value.advice


def test_bochs_without_its_display_library_is_not_available(engine, monkeypatch):
    bochs_engine = engine("bochs")
    monkeypatch.setattr(bochs, "_DISPLAY_PLUGIN", "libbx_missing_gui.so")
    state = bochs_engine.availability()
    assert not state.ok
    assert "libbx_missing_gui.so" in state.problem
    assert "bochs-term" in state.advice


def test_bochs_that_never_connects_is_given_up_and_killed(rom, tmp_path, monkeypatch):
    fake = tmp_path / "bin" / "bochs-bin"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "$$" > pid\nexec sleep 1000\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    with pytest.raises(errors.EngineUnavailable, match="within 1 s"):
        BochsEngine().open(rom("idle"), log_dir=tmp_path / "logs", start_deadline_s=1)
    assert is_gone(int((tmp_path / "logs" / "pid").read_text()))


def test_ctrl_c_while_bochs_starts_leaves_no_process(boot, monkeypatch):
    pids = []

    def interrupted(listener, child, deadline_s):
        pids.append(child.pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(bochs, "accept_from", interrupted)
    with pytest.raises(KeyboardInterrupt):
        boot("bochs", "idle")
    assert len(pids) == 1
    assert is_gone(pids[0])


def test_qemu_that_ends_at_its_start_is_an_error_with_its_last_words(boot):
    with pytest.raises(errors.EngineUnavailable, match="did not come up") as caught:
        boot("tcg", "idle", extra=["-no-such-option"])
    assert "no-such-option: invalid option" in str(caught.value)


def test_qemu_that_never_speaks_is_given_up_and_killed(rom, tmp_path, monkeypatch):
    fake = tmp_path / "bin" / "qemu-system-x86_64"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "$$" > pid\nexec sleep 1000\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    with pytest.raises(errors.EngineUnavailable, match="no answer within 1 s"):
        TcgEngine().open(rom("idle"), log_dir=tmp_path / "logs", start_deadline_s=1)
    assert is_gone(int((tmp_path / "logs" / "pid").read_text()))


def test_model_that_bochs_lacks_is_refused_with_the_ones_it_has(boot):
    with pytest.raises(errors.EngineUnavailable, match="no processor model 'pentium_9'") as caught:
        boot("bochs", "idle", model="pentium_9")
    assert "corei7_skylake_x" in caught.value.advice


def test_model_that_qemu_lacks_is_refused(boot):
    with pytest.raises(errors.EngineUnavailable, match="pentium_9"):
        boot("tcg", "idle", model="pentium_9")


@pytest.mark.parametrize("model", ["max,+vmx", "max,vmx=on", "max,vmx"])
def test_vmx_under_tcg_is_refused_rather_than_ignored(boot, model):
    with pytest.raises(errors.EngineUnavailable, match="TCG has no VMX"):
        boot("tcg", "idle", model=model)


@pytest.mark.parametrize("model", ["max,", "max,a b", "max,-smep,/etc"])
def test_switch_that_is_none_is_refused(boot, model):
    with pytest.raises(errors.EngineUnavailable, match="no name and no switch"):
        boot("tcg", "idle", model=model)


def test_path_that_a_bochsrc_can_not_carry_is_refused(boot, rom, tmp_path):
    image = tmp_path / 'with"quote.rom'
    image.write_bytes(rom("idle").read_bytes())
    with pytest.raises(errors.ImageError, match="Bochs can't be given the path"):
        boot("bochs", image)


def test_kvm_command_has_one_accelerator_and_enforces_vmx(rom):
    arguments = KvmEngine().arguments(
        RomImage.check(rom("idle")), model="host,vmx-ept=off,-vmx-vpid", memory_mb=64
    )
    assert arguments.count("-accel") == 1
    assert arguments[arguments.index("-accel") + 1] == "kvm"
    assert arguments[arguments.index("-cpu") + 1] == "host,+vmx,enforce,vmx-ept=off,-vmx-vpid"


def test_logs_are_numbered_and_never_shared(tmp_path):
    stems = [logs.claim(tmp_path, "bochs").stem for _ in range(3)] + [logs.claim(tmp_path, "tcg").stem]
    assert stems == ["bochs-1", "bochs-2", "bochs-3", "tcg-1"]


def test_tail_of_a_huge_log_is_bounded_and_begins_with_a_whole_line(tmp_path):
    log = tmp_path / "x.log"
    log.write_text("".join(f"line {number:06}\n" for number in range(100_000)))
    lines = logs.last_lines(log)
    assert lines[-1] == "line 099999"
    assert lines[0].startswith("line ")
    assert len(lines) < 30_000
    assert logs.tail(log, 2) == "line 099998\nline 099999"
    assert logs.tail(Path("/nonexistent"), 2) == ""
