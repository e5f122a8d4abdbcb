"""The HTML report, as text: what is packed in it, what it asks for, and what it says without a browser."""

from __future__ import annotations

import json
import re
import zlib
from base64 import b64decode, b64encode
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import pytest

from vmxlab import Case, Ept, IOBitmap, Mode, PageSize
from vmxlab.cases.program import assemble
from vmxlab.errors import CoverageError
from vmxlab.reports.disassembly import Code
from vmxlab.reports.html import parts
from vmxlab.reports.html.page import render
from vmxlab.reports.html.passed import passed_accesses
from vmxlab.reports.html.pictures import structure_item
from vmxlab.reports.results.facts import FactsWriter
from vmxlab.reports.results.model import TestVerdict

from .sessions import EVIL, Session, hlt, io, run_of

LOG = Path(__file__).parents[1] / "console" / "bochs.log"


class Document(HTMLParser):
    """The elements of a page, and the text of its scripts and styles."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self._open = ""
        self.feed(page.decode("utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag):
        self._open = ""

    def handle_data(self, data):
        if self._open in ("script", "style"):
            self.raw.append((self.tags[-1][1], data))
        else:
            self.text += f" {data}"

    def packed(self, **attributes):
        """What stands packed in the elements with these attributes."""
        return [
            json.loads(zlib.decompress(b64decode(data)))
            for found, data in self.raw
            if attributes.items() <= found.items()
        ]


@pytest.fixture
def session(tmp_path):
    return Session(tmp_path / "results.jsonl")


def page_of(session, status=0) -> Document:
    return Document(render([session.close(status)])[0])


# --- accesses that passed ----------------------------------------------------------------------------------


def passed(program, *exits_at, mode=Mode.LONG):
    code = assemble(program, mode, origin=0x8000).code
    found = passed_accesses(Code.of_bytes(mode, code, {}), set(exits_at))
    return sorted(found.ports), sorted(found.reads), sorted(found.writes)


@pytest.mark.parametrize(
    ("program", "exits_at", "found"),
    [
        ("in al, 0x60; hlt", [0x8002], ([0x60], [], [])),
        ("in al, 0x60; hlt", [0x8000, 0x8002], ([], [], [])),
        ("in al, 0x60; hlt", [], ([], [], [])),
        ("mov dx, 0x3f8; out dx, ax; hlt", [0x8006], ([0x3F8, 0x3F9], [], [])),
        ("mov edx, 0xffff; in al, dx; hlt", [0x8006], ([0xFFFF], [], [])),
        ("mov dl, 0x60; in al, dx; hlt", [0x8003], ([], [], [])),  # DH is not known
        ("mov dx, 0x60; inc dx; in al, dx; hlt", [0x8008], ([], [], [])),
        ("mov dx, 0x60; cpuid; in al, dx; hlt", [0x8004, 0x8007], ([], [], [])),
        ("mov ecx, 0x174; rdmsr; wrmsr; hlt", [0x8009], ([], [0x174], [0x174])),
        ("mov ecx, 0x174; rdmsr; wrmsr; hlt", [0x8007, 0x8009], ([], [0x174], [])),
        ("jmp 1f; in al, 0x60; 1: in al, 0x61; hlt", [0x8006], ([], [], [])),
        ("in al, 0x60; jz 1f; 1: in al, 0x61; hlt", [0x8006], ([0x60], [], [])),
        ("hlt; in al, 0x60", [0x8000], ([], [], [])),
    ],
)
def test_only_what_the_straight_line_shows_has_passed(program, exits_at, found):
    assert passed(program, *exits_at) == found


# --- structures --------------------------------------------------------------------------------------------


def test_ept_is_told_in_words_entry_by_entry(session):
    ept = Ept()
    ept.map(0x0, 0x120_0000, length=0x2_0000)
    ept.map(0x20_0000, 0x200_0000, PageSize.SIZE_2M, execute=False)
    ept.map(0x3000_0000_0000, 0, raw=0b010, length=0x1000)
    facts = json.loads(FactsWriter().text([run_of(Case(ept=ept))]))
    (told,) = (found for found in facts["structures"].values() if "entries" in found)
    entries = structure_item(told)["entries"]
    assert [entry[1:4] for entry in entries] == [
        ["PML4E[0]", 0, 0x7F_FFFF_FFFF],
        ["PDPTE[0]", 0, 0x3FFF_FFFF],
        ["PDE[0]", 0, 0x1F_FFFF],
        ["PTE[0-31]", 0, 0x1_FFFF],
        ["PDE[1]", 0x20_0000, 0x3F_FFFF],
        ["PML4E[96]", 0x3000_0000_0000, 0x307F_FFFF_FFFF],
        ["PDPTE[0]", 0x3000_0000_0000, 0x3000_3FFF_FFFF],
        ["PDE[0]", 0x3000_0000_0000, 0x3000_001F_FFFF],
        ["PTE[0]", 0x3000_0000_0000, 0x3000_0000_0FFF],
    ]
    assert entries[3][5:8] == ["0x1200000", "4K", "rwx WB"]
    assert entries[4][5:8] == ["0x2000000", "2M", "rw- WB"]
    assert [entry[8] for entry in entries if entry[8]] == [
        "writes are allowed (bit 1) but reads are not (bit 0)"
    ]


# --- the page ----------------------------------------------------------------------------------------------


def test_page_asks_for_nothing_and_runs_nothing_but_its_own_script(session):
    session.add("t.py::test", run_of(Case(), hlt(0x8000)), why=EVIL)
    document = page_of(session)
    asked = {
        name for _, found in document.tags for name in found if name in ("src", "srcset", "data", "action")
    }
    assert asked <= {"action"}
    links = [found["href"] or "" for _, found in document.tags if "href" in found]
    assert all(link.startswith("#") or link == "data:," for link in links)
    (policy,) = (
        found["content"] or "" for tag, found in document.tags if "http-equiv" in found and tag == "meta"
    )
    assert policy.startswith("default-src 'none'; ")
    code = [data for found, data in document.raw if "type" not in found]
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    assert sorted(allowed) == sorted(b64encode(sha256(text.encode()).digest()).decode() for text in code)
    assert not [found for _, found in document.tags if "style" in found]
    assert not [name for _, found in document.tags for name in found if name.startswith("on")]


def test_script_makes_no_html_of_text():
    assets = Path(parts.__file__).parent / "assets"
    for path in assets.glob("*.js"):
        for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "http"):
            assert word not in path.read_text(), f"{path.name}: {word}"


def test_what_a_test_or_a_guest_wrote_is_text(session):
    session.add(
        f"t.py::test[{EVIL}]", run_of(Case(), hlt(0x8000)), verdict=TestVerdict.FAIL, why=EVIL, text=EVIL
    )
    document = page_of(session)
    assert "img" not in [tag for tag, _ in document.tags]
    assert EVIL.partition("\u2028")[0] in document.text
    assert r"\x00\x1b[31m" in document.text  # no document may hold these, so they are spelled out
    (index,) = document.packed(id="index")
    assert index["tests"][0][5] == EVIL
    assert {"text": EVIL, "sections": [], "known": ""} in [
        i for p in document.packed(**{"class": "part"}) for i in p
    ]


def test_details_are_packed_in_pieces_that_are_closed_when_long(session, monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 3000)
    for number in range(20):
        session.add(f"t.py::test_{number}", run_of(Case(name=f"c{number}"), io(number, 0x8000), hlt(0x8002)))
    document = page_of(session)
    pieces = document.packed(**{"class": "part"})
    assert len(pieces) > 5
    (index,) = document.packed(id="index")
    for number, (test, case) in enumerate(zip(index["tests"], index["cases"], strict=True)):
        piece, place = case[6]
        assert test[1] == f"test_{number}"
        assert pieces[piece][place]["exits"][0][2] == f"OUT port {number:#x}, 1 byte".replace("OUT", "IN")
        assert [index["descriptions"][word] for word in case[5]] == [f"IN port {number:#x}, 1 byte", "-"]


def test_verdicts_are_counted_by_engine_without_a_script(session):
    for verdict in TestVerdict:
        session.add(
            f"t.py::test_{verdict.value}", run_of(Case(), hlt(0x8000)), verdict=verdict, why="because"
        )
    session.add("t.py::test_host", engine=None)
    document = page_of(session, 1)
    words = re.sub(r"\s+", " ", document.text)
    assert "engine crash fail error known difference expected failure skip pass tests cases exits" in words
    assert "bochs 2.7 1 1 1 1 1 1 1 7 7 7 no engine 0 0 0 0 0 0 1 1 0 0 all 1 1 1 1 1 1 2 8 7 7" in words
    listed = re.findall(r"(\w+) t\.py::test_(\w+) bochs", words.partition("To look at")[2])
    assert listed == [("crash", "crash"), ("fail", "fail"), ("error", "error")]


def test_coverage_table_is_that_of_the_passed_tests(session):
    session.add("t.py::test_hlt", run_of(Case(), hlt(0x8000)), seen=[12])
    words = re.sub(r"\s+", " ", page_of(session).text)
    assert "bochs 2.7: 1 of 80 reasons seen" in words
    assert "12 HLT t.py:: test_hlt" in words  # it may be broken there
    assert "10 CPUID not seen" in words


def test_tests_stand_by_file_though_workers_mix_them(session):
    for name in ("b.py::test_1", "a.py::test_2", "b.py::test_0", "a.py::test_1", "b.py::test_1"):
        session.add(name, run_of(Case(name=name.replace("::", "-")), hlt(0x8000)))
    (index,) = page_of(session).packed(id="index")
    names = [f"{index['files'][test[0]]}::{test[1]}" for test in index["tests"]]
    assert names == ["a.py::test_2", "a.py::test_1", "b.py::test_1", "b.py::test_1", "b.py::test_0"]
    titles = [index["cases"][test[7]][0].replace("-", "::") for test in index["tests"]]
    assert titles == names


def test_session_without_an_end_is_marked_as_cut_short(session):
    session.add("t.py::test", run_of(Case(), hlt(0x8000)))
    page, made = render([session.path])
    assert "the session was cut short" in page.decode()
    assert len(made.warnings) == 1


def test_several_files_make_one_page_and_a_log_is_one_of_them(session, tmp_path):
    bitmap = IOBitmap.intercept_all()
    session.add("t.py::test", run_of(Case(io_bitmap=bitmap), hlt(0x8000)))
    other = Session(tmp_path / "other.jsonl")
    other.add("t.py::test", run_of(Case(io_bitmap=bitmap), hlt(0x8000)), engine="kvm")
    page, made = render([session.close(), other.close(), LOG])
    (index,) = Document(page).packed(id="index")
    assert index["platforms"] == ["bochs 2.7", "kvm 2.7"]
    assert made.overview.total.tests.total() == 3
    structures = [i for p in Document(page).packed(**{"class": "part"}) for i in p if "ports" in i]
    assert structures == [{"ports": [[0, 0xFFFF]]}]


def test_same_files_give_the_same_page(session):
    session.add("t.py::test", run_of(Case(), hlt(0x8000)))
    path = session.close()
    assert render([path])[0] == render([path])[0]


def test_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CoverageError, match="No such file"):
        render([tmp_path / "none"])
