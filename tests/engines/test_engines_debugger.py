"""What a person with a debugger is told, and the symbols for it."""

from __future__ import annotations

import shlex
import socket
import threading
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from vmxlab.engines.bochs import BochsEngine
from vmxlab.engines.debugger import OwnTerminal, SocketTerminal, gdb_command, write_bochs_symbols
from vmxlab.engines.kvm_in_bochs import KvmInBochsEngine
from vmxlab.engines.tcg import TcgEngine
from vmxlab.errors import EngineUnavailable, ImageError, LogError
from vmxlab.image import monitor as monitor_module
from vmxlab.image.monitor import load_monitor, monitor_symbols


def test_the_symbols_are_those_of_the_monitor_that_is_loaded():
    with monitor_symbols().file.open("rb") as file:
        elf = ELFFile(file)
        (entry,) = elf.get_section_by_name(".symtab").get_symbol_by_name("vmx_exit_entry")
        assert elf.elfclass == 64
        assert elf.has_dwarf_info()
        assert entry["st_value"] == load_monitor().exit_entry
    assert (monitor_symbols().sources / "monitor" / "script.c").is_file()


def test_a_monitor_without_symbols_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr(monitor_module, "_PLACES", (tmp_path,))
    with pytest.raises(ImageError, match="make guest"):
        monitor_symbols()
    (tmp_path / "monitor.elf").touch()
    with pytest.raises(ImageError, match=r"no .*monitor\.elf\.64"):
        monitor_symbols()


def test_gdb_is_told_the_socket_in_a_way_that_the_kernel_takes(tmp_path):
    assert "target remote logs/gdb.sock" in shlex.split(gdb_command(Path("logs")))
    deep = tmp_path / ("d" * 60) / "with space" / ("e" * 60)
    command = shlex.split(gdb_command(deep))
    assert command[:3] == ["cd", str(deep), "&&"]
    assert "target remote gdb.sock" in command


def test_bochs_gets_its_symbols_as_lines(tmp_path):
    path = write_bochs_symbols(tmp_path)
    lines = dict(line.split()[::-1] for line in path.read_text().splitlines())
    assert int(lines["vmx_exit_entry"], 16) == load_monitor().exit_entry
    with pytest.raises(LogError):
        write_bochs_symbols(Path("/proc/nowhere"))


def test_each_engine_says_what_it_has(tmp_path):
    terminal = OwnTerminal()
    assert "gdb" in TcgEngine().debug(tmp_path, terminal)[0]
    assert 'ldsym global "monitor.sym"' in "\n".join(BochsEngine().debug(tmp_path, terminal))
    with pytest.raises(EngineUnavailable, match="no debugger"):
        KvmInBochsEngine().debug(tmp_path, terminal)


def test_a_prompt_goes_to_whoever_connects(tmp_path):
    told: list[str] = []
    terminal = SocketTerminal(tmp_path, told.append)
    with socket.socket(socket.AF_UNIX) as person:

        def connect(text: str) -> None:
            told.append(text)
            threading.Thread(target=person.connect, args=(str(terminal.path),)).start()

        terminal._tell = connect
        with terminal.ends() as (read_end, write_end), socket.socket(fileno=socket.dup(read_end)) as end:
            assert read_end == write_end
            end.sendall(b"<bochs:1> ")
            assert person.recv(100) == b"<bochs:1> "
    assert f"nc -U {terminal.path}" in told[0]
    terminal.close()
    assert not terminal.path.exists()
    with pytest.raises(EngineUnavailable, match="--log-dir"), SocketTerminal(tmp_path / "none", print).ends():
        pass
