"""The coverage file: what is written is read again, and whatever else it holds is a named error."""

from __future__ import annotations

import json

import pytest

from vmxlab.engines.base import EngineInfo
from vmxlab.errors import CoverageError
from vmxlab.reports.coverage_file import (
    CoverageWriter,
    Differs,
    Lacking,
    Platform,
    Processor,
    Seen,
    processor_line,
    read_coverage,
)

WHERE = {"test": "t.py::test[x]", "engine": "bochs", "version": "2.7"}
BOCHS = Platform("bochs", "2.7")
SEEN = {"kind": "seen", **WHERE, "models": ["m"], "reasons": [10, 200], "entry_failures": [33]}


@pytest.fixture
def path(tmp_path, processors):
    """A good file with a line of each kind."""
    writer = CoverageWriter(tmp_path / "coverage.jsonl")
    writer.write(SEEN)
    writer.write({"kind": "lacking", **WHERE, "feature": "EPT", "bit": "MSR[1]"})
    writer.write({"kind": "differs", **WHERE, "key": "some-key"})
    info = EngineInfo("bochs", "2.7", "m", "why")
    line = processor_line(info, processors["skylake"], is_default=True)
    writer.close([line, line], 1)
    return tmp_path / "coverage.jsonl"


def rewritten(path, change):
    """The file with its lines changed."""
    lines = path.read_text().splitlines()
    path.write_text("".join(f"{line}\n" for line in change(lines)))
    return path


def problem(path):
    with pytest.raises(CoverageError) as caught:
        read_coverage(path)
    assert str(path) in caught.value.message
    assert caught.value.advice
    return caught.value.message


def test_what_was_written_is_read(path, processors):
    file = read_coverage(path)
    assert file.seen == [Seen("t.py::test[x]", BOCHS, ("m",), (10, 200), (33,))]
    assert file.lacking == [Lacking("t.py::test[x]", BOCHS, "EPT", "MSR[1]")]
    assert file.differs == [Differs("t.py::test[x]", BOCHS, "some-key")]
    assert file.processors == [Processor(BOCHS, "m", True, processors["skylake"])]
    assert file.status == 1


def test_every_cut_is_noticed(path):
    text = path.read_text()
    for length in range(0, len(text) - 1, 37):
        path.write_text(text[:length])
        assert ", line " in problem(path)
    for count in range(len(text.splitlines())):
        path.write_text("".join(text.splitlines(keepends=True)[:count]))
        assert f", line {count + 1}: " in problem(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "line 1: the file is empty"),
        (b"\xff\xfe\x00", "it is no text"),
        (b"hello\n", "line 1: this is no line of a coverage file"),
        (b"[1]\n", "line 1: this is no line"),
        (b'{"a": 1}\n', "line 1: 'kind' is missing"),
        (b'{"kind": "seen"}\n', "line 1: a coverage file starts with its head"),
        (b'{"kind": "head", "format": 99}\n', "line 1: the format is 99"),
        (b'{"kind": "head", "format": "1"}\n', "line 1: 'format' is no int"),
    ],
)
def test_a_foreign_file_is_named_with_the_line(tmp_path, content, words):
    path = tmp_path / "foreign"
    path.write_bytes(content)
    assert words in problem(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: [*lines[:2], *lines], "line 3: a coverage file starts with its head, and has one"),
        (lambda lines: [*lines[:1], *lines[2:]], "line 5: 5 lines were written before the end, 4 are here"),
        (lambda lines: [*lines, lines[1]], "line 7: the file goes on behind its end"),
        (lambda lines: [lines[0], '{"kind": "new"}', *lines[2:]], "line 2: there is no line of kind 'new'"),
    ],
)
def test_lines_that_are_missing_doubled_or_unknown_are_named(path, change, words):
    assert words in problem(rewritten(path, change))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("test", None, "'test' is no str"),
        ("reasons", "10", "'reasons' is no list"),
        ("reasons", [True], "'reasons' is no list of int"),
        ("models", [1], "'models' is no list of str"),
        ("engine", 5, "'engine' is no str"),
    ],
)
def test_values_of_the_wrong_kind_are_named(path, key, value, words):
    def change(lines):
        return [lines[0], json.dumps({**SEEN, key: value}), *lines[2:]]

    assert f"line 2: {words}" in problem(rewritten(path, change))


def test_msrs_that_make_no_sense_are_named(path):
    assert "line 5: " in problem(rewritten(path, lambda ls: [*ls[:4], ls[4].replace("0x", "zz", 1), *ls[5:]]))


def test_a_file_that_is_not_there_or_can_not_be_written_is_named(tmp_path):
    assert "No such file" in problem(tmp_path / "none")
    assert "directory" in problem(tmp_path)
    with pytest.raises(CoverageError, match="No such file"):
        CoverageWriter(tmp_path / "none" / "file")
    with pytest.raises(CoverageError, match="No space left"):
        from pathlib import Path

        CoverageWriter(Path("/dev/full"))
