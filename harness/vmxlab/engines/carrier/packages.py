"""The packages of the carrier, kept in the cache: which versions, and the files.

Asking apt costs a second or two, so its answer is kept together with the state of the lists that it came
from, and asked again only when that has changed.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from vmxlab import errors
from vmxlab.engines.carrier.apt import Apt, Package, stamp
from vmxlab.engines.carrier.tools import ToolFailed, run, unavailable

_FORMAT = 1
_KERNEL = re.compile(r"linux-image-\d\S*-cloud-amd64$")
_QEMU = "qemu-system-x86"

# By Debian's rule a package is named for the library in it (Debian Policy, 8.1). The exceptions needed here.
_LIBRARY_PACKAGES = {
    "libz.so.1": "zlib1g",
    "libc.so.6": "libc6",
    "libm.so.6": "libc6",
    "ld-linux-x86-64.so.2": "libc6",
}

_NETWORK_ADVICE = (
    "see whether the network is there and whether 'apt-get update' works; the carrier takes "
    "linux-image-cloud-amd64 and qemu-system-x86 from the sources of this host: Debian 12 and newer have them"
)


@dataclass(frozen=True, slots=True)
class Resolution:
    """apt's answer: the packages to choose from, and those that were needed (none: not known yet)."""

    stamp: str
    private: bool
    packages: tuple[Package, ...]
    used: tuple[str, ...] = ()

    def package(self, name: str) -> Package:
        """The package of this name. Raises KeyError."""
        for package in self.packages:
            if package.name == name:
                return package
        raise KeyError(name)

    def __contains__(self, name: str) -> bool:
        return any(package.name == name for package in self.packages)

    @property
    def versions(self) -> dict[str, str]:
        """The versions of the needed packages."""
        return {name: self.package(name).version for name in sorted(self.used)}

    @property
    def kernel(self) -> Package:
        """The package with the kernel. Raises EngineUnavailable."""
        found = [package for package in self.packages if _KERNEL.match(package.name)]
        if not found:
            raise unavailable(
                "the package sources have no kernel linux-image-*-cloud-amd64", advice=_NETWORK_ADVICE
            )
        return found[0]

    @property
    def qemu(self) -> Package:
        """The package with QEMU. Raises EngineUnavailable."""
        if _QEMU not in self:
            raise unavailable(f"the package sources have no {_QEMU}", advice=_NETWORK_ADVICE)
        return self.package(_QEMU)


def package_for(library: str, packages: Iterable[Package]) -> Package | None:
    """The package that a library is in, going by its name; None where that does not tell."""
    wanted = _plain(_LIBRARY_PACKAGES.get(library) or re.sub(r"\.so(\.|$)", "", library))
    # "t64" is what Debian 13 added to some names.
    return next((p for p in packages if _plain(p.name) in (wanted, f"{wanted}t64")), None)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


class PackageCache:
    """The folder with apt's state, its answer, and the packages. One process at a time writes to it."""

    def __init__(self, folder: Path, tell: Callable[[str], None]) -> None:
        self._folder = folder
        self._state = folder / "apt"
        self._packages = folder / "packages"
        self._answer = folder / "resolution.json"
        self._tell = tell

    def current(self) -> Resolution | None:
        """The kept answer, if the lists are still those it came from. Runs nothing."""
        kept = self._kept()
        return kept if kept is not None and kept.stamp == stamp(self._state) else None

    def resolve(self, work: Path) -> Resolution:
        """Ask apt, by the host's lists or else by our own. Raises EngineUnavailable."""
        before = self._kept()
        # Taken before asking: lists that change meanwhile are asked again.
        state = stamp(self._state)
        try:
            answer = Resolution(state, False, Apt(self._state, private=False).closure(work))
        except ToolFailed:
            answer = self._ask_privately(work)
        if before is not None and before.used:
            now = {package.name: package.version for package in answer.packages}
            if all(now.get(name) == version for name, version in before.versions.items()):
                answer = replace(answer, used=before.used)
        self._keep(answer)
        return answer

    def refresh(self, work: Path) -> Resolution:
        """Fetch lists of our own and ask by them: the host's are out of date. Raises EngineUnavailable."""
        answer = self._ask_privately(work)
        self._keep(answer)
        return answer

    def note_used(self, answer: Resolution, used: Iterable[str]) -> Resolution:
        """Keep which packages were needed."""
        answer = replace(answer, used=tuple(sorted(used)))
        self._keep(answer)
        return answer

    def fetch(self, answer: Resolution, packages: Sequence[Package], work: Path) -> None:
        """Have these packages, whole, in the cache. Raises ToolFailed where apt can't get them."""
        missing = [package for package in packages if not package.is_whole(self.path(package))]
        if not missing:
            return
        size = sum(package.size_bytes for package in missing)
        self._tell(f"downloading {', '.join(p.name for p in missing)} ({size / 1e6:.1f} MB)")
        self._packages.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=work, prefix="download-") as name:
            into = Path(name)
            Apt(self._state, private=answer.private).download(missing, into)
            for package in missing:
                if not package.is_whole(into / package.file):
                    raise _bad_download(package)
                (into / package.file).replace(self.path(package))

    def unpack(self, package: Package, tree: Path, work: Path) -> None:
        """Unpack a package that was fetched. A damaged one is removed, so that it is downloaded again."""
        path = self.path(package)
        tree.mkdir(parents=True)
        try:
            run(["dpkg-deb", "-x", str(path), str(tree)], work)
        except ToolFailed as error:
            if package.sha256 and package.is_whole(path):
                raise unavailable(
                    f"the package {path} can't be unpacked: {error.message}", advice=None
                ) from error
            path.unlink(missing_ok=True)
            raise unavailable(
                f"the package {package.file} is damaged and was removed: {error.message}",
                advice="try again: it is downloaded anew",
            ) from error

    def path(self, package: Package) -> Path:
        """Where a package is, or would be."""
        return self._packages / package.file

    def drop_unused(self, answer: Resolution) -> None:
        """Remove the packages that this answer does not need."""
        needed = {answer.package(name).file for name in answer.used}
        for path in self._packages.iterdir():
            if path.name not in needed:
                with contextlib.suppress(OSError):
                    path.unlink()

    # --- apt's answer ----------------------------------------------------------------------------------

    def _ask_privately(self, work: Path) -> Resolution:
        apt = Apt(self._state, private=True)
        self._tell("this host's package lists don't have all that is needed: fetching lists into the cache")
        failed: ToolFailed | None = None
        try:
            apt.update(work)
        except ToolFailed as error:
            # One source of several may be out of reach: what matters is whether the packages are known.
            failed = error
        state = stamp(self._state)
        try:
            packages = apt.closure(work)
        except ToolFailed as error:
            raise not_to_be_had("the packages of the carrier", failed or error) from error
        if not packages:
            raise unavailable("apt-get lists no packages for the carrier", advice=_NETWORK_ADVICE)
        return Resolution(state, True, packages)

    def _kept(self) -> Resolution | None:
        try:
            kept = json.loads(self._answer.read_text())
            if kept["format"] != _FORMAT:
                return None
            packages = tuple(Package(**fields) for fields in kept["packages"])
            answer = Resolution(kept["stamp"], kept["private"], packages, tuple(kept["used"]))
            return answer if all(name in answer for name in answer.used) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _keep(self, answer: Resolution) -> None:
        fields = {"format": _FORMAT, **asdict(answer)}
        new = self._answer.with_suffix(".new")
        new.write_text(json.dumps(fields, indent=1))
        new.replace(self._answer)

    def clean(self) -> None:
        """Remove all of it."""
        self._answer.unlink(missing_ok=True)
        for folder in (self._state, self._packages):
            shutil.rmtree(folder, ignore_errors=True)


def not_to_be_had(what: str, error: ToolFailed) -> errors.EngineUnavailable:
    """The error for packages that apt can't find or can't download, with apt's own words."""
    return unavailable(f"{what} can't be had: {error.message}", advice=_NETWORK_ADVICE)


def _bad_download(package: Package) -> errors.EngineUnavailable:
    return unavailable(
        f"{package.file} came with another size or hash than the package lists say", advice="try again"
    )
