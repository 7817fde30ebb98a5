"""The conformance suite: is this backend right?

``qcore-conformance run --backend B`` runs the cases of :mod:`qcore_conformance.cases` on a backend. A case states what
a clause of ``docs/spec/`` demands; its inputs come from :mod:`~qcore_conformance.generators`, the truth from
:mod:`~qcore_conformance.oracle`, and every call goes through :mod:`~qcore_conformance.guards`.
"""

SPEC_VERSION = "1.0"
