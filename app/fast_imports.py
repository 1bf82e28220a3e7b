"""Imports of large libraries without the garbage collector.

A module that runs as a process imports this module first, and calls `imports_done` after its other
imports. torch and transformers create half a million objects that live as long as the process.
Collections during their imports free nothing, and take a fifth of the time.
"""

import gc

gc.disable()


def imports_done() -> None:
    """Switches the garbage collector on, and spares it the objects that exist now."""
    gc.freeze()
    gc.enable()
