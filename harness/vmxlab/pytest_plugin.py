"""The pytest plugin: the fixture `vmxlab`, its options and markers, and what a failed test shows.

    def test_hlt_exits(vmxlab):
        run = vmxlab.run(Case(program="hlt"))
        assert run.reasons == [ExitReason.HLT]

One machine a worker stays up for the whole session; it is started again when a case has killed it. A test
whose case needs what the processor lacks is skipped with the capability bit; the engine, its version and the
processor model stand in every test id.
"""

from __future__ import annotations

import secrets
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from vmxlab.cases.case import Case
    from vmxlab.console.lab import Lab
    from vmxlab.console.run import Run
    from vmxlab.sdm.flags import BitFlags
    from vmxlab.structures import Capabilities

_FIXTURE = "vmxlab"
_RUNS = pytest.StashKey["list[Run]"]()
"""The runs of the test at hand."""
_REFUSED = pytest.StashKey[str]()
"""Why a test can't run."""
_ENTRIES = pytest.StashKey["Counter[str]"]()
"""The VM entries that an engine counted, by its title."""
_WORKER_ENTRIES = "vmx_entries"
_MAX_LOG_LINES = 200
_MAX_SECTIONS = 10
_OPTION = "--vmx-engine"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options."""
    group = parser.getgroup("vmxlab", "vmxlab: VMX exit tests")
    group.addoption(
        _OPTION,
        default=None,
        metavar="NAME[,NAME...]",
        help="engines: auto (default), bochs, kvm, kvm-in-bochs, tcg; several run each test on each",
    )
    group.addoption("--vmx-model", default=None, metavar="MODEL", help="the engine's processor model")
    group.addoption("--vmx-log-dir", default=None, metavar="DIR", help="where the logs go, and stay")
    group.addoption(
        "--vmx-keep",
        action="store_true",
        help="keep the logs of a session in which nothing failed too",
    )


def pytest_configure(config: pytest.Config) -> None:
    """The markers, and this session's log folder (made when the first log is)."""
    for marker in (
        "vmx_needs(*controls): skip where the processor lacks one of these controls",
        "vmx_also_on(*engines): run on these engines as well; skipped where one can't run",
        "vmx_known_difference(key): fails on an engine that differs from the SDM (strict)",
    ):
        config.addinivalue_line("markers", marker)
    config.stash[_RUNS] = []
    counted: Counter[str] = Counter()
    config.stash[_ENTRIES] = counted
    if config.option.vmx_engine is not None:
        _described(config)  # an engine that was named and can't run ends the session before it starts
    workerinput = getattr(config, "workerinput", None)
    if workerinput is not None:  # a worker of pytest-xdist: its reports are shown where it was started
        config.option.vmx_log_dir = workerinput["vmx_log_dir"]
        return
    temporary = None
    if config.option.vmx_log_dir is None:
        temporary = Path(tempfile.gettempdir()) / f"vmxlab-logs-{secrets.token_hex(6)}"
        config.option.vmx_log_dir = str(temporary)
    else:  # where it is now: a test may go elsewhere
        config.option.vmx_log_dir = str(Path(config.option.vmx_log_dir).absolute())
    config.pluginmanager.register(_Summary(config, temporary), "vmxlab-summary")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Every worker of pytest-xdist puts its logs where this process says."""
    node.workerinput["vmx_log_dir"] = node.config.option.vmx_log_dir


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What a worker of pytest-xdist leaves behind."""
    counted: Counter[str] = node.config.stash[_ENTRIES]
    counted.update(getattr(node, "workeroutput", {}).get(_WORKER_ENTRIES, {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands over what it counted."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        counted: Counter[str] = session.config.stash[_ENTRIES]
        output[_WORKER_ENTRIES] = dict(counted)


# --- which engine ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Described:
    """An engine that tests run on, as far as can be told without booting it."""

    name: str
    version: str
    model: str
    why: str
    problem: str | None = None
    """Why it can't run here; only for one that a marker names."""

    @property
    def test_id(self) -> str:
        """What stands in the test's id."""
        return f"{self.name}-{self.version}-{self.model}"


def _engine_names(config: pytest.Config) -> list[str | None]:
    names = [name.strip() for name in (config.option.vmx_engine or "").split(",")]
    return [name for name in names if name] or [None]


def _describe(name: str | None, model: str | None, named_by: str) -> _Described:
    from vmxlab.engines.choose import choose

    engine, why = choose(name, model, named_by=named_by)
    engine.prepare(lambda what: print(f"vmxlab: {what}", file=sys.stderr, flush=True))
    version = engine.availability().version or "unknown"
    return _Described(engine.name, version, model or engine.default_model, why)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test that uses the fixture on each engine, and say in its id which."""
    if _FIXTURE not in metafunc.fixturenames:
        return
    try:
        described = _described(metafunc.config)
    except pytest.UsageError as error:  # "auto" found none
        raise pytest.Collector.CollectError(str(error)) from None
    more = [
        _described_by_marker(metafunc.config, name)
        for mark in metafunc.definition.iter_markers("vmx_also_on")
        for name in mark.args
        if name not in {about.name for about in described}
    ]
    metafunc.parametrize(
        _FIXTURE,
        [about.name for about in described] + [_marked(about) for about in more],
        ids=[about.test_id for about in (*described, *more)],
        indirect=True,
        scope="session",
    )


def _marked(about: _Described) -> Any:
    """The parameter for an engine that a marker names."""
    marks = [] if about.problem is None else [pytest.mark.skip(reason=about.problem)]
    return pytest.param(about.name, marks=marks)


_DESCRIBED = pytest.StashKey[list[_Described]]()
_BY_MARKER = pytest.StashKey[dict[str, _Described]]()


def _described(config: pytest.Config) -> list[_Described]:
    """The engines of this session."""
    from vmxlab.errors import EngineUnavailable

    if _DESCRIBED not in config.stash:
        model = config.option.vmx_model
        try:
            described = [_describe(name, model, _OPTION) for name in _engine_names(config)]
        except EngineUnavailable as error:
            raise pytest.UsageError(str(error)) from None
        # "auto" may be one that is named as well.
        config.stash[_DESCRIBED] = list({about.name: about for about in described}.values())
    return config.stash[_DESCRIBED]


def _described_by_marker(config: pytest.Config, name: str) -> _Described:
    """An engine that a test names, with its default model; where it can't run, that is a skip."""
    from vmxlab.errors import EngineUnavailable

    found = config.stash.setdefault(_BY_MARKER, {})
    if name not in found:
        try:
            found[name] = _describe(name, None, "the marker vmx_also_on")
        except EngineUnavailable as error:
            found[name] = _Described(name, "unavailable", "none", "", problem=str(error))
    return found[name]


def _about(config: pytest.Config, name: str) -> _Described:
    """The description of an engine that some test runs on."""
    session = {about.name: about for about in _described(config)}
    return session[name] if name in session else _described_by_marker(config, name)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Engine, version, processor model, and why."""
    try:
        described = _described(config)
    except pytest.UsageError as error:
        return [f"vmxlab: {line}" for line in str(error).splitlines()]
    return [f"vmxlab: {a.name} {a.version} ({a.model}); {a.why}" for a in described]


# --- the fixture -------------------------------------------------------------------------------------------


class VmxlabFixture:
    """What a test gets: cases in, runs out, on one engine.

    `lab` is the Lab behind it: it raises MissingCapability where this skips the test.
    """

    def __init__(self, lab: Lab, runs: list[Run]) -> None:
        self.lab = lab
        self._runs = runs

    @property
    def engine(self) -> str:
        """The engine's name."""
        return self.lab.engine.name

    @property
    def capabilities(self) -> Capabilities:
        """The capability MSRs of the processor; skips the test where it has no VMX."""
        with _skipping():
            return self.lab.capabilities

    def run(self, case: Case) -> Run:
        """Run a case. Skips the test where the processor lacks what it needs.

        Raises CaseError for a case that can't be, MachineError if the machine died or hung.
        """
        from vmxlab.errors import MachineError

        try:
            with _skipping():
                run = self.lab.run(case)
        except MachineError as error:
            if error.run is not None:
                self._runs.append(error.run)
            raise
        self._runs.append(run)
        return run

    def run_all(self, cases: Sequence[Case]) -> list[Run]:
        """Run cases one after the other; each has its own verdict, and none raises."""
        runs = self.lab.run_all(cases)
        self._runs += runs
        return runs

    def run_image(self, cases: Sequence[Case]) -> list[Run]:
        """Run cases out of one image, booted afresh."""
        with _skipping():
            runs = self.lab.run_image(cases)
        self._runs += runs
        return runs

    @property
    def physical_address_width(self) -> int:
        """MAXPHYADDR of the processor, in bits."""
        with _skipping():
            return self.lab.target.physical_address_width

    def require_ept(self, *features: str) -> None:
        """Skip the test where the processor lacks one of these fields of IA32_VMX_EPT_VPID_CAP."""
        with _skipping():
            for feature in features:
                self.lab.capabilities.ept_vpid.require(feature)

    def require(self, *controls: BitFlags) -> None:
        """Skip the test where the processor lacks one of these controls."""
        with _skipping():
            for control in controls:
                self.lab.capabilities.require(control)


class _skipping:  # noqa: N801  (used like a function)
    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        from vmxlab.errors import MissingCapability

        if isinstance(error, MissingCapability):
            pytest.skip(error.message)


@pytest.fixture(scope="session", name=_FIXTURE)
def vmxlab_fixture(request: pytest.FixtureRequest) -> Iterator[VmxlabFixture]:
    """A processor with VMX: `vmxlab.run(Case(...))` gives a Run."""
    from vmxlab.console.lab import Lab

    config = request.config
    about = _about(config, getattr(request, "param", _described(config)[0].name))
    with Lab(about.name, model=about.model, log_dir=Path(config.option.vmx_log_dir), why=about.why) as lab:
        yield VmxlabFixture(lab, request.config.stash[_RUNS])
        entries = lab.nested_entries()
        if entries:
            config.stash[_ENTRIES][lab.info.title()] += entries


# --- markers -----------------------------------------------------------------------------------------------


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Turn known differences of the engine at hand into strict expected failures."""
    from vmxlab.engines.differences import KNOWN_DIFFERENCES

    for item in items:
        for mark in item.iter_markers("vmx_known_difference"):
            if len(mark.args) != 1 or mark.args[0] not in KNOWN_DIFFERENCES:
                keys = ", ".join(map(repr, mark.args)) or "without a key"
                _refuse(item, f"there is no known difference {keys} in vmxlab.engines.differences")
                continue
            known = KNOWN_DIFFERENCES[mark.args[0]]
            engine = _engine_of(item)
            if engine is not None and known.applies(engine, _about(config, engine).version):
                item.add_marker(pytest.mark.xfail(reason=f"known difference: {known}", strict=True))


def _refuse(item: pytest.Item, problem: str) -> None:
    """End the session; where that is not possible, in a worker of pytest-xdist, fail the test."""
    if not hasattr(item.config, "workerinput"):
        raise pytest.UsageError(f"{item.nodeid}: {problem}")
    item.stash[_REFUSED] = problem


def _engine_of(item: pytest.Item) -> str | None:
    callspec = getattr(item, "callspec", None)
    return None if callspec is None else callspec.params.get(_FIXTURE)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Nothing of the test before shows in this one's report."""
    item.config.stash[_RUNS].clear()
    if _REFUSED in item.stash:
        pytest.fail(item.stash[_REFUSED], pytrace=False)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Skip where the processor lacks a control that a marker names."""
    marks = list(item.iter_markers("vmx_needs"))
    fixture = getattr(item, "funcargs", {}).get(_FIXTURE)
    if fixture is not None:
        for mark in marks:
            fixture.require(*mark.args)


# --- reports -----------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows the decoded log of its cases; every test says in JUnit what it ran on."""
    if call.when == "call" and _engine_of(item) is not None:
        _add_properties(item)
    report = yield
    if call.when != "teardown" and report.failed:
        runs = item.config.stash[_RUNS]
        report.sections += [_log_section(run) for run in _worth_showing(runs)]
        if len(runs) > _MAX_SECTIONS:
            more = f"{len(runs) - _MAX_SECTIONS} more cases of this test in {runs[-1].log_path}"
            report.sections.append(("vmxlab", more))
    return report


def _worth_showing(runs: Sequence[Run]) -> Sequence[Run]:
    """All, or where there are many those without PASS and the last ones; in their order."""
    from vmxlab.console.run import Verdict

    # Sorting keeps the order of equals: what is not PASS comes first, then the latest.
    latest_first = list(runs)[::-1]
    ranked = sorted(latest_first, key=lambda run: run.verdict is Verdict.PASS)[:_MAX_SECTIONS]
    return [run for run in runs if any(run is kept for kept in ranked)]


def _add_properties(item: pytest.Item) -> None:
    runs = item.config.stash[_RUNS]
    fixture = getattr(item, "funcargs", {}).get(_FIXTURE)
    if fixture is None or not runs:
        return
    info = fixture.lab.info
    item.user_properties += [
        ("vmx_engine", f"{info.name} {info.version}"),
        ("vmx_model", info.model),
        ("vmx_cases", len(runs)),
        ("vmx_exits", sum(len(run.exits) for run in runs)),
        ("vmx_log", str(runs[-1].log_path)),
    ]


def _log_section(run: Run) -> tuple[str, str]:
    """The decoded serial log of one case."""
    lines = [str(outcome) for outcome in run.outcomes]
    lines += [str(exit_) for exit_ in run.exits]
    lines += [str(fault) for fault in run.faults]
    lines.append(f"end: {run.end.value if run.end else 'none'}; verdict {run.verdict.value}")
    if run.error is not None:
        lines.append(str(run.error))
    lines += ["", "records:", *(record.line for record in run.records)]
    if len(lines) > _MAX_LOG_LINES:
        lines[_MAX_LOG_LINES:] = [f"... {len(lines) - _MAX_LOG_LINES} more lines in the log"]
    lines.append(f"log: {run.log_path}")
    title = f"vmxlab case {run.number}{f' ({run.name})' if run.name else ''} on {run.engine}"
    return title, "\n".join(lines)


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    """Exits are compared field by field."""
    from vmxlab.console.run import Exit

    if op != "==" or not isinstance(left, Exit) or not isinstance(right, Exit):
        return None
    lines = ["two exits differ"]
    for name in left.__dataclass_fields__:
        a, b = getattr(left, name), getattr(right, name)
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
            lines += [f"  {name}[{key}]: {_number(a.get(key))} != {_number(b.get(key))}" for key in keys]
        else:
            lines.append(f"  {name}: {_number(a)} != {_number(b)}")
    return lines


def _number(value: object) -> str:
    return f"{value:#x}" if isinstance(value, int) else repr(value)


class _Summary:
    """Counts what ran on which engine, says so at the end, and clears away logs that explain no failure."""

    def __init__(self, config: pytest.Config, temporary: Path | None) -> None:
        self._config = config
        self._folder: str = config.option.vmx_log_dir
        self._temporary = temporary
        self._tests: Counter[str] = Counter()
        self._cases: Counter[str] = Counter()
        self._exits: Counter[str] = Counter()
        self._failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._failed = self._failed or report.failed
        properties = {name: str(value) for name, value in report.user_properties}
        if report.when == "call" and "vmx_engine" in properties:
            title = f"{properties['vmx_engine']} ({properties['vmx_model']})"
            self._tests[title] += 1
            self._cases[title] += int(properties["vmx_cases"])
            self._exits[title] += int(properties["vmx_exits"])

    def pytest_keyboard_interrupt(self) -> None:
        self._failed = True

    def pytest_internalerror(self) -> None:
        self._failed = True

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for title, tests in self._tests.items():
            cases, exits = self._cases[title], self._exits[title]
            line = f"vmxlab: {title} ran {cases} cases with {exits} exits in {tests} tests"
            entries = self._config.stash[_ENTRIES][title]
            line += f"; KVM counted {entries} VM entries" if entries else ""
            terminalreporter.write_line(line)
        if self._keeps() and (self._tests or self._temporary) and Path(self._folder).is_dir():
            terminalreporter.write_line(f"vmxlab: logs are in {self._folder}")

    def pytest_unconfigure(self) -> None:
        if self._temporary is not None and not self._keeps():
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _keeps(self) -> bool:
        return self._temporary is None or self._failed or bool(self._config.option.vmx_keep)
