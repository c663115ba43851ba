"""Errors of the configuration parser, which span a dozen lines, as one line that names the key and the cause."""

from __future__ import annotations

import difflib
import importlib
import re

_NOISE = (
    "Does not validate against any of the Union subtypes",
    "Subtypes:",
    "Errors:",
    "Expected a <class 'NoneType'>",
    "Expected a path but",
    "Given value",
)
_KEY = re.compile(r'^Parser key "([^"]+)":?')
_CLASS = re.compile(r"^Problem with given class_path '([^']+)':?")
_UNTRUSTED = re.compile(r"Importing '(\w+)([\w.]*)' is not allowed.*?to allow it\.")
_UNNAMED = re.compile(r"Importing 'lightning\.(?:\w+\.)*Lightning(?:Data)?Module' is not allowed.*?to allow it\.")
_CAUGHT = re.compile(r"Caught (\w+) .*\nOriginal Traceback")  # what a process of a loader puts before the message
_MISSING = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")


def one_line(error: BaseException) -> str:
    """The keys that lead to the mistake, the class it was made in, and what is wrong."""
    keys: list[str] = []
    where = ""
    rest: list[str] = []
    for line in _told(error).splitlines():
        text = line.strip().removeprefix("- ")
        if text.startswith(_NOISE):
            continue
        while match := _KEY.match(text) or _CLASS.match(text):
            if match.re is _KEY:
                keys.append(match[1])
            else:
                where = match[1]
            text = text[match.end() :].strip()
        rest.append(text)
    message = " ".join(text for text in rest if text) or " ".join(_told(error).split()) or type(error).__name__
    # Of an option alone, as `--data.predict`, the parser takes the class to be that which all others derive from.
    message = _UNNAMED.sub("no class is given; give --config FILE, such as the config.yaml of a run", message)
    message = _UNTRUSTED.sub(r"\1\2 is of no trusted package; add --trust \1 if you trust it", message)
    parts = [".".join(keys), where, message]
    return ": ".join(part for part in parts if part) + _known_names(message)


def _told(error: BaseException) -> str:
    """What an error says, without the traceback that it brings along from a process of a loader."""
    text = str(error)
    if (match := _CAUGHT.match(text)) is None:
        return text
    return re.split(rf"\n(?:\w+\.)*{match[1]}: ", text)[-1]


def _known_names(message: str) -> str:
    """What a module has that comes close, where a name was asked of it that it does not have."""
    if (match := _MISSING.search(message)) is None or not match[1].startswith("crbp"):
        return ""
    names = getattr(importlib.import_module(match[1]), "__all__", ())
    close = difflib.get_close_matches(match[2], [name for name in names if name[0].isupper()], n=4, cutoff=0)
    return f"; it has {', '.join(close)}" if close else ""
