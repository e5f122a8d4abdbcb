"""`vmxlab carrier`: what the engine kvm-in-bochs boots, built where it is missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from vmxlab.cli.common import Status, json_option
from vmxlab.cli.output import Output, say, write_json

if TYPE_CHECKING:
    from vmxlab.engines.carrier.image import CarrierImage


@click.command()
@json_option
@click.option("--clean", is_flag=True, help="Remove the cached carriers and packages, and build nothing.")
def carrier(as_json: bool, clean: bool) -> int:
    """Build the carrier of kvm-in-bochs, and say what is in it.

    It is Debian's kernel with KVM and Debian's QEMU, as a memory image that Bochs starts. The packages are
    downloaded and unpacked into the user's cache folder; nothing is installed. What is there is not built
    again.
    """
    from vmxlab.engines.carrier import image as carriers

    if clean:
        folder = carriers.clean(tell=say)
        if as_json:
            write_json({"removed": str(folder)})
        else:
            click.echo(f"removed the carriers and packages in {folder}")
        return Status.PASS

    from vmxlab.image.monitor import load_carrier_parts

    built = carriers.carrier_image(load_carrier_parts(), tell=say)
    facts = carriers.manifest_of(built)
    if as_json:
        write_json({"memory": str(built.memory), "rom": str(built.rom), **facts})
    else:
        _show(built, facts)
    return Status.PASS


def _show(built: CarrierImage, facts: Mapping[str, Any]) -> None:
    output = Output()
    packages = [f"{name} {version}" for name, version in built.packages.items()]
    output.pairs(
        [
            ("Linux", f"{built.linux} ({built.release})"),
            ("QEMU", built.qemu),
            ("kernel", _megabytes(facts["kernel_bytes"])),
            ("initramfs", _megabytes(facts["initramfs_bytes"])),
            ("memory", f"{built.memory} ({_megabytes(built.memory.stat().st_size)})"),
            ("rom", str(built.rom)),
            *zip(["packages", *[""] * len(packages)], packages, strict=False),
        ]
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
