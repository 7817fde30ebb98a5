"""``qcore shim``."""

from __future__ import annotations

from dataclasses import asdict

import click

from qcore.cli.console import console
from qcore.compat.alias import DISTRIBUTION
from qcore.compat.metadata import shim_status


@click.group("shim")
def command() -> None:
    """Say what `import bitsandbytes` means here: bitsandbytes, qcore in its place, or nothing."""


@command.command("status")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def status(as_json: bool) -> None:
    """Show what is installed, what `import bitsandbytes` resolves to, and how to change that."""
    found = shim_status()
    if as_json:
        console().print_json(data=asdict(found))
        return
    out = console()
    out.print(f"{DISTRIBUTION}: {found.distribution or 'not installed'}", soft_wrap=True)
    out.print(f"bitsandbytes itself: {found.real or 'not installed'}", soft_wrap=True)
    out.print(f"active: {'yes' if found.active else 'no'}", soft_wrap=True)
    out.print(f"import bitsandbytes gives {found.resolves_to}", soft_wrap=True)
    out.print(f"to change it: {found.undo}", soft_wrap=True)
