"""How much memory there is, so that what cannot fit is refused before it is asked for."""

import os


def memory() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
