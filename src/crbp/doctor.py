"""`crbp doctor`: what is installed and what the machine has, and what to do where training would not work.

It needs torch alone, since it is for the day on which something else is missing.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import re
import subprocess
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

import crbp
from crbp._command import Parser
from crbp.data._parallel import cores
from crbp.ops import _native

Found = dict[str, Any]

_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[[\w,-]+\])?>=([\d.]+)(?:; extra == '([\w-]+)')?$")
_TRAINING = ("", "data", "train")  # the extras that training needs; the last brings the others
_USES = {"train": "crbp.tasks", "panoptic": "crbp.models.panoptic"}  # what proves that an extra can be used


class Requirement(NamedTuple):
    """A package that crbp asks for: its name, the lowest version, and the smallest extra it belongs to, if any."""

    name: str
    lowest: str
    extra: str


def main(arguments: list[str]) -> int:
    """Print what was found.

    Returns:
        0 where training would work, 1 where it would not.
    """
    options = parser().parse_args(arguments)
    found = examine()
    print(json.dumps(found, indent=2) if options.json else _told(found))
    return 0 if found["works"] else 1


def parser() -> argparse.ArgumentParser:
    """The command's parser."""
    made = Parser(prog="crbp doctor", description="Say what is installed, what is missing and what the machine has.")
    made.add_argument("--json", action="store_true", help="print it as JSON")
    return made


def examine() -> Found:
    """All that the command tells, as JSON can hold it; ``works`` says whether training would."""
    packages = [_package(each) for each in requirements()]
    faults = {extra: fault for extra in _USES if (fault := _fault(extra, packages))}
    return {
        "crbp": crbp.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": packages,
        "faults": faults,
        "devices": _devices(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory": _memory(),
        "native": _native_code(),
        "cache": _cache(),
        "works": bool(packages) and not _lacking(packages, _TRAINING) and "train" not in faults,
    }


def requirements() -> list[Requirement]:
    """What the installed crbp says that it asks for; nothing where it runs from its source without being installed."""
    try:
        lines = metadata.requires("crbp") or []
    except metadata.PackageNotFoundError:
        return []
    matches = [match for line in lines if (match := _REQUIREMENT.match(line.replace('"', "'")))]
    extras = [match[3] for match in matches if match[3]]
    by_size = sorted({*extras} - {"all"}, key=lambda extra: (extras.count(extra), extra))
    found: dict[str, Requirement] = {}
    for extra in ("", *by_size):
        for match in matches:
            if (match[3] or "") == extra:
                found.setdefault(match[1], Requirement(match[1], match[2], extra))
    return list(found.values())


def _package(asked: Requirement) -> Found:
    line = f"pip install 'crbp[{asked.extra}]'" if asked.extra else f"pip install '{asked.name}>={asked.lowest}'"
    try:
        version = metadata.version(asked.name)
    except metadata.PackageNotFoundError:
        version = None
    fine = version is not None and _numbers(version) >= _numbers(asked.lowest)
    return {**asked._asdict(), "version": version, "remedy": None if fine else line}


def _lacking(packages: list[Found], extras: tuple[str, ...]) -> list[Found]:
    return [each for each in packages if each["remedy"] and each["extra"] in extras]


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version.split("+")[0])]


def _fault(extra: str, packages: list[Found]) -> str | None:
    """Why an extra of which all is installed cannot be imported, as where two of its packages do not fit together."""
    if _lacking(packages, (*_TRAINING, extra)):
        return None
    try:
        import_module(_USES[extra])
    except Exception as error:  # a broken package fails in any way
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _devices() -> list[str]:
    names = ["cpu"]
    for index in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(index)
        names.append(f"cuda:{index} {of.name}, {_gib(of.total_memory)}")
    return [*names, *(["mps"] if torch.backends.mps.is_available() else [])]


def _memory() -> Found:
    """Bytes of the machine, and those free for a new program where the system tells."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        free = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"))
    except (AttributeError, ValueError, OSError):  # no Linux
        return {"total": None, "available": None}
    return {"total": total, "available": int(free[1]) * 1024 if free else None}


def _native_code() -> Found:
    """The compiler, and the native code, which is built here if it is not in the cache yet."""
    compiler, library, fault = None, None, None
    try:
        compiler = " ".join(_native.compiler())
        library = _native.build()
        ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        fault = _native.reason(error)
    return {"compiler": compiler, "library": None if fault else str(library), "fault": fault}


def _cache() -> Found:
    try:
        return {"folder": str(_native.writable(_native.user_cache())), "fault": None}
    except (OSError, RuntimeError) as error:
        return {"folder": None, "fault": f"{error}; set XDG_CACHE_HOME to a folder that can be written"}


def _told(found: Found) -> str:
    memory, native, cache = found["memory"], found["native"], found["cache"]
    lines = [f"crbp {found['crbp']}, Python {found['python']}, {found['system']}", "", "packages"]
    for each in found["packages"]:
        state = each["version"] or "missing"
        told = f"at least {each['lowest']} is needed; run: {each['remedy']}" if each["remedy"] else ""
        lines.append(f"  {each['name']:<18}{state:<18}{each['extra'] or 'always':<10}{told}".rstrip())
    if not found["packages"]:
        lines.append("  unknown: crbp is not installed; run: pip install -e '.[train]' in its checkout")
    lines += [f"  {extra}: cannot be imported: {fault}" for extra, fault in found["faults"].items()]
    sizes = ", ".join(f"{_gib(size)} {what}" for what, size in memory.items() if size is not None)
    lines += ["", "machine", f"  devices           {'; '.join(found['devices'])}"]
    lines += [f"  cores, threads    {found['cores']} to use, {found['threads']} used by torch"]
    lines += [f"  memory            {sizes or 'unknown'}"]
    lines += [f"  C++ compiler      {native['compiler'] or 'missing: cells and convolutions are slower'}"]
    lines += [f"  native code       {native['library'] or 'cannot be built: ' + native['fault']}"]
    lines += [f"  cache             {cache['folder'] or 'cannot be written: ' + cache['fault']}", ""]
    return "\n".join(
        [*lines, f"Training does not work: {_trouble(found)}" if not found["works"] else "Training works."]
    )


def _trouble(found: Found) -> str:
    lacking = _lacking(found["packages"], _TRAINING)
    if not lacking:
        return found["faults"].get("train") or "it is not known what is installed (see above)"
    remedy = "pip install 'crbp[train]'" if any(each["extra"] for each in lacking) else lacking[0]["remedy"]
    return f"{', '.join(each['name'] for each in lacking)} missing or too old; run: {remedy}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
