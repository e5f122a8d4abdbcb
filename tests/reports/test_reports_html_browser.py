"""The HTML report in a real browser, opened from disk: it works, and its console stays empty."""

from __future__ import annotations

import json
from urllib.parse import urlencode

import pytest

from vmxlab import Case, Field, IOBitmap, MsrBitmap, PageSize, PrimaryControls, guest_ept
from vmxlab.console.records import encode_record
from vmxlab.reports.html.page import render
from vmxlab.reports.results.facts import MAX_EXITS
from vmxlab.reports.results.model import TestVerdict

from .browser import Browser, running_browser
from .sessions import EVIL, Session, hlt, io, run_of

MANY = 1000
"""Tests that are in the list besides those with names of their own."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with running_browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


def first_case():
    """Every structure, and an exit by each."""
    bitmap, msrs, ept = IOBitmap(), MsrBitmap(), guest_ept()
    bitmap.set_intercept_of_range(0x60, 2, True)
    bitmap.set_intercept(0xB000, True)
    msrs.set_read_intercept(0xC000_0080, True)
    ept.map(0x20_0000, 0x200_0000, PageSize.SIZE_2M, execute=False)
    ept.map(0x40_0000, 0x240_0000, write=True, read=False)
    program = "in al, 0x60; in al, 0x70; mov ecx, 0xc0000080; rdmsr; mov ecx, 0x174; wrmsr"
    program += "; mov [UNMAPPED], rax; hlt"
    case = Case(
        name="first",
        program=program,
        io_bitmap=bitmap,
        msr_bitmap=msrs,
        ept=ept,
        enable=PrimaryControls.RDTSC_EXITING,
        fields={Field.TSC_OFFSET: 5},
    )
    violation = {"reason": 48, "qual": 0x182, "gpa": 0x10_0000, "gla": 0x10_0000, "rip": 0x8014}
    return run_of(
        case,
        {**io(0x60, 0x8000), "rax": 0x1C},
        {"reason": 31, "len": 2, "rip": 0x8009, "rcx": 0xC000_0080},
        violation,
        hlt(0x801C),
    )


def failed_entry():
    case = Case(fields={Field.GUEST_RFLAGS: 0}, name="fails")
    compiled = run_of(case).compiled
    assert compiled is not None
    dumped = encode_record("vmcs", {f"f{field:x}": value for field, value in compiled.fields.items()})
    return run_of(case, {"reason": 0x8000_0021, "rip": 0x8000}, extra=[dumped], number=1)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A session with a test of each kind, and many more."""
    folder = tmp_path_factory.mktemp("page")
    session = Session(folder / "results.jsonl", began="2026-01-01T00:00:00+00:00", host="Linux")
    session.add("a.py::test_first", first_case(), seen=[30, 31, 48, 12], seconds=1.25)
    session.add(
        "a.py::test_failed_entry", failed_entry(), verdict=TestVerdict.FAIL, why="no exit", text="E assert"
    )
    cases = [run_of(Case(name=f"c{n}"), io(n, 0x8000), hlt(0x8002), number=n) for n in range(120)]
    session.add("a.py::test_many_cases", *cases)
    session.add("a.py::test_first", first_case(), engine="kvm-in-bochs")
    long = [{"reason": 10, "len": 2, "rip": 0x8000}] * (MAX_EXITS + 500)
    session.add("b.py::test_long", run_of(Case(), *long, why="limit"))
    session.add(
        f"b.py::test_evil[{EVIL}]",
        run_of(Case(name="</script><img/src>"), hlt(0x8000)),
        verdict=TestVerdict.CRASH,
        why=EVIL,
        text=EVIL,
        sections=[(EVIL, EVIL)],
    )
    session.add("b.py::test_known", verdict=TestVerdict.KNOWN, why="ept-exit-rf-clear")
    for number in range(MANY):
        session.add(f"c.py::test_host[{number}]", engine=None)
    content, _ = render([session.close(1)])
    path = folder / "report.html"
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def loaded(browser, page):
    """The page, loaded once: whatever it shows then is in its address."""
    browser.open(page)
    return browser


@pytest.fixture
def opened(loaded):
    """opened(**state) shows a view of the page; in the end its console must be empty."""

    def show(*, width: int = 1280, dark: bool = False, **state: object) -> Browser:
        loaded.resize(width)
        loaded.use_dark(dark)
        # By way of a test that is not there, so that nothing is left of what was shown before.
        for fragment in ({"view": "tests", "t": "none"}, state):
            loaded.js(
                "location.hash = arguments[0]; dispatchEvent(new HashChangeEvent('hashchange'))",
                "#" + urlencode(fragment),
            )
        return loaded

    yield show
    assert loaded.console() == []


def rows(browser: Browser) -> list[str]:
    # As JSON: the driver takes no lone surrogate.
    names = "[...document.querySelectorAll('.row .name')].map((e) => e.textContent)"
    found: list[str] = json.loads(browser.js(f"return JSON.stringify({names})"))
    return found


def count(browser: Browser) -> str:
    return browser.js("return document.getElementById('count').textContent")


def unfold(browser: Browser, title: str) -> None:
    """Open a part of the case that is shown, and wait for what is in it."""
    browser.wait(
        "const part = [...document.querySelectorAll('.case details')]"
        ".find((e) => e.firstChild.textContent.startsWith(arguments[0]));"
        "if (part) part.open = true; return part && part.querySelector('.body').childElementCount",
        title,
    )


# --- opening -----------------------------------------------------------------------------------------------


def test_it_opens_on_the_overview_and_asks_for_no_other_file(opened):
    browser = opened()
    assert browser.texts("main > section > .columns h2")[:2] == ["Verdicts by engine", "To look at"]
    assert browser.js("return performance.getEntriesByType('resource').length") == 0
    assert browser.js("return document.title") == f"crash: {MANY + 7:,} tests - vmxlab report"


def test_only_the_rows_in_sight_are_in_the_document_and_the_last_one_can_be_reached(opened):
    browser = opened(view="tests")
    assert count(browser) == f"{MANY + 7:,} tests, 125 cases"
    assert len(rows(browser)) < 100
    browser.js("document.getElementById('rows').scrollTop = 1e9")
    browser.wait(
        "return [...document.querySelectorAll('.row .name')].some((e) => e.textContent === arguments[0])",
        f"test_host[{MANY - 1}]",
    )
    assert len(rows(browser)) < 100


def test_data_that_is_damaged_is_said(loaded, page, tmp_path):
    damaged = tmp_path / "damaged.html"
    text = page.read_text()
    at = text.index('id="index">') + 500
    damaged.write_text(text[:at] + "AAAA" + text[at + 4 :])
    loaded.js("location.href = arguments[0]", damaged.as_uri())
    loaded.wait("return document.querySelector('.notice')?.textContent.includes('can\\'t be read')")
    assert loaded.console() != []
    loaded.open(page)


# --- the filter --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "tests", "cases"),
    [
        ({"q": "first"}, ["test_first", "test_first"], 2),
        ({"q": "FIRST kvm"}, ["test_first"], 1),
        ({"q": "port 0x60"}, ["test_first", "test_first", "test_many_cases"], 3),
        ({"q": '"port 0x7, "'}, ["test_many_cases"], 1),
        ({"q": "c11"}, ["test_many_cases"], 11),
        ({"q": "IA32_EFER"}, ["test_first", "test_first"], 2),
        ({"q": "ept_violation", "e": "bochs 2.7"}, ["test_first"], 1),
        ({"r": 10}, ["test_long"], 1),
        ({"r": 33}, ["test_failed_entry"], 1),
        ({"v": "fail"}, ["test_failed_entry"], 1),
        ({"v": "known,fail"}, ["test_failed_entry", "test_known"], 1),
        ({"e": "kvm-in-bochs 2.7"}, ["test_first"], 1),
        ({"e": "", "q": "host[999]"}, ["test_host[999]"], 0),
        ({"q": "nowhere"}, [], 0),
    ],
)
def test_filter_finds(opened, state, tests, cases):
    browser = opened(view="tests", **state)
    assert rows(browser) == tests
    assert count(browser).startswith(f"{len(tests)} of {MANY + 7:,} tests, {cases} of ")


def test_filter_by_hand_is_in_the_address_and_can_be_cleared(opened):
    browser = opened()
    browser.js("document.body.focus()")
    browser.type("/")
    browser.wait("return document.activeElement.id === 'q' && document.body.dataset.view === 'tests'")
    browser.type("0x60")
    browser.wait("return document.querySelectorAll('.row').length === 3")
    browser.click(".chip.v-pass")
    browser.js(
        "const e = document.getElementById('engine'); e.value = 'ebochs 2.7';"
        "e.dispatchEvent(new Event('change'))"
    )
    browser.wait("return document.querySelectorAll('.row').length === 2")
    browser.js(
        "const e = document.getElementById('reason'); e.value = '31'; e.dispatchEvent(new Event('change'))"
    )
    browser.wait("return document.querySelectorAll('.row').length === 1")
    assert browser.js("return location.hash") == "#view=tests&q=0x60&v=pass&e=bochs+2.7&r=31"
    browser.click("#clear")
    browser.wait("return document.querySelectorAll('.row').length > 10")
    assert browser.js("return location.hash") == "#view=tests"
    assert browser.js("return document.getElementById('q').value") == ""


def test_overview_leads_to_what_it_counts(opened):
    browser = opened()
    browser.click(".matrix a.v-crash")
    browser.wait(
        "return document.body.dataset.view === 'tests' && document.querySelectorAll('.row').length === 1"
    )
    assert browser.js("return new URLSearchParams(location.hash.slice(1)).get('e')") == "bochs 2.7"


def test_keys_go_through_the_tests(opened):
    browser = opened(view="tests")
    browser.js("document.body.focus()")
    for key, name in (
        ("j", "test_first"),
        ("j", "test_first"),
        ("j", "test_failed_entry"),
        ("k", "test_first"),
    ):
        browser.type(key)
        browser.wait(
            "return document.querySelector('.row[aria-current] .name')?.textContent === arguments[0]", name
        )
        browser.wait("return document.querySelector('#detail > h2')?.textContent === arguments[0]", name)


# --- a case ------------------------------------------------------------------------------------------------


@pytest.fixture
def first(opened):
    """The test that has everything, shown."""
    browser = opened(view="tests", t="a.py::test_first[bochs]")
    browser.wait("return document.querySelector('.exits')")
    return browser


def test_exits_are_on_a_line_and_in_a_table(first):
    cells = [row.split("\t") for row in first.texts(".exits tbody tr")]
    assert [cell.strip() for cell in cells[0]] == [
        "0",
        "IO_INSTRUCTION",
        "IN port 0x60, 1 byte",
        "0x8000",
        "in al, 0x60",
        "rax=0x1c",
    ]
    assert [row[1] for row in cells] == ["IO_INSTRUCTION", "RDMSR", "EPT_VIOLATION", "HLT"]
    line = "document.querySelector('.line')"
    first.js(
        f"const line = {line}, box = line.getBoundingClientRect();"
        "const at = {clientX: box.left + 2.5 * 18, clientY: box.top + 9};"
        "for (const kind of ['mousemove', 'click']) line.dispatchEvent(new MouseEvent(kind, at))"
    )
    assert first.js("return document.querySelector('tr.chosen').dataset.n") == "2"
    assert first.texts(".timeline .pointed")[0].startswith(
        "exit 2: EPT_VIOLATION, write, EPT allows ---; GPA 0x100000"
    )
    first.js(f"{line}.focus()")
    first.type("\ue014")  # right
    assert first.js(f"return {line}.getAttribute('aria-valuetext')") == "exit 3: HLT, RIP 0x801c"


def test_fields_of_an_exit_unfold(first):
    first.click('tr[data-n="1"] button')
    fields = dict(text.split("\n") for text in first.texts(".fields .field"))
    assert fields["exit reason"] == "0x1f"
    assert (fields["rax"], fields["rcx"], fields["rsp"]) == ("0x1c", "0xc0000080", "0x7ff0")
    assert (
        first.js("return document.querySelector('tr[data-n=\"1\"] button').getAttribute('aria-expanded')")
        == "true"
    )


def pixels(browser: Browser, title: str, number: int, columns: int) -> list[str]:
    """The colours of some bits of a picture, by the names of the style."""
    return browser.js(
        """
        const [title, numbers, columns] = arguments;
        const figure = [...document.querySelectorAll('figure')].find((e) => e.textContent.startsWith(title));
        const canvas = figure.querySelector('canvas'), style = getComputedStyle(canvas);
        const copy = new OffscreenCanvas(canvas.width, canvas.height);
        const pen = copy.getContext('2d', {willReadFrequently: true});
        pen.drawImage(canvas, 0, 0);
        const names = {};
        for (const name of ['--bit-clear', '--bit-set', '--bit-exited', '--bit-passed'])
            names[style.getPropertyValue(name).trim()] = name.slice(6);
        return numbers.map((n) => {
            const x = n % columns * 2 + 4, y = Math.floor(n / columns) * 2 + 4;
            const [red, green, blue] = pen.getImageData(x, y, 1, 1).data;
            return names['#' + [red, green, blue].map((c) => c.toString(16).padStart(2, '0')).join('')];
        })""",
        title,
        number,
        columns,
    )


def test_io_bitmap_is_a_picture_of_what_was_asked_for_and_what_happened(first):
    unfold(first, "I/O bitmaps")
    first.wait("return document.querySelector('.bits').clientWidth")
    first.js("return new Promise(requestAnimationFrame)")
    assert pixels(first, "ports", [0x60, 0x70, 0x500, 0xB000, 0xFFFF], 256) == [
        "exited", "passed", "clear", "set", "clear"]  # fmt: skip
    assert first.texts(".met tbody tr") == ["0x60\t1\t1", "0x70\t0\t0 (passed)"]
    assert "intercepted: 0x60-0x61, 0xb000" in first.texts("#detail")[0]


def test_msr_bitmap_is_four_pictures(first):
    unfold(first, "MSR bitmap")
    assert [text.split("\n")[0] for text in first.texts("figure")] == [
        "RDMSR of 0x0 to 0x1fff",
        "RDMSR of 0xc0000000 to 0xc0001fff",
        "WRMSR of 0x0 to 0x1fff",
        "WRMSR of 0xc0000000 to 0xc0001fff",
    ]
    first.js("return new Promise(requestAnimationFrame)")
    assert pixels(first, "RDMSR of 0xc", [0x80, 0x90], 128) == ["exited", "clear"]
    assert pixels(first, "WRMSR of 0x0", [0x174], 128) == ["passed"]


def test_ept_is_a_tree_with_the_exits_in_it(first):
    unfold(first, "EPT")
    lines = [" ".join(text.split()) for text in first.texts(".entry")]
    assert lines == [
        "PML4E[0] 0x0-0x7fffffffff table rwx",
        "PDPTE[0] 0x0-0x3fffffff table rwx",
        "PDE[0] 0x0-0x1fffff table rwx",
        "PTE[0-31] 0x0-0x1ffff → 0x1200000 rwx WB 4K × 32",
        "PDE[1] 0x200000-0x3fffff → 0x2000000 rw- WB 2M",
        "PDE[2] 0x400000-0x5fffff table rwx",
        "PTE[0] 0x400000-0x400fff → 0x2400000 -wx WB 4K "
        "misconfigured: writes are allowed (bit 1) but reads are not (bit 0)",
    ]
    assert first.texts(".missing") == ["0x100000 is mapped by no entry exit 2"]


def test_rest_of_a_case_is_there(first):
    for title, words in (
        ("What differs", ["RDTSC_EXITING\tset", "TSC_OFFSET\t0x5"]),
        ("Program", ["0x8002\te4 70\tin al, 0x70\t", "0x8014\t"]),
        ("As a test", ["def test_case(vmxlab):", "run = vmxlab.run("]),
        ("Records", ["@case id=0x0 name=first*", "@end "]),
        ("VMX instructions", ["VMXON: VMsucceed"]),
    ):
        unfold(first, title)
        text = first.texts("#detail")[0]
        assert all(word in text for word in words), title


def test_broken_rules_of_a_failed_entry_are_shown(opened):
    browser = opened(view="tests", t="a.py::test_failed_entry[bochs]")
    browser.wait("return document.querySelector('.rules')")
    assert browser.texts(".rules li")[0].startswith("guest-rflags-reserved SDM Vol. 3C, 27.3.1.4")
    assert browser.texts(".failure") == ["E assert"]


def test_nothing_is_shown_where_there_is_nothing(opened):
    browser = opened(view="tests", t="a.py::test_failed_entry[bochs]")
    browser.wait("return document.querySelector('.rules')")
    for title in ("EPT", "Records", "What differs", "I/O bitmaps", "MSR bitmap", "Program", "VMX instr"):
        unfold(browser, title)
    (text,) = browser.texts("#detail")
    assert not [word for word in ("null", "undefined", "NaN", "[object") if word in text]


def test_link_leads_to_one_case_of_many(opened):
    browser = opened(view="tests", t="a.py::test_many_cases[bochs]", c=110)
    browser.wait("return document.querySelector('.case[open] .exits')")
    assert browser.texts(".case[open] > summary b") == ["c110"]
    assert browser.texts(".cases + .more") == []  # 120 cases: both pages are there


def test_cases_that_fit_the_filter_are_shown_first_and_all_can_be(opened):
    browser = opened(view="tests", q="0x77", t="a.py::test_many_cases[bochs]")
    browser.wait("return document.querySelectorAll('.case').length === 1")
    assert "1 of 120 cases fit the filter." in browser.texts("#detail")[0]
    browser.click("#detail .notice button")
    browser.wait("return document.querySelectorAll('.case').length === 100")
    browser.click(".cases + .more")
    browser.wait("return document.querySelectorAll('.case').length === 120")


def test_of_thousands_of_exits_it_says_how_many_are_not_here(opened):
    browser = opened(view="tests", t="b.py::test_long[bochs]")
    browser.wait("return document.querySelector('.exits')")
    assert "The first 1,000 of 1,500 exits; the rest is in the log." in browser.texts("#detail .notice")
    assert len(browser.texts(".exits tbody tr")) == 200
    assert "200 of 1,000: show 200 more" in browser.texts(".more")


# --- what others wrote -------------------------------------------------------------------------------------


def test_what_a_test_or_a_guest_wrote_is_text_wherever_it_stands(opened):
    browser = opened()
    browser.js("location.hash = document.querySelector('.rows a').getAttribute('href')")
    browser.wait("return document.querySelector('#detail .failure')")
    browser.wait("return document.querySelector('.case .exits')")
    for details in range(browser.js("return document.querySelectorAll('#detail details').length")):
        browser.js("document.querySelectorAll('#detail details')[arguments[0]].open = true", details)
    assert browser.js("return document.querySelectorAll('img').length") == 0
    assert browser.js("return window.pwned === undefined")
    told = browser.js("return JSON.stringify(document.querySelector('#detail .failure').textContent)")
    assert json.loads(told) == EVIL
    assert browser.texts(".case > summary b") == ["</script><img/src>"]


# --- everywhere --------------------------------------------------------------------------------------------

VIEWS = ({}, {"view": "tests"}, {"view": "tests", "t": "a.py::test_first[bochs]"}, {"view": "coverage"})

_CONTRASTS = """
    const channel = (value) => (value /= 255) <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    const parts = (color) => color.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
    const behind = (e) => {
        for (; e; e = e.parentElement) {
            const found = parts(getComputedStyle(e).backgroundColor);
            if (found.length === 3 || found[3] > 0) return found;
        }
        return [255, 255, 255];
    };
    const bad = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const e = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !e.checkVisibility()) continue;
        if (/SCRIPT|STYLE|OPTION/.test(e.tagName)) continue;
        const both = [light(parts(getComputedStyle(e).color)), light(behind(e))];
        const [one, other] = both.sort((a, b) => b - a);
        const ratio = (one + 0.05) / (other + 0.05);
        if (ratio < 4.5) bad.push(`${walker.currentNode.data.trim().slice(0, 40)}: ${ratio.toFixed(2)}`);
    }
    return bad"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_has_contrast_enough_to_be_read(opened, dark):
    """WCAG 2.2, 1.4.3: at least 4.5 to 1."""
    for state in VIEWS:
        browser = opened(dark=dark, **state)
        if "t" in state:
            browser.wait("return document.querySelector('.exits')")
        assert browser.js(_CONTRASTS) == []


def test_everything_that_can_be_used_has_a_name(opened):
    roles = {
        "button",
        "link",
        "textbox",
        "searchbox",
        "combobox",
        "checkbox",
        "slider",
        "image",
        "navigation",
    }
    for state in VIEWS:
        browser = opened(**state)
        if "t" in state:
            browser.wait("return document.querySelector('.exits')")
            unfold(browser, "MSR bitmap")
        found = [node for node in browser.accessibility() if node.get("role", {}).get("value") in roles]
        assert len(found) > 5
        assert [node for node in found if not node["name"]["value"].strip()] == []


def test_narrow_window_shows_the_list_or_the_test_and_nothing_sticks_out(opened):
    for state in VIEWS:
        browser = opened(width=400, **state)
        if "t" in state:
            browser.wait("return document.querySelector('.exits')")
            unfold(browser, "MSR bitmap")
            assert browser.texts(".list") == []
            assert browser.texts(".back") == ["← all tests"]
        assert browser.js("return document.documentElement.scrollWidth") <= 400
        assert browser.js("return document.getElementById('detail').scrollWidth") <= 400


def test_it_can_be_printed(opened):
    browser = opened(view="tests", t="a.py::test_first[bochs]")
    browser.wait("return document.querySelector('.exits')")
    assert len(browser.printed()) > 10_000
