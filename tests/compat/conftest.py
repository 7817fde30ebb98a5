"""Tests of the compatibility layers.

Those in ``aliased`` need a process in which bitsandbytes has not been imported; ``test_aliased.py`` runs them there.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("QCORE_ALIASED") == "1" else ["aliased", "aliased/*"]
