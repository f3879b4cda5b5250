"""What this program needs of a machine, said in one line before anything is installed.

`python3 requires.py` ends with 0 and says nothing where it can be installed. It runs on any Python
from 3.6 on, whose `pip` would end in an error that names neither Python nor the system.
"""

import os
import platform
import shutil
import subprocess
import sys

OLDEST, NEWEST = (3, 11), (3, 14)  # the Pythons that MLX has wheels for
OLDEST_MACOS = (14, 0)
OLDEST_GLIBC = (2, 35)  # Ubuntu 22.04, Debian 12: what MLX for Linux is built for


def complaint():
    """What is missing, in one line; "" where nothing is."""
    return _of_the_system() or _of_python()


def _of_the_system():
    system, machine = platform.system(), platform.machine()
    if system == "Darwin":
        return _of_a_mac(machine, platform.mac_ver()[0])
    if system != "Linux":
        return f"macOS or Linux is needed, this is {system}: on Windows use WSL 2"
    library, _, version = _c_library().partition(" ")
    if machine not in ("x86_64", "aarch64"):
        return f"an x86-64 or ARM processor of 64 bits is needed, this one is {machine}"
    if library != "glibc" or _numbers(version) < OLDEST_GLIBC:
        return (
            f"Linux with glibc {_dotted(OLDEST_GLIBC)} or newer is needed (Ubuntu 22.04, "
            f"Debian 12), found {_c_library()}: use a newer system or a container"
        )
    return ""


def _c_library():
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or "another C library"
    except ValueError:  # musl does not know the name
        return "another C library"


def _of_a_mac(machine, macos):
    if machine != "arm64":
        return (
            "a Mac with Apple silicon is needed, for MLX has nothing for Intel; this Python runs "
            f"as {machine}: on an Apple-silicon Mac install a native one (python.org, Homebrew)"
        )
    if _numbers(macos) < OLDEST_MACOS:
        return f"macOS {OLDEST_MACOS[0]} or newer is needed by MLX, found macOS {macos}: update it"
    return ""


def _of_python():
    found = sys.version_info[:2]
    if OLDEST <= found <= NEWEST:
        return ""
    others = _others()
    instead = (
        f"{others[0]} is here: begin the command with it instead of python3"
        if others
        else "install one (python.org, or `brew install python@3.13` on a Mac) and begin the "
        "command with its name, as python3.13"
    )
    return (
        f"Python {_dotted(OLDEST)} to {_dotted(NEWEST)} is needed, "
        f"{os.path.basename(sys.executable)} is {platform.python_version()}: {instead}"
    )


def _others():
    """Commands that start a Python which would do, one that most packages know first."""
    names = [f"python3.{minor}" for minor in (13, 12, 14, 11)]
    return [name for name in names if shutil.which(name) and _starts(name)]


def _starts(name):
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.call([name, "-c", ""], **quiet) == 0


def _numbers(version):
    """ "14.5.1" as (14, 5)."""
    parts = [int(part) if part.isdigit() else 0 for part in version.split(".")]
    return (*parts, 0, 0)[:2]


def _dotted(version):
    return ".".join(map(str, version))


if __name__ == "__main__":
    said = complaint()
    if said:
        print(f"mlx-distill cannot be installed here: {said}", file=sys.stderr)
        sys.exit(2)
