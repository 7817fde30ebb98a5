"""Makes ``import bitsandbytes`` mean qcore: imported by ``qcore_bitsandbytes.pth`` when an interpreter starts.

What it costs is one finder in ``sys.meta_path``: neither torch nor the rest of qcore is imported.
"""

from qcore.compat.alias import install_for_environment

install_for_environment()
