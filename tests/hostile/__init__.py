"""Files that no encoder writes: each format's odd and broken forms, bombs, and mutations of all of them.

A bomb costs far more than its size: each took seconds or gigabytes of some release of a library.

Each format has a module with functions that write its parts, and four tables of makers by what is odd about the file:
READABLE ones give pixels, BROKEN ones are refused, BOMBS are refused at little cost, and HARMLESS_BOMBS give pixels at
little cost, since their expensive part is ignored.
"""

from hostile.cases import BOMBS, HARMLESS_BOMBS, ODD
from hostile.mutations import mutant
from hostile.parts import SMALL

__all__ = ["BOMBS", "HARMLESS_BOMBS", "ODD", "SMALL", "mutant"]
