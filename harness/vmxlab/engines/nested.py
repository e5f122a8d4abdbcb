"""Is nested VMX here? Asked of KVM itself, in two milliseconds, without starting a machine.

The order: open /dev/kvm; KVM_GET_API_VERSION; KVM_GET_SUPPORTED_CPUID, leaf 1, ECX bit 5 (what KVM would
give a guest: this decides); the module's parameter `nested`, which only explains; KVM_GET_MSRS on the system
descriptor for the VMX capability MSRs. Never the host's own CPUID, which says nothing about guests.

Linux, Documentation/virt/kvm/api.rst. SDM Vol. 3C, 24.6 "Discovering Support for VMX".
"""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

KVM_API_VERSION = 12
KVM_GET_API_VERSION = 0xAE00
KVM_GET_SUPPORTED_CPUID = 0xC008AE05
KVM_GET_MSRS = 0xC008AE88

# The capability MSRs that KVM knows as features: IA32_VMX_BASIC to IA32_VMX_VMFUNC (SDM Vol. 3D, App. A).
VMX_CAPABILITY_MSRS = range(0x480, 0x492)

_CPUID_VMX_BIT = 5
_CPUID_HEADER = struct.Struct("<II")
_CPUID_ENTRY = struct.Struct("<10I")
_CPUID_ENTRIES = 256
_MSRS = struct.Struct("<IIIIQ")

_OTHER_WAY = "engine bochs needs none of this"


class NestedProblem(enum.Enum):
    """Why there is no nested VMX."""

    NO_DEVICE = enum.auto()
    NO_PERMISSION = enum.auto()
    DENIED = enum.auto()
    NO_MODULE = enum.auto()
    NO_API = enum.auto()
    NOT_INTEL = enum.auto()
    NESTED_OFF = enum.auto()
    CPUID_WITHOUT_VMX = enum.auto()
    MSRS_REFUSED = enum.auto()


Ioctl = Callable[[int, int, bytearray], int]


def _ioctl(descriptor: int, request: int, argument: bytearray) -> int:
    # KVM_GET_API_VERSION takes no argument, and refuses one.
    result: int = (
        fcntl.ioctl(descriptor, request, argument, True) if argument else fcntl.ioctl(descriptor, request)
    )
    return result


@dataclass(frozen=True, slots=True)
class Host:
    """Where to ask. `ioctl` fills its argument in place and returns the call's result, or raises OSError."""

    device: Path = Path("/dev/kvm")
    modules: Path = Path("/sys/module")
    cpuinfo: Path = Path("/proc/cpuinfo")
    container_marks: tuple[Path, ...] = (Path("/.dockerenv"), Path("/run/.containerenv"))
    ioctl: Ioctl = _ioctl

    def processor(self) -> tuple[str, frozenset[str]]:
        """The processor's vendor ("GenuineIntel") and its flags; empty where they are not shown."""
        vendor, flags = "", frozenset[str]()
        try:
            text = self.cpuinfo.read_text(encoding="ascii", errors="replace")
        except OSError:
            return vendor, flags
        for line in text.splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "vendor_id":
                vendor = vendor or value.strip()
            elif name.strip() == "flags":
                flags = flags or frozenset(value.split())
        return vendor, flags

    def nested_parameter(self) -> str | None:
        """What kvm_intel's parameter `nested` says ("Y", "N", older: "1", "0"); None without that module."""
        try:
            return (self.modules / "kvm_intel/parameters/nested").read_text(encoding="ascii").strip()
        except OSError:
            return None

    def has_module(self, name: str) -> bool:
        """Whether a kernel module is there, loaded or built in."""
        return (self.modules / name).exists()

    def in_container(self) -> bool:
        """Whether this looks like a container."""
        return any(mark.exists() for mark in self.container_marks)


@dataclass(frozen=True, slots=True)
class NestedVmx:
    """The answer. `msrs` are the VMX capability MSRs that KVM would show a guest, by number."""

    problem: NestedProblem | None
    message: str
    advice: str | None = None
    msrs: Mapping[int, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nested VMX is proven."""
        return self.problem is None


def probe(host: Host | None = None) -> NestedVmx:
    """Find out whether a guest of this host's KVM gets VMX. Never raises for a host that has none."""
    host = host or Host()
    try:
        descriptor = os.open(host.device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return _not_opened(host, error)
    try:
        return _ask(host, descriptor)
    finally:
        os.close(descriptor)


def _ask(host: Host, descriptor: int) -> NestedVmx:
    try:
        version = host.ioctl(descriptor, KVM_GET_API_VERSION, bytearray())
    except OSError as error:
        return _no_api(host, f"does not answer KVM_GET_API_VERSION ({error.strerror})")
    if version != KVM_API_VERSION:
        return _no_api(host, f"speaks version {version} of KVM's interface, not {KVM_API_VERSION}")
    try:
        ecx = _supported_ecx(host, descriptor)
    except OSError as error:
        return _no_api(host, f"does not answer KVM_GET_SUPPORTED_CPUID ({error.strerror})")
    if not ecx >> _CPUID_VMX_BIT & 1:
        return _cpuid_without_vmx(host)
    msrs = _capability_msrs(host, descriptor)
    if VMX_CAPABILITY_MSRS.start not in msrs:
        return NestedVmx(
            NestedProblem.MSRS_REFUSED,
            "KVM shows CPUID.VMX to guests, but refuses to tell its VMX capability MSRs (KVM_GET_MSRS)",
            f"a Linux kernel of 4.17 or later with kvm_intel is needed; {_OTHER_WAY}",
        )
    return NestedVmx(None, "KVM gives its guests VMX", msrs=msrs)


def _supported_ecx(host: Host, descriptor: int) -> int:
    # struct kvm_cpuid2: nent, padding; then entries: function, index, flags, eax, ebx, ecx, edx, padding[3].
    buffer = bytearray(_CPUID_HEADER.size + _CPUID_ENTRIES * _CPUID_ENTRY.size)
    _CPUID_HEADER.pack_into(buffer, 0, _CPUID_ENTRIES, 0)
    host.ioctl(descriptor, KVM_GET_SUPPORTED_CPUID, buffer)
    count = min(_CPUID_HEADER.unpack_from(buffer)[0], _CPUID_ENTRIES)
    for number in range(count):
        entry = _CPUID_ENTRY.unpack_from(buffer, _CPUID_HEADER.size + number * _CPUID_ENTRY.size)
        if entry[0] == 1:
            return int(entry[5])
    return 0


def _capability_msrs(host: Host, descriptor: int) -> dict[int, int]:
    # One at a time: a call for many stops at the first that is missing (VMFUNC, on older processors).
    found = {}
    for number in VMX_CAPABILITY_MSRS:
        buffer = bytearray(_MSRS.pack(1, 0, number, 0, 0))
        try:
            count = host.ioctl(descriptor, KVM_GET_MSRS, buffer)
        except OSError:
            continue
        if count == 1:
            found[number] = int(_MSRS.unpack(buffer)[4])
    return found


def _not_opened(host: Host, error: OSError) -> NestedVmx:
    where = host.device
    if error.errno in {errno.ENOENT, errno.ENOTDIR}:
        return NestedVmx(NestedProblem.NO_DEVICE, f"there is no {where}", _advice_without_device(host))
    if error.errno == errno.EACCES:
        return NestedVmx(
            NestedProblem.NO_PERMISSION,
            f"{where} is there, but this user may not open it",
            'join its group and log in again: sudo usermod -aG kvm "$USER"',
        )
    if error.errno == errno.EPERM:
        return NestedVmx(
            NestedProblem.DENIED,
            f"{where} is there, but the system denies it to this process, whoever runs it",
            f"a container must be given it: docker run --device {where} ...; {_OTHER_WAY}",
        )
    return NestedVmx(
        NestedProblem.NO_MODULE,
        f"{where} is there, but nothing answers behind it ({error.strerror})",
        _advice_without_device(host),
    )


def _advice_without_device(host: Host) -> str:
    vendor, flags = host.processor()
    if host.in_container():
        way = (
            f"this is a container: if its host has the device, give it: docker run --device {host.device} ..."
        )
    elif vendor and "vmx" not in flags and vendor != "GenuineIntel":
        way = f"the processor is {vendor}: it has no VMX (AMD's SVM is another thing), use an Intel host"
    elif "vmx" in flags:
        way = "load the module: sudo modprobe kvm_intel nested=1"
    elif "hypervisor" in flags:
        way = "this is a virtual machine: turn on nested virtualization for it on its host"
    else:
        way = (
            "enable VT-x (Virtualization Technology) in the firmware, then: sudo modprobe kvm_intel nested=1"
        )
    return f"{way}; {_OTHER_WAY}"


def _no_api(host: Host, what: str) -> NestedVmx:
    return NestedVmx(NestedProblem.NO_API, f"{host.device} {what}: this is not Linux's KVM", _OTHER_WAY)


def _cpuid_without_vmx(host: Host) -> NestedVmx:
    vendor, _ = host.processor()
    nested = host.nested_parameter()
    if nested in {"N", "0"}:
        return NestedVmx(
            NestedProblem.NESTED_OFF,
            f"kvm_intel is loaded with nested={nested}: its guests get no VMX",
            "turn it on, with no virtual machine running: "
            "sudo modprobe -r kvm_intel && sudo modprobe kvm_intel nested=1; "
            "for good: echo 'options kvm_intel nested=1' | sudo tee /etc/modprobe.d/kvm-nested.conf",
        )
    if nested is None and host.has_module("kvm_amd"):
        return NestedVmx(
            NestedProblem.NOT_INTEL,
            f"the processor is {vendor or 'not Intel'}: KVM gives its guests SVM, which is not VMX",
            f"use a host with an Intel processor; {_OTHER_WAY}",
        )
    behind = "kvm_intel" if nested is not None else "neither kvm_intel nor kvm_amd"
    return NestedVmx(
        NestedProblem.CPUID_WITHOUT_VMX,
        "KVM is here, but the CPUID that it gives its guests shows no VMX "
        f"(processor {vendor or 'unknown'}, module behind it: {behind})",
        f"use a host whose KVM is kvm_intel with nested=1, on hardware or with VMX given to it; {_OTHER_WAY}",
    )
