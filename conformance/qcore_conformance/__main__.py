"""``python -m qcore_conformance``: the command, where its script is not on the path."""

from __future__ import annotations

from qcore_conformance.cli import main

main()
