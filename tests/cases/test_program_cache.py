"""The cache of guest programs: it saves calls of `as`, is never believed blindly and never in the way."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vmxlab.cases.program import Assembler, Mode, Request
from vmxlab.cases.program_cache import _ENTRIES_PER_FOLDER, Assembled, ProgramCache


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_what_was_assembled_is_not_assembled_again(as_calls: list[list[str]], tmp_path: Path) -> None:
    requests = [Request("x: jmp x"), Request("hlt")]
    first = Assembler(ProgramCache(tmp_path))
    programs = first.assemble_many(requests)
    started = len(as_calls)
    assert first.assemble_many(requests) == programs
    assert Assembler(ProgramCache(tmp_path)).assemble_many(requests) == programs
    assert len(as_calls) == started == 2


@pytest.mark.parametrize(
    "other",
    [
        Request("hlt", Mode.REAL),
        Request("hlt", origin=0x9000),
        Request("hlt", symbols={"X": 1}),
        Request("hlt "),
    ],
)
def test_any_other_request_is_another_entry(
    as_calls: list[list[str]], tmp_path: Path, other: Request
) -> None:
    make = Assembler(ProgramCache(tmp_path))
    make.assemble_many([Request("hlt")])
    make.assemble_many([other])
    assert len(as_calls) == len(entries(tmp_path)) == 2


def test_another_assembler_does_not_get_the_entries_of_this_one(
    as_calls: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Assembler(ProgramCache(tmp_path / "cache")).assemble_many([Request("hlt")])
    other = tmp_path / "bin" / "as"
    other.parent.mkdir()
    other.write_text('#!/bin/sh\nexec /usr/bin/as "$@"\n')
    other.chmod(0o755)
    monkeypatch.setenv("PATH", f"{other.parent}:{os.environ['PATH']}")
    Assembler(ProgramCache(tmp_path / "cache")).assemble_many([Request("hlt")])
    assert [Path(command[0]).name for command in as_calls][1] == "as"
    assert len(entries(tmp_path / "cache")) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: b"",
        lambda entry: entry[:-1],
        lambda entry: entry.replace(b'"f4"', b'"90"'),
        lambda entry: entry[:70],
        lambda entry: os.urandom(200),
        lambda entry: b"\n".join([entry.split(b"\n")[0], b"{}"]),
    ],
    ids=["empty", "cut", "changed", "cut-early", "noise", "other-payload"],
)
def test_a_damaged_entry_is_ignored_and_rewritten(tmp_path: Path, as_calls: list[list[str]], damage) -> None:
    Assembler(ProgramCache(tmp_path)).assemble_many([Request("hlt")])
    (path,) = entries(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert Assembler(ProgramCache(tmp_path)).assemble_many([Request("hlt")])[0].code == b"\xf4"
    assert path.read_bytes() == whole
    assert len(as_calls) == 2


def test_an_entry_under_another_key_is_not_believed(tmp_path: Path) -> None:
    cache = ProgramCache(tmp_path)
    cache.put("a" * 64, Assembled(b"\xf4", {}))
    (path,) = entries(tmp_path)
    moved = tmp_path / "bb" / ("b" * 62)
    moved.parent.mkdir()
    path.rename(moved)
    assert cache.get("b" * 64) is None


@pytest.mark.parametrize("where", ["a file in the way", "an entry that is a folder", "no folder"])
def test_a_cache_that_can_not_be_written_is_no_error(
    tmp_path: Path, as_calls: list[list[str]], where: str
) -> None:
    folder: Path | None = tmp_path / "cache"
    if where == "a file in the way":
        (tmp_path / "cache").write_text("in the way")
    elif where == "an entry that is a folder":
        Assembler(ProgramCache(folder)).assemble_many([Request("hlt")])
        (path,) = entries(tmp_path)
        path.unlink()
        path.mkdir()
    else:
        folder = None
    assert Assembler(ProgramCache(folder)).assemble_many([Request("hlt")])[0].code == b"\xf4"
    assert as_calls
    assert not list(tmp_path.rglob(".new-*"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_cache_that_takes_no_more_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "replace", refuse)
    assert Assembler(ProgramCache(tmp_path)).assemble_many([Request("hlt")])[0].code == b"\xf4"
    assert entries(tmp_path) == []


def test_a_full_folder_drops_its_older_half(tmp_path: Path) -> None:
    cache = ProgramCache(tmp_path)
    keys = [f"aa{number:062x}" for number in range(_ENTRIES_PER_FOLDER + 1)]
    for number, key in enumerate(keys):
        cache.put(key, Assembled(b"\xf4", {}))
        path = tmp_path / "aa" / key[2:]
        if path.exists():
            os.utime(path, ns=(number, number))
    assert cache.get(keys[0]) is None
    assert cache.get(keys[-1]) is not None
    assert len(entries(tmp_path)) < _ENTRIES_PER_FOLDER


def test_assemblers_side_by_side_share_a_cache(tmp_path: Path) -> None:
    requests = [Request(f"x: mov eax, {i % 7}; jmp x") for i in range(14)]

    def run(_: int) -> list[bytes]:
        return [program.code for program in Assembler(ProgramCache(tmp_path)).assemble_many(requests)]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, range(8)))
    assert all(result == results[0] for result in results)
    assert len(entries(tmp_path)) == 7
