"""Files that no encoder writes: odd and broken files of each format, bombs, and mutations of readable files.

A bomb costs far more than its size suggests: each took seconds or gigabytes in some release of a library.

Each format has a module with functions that write parts of a file, and four tables. Their keys say what is odd about a
file, their values make it. READABLE files give pixels, BROKEN ones are refused, BOMBS are refused at little cost, and
HARMLESS_BOMBS give pixels at little cost, since their expensive part is ignored.
"""

from hostile.cases import BOMBS, HARMLESS_BOMBS, ODD
from hostile.mutations import mutant
from hostile.parts import SMALL

__all__ = ["BOMBS", "HARMLESS_BOMBS", "ODD", "SMALL", "mutant"]
