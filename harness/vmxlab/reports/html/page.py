"""The whole page: what Python writes into it, and what stands packed in it."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

from vmxlab import __version__
from vmxlab.engines.differences import KNOWN_DIFFERENCES
from vmxlab.errors import CoverageError
from vmxlab.reports.coverage import Coverage, Status
from vmxlab.reports.coverage_file import CoverageFile
from vmxlab.reports.html.cases import case_item
from vmxlab.reports.html.index import Index
from vmxlab.reports.html.overview import MAX_LISTED, NO_ENGINE, Overview, link
from vmxlab.reports.html.parts import Parts, Place, packed
from vmxlab.reports.html.pictures import structure_item
from vmxlab.reports.html.text import printable
from vmxlab.reports.results.file import Results, is_results_file, read_results
from vmxlab.reports.results.logs import read_log
from vmxlab.reports.results.model import RecordedTest, TestVerdict

_ASSETS = files("vmxlab.reports.html") / "assets"
_SCRIPTS = ("base", "state", "search", "list", "timeline", "bitmaps", "ept", "case", "test", "main")
"""The script's files, in the order in which they are put together."""


@dataclass(slots=True)
class Page:
    """A page as it grows: files are added, then it is rendered."""

    overview: Overview = field(default_factory=Overview)
    _index: Index = field(default_factory=Index)
    _parts: Parts = field(default_factory=Parts)
    _structures: dict[str, Place] = field(default_factory=dict)
    _coverage: list[CoverageFile] = field(default_factory=list)
    _sources: list[Mapping[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    # --- what it is made of ------------------------------------------------------------------------------

    def add(self, path: Path) -> None:
        """Add a file of results, or a serial log. Raises CoverageError for one that is neither."""
        if is_results_file(path):
            self._add_results(read_results(path, self.add_test))
        else:
            self.add_test(read_log(path))
            self._sources.append({"path": str(path), "what": "a serial log"})

    def _add_results(self, results: Results) -> None:
        self._coverage.append(results.coverage)
        self._sources.append({"path": str(results.path), "what": "a session of pytest", **results.head})
        if not results.is_whole:
            self.warnings.append(
                f"{results.path} has no end: the session was cut short, and tests may be missing here."
            )

    def add_test(self, test: RecordedTest) -> None:
        """Add a test."""
        for digest, told in test.new_structures.items():
            if digest not in self._structures:
                self._structures[digest] = self._parts.add(structure_item(told))
        known = str(KNOWN_DIFFERENCES.get(test.why, "")) if test.verdict is TestVerdict.KNOWN else ""
        place = self._parts.add({"text": test.text, "sections": test.sections, "known": known})
        case_places = [self._parts.add(case_item(case, self._structures.get)) for case in test.cases]
        self._index.add(test, place, case_places)
        self.overview.add(test)

    # --- what comes of it --------------------------------------------------------------------------------

    def render(self) -> bytes:
        """The page."""
        from jinja2 import Environment

        # Autoescaping is for what guests and tests wrote; style and script are our own.
        environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_shown)
        environment.filters["count"] = lambda number: f"{number:,}"
        style, script = _read("report.css"), "".join(_read(f"{name}.js") for name in _SCRIPTS)
        script = f'"use strict";\n{{\n{script}}}\n'
        text = environment.from_string(_read("report.html.j2")).render(
            version=__version__,
            style=style,
            script=script,
            style_hash=_hash(style),
            script_hash=_hash(script),
            overview=self.overview,
            coverage=self._coverage_table(),
            sources=self._sources,
            warnings=self.warnings,
            index=packed(json.dumps(self._index.item(), separators=(",", ":"))),
            parts=self._parts.packed(),
            link=link,
            NO_ENGINE=NO_ENGINE,
            MAX_LISTED=MAX_LISTED,
            Status=Status,
        )
        return text.encode("utf-8")

    def _coverage_table(self) -> Coverage | None:
        try:
            return Coverage(self._coverage)
        except CoverageError:  # no test ran on an engine
            return None


def render(paths: Sequence[Path]) -> tuple[bytes, Page]:
    """The page of these files, and what was counted. Raises CoverageError."""
    page = Page()
    for path in paths:
        page.add(path)
    return page.render(), page


def _read(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """What the page's policy allows: this very text, and no other."""
    return f"sha256-{b64encode(sha256(text.encode('utf-8')).digest()).decode('ascii')}"


def _shown(value: object) -> object:
    """What the template writes; of our own style and script, as it is."""
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value
