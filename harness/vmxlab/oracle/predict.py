"""What a case must do: `predict(compiled, target)`, from the SDM, the case and the capability MSRs alone.

The steps are taken one after the other, as the monitor takes them. Where the oracle's knowledge ends, the
prediction ends, and says why.
"""

from __future__ import annotations

from collections.abc import Mapping

from vmxlab.cases import steps as s
from vmxlab.image import layout
from vmxlab.image.compiler import CompiledCase, Target
from vmxlab.image.host_state import host_state
from vmxlab.oracle.cached import Cached
from vmxlab.oracle.entering import enter, failed_entry, leave
from vmxlab.oracle.entry_checks import NotEntered
from vmxlab.oracle.memory import MachineMemory
from vmxlab.oracle.prediction import PredictedExit, PredictedOutcome, Prediction
from vmxlab.oracle.processor.execute import run_until_exit
from vmxlab.oracle.processor.state import Carried
from vmxlab.oracle.reactions import Policy, answer
from vmxlab.oracle.root import Root
from vmxlab.oracle.rules.injection import inject_event
from vmxlab.oracle.values import NOTHING_KNOWN, Bits, CannotTell, Unknown, Value
from vmxlab.oracle.vmcs import ModelVmcs
from vmxlab.sdm.fields import Field
from vmxlab.sdm.msrs import Msr
from vmxlab.sdm.registers import GENERAL_REGISTERS

# MSRs that each processor with Intel 64 architecture has (Vol. 4, table 2-2).
_ALWAYS_THERE = frozenset(
    {Msr.IA32_TSC, Msr.IA32_APIC_BASE, Msr.IA32_PAT, Msr.IA32_EFER, Msr.IA32_STAR, Msr.IA32_LSTAR}
    | {Msr.IA32_SYSENTER_CS, Msr.IA32_SYSENTER_ESP, Msr.IA32_SYSENTER_EIP}
    | {Msr.IA32_FMASK, Msr.IA32_FS_BASE, Msr.IA32_GS_BASE, Msr.IA32_KERNEL_GS_BASE}
)
BUDGET = 1_000
"""Instructions of L2 that are followed in a whole case."""


def predict(compiled: CompiledCase, target: Target | None = None) -> Prediction:
    """What the case must do on a processor with `target`'s capabilities, or what it is compiled for."""
    return _Predictor(compiled, target or compiled.target).predict()


class _Predictor:
    def __init__(self, compiled: CompiledCase, target: Target) -> None:
        self.compiled = compiled
        self.case = compiled.case
        self.memory = MachineMemory(compiled.contents)
        self.root = Root(target.capabilities, target.physical_address_width, self.memory)
        self.width = target.physical_address_width
        self.registers = [Bits(self.case.registers.get(name, 0)) for name in GENERAL_REGISTERS]
        self.policy = Policy(tuple(self.case.reactions), compiled.eptp)
        self.carried, self.cached = Carried(), Cached()
        self.valid: dict[Field, Bits] = {}
        self.outcomes: list[PredictedOutcome] = []
        self.exits: list[PredictedExit] = []
        self.reported: dict[int, tuple[int | None, ...]] = {}
        self.notes: list[Unknown] = []
        self.entries = 0
        self.budget = BUDGET
        self.end: str | None = "done"

    def predict(self) -> Prediction:
        unknown: Unknown | None = None
        try:
            if self.case.processors > 1:
                raise CannotTell("what the second processor does")
            for step in self.case.steps:
                if not self._take(step) and not step.go_on:
                    self.end = "vmfail"
                    break
                if self.end == "limit":
                    break
        except CannotTell as end:
            unknown, self.end = end.unknown, None
        return Prediction(
            outcomes=tuple(self.outcomes),
            exits=tuple(self.exits),
            end=self.end,
            memory=self.reported,
            unknown=unknown,
            notes=tuple(self.notes),
            entries=self.entries,
            deadline=self._sets_the_timer(),
            memory_rules=self.memory.rules,
        )

    def _sets_the_timer(self) -> bool:
        return self.case.limits.l2_tsc is not None or Field.VMX_PREEMPTION_TIMER_VALUE in self.case.fields

    # --- steps -------------------------------------------------------------------------------------------

    def _take(self, step: s.Step) -> bool:
        """One step; whether it succeeded."""
        root = self.root
        match step:
            case s.WriteVmcs():
                return self._write_vmcs()
            case s.Enter(resume=resume):
                if self._enter(resume=resume):
                    return True
                self.end = "vmfail"  # which stays, unless a later entry ends otherwise
                return False
            case s.Store(address=address, data=content):
                _require_mapped(address, len(content))
                self.memory.write(address, content)
                return True
            case s.ReportMemory(address=address, length=length):
                _require_mapped(address, length)
                self.reported[address] = self.memory.read_known(address, length)
                return True
            case s.Vmxon(region=region):
                return self._report(root.vmxon(layout.VMXON_REGION if region is None else region))
            case s.Vmclear(region=region):
                return self._report(root.vmclear(layout.VMCS_REGION if region is None else region))
            case s.Vmptrld(region=region):
                return self._report(root.vmptrld(layout.VMCS_REGION if region is None else region))
            case s.Vmptrst():
                return self._report(root.vmptrst())
            case s.Vmxoff():
                self.cached.drop()
                return self._report(root.vmxoff())
            case s.Vmread(field=field):
                return self._report(root.vmread(int(field)))
            case s.Vmwrite(field=field, value=value):
                return self._report(root.vmwrite(int(field), value))
            case s.Vmcall():
                return self._report(root.vmcall())
        return self._take_more(step)

    def _take_more(self, step: s.Step) -> bool:
        root = self.root
        match step:
            case s.Invept(type=kind, eptp=eptp):
                chosen = self.compiled.eptp if eptp is None else eptp
                assert chosen is not None
                outcome = root.invept(kind, chosen)
                if outcome.kind == "ok":
                    self.cached.drop(physical=True)
                    self.memory.tables_are_new()
                return self._report(outcome)
            case s.Invvpid(type=kind, vpid=vpid, linear_address=address):
                outcome = root.invvpid(kind, vpid, address)
                if outcome.kind == "ok":
                    self.cached.drop()
                return self._report(outcome)
            case s.SetCr0(value=value):
                return self._report(root.set_control_register(value, cr4=False))
            case s.SetCr4(value=value):
                return self._report(root.set_control_register(value, cr4=True))
            case s.Rdmsr(msr=msr):
                return self._rdmsr(msr)
        raise CannotTell(f"what the step {type(step).__name__} does")

    def _report(self, outcome: PredictedOutcome) -> bool:
        self.outcomes.append(outcome)
        return outcome.kind == "ok"

    def _rdmsr(self, msr: int) -> bool:
        value: Value | None = self.root.capabilities.raw.get(msr)
        if value is None and msr in _ALWAYS_THERE:
            value = Unknown(f"what MSR {msr:#x} holds")
        if value is None:
            raise CannotTell(f"what RDMSR of MSR {msr:#x} in L1 gives")
        return self._report(PredictedOutcome("rdmsr", "ok", msr=msr, value=value))

    def _write_vmcs(self) -> bool:
        """All VMWRITEs: each failure is reported, and the number of those that succeed."""
        written, good = 0, True
        for field, value in self.compiled.fields.items():
            outcome = self.root.vmwrite(int(field), value)
            if outcome.kind == "ok":
                written += 1
            else:
                self._report(outcome)
                good = False
        if written:
            self._report(self.root.succeed("vmwrite", count=written))
        return good

    # --- VM entries --------------------------------------------------------------------------------------

    def _enter(self, *, resume: bool) -> bool:
        """VMLAUNCH or VMRESUME, and all exits and reactions until one stops."""
        first = "vmresume" if resume else "vmlaunch"
        for _ in range(self.case.limits.exits):
            refused = self.root.may_enter(resume=resume)
            if refused is not None:
                return self._report(refused)
            vmcs = self.root.current
            assert vmcs is not None
            entered = enter(
                vmcs,
                width=self.width,
                memory=self.memory,
                carried=self.carried,
                cached=self.cached,
                registers=self.registers,
                current=self.root.pointer or 0,
                valid=self.valid,
            )
            if isinstance(entered, NotEntered):
                if entered.error is not None:
                    return self._report(self.root.fail_entry("vmresume" if resume else "vmlaunch", entered))
                exit_ = failed_entry(vmcs, entered, len(self.exits), self.registers, tuple(self.case.watch))
            else:
                self._refuse_other_host_state(vmcs)
                vmcs.launched = True
                resume = True
                entered.budget = self.budget
                try:
                    cause = inject_event(entered) or run_until_exit(entered)
                finally:
                    self.budget = entered.budget
                    self.notes += [note for note in entered.notes if note not in self.notes]
                exit_ = leave(entered, cause, len(self.exits), tuple(self.case.watch))
                self.registers = entered.registers
                self._remember_valid(vmcs.values)
            self.entries += 1
            self._forget_error()
            if first:
                self._report(self.root.succeed(first))
                first = ""
            self.exits.append(exit_)
            done = answer(
                self.policy.choose(exit_), self.root, self.registers, self.cached, self.compiled.eptp
            )
            self.outcomes += done.outcomes
            if done.stopped:
                self.end = "stop"
                return True
        self.end = "limit"
        return True

    def _refuse_other_host_state(self, vmcs: ModelVmcs) -> None:
        """CannotTell where an exit would not lead to the monitor as it is."""
        target = self.compiled.target
        for field, value in host_state(target.monitor, target.capabilities).items():
            if vmcs.get(field) != value:
                raise CannotTell(f"what L1 does after an exit that loads another {field.name}")

    def _forget_error(self) -> None:
        """The monitor reads fields after exits and failed entries: one that is missing sets the error."""
        if self.root.current is not None:
            self.root.current.put(Field.VM_INSTRUCTION_ERROR, NOTHING_KNOWN)

    def _remember_valid(self, values: Mapping[Field, Bits]) -> None:
        """What a VM exit saved can be loaded again, and what was good is so still."""
        self.valid = dict(values)


def _require_mapped(address: int, length: int) -> None:
    """CannotTell for what is no RAM: L1 may not map it."""
    if address + length > layout.MEMORY_BYTES:
        raise CannotTell(f"what L1 finds at machine address {address:#x}")
