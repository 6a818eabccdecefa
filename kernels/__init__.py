"""Triton kernels of fastres, imported as ``fastres.kernels``."""

if __name__ != "fastres.kernels":
    raise ImportError(
        f"this folder was imported as {__name__!r}; import it as 'fastres.kernels' "
        "(a second copy would register the same custom operators twice)"
    )
