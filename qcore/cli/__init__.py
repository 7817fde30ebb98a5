"""The ``qcore`` command."""
