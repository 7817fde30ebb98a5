"""Build hook of qcore-bitsandbytes: refuses to be built where bitsandbytes itself is installed."""

from __future__ import annotations

import sys
import sysconfig
from importlib.metadata import Distribution, distributions
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class RefuseBesideBitsandbytes(BuildHookInterface):
    """Looks into the environment of the interpreter that builds, which pip makes the one that is installed into."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        found = installed()
        if found is not None:
            raise RuntimeError(
                f"qcore-bitsandbytes: bitsandbytes {found.version} is installed in {found.locate_file('')}. Two "
                "packages cannot answer to one name: pip uninstall bitsandbytes first. A program that shall use qcore "
                "without this distribution calls qcore.install_as_bitsandbytes()"
            )


def installed() -> Distribution | None:
    """bitsandbytes' distribution in this interpreter's environment; build isolation hides it from sys.path alone."""
    paths = sysconfig.get_paths()
    path = [paths["purelib"], paths["platlib"], *sys.path]
    # With a path given, only the files there are looked at: a stand-in that is installed already does not count.
    return next(iter(distributions(name="bitsandbytes", path=path)), None)
