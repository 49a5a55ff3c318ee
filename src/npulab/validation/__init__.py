"""Whether a finished network of integers is one that a target takes: read from the file, apart from what made it."""

from npulab.validation.checks import Violation, violations

__all__ = ["Violation", "violations"]
