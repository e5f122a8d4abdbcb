"""`Run.check()`: a run that is as predicted has no difference, and each single thing that is not has one."""

from __future__ import annotations

import dataclasses

import pytest

from vmxlab import Case, ExitReason, Field, IOBitmap, Limits, guest_ept, on
from vmxlab.cases.memory import UNMAPPED
from vmxlab.cases.steps import STANDARD, ReportMemory
from vmxlab.console.check import compare_with
from vmxlab.console.known import MATCHES, explain, known_difference
from vmxlab.console.run import End, Exit, Run
from vmxlab.engines.differences import KNOWN_DIFFERENCES
from vmxlab.errors import CaseError
from vmxlab.oracle.prediction import EXIT_ATTRIBUTES
from vmxlab.oracle.values import UNDEFINED, Bits, Unknown, is_said
from vmxlab.sdm.exit_reasons import ENTRY_FAILURE_BIT

L2 = 18 * 1024 * 1024


def passthrough_but_port_0x60() -> IOBitmap:
    bitmap = IOBitmap()
    bitmap.set_intercept(0x60, True)
    return bitmap


CASE = Case(
    program="cpuid; in al, 0x60; in al, 0x61; mov dword ptr [DATA], 0x1234; ud2",
    io_bitmap=passthrough_but_port_0x60(),
    watch=[Field.GUEST_CR3, Field.GUEST_INTERRUPTIBILITY_STATE],
    steps=(*STANDARD, ReportMemory(L2 + 0x10000, 8)),
)


def test_a_run_as_predicted_has_no_difference(run_as_predicted):
    run, prediction = run_as_predicted(CASE)
    assert [exit_.reason for exit_ in prediction.exits] == [
        ExitReason.CPUID,
        ExitReason.IO_INSTRUCTION,
        ExitReason.EXCEPTION_OR_NMI,
    ]
    assert prediction.complete
    assert run.check() == ()


def test_each_value_that_is_said_can_make_it_fail(run_as_predicted):
    """Every bit that is said, of every attribute of every exit, alone."""
    run, prediction = run_as_predicted(CASE)
    for number, (said, exit_) in enumerate(zip(prediction.exits, run.exits, strict=True)):
        for name in EXIT_ATTRIBUTES:
            value = getattr(said, name)
            for bit in range(64 if isinstance(value, int) else 32):
                known = not isinstance(value, Bits) or value.known >> bit & 1
                changed = with_exit(run, number, **{name: getattr(exit_, name) ^ 1 << bit})
                expected = int(is_said(value) and bool(known))
                if name == "full_reason" and bit == 31:
                    continue  # an entry failure is told from an exit by more than this bit
                assert len(compare_with(changed, prediction).differences) == expected, (number, name, bit)


def test_each_register_and_each_watched_field_can_make_it_fail(run_as_predicted):
    run, prediction = run_as_predicted(CASE)
    for number, (said, exit_) in enumerate(zip(prediction.exits, run.exits, strict=True)):
        for kind in ("registers", "watched"):
            for key, value in getattr(said, kind).items():
                have = getattr(exit_, kind)
                changed = with_exit(run, number, **{kind: {**have, key: have[key] ^ 1 << 40}})
                expected = isinstance(value, int) or (isinstance(value, Bits) and value.known >> 40 & 1)
                assert len(compare_with(changed, prediction).differences) == bool(expected), (number, key)


def test_each_outcome_can_make_it_fail(run_as_predicted):
    run, prediction = run_as_predicted(CASE)
    for number, outcome in enumerate(run.outcomes):
        for change in ({"operation": "invept"}, {"count": 99}, {"value": 5}, {"msr": 5}):
            outcomes = list(run.outcomes)
            outcomes[number] = dataclasses.replace(outcome, **change)
            changed = dataclasses.replace(run, outcomes=tuple(outcomes))
            assert compare_with(changed, prediction).differences, (number, change)


@pytest.mark.parametrize(
    "change",
    [
        {"exits": lambda run: run.exits[:-1]},
        {"exits": lambda run: (*run.exits, run.exits[-1])},
        {"outcomes": lambda run: run.outcomes[:-1]},
        {"outcomes": lambda run: (*run.outcomes, run.outcomes[-1])},
        {"end": lambda run: End.LIMIT},
        {"memory": lambda run: {L2 + 0x10000: b"\x34\x13" + bytes(6)}},
        {"memory": lambda run: {}},
    ],
)
def test_what_is_missing_or_too_much_is_a_difference(run_as_predicted, change):
    run, _ = run_as_predicted(CASE)
    changed = dataclasses.replace(run, **{name: make(run) for name, make in change.items()})
    assert changed.check()


def test_what_is_undefined_or_unknown_is_not_compared(run_as_predicted):
    run, prediction = run_as_predicted(CASE)
    assert prediction.exits[0].guest_linear_address is UNDEFINED
    assert with_exit(run, 0, guest_linear_address=0xDEAD).check() == ()
    # What port 0x61 answered is in AL, and all else of RAX is known.
    assert prediction.exits[2].registers["rax"] == Bits(0, ~0xFF & (1 << 64) - 1)


def test_nothing_is_compared_behind_the_end_of_what_is_known(run_as_predicted):
    run, prediction = run_as_predicted(Case(program="cpuid; monitor; hlt"))
    assert isinstance(prediction.unknown, Unknown)
    more = dataclasses.replace(run, exits=(*run.exits, Exit(1, 99), Exit(2, 98)), end=End.LIMIT)
    assert more.check() == ()
    assert compare_with(more, prediction).exits_unknown == 2
    assert dataclasses.replace(run, exits=()).check()


def test_a_timer_that_the_case_sets_may_expire_at_any_time(run_as_predicted):
    run, _ = run_as_predicted(Case(program="cpuid; hlt", limits=Limits(l2_tsc=100_000)))
    expired = Exit(1, int(ExitReason.PREEMPTION_TIMER))
    assert dataclasses.replace(run, exits=(run.exits[0], expired)).check() == ()
    wrong = dataclasses.replace(run.exits[0], rip=1)
    assert dataclasses.replace(run, exits=(wrong, expired)).check()


def test_a_difference_is_one_readable_line(run_as_predicted):
    run, _ = run_as_predicted(Case(program="in al, 0x60"))
    (difference,) = with_exit(run, 0, raw_qualification=5).check()
    assert str(difference).startswith(
        "exit 0: raw_qualification: the SDM says 0x600048, seen 0x5 [I/O instructions exit"
    )
    assert "Vol. 3C, 28.2.1" in str(difference)


def test_a_run_from_a_log_can_not_be_checked():
    with pytest.raises(CaseError, match="compiled case"):
        Run(None, 0).check()


def test_known_differences_are_told_from_new_ones(run_as_predicted):
    run, _ = run_as_predicted(Case(program="ud2"))
    (known,) = with_exit(run, 0, rflags=0x2).check()
    assert known_difference(known, "bochs", "2.7") == "exception-exit-rf-clear"
    assert known_difference(known, "bochs", "3.0") is None
    (new,) = with_exit(run, 0, rflags=0x10003).check()
    assert known_difference(new, "bochs", "2.7") is None
    assert set(MATCHES) <= set(KNOWN_DIFFERENCES)


def explained_keys(differences, engine="bochs", version="2.7"):
    return [key for _, key in explain(differences, engine, version)]


def test_what_follows_from_another_way_that_is_known_is_explained(run_as_predicted):
    """An INVPCID that exits where it is #GP(0): all else of that exit, and the end, are another story."""
    run, _ = run_as_predicted(Case(program="cpuid; ud2"))
    wrong_before = {"registers": {**run.exits[0].registers, "rbx": 5}}
    changed = with_exit(with_exit(run, 0, **wrong_before), 1, full_reason=ExitReason.INVPCID, rip=0)
    changed = dataclasses.replace(changed, end=End.LIMIT)
    differences = changed.check()
    assert explained_keys(differences) == [None, *["exit-before-privilege-fault"] * (len(differences) - 1)]
    assert explained_keys(differences, version="3.0") == [None] * len(differences)


def test_an_exit_of_the_same_reason_by_another_access_is_another_way(run_as_predicted):
    """A flag of L2's own tables that EPT lets nobody write; Bochs writes it, and the access itself exits."""
    ept = guest_ept()
    ept.set_raw_entry(0x3000, 1, L2 + 0x3000 | 0x35)  # L2's page table: read, execute
    run, _ = run_as_predicted(Case(program="mov ebx, UNMAPPED; mov [rbx], al; hlt", ept=ept))
    assert run.exits[0].guest_physical_address == 0x3000
    of_the_access = {"guest_physical_address": UNMAPPED, "guest_linear_address": UNMAPPED, "rip": 0x8005}
    key = "ept-guest-flag-update-not-checked"
    differences = with_exit(run, 0, **of_the_access, raw_qualification=0x182).check()
    assert explained_keys(differences) == [key] * len(differences)
    assert explained_keys(differences, version="3.0") == [None] * len(differences)
    # The same access with another qualification is no other access.
    (difference,) = with_exit(run, 0, raw_qualification=run.exits[0].raw_qualification ^ 2).check()
    assert explained_keys([difference]) == [None]


def test_another_address_of_an_exit_by_another_rule_is_not_explained(run_as_predicted):
    """A violation by the access itself: Bochs makes that one, so it has no excuse for another address."""
    run, _ = run_as_predicted(Case(program="mov ebx, UNMAPPED; mov [rbx], al; hlt"))
    elsewhere = {"guest_physical_address": UNMAPPED + 0x1000, "guest_linear_address": UNMAPPED + 0x1000}
    assert explained_keys(with_exit(run, 0, **elsewhere).check()) == [None, None]


def test_flags_that_an_exit_has_not_saved_are_missing_at_the_next_one_too(run_as_predicted):
    twice = [on(ExitReason.EXCEPTION_OR_NMI, times=1).resume()]
    run, _ = run_as_predicted(Case(program="mov rax, [rbx]", registers={"rbx": 1 << 63}, reactions=twice))
    changed = with_exit(with_exit(run, 0, rflags=2), 1, rflags=2)
    assert explained_keys(changed.check()) == ["exception-exit-rf-clear"] * 2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"exits": ()}, "exits: the SDM says 1, seen 0"),
        ({"outcomes": ()}, "outcomes: the SDM says 5, seen 0"),
    ],
)
def test_an_exit_that_does_not_come_carries_its_rules(run_as_predicted, change, expected):
    run, _ = run_as_predicted(Case(program="cpuid; hlt", reactions=[on(ExitReason.CPUID).stop()]))
    (difference, *_) = dataclasses.replace(run, **change).check()
    assert str(difference).startswith(expected)
    assert difference.diverges == bool(difference.rules) == ("exits" in change)


def test_a_failed_entry_is_known_only_by_the_rules_that_the_engine_lacks(run_as_predicted):
    hlt = {Field.GUEST_ACTIVITY_STATE: 1}
    for fields, key in (
        (hlt | {Field.ENTRY_INTERRUPTION_INFORMATION: 0x8000_0306}, "injection-into-hlt-not-checked"),
        (hlt | {Field.ENTRY_INTERRUPTION_INFORMATION: 0x8000_0306, Field.GUEST_RFLAGS: 0}, None),
    ):
        run, _ = run_as_predicted(Case(fields=fields))
        assert run.exits[0].full_reason == ENTRY_FAILURE_BIT | ExitReason.ENTRY_FAILURE_GUEST_STATE
        (difference, *_) = with_exit(run, 0, full_reason=int(ExitReason.HLT)).check()
        assert known_difference(difference, "bochs", "2.7") == key


@pytest.mark.parametrize(
    ("program", "key"),
    [
        ("lldt word ptr [rbx]", "kvm-operand-of-an-instruction-emulated-for-umip"),
        ("mov ax, [rbx]", None),
    ],
)
def test_a_known_difference_of_some_instructions_is_that_of_no_others(run_as_predicted, program, key):
    run, _ = run_as_predicted(Case(program=program, registers={"rbx": UNMAPPED + 0x105}))
    assert run.reasons == [ExitReason.EPT_VIOLATION]
    wrong = {"guest_physical_address": UNMAPPED, "guest_linear_address": 0x1234}
    for name, value in wrong.items():
        (difference,) = with_exit(run, 0, **{name: value}).check()
        assert known_difference(difference, "kvm-in-bochs", "linux-6.1.192") == key


def with_exit(run: Run, number: int, **changes: object) -> Run:
    exits = list(run.exits)
    exits[number] = dataclasses.replace(exits[number], **changes)
    return dataclasses.replace(run, exits=tuple(exits))
