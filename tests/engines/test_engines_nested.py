"""Is nested VMX here? Each answer, simulated; and this host's own, whatever it is."""

import errno
import os
import stat
import struct

import pytest

from vmxlab import errors
from vmxlab.engines import kvm, nested
from vmxlab.engines.kvm import KvmEngine
from vmxlab.engines.nested import Host, NestedProblem, probe

INTEL = "vendor_id\t: GenuineIntel\nflags\t\t: fpu {}\n"
INTEL_VMX = INTEL.format("vmx")
AMD = "vendor_id\t: AuthenticAMD\nflags\t\t: fpu svm\n"


@pytest.fixture
def host(tmp_path):
    """host(...) -> a Host all of whose sources are made up."""

    def make(*, cpuinfo=INTEL_VMX, nested_is=None, modules=(), container=False, ecx=1 << 5, **ioctl):
        device = tmp_path / "kvm"
        device.touch()
        (tmp_path / "cpuinfo").write_text(cpuinfo)
        for module in modules:
            (tmp_path / "modules" / module / "parameters").mkdir(parents=True)
        if nested_is is not None:
            parameters = tmp_path / "modules" / "kvm_intel" / "parameters"
            parameters.mkdir(parents=True, exist_ok=True)
            (parameters / "nested").write_text(f"{nested_is}\n")
        if container:
            (tmp_path / "mark").touch()
        return Host(
            device=device,
            modules=tmp_path / "modules",
            cpuinfo=tmp_path / "cpuinfo",
            container_marks=(tmp_path / "mark",),
            ioctl=FakeKvm(ecx=ecx, **ioctl),
        )

    return make


class FakeKvm:
    """What KVM's system descriptor answers."""

    def __init__(self, *, ecx, version=12, msrs=nested.VMX_CAPABILITY_MSRS, refuse=()):
        self.ecx = ecx
        self.version = version
        self.msrs = msrs
        self.refuse = refuse

    def __call__(self, descriptor, request, argument):
        if request in self.refuse:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        if request == nested.KVM_GET_API_VERSION:
            assert not argument
            return self.version
        if request == nested.KVM_GET_SUPPORTED_CPUID:
            room = struct.unpack_from("<I", argument)[0]
            assert len(argument) == 8 + 40 * room
            struct.pack_into("<I", argument, 0, 2)
            struct.pack_into("<7I", argument, 8, 0, 0, 0, 0x16, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
            struct.pack_into("<7I", argument, 48, 1, 0, 0, 0x50654, 0, self.ecx, 0)
            return 0
        assert request == nested.KVM_GET_MSRS
        count, number = struct.unpack_from("<I4xI", argument)
        assert (count, len(argument)) == (1, 24)
        if number not in self.msrs:
            return 0
        struct.pack_into("<Q", argument, 16, number * 0x1_0000_0001)
        return 1


def refusing(number):
    """An os.open that fails for the device in this way."""
    real = os.open

    def open_(path, *rest, **options):
        if str(path).endswith("kvm"):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *rest, **options)

    return open_


def test_proven_nested_vmx_brings_the_capability_msrs(host):
    found = probe(host(nested_is="Y", msrs=range(0x480, 0x491)))
    assert found.ok
    assert found.problem is None
    assert sorted(found.msrs) == list(range(0x480, 0x491))  # an older processor: no VMFUNC
    assert found.msrs[0x480] == 0x480_0000_0480


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"cpuinfo": INTEL.format("vmx")}, "modprobe kvm_intel nested=1"),
        ({"cpuinfo": INTEL.format("")}, "enable VT-x"),
        ({"cpuinfo": INTEL.format("hypervisor")}, "nested virtualization"),
        ({"cpuinfo": AMD}, "SVM"),
        ({"cpuinfo": ""}, "enable VT-x"),
        ({"container": True}, "--device"),
    ],
)
def test_no_device(host, options, advice):
    made = host(**options)
    made.device.unlink()
    found = probe(made)
    assert found.problem is NestedProblem.NO_DEVICE
    assert "there is no" in found.message
    assert advice in found.advice


@pytest.mark.parametrize(
    ("number", "problem", "advice"),
    [
        (errno.EACCES, NestedProblem.NO_PERMISSION, "usermod -aG kvm"),
        (errno.EPERM, NestedProblem.DENIED, "--device"),
        (errno.ENODEV, NestedProblem.NO_MODULE, "modprobe kvm_intel"),
        (errno.ENXIO, NestedProblem.NO_MODULE, "modprobe kvm_intel"),
    ],
)
def test_device_that_does_not_open(host, monkeypatch, number, problem, advice):
    made = host()
    monkeypatch.setattr(nested.os, "open", refusing(number))
    found = probe(made)
    assert found.problem is problem
    assert advice in found.advice


@pytest.mark.parametrize(
    "options",
    [{"version": 11}, {"refuse": [nested.KVM_GET_API_VERSION]}, {"refuse": [nested.KVM_GET_SUPPORTED_CPUID]}],
)
def test_device_that_is_not_kvm(host, options):
    found = probe(host(**options))
    assert found.problem is NestedProblem.NO_API
    assert "not Linux's KVM" in found.message


@pytest.mark.parametrize("value", ["N", "0"])
def test_nested_turned_off(host, value):
    found = probe(host(ecx=0, nested_is=value))
    assert found.problem is NestedProblem.NESTED_OFF
    assert f"nested={value}" in found.message
    assert "modprobe -r kvm_intel && sudo modprobe kvm_intel nested=1" in found.advice
    assert "options kvm_intel nested=1" in found.advice


def test_parameter_explains_but_does_not_decide(host):
    assert probe(host(ecx=1 << 5, nested_is="N")).ok
    assert not probe(host(ecx=0, nested_is="Y")).ok


def test_amd_processor(host):
    found = probe(host(ecx=0, cpuinfo=AMD, modules=["kvm_amd"]))
    assert found.problem is NestedProblem.NOT_INTEL
    assert "AuthenticAMD" in found.message
    assert "SVM, which is not VMX" in found.message


@pytest.mark.parametrize(("options", "behind"), [({"nested_is": "Y"}, "kvm_intel"), ({}, "neither")])
def test_cpuid_without_vmx(host, options, behind):
    found = probe(host(ecx=~(1 << 5) & 0xFFFFFFFF, **options))
    assert found.problem is NestedProblem.CPUID_WITHOUT_VMX
    assert behind in found.message


@pytest.mark.parametrize("options", [{"refuse": [nested.KVM_GET_MSRS]}, {"msrs": ()}])
def test_capability_msrs_refused(host, options):
    found = probe(host(**options))
    assert found.problem is NestedProblem.MSRS_REFUSED
    assert "KVM_GET_MSRS" in found.message


def test_each_problem_has_its_own_message_and_advice(host, monkeypatch):
    answers = [probe(host(ecx=0, nested_is="N")), probe(host(msrs=()))]
    for number in (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENODEV):
        monkeypatch.setattr(nested.os, "open", refusing(number))
        answers.append(probe(host()))
    assert len({answer.message for answer in answers}) == len(answers)
    assert all(answer.advice for answer in answers)


def test_this_host_gives_a_consistent_answer():
    real = Host()
    found = probe()
    vendor, flags = real.processor()
    if found.ok:
        assert found.msrs[0x480] & 0x7FFFFFFF, "a VMCS revision identifier"
        assert real.nested_parameter() not in {"N", "0"}
        return
    assert found.advice
    assert not found.msrs
    exists = real.device.exists() and stat.S_ISCHR(real.device.stat().st_mode)
    assert (found.problem is NestedProblem.NO_DEVICE) == (not exists)
    if found.problem is NestedProblem.NESTED_OFF:
        assert real.nested_parameter() in {"N", "0"}
    if found.problem is NestedProblem.NOT_INTEL:
        assert vendor != "GenuineIntel"
        assert "vmx" not in flags


def test_engine_refuses_with_the_reason_and_starts_nothing(host, rom, tmp_path):
    engine = KvmEngine(host(ecx=0, nested_is="N"))
    state = engine.availability()
    assert not state.ok
    assert "nested=N" in state.problem
    with pytest.raises(errors.EngineUnavailable, match="kvm_intel is loaded with nested=N") as caught:
        engine.open(rom("idle"), log_dir=tmp_path / "logs")
    assert caught.value.engine == "kvm"
    assert "modprobe" in caught.value.advice
    assert not (tmp_path / "logs").exists()


def test_engine_on_a_host_that_only_claims_nested_vmx_does_not_fall_back(host, rom, tmp_path):
    if probe().ok:
        pytest.skip("this host has nested VMX")
    claims = KvmEngine(host(nested_is="Y"))
    if not claims.availability().ok:
        pytest.skip(f"kvm: {claims.availability().problem}")
    with pytest.raises(errors.EngineUnavailable, match="did not come up"):
        claims.open(rom("idle"), log_dir=tmp_path)


def test_engine_has_only_the_hosts_model():
    assert KvmEngine().models() == ("host",)
    assert KvmEngine().has_vmx()
    assert not KvmEngine().has_vmx("host,-vmx")
    assert kvm.KvmEngine.l2_budget_tsc == 1 << 32
