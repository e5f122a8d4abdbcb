"""The lab above an engine on paper: a thread plays the monitor, and does what a case's name asks for.

What real machines do when they die or hang stands in tests/faults.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import pytest

from vmxlab import Capabilities, Case, End, ExitReason, Lab, Limits, Mode, PrimaryControls, Verdict
from vmxlab.console.records import encode_record
from vmxlab.engines.base import MachineEnd
from vmxlab.errors import (
    MachineDied,
    MachineError,
    MachineHung,
    MissingCapability,
    OverlappingPages,
    ProtocolError,
)
from vmxlab.image.frames import FRAME_HEADER, PAYLOAD_HEADER, decode_frame
from vmxlab.image.protocol import PROTOCOL_VERSION

HLT = b"\xf4"


@dataclass
class PaperMonitor:
    """Boots, runs the cases of its image, and then those that are sent. `texts` makes a case's records."""

    line: socket.socket
    machine: object
    boot: bytes
    case_text: Callable[..., bytes]
    bases: list[int] = field(default_factory=list)
    _previous: bytes = b""

    def run(self, payload: bytes) -> None:
        try:
            self._run(payload)
        except OSError:  # the machine was stopped
            self.line.close()

    def _run(self, payload: bytes) -> None:
        self.line.sendall(self.boot)
        size = PAYLOAD_HEADER.unpack_from(payload)[3] if payload else 0
        body = payload[PAYLOAD_HEADER.size :][:size]
        while body:
            size = FRAME_HEADER.size + FRAME_HEADER.unpack_from(body)[0]
            if not self._case(body[:size]):
                return
            body = body[size:]
        if payload:
            self.line.sendall(encode_record("done", {}).encode() + b"\r\n")
        while True:
            self.line.sendall(b"\r\nvmx> ")
            if self._receive(1) != b"\x01":
                return
            self.line.sendall(b"\r\n")
            header = self._receive(FRAME_HEADER.size)
            if not self._case(header + self._receive(FRAME_HEADER.unpack(header)[0])):
                return

    def _case(self, frame: bytes) -> bool:
        self.bases.append(FRAME_HEADER.unpack_from(frame)[3])
        self._previous = decode_frame(frame, self._previous)
        code, number, length = struct.unpack_from("<BIB", self._previous)
        assert code == 1
        name = self._previous[6 : 6 + length].decode()
        text = self.case_text(number, (10, 12), name=name)
        act = name.partition("-")[0]
        if act == "dies":
            self.line.sendall(text[: text.index(b"@exit n=0x1")] + b"@exi")
            self.machine.ending = MachineEnd.TRIPLE_FAULT
            self.line.close()
            return False
        if act == "hangs":
            self.line.sendall(text[: text.index(b"@end")])
            self._receive(1)
            return False
        if act == "damaged":
            text = text.replace(b"reason=0xa", b"reason=0xb")
        if act == "startless":
            text = text.replace(b"@case", b"@cas")
        if act == "endless":
            text = text.replace(b"@end", b"@enf")
        if act == "stranger":
            text = self.case_text(number + 1000, (10, 12))
        self.line.sendall(text)
        return True

    def _receive(self, count: int) -> bytes:
        got = b""
        while len(got) < count:
            news = self.line.recv(count - len(got))
            if not news:
                raise ConnectionError
            got += news
        return got


class PaperEngine:
    """Opens machines that are threads. `monitors` and `machines` are all that were made."""

    name = "paper"
    default_model = "model-x"
    l2_budget_tsc = 1_000_000
    patience = 1

    def __init__(
        self, make_machine: Callable[..., object], make_monitor: Callable[..., PaperMonitor]
    ) -> None:
        self._make_machine, self._make_monitor = make_machine, make_monitor
        self.machines: list = []
        self.monitors: list[PaperMonitor] = []
        self.threads: list[threading.Thread] = []
        self.processors: list[int] = []

    def close(self) -> None:
        pass

    def open(
        self, rom: Path, *, log_dir: Path, model: str | None = None, why: str = "", processors: int = 1
    ) -> object:
        self.processors.append(processors)
        image = rom.read_bytes()
        table = struct.unpack_from("<8s8I", image, len(image) - 1024)
        at = table[5] - ((1 << 32) - len(image))
        mine, theirs = socket.socketpair()
        machine = self._make_machine(theirs)
        monitor = self._make_monitor(mine, machine)
        thread = threading.Thread(target=monitor.run, args=(image[at : at + table[6]],), daemon=True)
        self.machines.append(machine)
        self.monitors.append(monitor)
        self.threads.append(thread)
        thread.start()
        return machine


@pytest.fixture
def boot(record, processors: Mapping[str, Capabilities]) -> dict[str, bytes]:
    """What a monitor says first, by kind of machine."""
    msrs = {f"m{msr:03x}": value for msr, value in processors["skylake"].raw.items()}
    good = record("boot", protocol=PROTOCOL_VERSION, maxphyaddr=40, vmx=1) + record("caps", **msrs)
    return {
        "good": good,
        "no vmx": record("boot", protocol=PROTOCOL_VERSION, maxphyaddr=40, vmx=0),
        "old": record("boot", protocol=PROTOCOL_VERSION - 1, maxphyaddr=40, vmx=1),
        "damaged": good.replace(b"protocol", b"pr0tocol"),
    }


@pytest.fixture
def engine_with(paper, case_text, boot, monkeypatch) -> Iterator[Callable[[str], PaperEngine]]:
    """engine_with(boot) -> the engine that every lab gets from now on."""
    made: list[PaperEngine] = []

    def make(kind: str = "good") -> PaperEngine:
        _, make_machine = paper
        engine = PaperEngine(
            make_machine, lambda line, machine: PaperMonitor(line, machine, boot[kind], case_text)
        )
        # The package has a function of that name, which hides the module.
        module = import_module("vmxlab.engines.choose")
        monkeypatch.setattr(module, "choose", lambda name, model: (engine, "the test says so"))
        made.append(engine)
        return engine

    yield make
    for engine in made:
        for thread in engine.threads:
            thread.join(timeout=10)
            assert not thread.is_alive(), "a machine was not stopped"


@pytest.fixture
def engine(engine_with) -> PaperEngine:
    return engine_with()


@pytest.fixture
def lab(engine, tmp_path) -> Iterator[Lab]:
    with Lab(log_dir=tmp_path / "logs", case_deadline_s=1.5) as made:
        yield made


def case(name: str = "good", **more: object) -> Case:
    return Case(program=HLT, name=name, **more)


SHORT = Limits(seconds=0.05)


# --- one machine for many cases -----------------------------------------------------------------------------


def test_a_case_is_sent_run_and_read_back(lab):
    run = lab.run(case(expect=[ExitReason.CPUID, ExitReason.HLT]))
    assert run.verdict is Verdict.PASS
    assert run.reasons == [ExitReason.CPUID, ExitReason.HLT]
    assert run.engine == "paper 1.0 (model-x)"
    assert run.case.name == run.name == "good"


def test_one_machine_serves_many_cases_and_the_later_ones_are_differences(lab, engine):
    runs = [lab.run(case(f"good-{i}")) for i in range(5)]
    assert [run.number for run in runs] == [0, 1, 2, 3, 4]
    assert [run.name for run in runs] == [f"good-{i}" for i in range(5)]
    (monitor,) = engine.monitors
    assert monitor.bases[0] == 0 and 0 not in monitor.bases[1:]


def test_a_machine_has_as_many_processors_as_its_cases_need(lab, engine):
    wanted = [1, 1, 2, 2, 1]
    runs = [lab.run(case(second_program=HLT if count == 2 else None)) for count in wanted]
    assert [run.verdict for run in runs] == [Verdict.PASS] * 5
    assert engine.processors == [1, 2, 1]


def test_an_image_is_booted_with_as_many_processors_as_any_of_its_cases_needs(lab, engine):
    lab.run_image([case(), case(second_program=HLT), case()])
    assert engine.processors[-1] == 2


def test_the_machine_sleeps_between_cases(lab, engine):
    lab.run(case())
    assert engine.machines[0].calls[-1] == "pause"
    lab.run(case())
    assert engine.machines[0].calls[-2:] == ["resume", "pause"]


def test_what_the_lab_knows_of_the_processor(lab, processors):
    assert lab.capabilities == processors["skylake"]
    assert lab.target.physical_address_width == 40
    assert lab.target.l2_tsc == 1_000_000
    assert lab.info.title() == "paper 1.0 (model-x)"


def test_a_processor_without_vmx_is_a_missing_capability(engine_with, tmp_path):
    engine_with("no vmx")
    with Lab(log_dir=tmp_path) as lab:
        with pytest.raises(MissingCapability, match=r"lacks VMX \(CPUID.1:ECX.VMX\[5\] is 0\)") as caught:
            lab.run(case())
        assert caught.value.engine == "paper 1.0 (model-x)"
        (run,) = lab.run_all([case()])
        assert run.verdict is Verdict.SKIP


# --- cases that end badly -----------------------------------------------------------------------------------


def test_a_case_that_kills_the_machine_is_a_crash_with_what_had_come(lab, engine):
    lab.run(case("good-before"))
    with pytest.raises(MachineDied, match="triple fault") as caught:
        lab.run(case("dies"))
    error = caught.value
    assert (error.case, error.engine) == ("dies", "paper 1.0 (model-x)")
    assert error.last_record.startswith("@exit n=0x0")
    assert (error.run.verdict, error.run.end, error.run.name) == (Verdict.CRASH, End.DIED, "dies")
    assert error.run.reasons == [ExitReason.CPUID]
    assert b"# the evidence" in error.log_path.read_bytes()
    assert engine.machines[0].calls[-1] == "stop"


def test_after_a_death_a_fresh_machine_runs_the_next_case(lab, engine):
    with pytest.raises(MachineError):
        lab.run(case("dies"))
    assert lab.run(case()).reasons == [ExitReason.CPUID, ExitReason.HLT]
    assert len(engine.machines) == 2
    assert engine.monitors[1].bases == [0], "nothing is a difference to what the dead machine had"


def test_a_machine_that_died_between_two_cases_costs_none(lab, engine):
    lab.run(case())
    engine.machines[0].ending = MachineEnd.KILLED
    assert lab.run(case()).verdict is Verdict.PASS
    assert len(engine.machines) == 2


def test_a_case_that_hangs_ends_at_its_deadline_with_what_had_come(lab, engine):
    with pytest.raises(MachineHung) as caught:
        lab.run(case("hangs", limits=SHORT))
    assert (caught.value.run.verdict, caught.value.run.end) == (Verdict.CRASH, End.HUNG)
    assert caught.value.run.reasons == [ExitReason.CPUID, ExitReason.HLT]
    assert "stop" in engine.machines[0].calls


@pytest.mark.parametrize("name", ["damaged", "startless", "endless", "stranger"])
def test_damaged_or_foreign_records_are_no_result(lab, engine, name):
    """An end that is damaged is still followed by the prompt, so it need not be waited for."""
    with pytest.raises(ProtocolError) as caught:
        lab.run(case(name))
    assert caught.value.log_path
    assert lab.run(case()).verdict is Verdict.PASS


def test_an_interrupt_in_the_middle_of_a_case_stops_the_machine(lab, engine, monkeypatch):
    session = lab.session()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "run_frame", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lab.run(case())
    assert engine.machines[0].calls[-1] == "stop"
    assert lab.run(case()).verdict is Verdict.PASS


@pytest.mark.parametrize("kind", ["old", "damaged"])
def test_a_machine_that_boots_something_else_is_stopped(engine_with, tmp_path, kind):
    engine = engine_with(kind)
    with Lab(log_dir=tmp_path) as lab:
        with pytest.raises(ProtocolError) as caught:
            lab.run(case())
        assert caught.value.log_path.parent == tmp_path
        assert engine.machines[0].calls[-1] == "stop"


MIXED = [
    (case("good-0"), Verdict.PASS, None),
    (case("dies-1"), Verdict.CRASH, MachineDied),
    (case("bad-2", data={0x8000: b"x"}), Verdict.ERROR, OverlappingPages),
    (case("good-3"), Verdict.PASS, None),
    (case("skip-4", needs=PrimaryControls.ACTIVATE_TERTIARY_CONTROLS), Verdict.SKIP, MissingCapability),
    (case("hangs-5", limits=SHORT), Verdict.CRASH, MachineHung),
    (case("damaged-6"), Verdict.ERROR, ProtocolError),
    (case("good-7", mode=Mode.PROTECTED), Verdict.PASS, None),
    (case("good-8", expect=[ExitReason.HLT]), Verdict.FAIL, None),
    (case("dies-9"), Verdict.CRASH, MachineDied),
]


@pytest.mark.parametrize("way", ["run_all", "run_image"])
def test_each_case_has_its_own_verdict_and_takes_no_other_down(lab, way):
    runs = getattr(lab, way)([given for given, _, _ in MIXED])
    assert [run.case for run in runs] == [given for given, _, _ in MIXED]
    assert [run.name for run in runs] == [given.name for given, _, _ in MIXED]
    assert [run.verdict for run in runs] == [verdict for _, verdict, _ in MIXED]
    assert [type(run.error) for run in runs] == [error or type(None) for _, _, error in MIXED]


@pytest.mark.parametrize("way", ["run_all", "run_image"])
def test_no_cases_no_runs(lab, way):
    assert getattr(lab, way)([]) == []


# --- images -------------------------------------------------------------------------------------------------


def test_an_image_runs_its_cases_without_anything_being_sent(lab, engine):
    runs = lab.run_image([case(f"good-{i}") for i in range(4)])
    assert [(run.number, run.verdict) for run in runs] == [(i, Verdict.PASS) for i in range(4)]
    assert len(engine.machines) == 2, "one was asked for its capabilities, one booted the image"


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("name", ["damaged", "startless", "endless"])
def test_damage_to_one_case_of_an_image_costs_that_case(lab, place, name):
    cases = [case(name if i == place else f"good-{i}") for i in range(4)]
    runs = lab.run_image(cases)
    verdicts = [run.verdict for run in runs]
    assert verdicts[place] is not Verdict.PASS
    # Where the records of two cases ran together, nobody knows whose the damage was.
    assert verdicts.count(Verdict.PASS) >= 2
    assert all(run.reasons == [10, 12] for run in runs if run.verdict is Verdict.PASS)
    assert all(run.name == given.name for run, given in zip(runs, cases, strict=True))


def test_records_of_a_case_that_was_never_asked_for_are_a_typed_error(lab):
    runs = lab.run_image([case("good-0"), case("stranger"), case("good-2")])
    assert runs[0].verdict is Verdict.PASS
    assert runs[1].verdict is Verdict.ERROR
    assert isinstance(runs[1].error, ProtocolError)


# --- the end ------------------------------------------------------------------------------------------------


def test_closing_stops_the_machine_and_keeps_the_logs(engine, tmp_path):
    with Lab(log_dir=tmp_path) as lab:
        lab.run(case())
        log = lab.log_path
    assert engine.machines[0].calls[-1] == "stop"
    assert log.read_bytes().startswith(b"# engine: paper 1.0 (model-x); the test says so\n")
    assert b"@exit" in log.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [log.name], "no image stays behind"
    lab.close()


def test_logs_without_a_folder_go_with_the_lab(engine):
    lab = Lab()
    lab.run(case())
    folder = lab.log_path.parent
    assert folder.is_dir()
    lab.close()
    assert not folder.exists()
