"""What a device's times say about it: experiments chosen, repeated and checked, and quantities or reasons against."""

from npulab.gpu.analysis.conclude import conclude

__all__ = ["conclude"]
