"""Uses of other libraries beyond their documented interfaces, one module per library.

Each function or constant names what it depends on and since which version, and offers one form that holds in
every supported version. No other file reads a private name, a version or a message text of these libraries.
`versions` lists the supported versions; `mechanism/self_check.py` checks a version that is not listed.
"""

from .versions import check_not_too_old

check_not_too_old()  # before any import of a name that older versions do not have
