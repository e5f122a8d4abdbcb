"""Which engine, and why."""

import pytest

from vmxlab import errors
from vmxlab.engines import ENGINES, Availability, choose
from vmxlab.engines.bochs import BochsEngine
from vmxlab.engines.kvm import KvmEngine


@pytest.fixture
def available(monkeypatch):
    """available(kvm=..., bochs=...): each None, or the problem it has."""

    def set_(*, kvm, bochs):
        for engine, problem in ((KvmEngine, kvm), (BochsEngine, bochs)):
            state = Availability(problem is None, "1.0", problem, problem and f"mend {problem}")
            monkeypatch.setattr(engine, "availability", lambda self, state=state: state)

    return set_


@pytest.mark.parametrize("name", [None, "auto"])
def test_auto_takes_kvm_where_nested_vmx_is_proven(available, name):
    available(kvm=None, bochs=None)
    engine, why = choose(name)
    assert engine.name == "kvm"
    assert why.startswith("auto: ")


def test_auto_takes_bochs_elsewhere_and_says_why(available):
    available(kvm="no /dev/kvm", bochs=None)
    engine, why = choose("auto")
    assert engine.name == "bochs"
    assert why == "auto: kvm can't run here (no /dev/kvm)"


def test_auto_with_a_model_of_bochs_takes_bochs(available):
    available(kvm=None, bochs=None)
    engine, why = choose("auto", "corei7_haswell_4770")
    assert engine.name == "bochs"
    assert "corei7_haswell_4770" in why
    assert choose("auto", "host,vmx-ept=off")[0].name == "kvm"


def test_auto_with_nothing_at_hand_says_what_each_lacks(available):
    available(kvm="no /dev/kvm", bochs="no bochs")
    with pytest.raises(errors.EngineUnavailable, match=r"no /dev/kvm.*no bochs") as caught:
        choose(None)
    assert "mend no bochs" in caught.value.advice


def test_named_engine_is_taken_and_the_reason_names_the_source(available):
    available(kvm=None, bochs=None)
    assert choose("bochs")[1] == "named by --engine"
    assert choose("bochs", named_by="--vmx-engine")[1] == "named by --vmx-engine"


def test_named_engine_that_can_not_run_is_an_error_and_no_fallback(available):
    available(kvm="no /dev/kvm", bochs=None)
    with pytest.raises(errors.EngineUnavailable, match="engine kvm: no /dev/kvm") as caught:
        choose("kvm")
    assert caught.value.advice == "mend no /dev/kvm"
    assert caught.value.engine == "kvm"


def test_unknown_name_lists_the_names():
    with pytest.raises(errors.EngineUnavailable, match="no engine 'bosch'") as caught:
        choose("bosch")
    assert caught.value.advice == "the engines are auto, auto-kvm, kvm, bochs, kvm-in-bochs, tcg"


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_goes_by_its_name(name):
    assert ENGINES[name].name == name


def test_table_of_engines_can_not_be_changed():
    with pytest.raises(TypeError):
        ENGINES["mine"] = BochsEngine
