"""``qcore bench``: what is timed, beside what, and how it is reported.

``measure`` times calls side by side, ``floors`` measures what the machine can do at most, ``ops``, ``layers`` and
``host`` say what is timed, ``run`` puts them together, ``report`` and ``plot`` write the result down.
"""
