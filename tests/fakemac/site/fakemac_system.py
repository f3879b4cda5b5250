"""macOS as Python code sees it: names of the system, what `os` lacks there, files, libraries.

Modules that load libraries of the platform or look at its name while they are imported see Linux
while they are.
"""

import builtins
import contextlib
import ctypes
import errno
import importlib
import importlib.abc
import importlib.util
import io
import os
import platform
import resource
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

# modules that look at the platform while they are imported: some are cheap enough to be first
IMPORTED_FIRST = (
    *("asyncio", "ctypes.util", "locale", "multiprocessing", "pathlib", "selectors", "shutil"),
    *("socket", "ssl", "subprocess", "tempfile", "threading", "urllib.request", "webbrowser"),
    "zoneinfo",
)
SEE_LINUX = ("truststore", "huggingface_hub", "httpx", "psutil", "numpy", "scipy", "torch")
MACOS = os.environ.get("FAKEMAC_MACOS", "15.5")
DARWIN = ("Darwin", "mac.local", "24.5.0", "Darwin Kernel Version 24.5.0", "arm64")
MEMORY = int(float(os.environ.get("FAKEMAC_MEMORY_GB", "32")) * 2**30)
PAGE = 16384
HIDDEN = ("/proc", "/sys")
LINUX_ALONE = (
    *("sched_getaffinity", "sched_setaffinity", "posix_fadvise", "posix_fallocate"),
    *("memfd_create", "eventfd", "pidfd_open", "copy_file_range", "splice", "fdatasync"),
    *("getrandom", "process_cpu_count"),
)
NO_LIBRARY = ("cuda", "openblas", "mkl", "libc.so")
NO_FUNCTION = (
    *("mallopt", "malloc_trim", "mallinfo", "mallinfo2"),
    *("prctl", "sched_getcpu", "gnu_get_libc_version"),
)
ABSENT = object()

_changes: list[tuple[object, str, object, object]] = []  # owner, name, on Linux, on a Mac
_imports_under_way: list[str] = []


def pretend() -> None:
    """From now on this process is on a Mac."""
    for name in IMPORTED_FIRST:
        importlib.import_module(name)
    sys.meta_path.insert(0, _SeesLinux())
    _names()
    _numbers()
    _files()
    _libraries()


def _change(owner: object, name: str, on_a_mac: object) -> None:
    _changes.append((owner, name, getattr(owner, name), on_a_mac))
    _set(owner, name, on_a_mac)


def _set(owner: object, name: str, value: object) -> None:
    if value is ABSENT:
        delattr(owner, name)
    else:
        setattr(owner, name, value)


class _SeesLinux(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] not in SEE_LINUX or name in _imports_under_way:
            return None
        _imports_under_way.append(name)  # the finders after this one are asked
        try:
            spec = importlib.util.find_spec(name)
        finally:
            _imports_under_way.remove(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                with _on_linux(name):
                    load(module)

            spec.loader.exec_module = exec_module
        return spec


@contextlib.contextmanager
def _on_linux(name: str) -> Iterator[None]:
    if not _imports_under_way:
        for owner, attribute, on_linux, _ in _changes:
            _set(owner, attribute, on_linux)
    _imports_under_way.append(f"import {name}")
    try:
        yield
    finally:
        _imports_under_way.pop()
        if not _imports_under_way:
            for owner, attribute, _, on_a_mac in _changes:
                _set(owner, attribute, on_a_mac)


def _names() -> None:
    _change(sys, "platform", "darwin")
    _change(os, "uname", lambda: os.uname_result(DARWIN))
    _change(platform, "system", lambda: "Darwin")
    _change(platform, "machine", lambda: "arm64")
    _change(platform, "processor", lambda: "arm")
    _change(platform, "release", lambda: "24.5.0")
    _change(platform, "mac_ver", lambda *_, **__: (MACOS, ("", "", ""), "arm64"))
    _change(platform, "platform", lambda *_, **__: f"macOS-{MACOS}-arm64-arm-64bit")
    for name in LINUX_ALONE:
        if hasattr(os, name):
            _change(os, name, ABSENT)


def _numbers() -> None:
    sysconf, getrusage = os.sysconf, resource.getrusage

    def macs_sysconf(name: str) -> int:
        if name == "SC_AVPHYS_PAGES":  # macOS has none
            raise ValueError("unrecognized configuration name")
        known = {"SC_PHYS_PAGES": MEMORY // PAGE, "SC_PAGE_SIZE": PAGE, "SC_PAGESIZE": PAGE}
        return known[name] if name in known else sysconf(name)

    def macs_getrusage(who: int) -> resource.struct_rusage:
        values = list(getrusage(who))
        values[2] *= 1024  # the largest resident size: bytes, not kilobytes
        return resource.struct_rusage(values)

    _change(os, "sysconf", macs_sysconf)
    _change(resource, "getrusage", macs_getrusage)


def _files() -> None:
    """/proc and /sys are not there."""

    def refusing(function: Callable) -> Callable:
        def call(*arguments, **keywords):
            if arguments and _is_hidden(arguments[0]):
                missing = os.fspath(arguments[0])
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", missing)
            return function(*arguments, **keywords)

        call.__name__ = function.__name__
        return call

    def denying(function: Callable) -> Callable:
        return lambda path, *more, **keywords: (
            not _is_hidden(path) and function(path, *more, **keywords)
        )

    opens = refusing(builtins.open)
    _change(builtins, "open", opens)
    _change(io, "open", opens)
    for name in ("open", "stat", "lstat", "listdir", "scandir", "readlink"):
        _change(os, name, refusing(getattr(os, name)))
    _change(os, "access", denying(os.access))
    for name in ("exists", "isfile", "isdir"):
        _change(os.path, name, denying(getattr(os.path, name)))


def _is_hidden(path: object) -> bool:
    try:
        text = os.fsdecode(path)
    except TypeError:  # an open file's number
        return False
    return any(text == root or text.startswith(f"{root}/") for root in HIDDEN)


def _libraries() -> None:
    class CDLL(ctypes.CDLL):
        def __init__(self, name, *arguments, **keywords):
            if isinstance(name, str) and ".so" in name and any(n in name for n in NO_LIBRARY):
                raise OSError(f"dlopen({name}): tried: '{name}' (no such file)")
            super().__init__(name, *arguments, **keywords)

        def __getattr__(self, name):
            if name in NO_FUNCTION:
                raise AttributeError(f"dlsym(RTLD_DEFAULT, {name}): symbol not found")
            return super().__getattr__(name)

    _change(ctypes, "CDLL", CDLL)
