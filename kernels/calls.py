"""CPU operators that torch's dispatcher calls in C++, without a word of Python.

A small call through Python takes longer than its row: arguments become Python objects, checks,
allocation and ctypes look at each, 8 to 30 us in all.  ``kernels/<op>/call.cpp`` does the same in
about 1, through torch's stable C interface (under a second to compile), and stands in the
dispatcher, for CPU tensors, before the Python implementation, which stays for all that has no
such file.  What it computes is what ``cpu.cpp`` computes: it holds the addresses of its functions.
"""

from __future__ import annotations

import ctypes
import threading

from . import build
from .op import KernelError

_ASK = ctypes.CFUNCTYPE(None)


class Call:
    """One operation's ``call.cpp``, installed."""

    def __init__(self, name: str, library: ctypes.CDLL):
        self.name = name
        self.failure: Exception | None = None
        self._bind = library.bind_symbol
        self._bind.argtypes, self._bind.restype = (ctypes.c_int, ctypes.c_void_p), None
        self.symbols = _names(library)
        self._bind_all()  # built before torch knows of it
        self._asked = _ASK(self._resolve)  # C++ keeps its address: it must live as long
        if library.install(self._asked):
            raise KernelError(f"{name}: torch did not take its C++ call; take impl='reference'")
        build.ON_CHANGE.append(self.forget)

    def _bind_all(self) -> None:
        """Hand over the addresses of the functions for the current instruction set."""
        for i, symbol in enumerate(self.symbols):
            self._bind(i, build.cpu_address(self.name, symbol))

    def _resolve(self) -> None:
        """The same for C++, through which no exception passes: the caller raises it."""
        try:
            self._bind_all()
        except Exception as failure:
            self.failure = failure

    def forget(self) -> None:
        """Ask for the functions again at the next call."""
        for i in range(len(self.symbols)):
            self._bind(i, None)


def _names(library: ctypes.CDLL) -> list[str]:
    """The strings of the library's ``symbols``, up to its null pointer."""
    names, at = [], ctypes.addressof(ctypes.c_char_p.in_dll(library, "symbols"))
    while name := ctypes.c_char_p.from_address(at).value:
        names.append(name.decode())
        at += ctypes.sizeof(ctypes.c_char_p)
    return names


_CALLS: dict[str, Call | None] = {}
_LOCK = threading.Lock()


def install(name: str) -> None:
    """Let torch call the operation ``name`` in C++ from now on, where it has a ``call.cpp``.

    Builds its kernels.  To be called before anyone calls the operator: torch's tables are not to
    change under a call.  Raises ``KernelError`` when a build fails.
    """
    with _LOCK:
        if name in _CALLS:
            return
        library = build.call_library(name)
        _CALLS[name] = None if library is None else Call(name, library)


def failure_of(name: str) -> Exception | None:
    """What kept C++ from its kernels at the last call, once."""
    call = _CALLS.get(name)
    if call is None:
        return None
    failure, call.failure = call.failure, None
    return failure


def is_installed(name: str) -> bool:
    """Whether torch calls the operation ``name`` in C++."""
    return _CALLS.get(name) is not None
