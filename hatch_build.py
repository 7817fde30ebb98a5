"""Build hook of qcore-quant: parses the C header once, so that importing qcore does not have to."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class PreparseHeader(BuildHookInterface):
    """Writes ``qcore/backend/_abi.py`` before a wheel or an editable install is made."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        # By path: importing the package would import torch, which a build environment does not have.
        path = Path(self.root) / "qcore" / "backend" / "abi.py"
        spec = spec_from_file_location("qcore_abi", path)
        assert spec is not None
        assert spec.loader is not None
        abi = module_from_spec(spec)
        spec.loader.exec_module(abi)
        abi.generate(Path(self.root))
