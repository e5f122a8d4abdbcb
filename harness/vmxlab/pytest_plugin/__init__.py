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
import tempfile
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vmxlab.pytest_plugin.coverage import Recorder, coverage_line, without_engine
from vmxlab.pytest_plugin.engines import (
    OPTION,
    as_parameter,
    engine_named,
    engine_of_marker,
    engines_of_session,
)
from vmxlab.pytest_plugin.fixture import TestAtHand, VmxlabFixture
from vmxlab.pytest_plugin.github import Annotations, in_github_actions
from vmxlab.pytest_plugin.oracle import OracleCheck
from vmxlab.pytest_plugin.reports import (
    by_need_section,
    exits_differ,
    failure_lines,
    failure_sections,
    run_properties,
)
from vmxlab.pytest_plugin.reproducer import REPRODUCER_PROPERTY, FailedTest
from vmxlab.pytest_plugin.results import Facts, ResultsRecorder
from vmxlab.reports.coverage_file import processor_line

if TYPE_CHECKING:
    from vmxlab.console.run import Run
    from vmxlab.engines.base import EngineInfo

_FIXTURE = "vmxlab"
_TEST = pytest.StashKey[TestAtHand]()
_REFUSED = pytest.StashKey[str]()
"""Why a test can't run."""
_ENTRIES = pytest.StashKey["Counter[str]"]()
"""The VM entries that an engine counted, by its title."""
_PROCESSORS = pytest.StashKey[list[Mapping[str, object]]]()
"""What the processors can do that tests ran on, as lines of the coverage file."""
_RESULTS = pytest.StashKey[Facts]()
"""What makes the facts of each test for --vmx-results."""
_KNOWN = pytest.StashKey[str]()
"""The key of the known difference for which a test is expected to fail."""
_WORKER_ENTRIES = "vmx_entries"
_WORKER_PROCESSORS = "vmx_processors"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options."""
    group = parser.getgroup("vmxlab", "vmxlab: VMX exit tests")
    group.addoption(
        OPTION,
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
    group.addoption(
        "--vmx-coverage",
        default=None,
        metavar="FILE",
        help="write which exit reasons the tests have seen, for `vmxlab coverage FILE`",
    )
    group.addoption(
        "--vmx-results",
        default=None,
        metavar="FILE",
        help="write what every test did, case by case, for `vmxlab report FILE`",
    )
    group.addoption(
        "--vmx-oracle", action="store_true", help="check every run by the oracle as well (Run.check())"
    )


def pytest_configure(config: pytest.Config) -> None:
    """The markers, and this session's log folder (made when the first log is)."""
    for marker in (
        "vmx_needs(*needs): run where the processor has all of these controls or features, else skip",
        "vmx_also_on(*engines): run on these engines as well; skipped where one can't run",
        "vmx_known_difference(key): fails on an engine that differs from the SDM (strict)",
    ):
        config.addinivalue_line("markers", marker)
    config.stash[_TEST] = TestAtHand()
    config.stash[_RESULTS] = Facts()
    processors: list[Mapping[str, object]] = []
    config.stash[_PROCESSORS] = processors
    counted: Counter[str] = Counter()
    config.stash[_ENTRIES] = counted
    if config.option.vmx_engine is not None:
        engines_of_session(config)  # an engine that was named and can't run ends the session before it starts
    if config.option.vmx_oracle:
        config.pluginmanager.register(_oracle_check(config), "vmxlab-oracle")
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
    if in_github_actions():
        config.pluginmanager.register(Annotations(config), "vmxlab-annotations")
    if config.option.vmx_coverage is not None:
        recorder = Recorder(Path(config.option.vmx_coverage), processors)
        config.pluginmanager.register(recorder, "vmxlab-coverage")
    if config.option.vmx_results is not None:
        arguments = [str(argument) for argument in config.invocation_params.args]
        results = ResultsRecorder(Path(config.option.vmx_results), processors, arguments)
        config.pluginmanager.register(results, "vmxlab-results")


def _oracle_check(config: pytest.Config) -> OracleCheck:
    """The check of every run by the oracle."""

    def about(item: pytest.Item) -> tuple[str, str] | None:
        name = _engine_of(item)
        return None if name is None else (name, engine_named(config, name).version)

    return OracleCheck(lambda: config.stash[_TEST], about)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Every worker of pytest-xdist puts its logs where this process says."""
    node.workerinput["vmx_log_dir"] = node.config.option.vmx_log_dir


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What a worker of pytest-xdist leaves behind."""
    output = getattr(node, "workeroutput", {})
    counted: Counter[str] = node.config.stash[_ENTRIES]
    counted.update(output.get(_WORKER_ENTRIES, {}))
    node.config.stash[_PROCESSORS] += output.get(_WORKER_PROCESSORS, [])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands over what it counted."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        counted: Counter[str] = session.config.stash[_ENTRIES]
        output[_WORKER_ENTRIES] = dict(counted)
        output[_WORKER_PROCESSORS] = session.config.stash[_PROCESSORS]


# --- which engine ------------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test that uses the fixture on each engine, and say in its id which."""
    if _FIXTURE not in metafunc.fixturenames:
        return
    try:
        described = engines_of_session(metafunc.config)
    except pytest.UsageError as error:  # "auto" found none
        raise pytest.Collector.CollectError(str(error)) from None
    more = [
        engine_of_marker(metafunc.config, name)
        for mark in metafunc.definition.iter_markers("vmx_also_on")
        for name in mark.args
        if name not in {about.name for about in described}
    ]
    metafunc.parametrize(
        _FIXTURE,
        [about.name for about in described] + [as_parameter(about) for about in more],
        ids=[about.test_id for about in (*described, *more)],
        indirect=True,
        scope="session",
    )


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Engine, version, processor model, and why."""
    try:
        described = engines_of_session(config)
    except pytest.UsageError as error:
        return [f"vmxlab: {line}" for line in str(error).splitlines()]
    return [f"vmxlab: {a.name} {a.version} ({a.model}); {a.why}" for a in described]


# --- the fixture -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session", name=_FIXTURE)
def vmxlab_fixture(request: pytest.FixtureRequest) -> Iterator[VmxlabFixture]:
    """A processor with VMX: `vmxlab.run(Case(...))` gives a Run."""
    from vmxlab.console.lab_by_need import LabByNeed

    config = request.config
    about = engine_named(config, getattr(request, "param", engines_of_session(config)[0].name))
    log_dir = Path(config.option.vmx_log_dir)
    with LabByNeed(about.name, model=about.named_model, log_dir=log_dir, why=about.why) as lab:
        yield VmxlabFixture(lab, config.stash[_TEST])
        entries = lab.nested_entries()
        if entries:
            config.stash[_ENTRIES][lab.info.title()] += entries
        if _tells_coverage(config):
            config.stash[_PROCESSORS] += [
                processor_line(info, capabilities, is_default=info.model == about.model)
                for info, capabilities in lab.processors()
            ]


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
            if engine is not None and known.applies(engine, engine_named(config, engine).version):
                item.add_marker(pytest.mark.xfail(reason=f"known difference: {known}", strict=True))
                item.stash[_KNOWN] = mark.args[0]


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
    item.config.stash[_TEST].forget()
    if _REFUSED in item.stash:
        pytest.fail(item.stash[_REFUSED], pytrace=False)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Have the test run on a processor with what a marker names, or skip it."""
    marks = list(item.iter_markers("vmx_needs"))
    fixture = getattr(item, "funcargs", {}).get(_FIXTURE)
    if fixture is not None:
        for mark in marks:
            fixture.require(*mark.args)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """A live machine does not outlive its test."""
    item.config.stash[_TEST].close_live()


# --- reports -----------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows the decoded log of its cases; every test says in JUnit what it ran on."""
    uses_it = _engine_of(item) is not None
    if call.when == "call" and uses_it:
        _add_properties(item)
    report = yield
    if call.when == "teardown":
        return report
    if call.when == "setup" and uses_it and not report.passed:
        _add_properties(item)
    runs = item.config.stash[_TEST].runs
    facts = _facts(item, call, report) if uses_it else {}
    report.sections += by_need_section(runs)
    if report.failed:
        report.sections += failure_sections(runs)
        report.sections += item.config.stash[_TEST].live_sections()
        facts["failed"] = failure_lines(runs) + _keep_reproducers(item, call, report)
    report.vmxlab = facts  # type: ignore[attr-defined]
    return report


def _keep_reproducers(item: pytest.Item, call: pytest.CallInfo[Any], report: pytest.TestReport) -> list[str]:
    """Keep what it takes to ask the failed cases again; where that is, in a line."""
    test = item.config.stash[_TEST]
    failed = FailedTest(item.nodeid, report.longreprtext, test, call.excinfo, partial(_info_of, item))
    sections, folder = failed.keep(Path(item.config.option.vmx_log_dir))
    report.sections += sections
    if folder is None:
        return []
    item.user_properties.append((REPRODUCER_PROPERTY, str(folder)))
    return [f"reproducer: {folder}"]


def _info_of(item: pytest.Item, run: Run) -> EngineInfo | None:
    """What a run ran on. No machine is booted to know it."""
    fixture: VmxlabFixture | None = getattr(item, "funcargs", {}).get(_FIXTURE)
    return None if fixture is None else fixture.lab.known_info_of(run)


def _add_properties(item: pytest.Item) -> None:
    engine = _engine_of(item)
    assert engine is not None
    about, test = engine_named(item.config, engine), item.config.stash[_TEST]
    infos = [info for run in test.runs if (info := _info_of(item, run)) is not None]
    infos += [vm.info for vm in test.live]
    if not infos:
        from vmxlab.engines.base import EngineInfo

        infos = [EngineInfo(about.name, about.version, about.model, about.why)]
    item.user_properties += run_properties(test.runs, test.live, infos)


def _tells_coverage(config: pytest.Config) -> bool:
    """Whether a file is written that says what the tests have seen."""
    return config.option.vmx_coverage is not None or config.option.vmx_results is not None


def _facts(item: pytest.Item, call: pytest.CallInfo[Any], report: pytest.TestReport) -> dict[str, object]:
    """What the process that was started needs to know of a test, in words that JSON knows.

    `ran`: cases and exits by the engine's title. `coverage`: the test's line in the coverage file. `results`:
    what stands of it in the file of results. `failed`: of a test that failed, what is to be said of it in few
    lines.
    """
    facts: dict[str, object] = {}
    test = item.config.stash[_TEST]
    fixture = getattr(item, "funcargs", {}).get(_FIXTURE)
    if report.when == "call" and fixture is not None:
        ran: dict[str, list[int]] = {}
        for run in test.runs:
            counts = ran.setdefault(fixture.lab.info_of(run).title(), [0, 0])
            counts[0] += 1
            counts[1] += len(run.exits)
        for vm in test.live:
            ran.setdefault(vm.info.title(), [0, 0])[1] += vm.entries
        facts["ran"] = ran
    if _tells_coverage(item.config):
        engine = _engine_of(item)
        assert engine is not None
        about, key = engine_named(item.config, engine), item.stash.get(_KNOWN, None)
        where = {"engine": engine, "version": about.version}
        where["test"] = without_engine(item.nodeid, about.test_id)
        facts["coverage"] = coverage_line(report, test, key, where)
        if item.config.option.vmx_results is not None:
            error = None if call.excinfo is None else call.excinfo.value
            facts["results"] = item.config.stash[_RESULTS].of(report, error, test, key, where)
    return facts


def pytest_assertrepr_compare(
    config: pytest.Config, op: str, left: object, right: object
) -> list[str] | None:
    """Exits are compared field by field; and where a VM entry failed, its broken rules are named."""
    from vmxlab.console.run import Exit

    lines = None
    if op == "==" and isinstance(left, Exit) and isinstance(right, Exit):
        lines = exits_differ(left, right)
    runs = config.stash[_TEST].runs
    broken = [f"broken rule {rule}" for rule in runs[-1].broken_rules()] if runs else []
    if not broken:
        return lines
    return [*(lines or [f"{left!r} {op} {right!r}"]), "the VM entry failed:", *broken]


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
        for title, (cases, exits) in getattr(report, "vmxlab", {}).get("ran", {}).items():
            self._tests[title] += 1
            self._cases[title] += cases
            self._exits[title] += exits

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
