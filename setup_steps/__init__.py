"""The modules behind steps 1 to 3, the repair of the statistics and quickstart.

They load on a machine where step 1 has not run yet: at import they use the standard library, and of the library its
`errors`, `console`, `files` and `hub.registry`. An older Python ends here, before it meets what it cannot parse or
import.
"""

import sys

OLDEST_PYTHON = (3, 10)

if sys.version_info[:2] < OLDEST_PYTHON:
    sys.exit(
        f"error: this is Python {'.'.join(map(str, sys.version_info[:3]))}, 3.10 or newer is needed; "
        "fix: install Python 3.10 or newer and run the same script with it"
    )
