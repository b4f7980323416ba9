"""Data sets, a file each: a function of the split and options that returns a torch data set."""

from composer_gradmatch.data.digits import digits

__all__ = ["digits"]
