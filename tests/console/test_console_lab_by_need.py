"""The processor model by need: on Bochs, whose models differ, and on engines that have nothing to choose."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from vmxlab import CR4, Case, EptVpidCap, ExitReason, LabByNeed, SecondaryControls, Verdict
from vmxlab.engines.bochs import BochsEngine
from vmxlab.engines.kvm import KvmEngine
from vmxlab.engines.kvm_in_bochs import KvmInBochsEngine
from vmxlab.engines.tcg import TcgEngine
from vmxlab.errors import CaseError, MachineDied, MissingCapability
from vmxlab.sdm.fields import Field

DEFAULT = "corei7_skylake_x"
SPP = SecondaryControls.SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT
NOWHERE = SecondaryControls.ENABLE_PCONFIG
KILLS = {Field.HOST_CR3: 0x3F00000}

FEW = ("core2_penryn_t9600", DEFAULT, "corei7_icelake_u", "tigerlake")
few_models = pytest.mark.usefixtures("few")


@pytest.fixture
def few(monkeypatch) -> None:
    """A Bochs with few models: to boot all of them takes a second."""
    assert set(FEW) <= set(BochsEngine().models())
    monkeypatch.setattr(BochsEngine, "models", lambda self: FEW)


@pytest.fixture
def opened(monkeypatch) -> list:
    """Every machine of Bochs that is opened, in order."""
    machines: list = []
    open_ = BochsEngine.open

    def opening(self, *arguments, **options):
        machines.append(open_(self, *arguments, **options))
        return machines[-1]

    monkeypatch.setattr(BochsEngine, "open", opening)
    return machines


@pytest.fixture
def lab(opened, tmp_path: Path) -> Iterator[LabByNeed]:
    with LabByNeed("bochs", log_dir=tmp_path) as made:
        yield made
    assert all(machine._child.poll() is not None for machine in opened), "a process was left"


def models(opened: list) -> list[str]:
    return [machine.info.model for machine in opened]


def test_a_case_that_the_default_model_can_run_starts_no_other(lab, opened):
    run = lab.run(Case())
    assert (run.engine, run.by_need) == (f"bochs {lab.info.version} ({DEFAULT})", "")
    assert models(opened) == [DEFAULT]


def test_a_case_runs_on_the_first_other_model_that_has_what_it_needs(lab, opened):
    run = lab.run(Case(needs=SPP))
    assert run.reasons == [ExitReason.HLT]
    assert run.engine == f"bochs {lab.info.version} (tigerlake)"
    assert run.by_need == (
        f"{DEFAULT} lacks SUB_PAGE_WRITE_PERMISSIONS_FOR_EPT (IA32_VMX_PROCBASED_CTLS2[55] is 0)"
    )
    assert lab.info_of(run).why.endswith(f"by need: a case needs what {DEFAULT} lacks")
    assert models(opened) == [DEFAULT, "tigerlake"]
    assert lab.run(Case()).by_need == ""
    assert lab.run(Case(enable=SPP)).by_need == run.by_need
    assert models(opened) == [DEFAULT, "tigerlake"], "both stay up"


@few_models
def test_needs_of_the_caller_and_of_the_case_must_meet_in_one_model(lab):
    run = lab.run(Case(needs=[SPP]), needs=[CR4.PKE, EptVpidCap.page_1g])
    assert run.engine.endswith("(tigerlake)")
    assert lab.model_for([EptVpidCap.page_1g]) == DEFAULT
    assert lab.target_for([SPP]).capabilities.supports(SPP)
    assert not lab.target_for([]).capabilities.supports(SPP)
    with pytest.raises(MissingCapability):
        lab.run(Case(needs=SPP), needs=[NOWHERE])


@few_models
def test_a_need_that_no_model_has_names_the_bit_and_says_so_and_is_learnt_once(lab, opened):
    for _ in range(2):
        with pytest.raises(MissingCapability) as caught:
            lab.run(Case(name="asks", needs=NOWHERE))
        assert caught.value.message == (
            "the processor lacks ENABLE_PCONFIG (IA32_VMX_PROCBASED_CTLS2[59] is 0): "
            f"neither {DEFAULT} nor another model of bochs has what is needed"
        )
        assert caught.value.case == "asks"
    assert sorted(models(opened)) == sorted(BochsEngine().models())


@few_models
def test_at_most_one_machine_is_up_besides_the_default_models(lab, opened):
    with pytest.raises(MissingCapability):
        lab.run(Case(needs=NOWHERE))
    alive = [machine for machine in opened if machine.end().alive]
    assert len(alive) == 2
    assert models(alive)[0] == DEFAULT
    assert all(machine.paused for machine in alive)


def test_a_named_model_is_never_left(opened, tmp_path):
    with LabByNeed("bochs", model=DEFAULT, log_dir=tmp_path) as lab:
        with pytest.raises(MissingCapability) as caught:
            lab.run(Case(needs=SPP))
        assert caught.value.message.endswith("(IA32_VMX_PROCBASED_CTLS2[55] is 0)")
        assert [info.model for info, _ in lab.processors()] == [DEFAULT]
    assert models(opened) == [DEFAULT]


@pytest.mark.parametrize("engine", [KvmEngine, KvmInBochsEngine, TcgEngine])
def test_engines_whose_models_only_lack_features_offer_none(engine):
    assert engine().models_by_need() == ()


def test_bochs_offers_its_other_models_the_newest_first():
    offered = BochsEngine().models_by_need()
    assert DEFAULT not in offered
    assert offered[:2] == ("tigerlake", "corei7_icelake_u")
    assert len(offered) == len(BochsEngine().models()) - 1


MIXED = [
    (Case(), Verdict.PASS, DEFAULT),
    (Case(needs=SPP), Verdict.PASS, "tigerlake"),
    (Case(needs=NOWHERE), Verdict.SKIP, ""),
    (Case(data={0x8000: b"x"}), Verdict.ERROR, ""),
    (Case(enable=SPP, fields=KILLS), Verdict.CRASH, "tigerlake"),
    (Case(enable=SPP), Verdict.PASS, "tigerlake"),
    (Case(fields=KILLS), Verdict.CRASH, DEFAULT),
    (Case(), Verdict.PASS, DEFAULT),
]


@few_models
@pytest.mark.parametrize("way", ["run_all", "run_image"])
def test_each_case_of_many_has_its_own_model_number_and_verdict(lab, way):
    runs = getattr(lab, way)([case for case, _, _ in MIXED])
    assert [run.verdict for run in runs] == [verdict for _, verdict, _ in MIXED]
    assert [run.number for run in runs] == list(range(len(MIXED)))
    for run, (case, _, model) in zip(runs, MIXED, strict=True):
        assert run.case is case
        assert run.engine.endswith(f"({model})") or not model
        assert bool(run.by_need) == (model == "tigerlake")


def test_a_crash_on_another_model_takes_nothing_else_down(lab):
    with pytest.raises(MachineDied) as caught:
        lab.run(Case(enable=SPP, fields=KILLS))
    assert caught.value.run.by_need
    assert lab.run(Case(enable=SPP)).verdict is Verdict.PASS
    assert lab.run(Case()).verdict is Verdict.PASS


def test_what_is_wrong_with_a_case_itself_is_no_want_of_the_processor(lab, opened):
    with pytest.raises(CaseError):
        lab.run(Case(data={0x8000: b"x"}, needs=SPP))
    with pytest.raises(CaseError):
        lab.run(Case(program="no such instruction"))
    assert models(opened) == [DEFAULT, "tigerlake"]


def test_every_model_is_told_with_what_it_can_do(lab):
    found = lab.processors()
    assert [info.model for info, _ in found] == [DEFAULT, *BochsEngine().models_by_need()]
    assert {info.model for info, capabilities in found if capabilities.supports(SPP)} == {
        "tigerlake",
        "corei7_icelake_u",
    }


def test_an_engine_without_vmx_has_no_processor_to_tell_of(tmp_path):
    if not TcgEngine().availability().ok:
        pytest.skip("no QEMU here")
    with LabByNeed("tcg", log_dir=tmp_path) as lab:
        assert lab.processors() == []
        with pytest.raises(MissingCapability, match=r"VMX \(CPUID.1:ECX.VMX\[5\] is 0\)") as caught:
            lab.run_image([Case()])
        assert "model" not in caught.value.message


def test_logs_of_all_models_are_in_one_folder_that_goes_with_the_lab():
    lab = LabByNeed("bochs")
    logs = {lab.run(Case()).log_path, lab.run(Case(needs=SPP)).log_path}
    (folder,) = {log.parent for log in logs}
    assert len(logs) == 2
    lab.close()
    assert not folder.exists()
