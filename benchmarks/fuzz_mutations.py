"""How a good file becomes a bad one: every function takes the source of random numbers, so that a case can be repeated.

A mutation of bytes is what a broken disk or cable makes; one of the structure is what an attacker or a careless program
makes, with lengths and checksums that are right.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

import numpy as np

NUMBERS = (
    0,
    1,
    -1,
    255,
    256,
    32767,
    2**16,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**63 - 1,
    2**63,
    10**30,
    10**400,
)
DEEP = "DEEPLY NESTED"
_NESTED = "[" * 20_000 + "]" * 20_000
PATHS = (
    *("..", "../../secret", "/etc/passwd", "a/../../secret", "imgs/../../secret.png", "C:\\secret", "..\\secret", "~"),
    *("a\0b", "\ud800", "", ".", "/", "x" * 300, "a/" * 2000, "con", "\n", "image\u202egnp.a"),
)
CLASSES = (
    *("os.system", "subprocess.Popen", "builtins.eval", "crbp.data._files.os.system", "torch.os.system", "this.is"),
    *(
        "crbp.tasks.weights.pickle.loads",
        "torch.load",
        "torch.nn.Identity",
        "crbp.cells.HGRU",
        "crbp.RBP",
        "crbp",
        "...",
    ),
    *("crbp.cli.main", "antigravity.x", "crbp.Neumann", "crbp.models.FeedForwardNet", "a..b", ".", "ü.ß"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 1e308, -1e308, float("nan"), float("inf"), 0.5, [], {}, [[]], [None], {"": None}, "1", DEEP),
    *({"class_path": "os.system", "init_args": {"command": "true"}}, {"class_path": "crbp.cells.HGRU"}, [1, 2, 3]),
    *NUMBERS,
    *PATHS,
    *CLASSES,
)


def spoil_bytes(random: Random, data: bytes) -> bytes:
    """One to four random edits of bytes."""
    made = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at = random.randint(0, len(made))
        end = min(len(made), at + random.choice((1, 1, 2, 4, 16, 256)))
        kind = random.randrange(8)
        if kind == 0 and made:
            made[at % len(made)] ^= 1 << random.randrange(8)
        elif kind == 1:
            made[at:end] = bytes(random.randrange(256) for _ in range(end - at))
        elif kind == 2:
            del made[at:end]
        elif kind == 3:
            made[at:at] = made[at:end] * random.choice((1, 2, 50))
        elif kind == 4:
            del made[at:]
        elif kind == 5:
            number = random.choice(NUMBERS) % 2**64
            width, order = random.choice((2, 4, 8)), random.choice(("little", "big"))
            made[at : at + width] = (number % 256**width).to_bytes(width, order)
        elif kind == 6:
            made[at:at] = random.choice((b"\0", b"\xff" * 8, b"\xed\xa0\x80", b"{", b"[" * 99, b"PK\3\4", b"\x93NUMPY"))
        else:
            made += bytes(random.randrange(256) for _ in range(random.choice((1, 12, 300))))
    return bytes(made)


def spoil_tree(random: Random, tree: Any, values: tuple[Any, ...] = VALUES) -> Any:
    """Nested containers of which one to three entries are replaced, left out, doubled or renamed."""
    made = copy.deepcopy(tree)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        holder, key = _place(random, made)
        if holder is None:
            return random.choice(values)
        kind = random.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif kind == 1 and isinstance(key, str):
            holder[random.choice((key + "x", key.upper(), "", "class_path", "__class__"))] = holder.pop(key)
        elif kind == 2 and isinstance(holder[key], str) and holder[key]:
            holder[key] = spoil_text(random, holder[key])
        else:
            holder[key] = copy.deepcopy(random.choice(values))
    return made


def spoil_text(random: Random, text: str) -> str:
    """A text with a piece replaced."""
    at = random.randrange(len(text) + 1)
    return (
        text[:at]
        + random.choice(("\0", "\ud800", "/", "..", " ", "\n", "é", "\U0001f600", "9" * 5000))
        + text[at + 1 :]
    )


def _place(random: Random, tree: Any) -> tuple[Any, Any]:
    """A random entry: the container that holds it and its key."""
    holder, key, found = None, None, tree
    while isinstance(found, dict | list) and found and (holder is None or random.random() < 0.8):
        key = random.choice(list(found)) if isinstance(found, dict) else random.randrange(len(found))
        holder, found = found, found[key]
    return holder, key


def as_json(tree: Any) -> bytes:
    """JSON, as Python writes it, of what may hold lone surrogates, NaN and deep nesting."""
    return json.dumps(tree).replace(json.dumps(DEEP), _NESTED).encode()


def spoil_json(random: Random, data: bytes) -> bytes:
    """A JSON file with a wrong structure."""
    return as_json(spoil_tree(random, json.loads(data)))


def spoil_png(random: Random, data: bytes) -> bytes:
    """A PNG with a wrong structure and right checksums."""
    chunks, at = [], 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    for _ in range(random.randint(1, 3)):
        k = random.randrange(len(chunks))
        kind, content = chunks[k]
        what = random.randrange(6)
        if what == 0:
            chunks[0] = b"IHDR", _header(random, chunks[0][1])
        elif what == 1:
            chunks[k] = kind, spoil_bytes(random, content)
        elif what == 2 and len(chunks) > 1:
            del chunks[k]
        elif what == 3:
            chunks.insert(random.randrange(len(chunks) + 1), chunks[k])
        elif what == 4:
            chunks.insert(random.randint(1, len(chunks)), _chunk(random))
        else:
            chunks[k] = kind, random.choice((zlib.compress(b""), _bomb(), zlib.compress(content * 3)))
    body = b"".join(struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    return data[:8] + body


def _header(random: Random, content: bytes) -> bytes:
    sizes = (0, 1, 2, 7, 32, 4097, 20_000, 100_000, 2**31 - 1, 2**32 - 1)
    width, height, *rest = struct.unpack(">IIBBBBB", content[:13].ljust(13, b"\0"))
    which = random.randrange(4)
    if which < 3:
        width, height = random.choice(sizes) if which else width, random.choice(sizes) if which != 1 else height
    else:
        rest[random.randrange(5)] = random.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
    return struct.pack(">IIBBBBB", width, height, *rest)


@cache
def _bomb() -> bytes:
    return zlib.compress(b"a" * 8_000_000)


def _chunk(random: Random) -> tuple[bytes, bytes]:
    bomb = _bomb()
    return random.choice(
        (
            *(
                (b"tEXt", b"a\0b"),
                (b"zTXt", b"a\0\0" + bomb),
                (b"iTXt", b"a\0\1\0\0\0" + bomb),
                (b"iCCP", b"a\0\0" + bomb),
            ),
            *((b"eXIf", b"Exif\0\0MM\0*" + bytes(20)), (b"eXIf", b"II*\0\xff\xff\xff\xff"), (b"tRNS", b"\0" * 6)),
            *((b"acTL", struct.pack(">II", 2**31, 0)), (b"fcTL", bytes(26)), (b"PLTE", b"\1" * 9), (b"gAMA", b"")),
            *((b"pHYs", b"\0"), (b"cHRM", b""), (b"sRGB", b""), (b"IEND", b""), (b"CgBI", b"\0"), (b"\0\0\0\0", b"")),
        )
    )


def spoil_npy(random: Random, data: bytes) -> bytes:
    """A NumPy file with other strings, another shape or kind, or a header that lies."""
    rows = np.load(io.BytesIO(data)).tolist()
    if random.random() < 0.5:
        cells = spoil_tree(random, rows, values=(*PATHS, "nan", "inf", "1e400", "9" * 5000, "sample_0.png", "seg/1"))
        try:
            made: Any = np.array(cells, random.choice((None, str, "U300", "S300", object)))
        except ValueError:
            made = np.array(rows, object)
        buffer = io.BytesIO()
        np.save(buffer, made)
        return buffer.getvalue()
    shape = random.choice(
        ("(6, 5)", "(10000000000, 5)", "(-1, 5)", "(6, 5", "6", "(2**9,)", "(0, 5)", "(1, 9999999999999)")
    )
    kinds = (
        "<U12",
        "<U0",
        "<U2147483647",
        "|S12",
        "|O",
        "<f8",
        "|V8",
        "<U9999999999",
        "[('a', '<f4')]",
        "<M8",
        "<?",
        "",
    )
    kind = random.choice(kinds)
    head = f"{{'descr': '{kind}', 'fortran_order': {random.choice(('False', 'True', '3'))}, 'shape': {shape}, }}"
    head = random.choice((head, head, head, "(" * 3000, "{", "9" * 9000, head.replace("'shape'", "'ship'")))
    encoded = (head + " " * (-len(head) % 64) + "\n").encode()
    version = random.choice((b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\7\0"))
    return (
        b"\x93NUMPY" + version + struct.pack("<H" if version == b"\1\0" else "<I", len(encoded)) + encoded + data[128:]
    )


def spoil_lines(random: Random, data: bytes) -> bytes:
    """A list file with a wrong line."""
    lines = data.decode().splitlines()
    for _ in range(random.randint(1, 3)):
        path = random.choice((*PATHS, "imgs/1/sample_0.png", "imgs", "imgs/imgs/1/a.png", "seg/1/sample_0.png"))
        label = random.choice(("0", "1", "-1", "9" * 5000, "²", "٣", "x", "", "1e3", "9" * 30))
        lines[random.randrange(len(lines))] = f"{path}{random.choice((' ', '  ', chr(9), ''))}{label}"
    return "\n".join(lines).encode("utf-8", "surrogatepass")


class Malicious:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, canary: str, how: int) -> None:
        self.canary, self.how = canary, how

    def __deepcopy__(self, memo: Any) -> Malicious:
        return self  # a copy would run it here

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        if self.how == 0:
            import os

            return os.mkdir, (self.canary,)
        if self.how == 1:
            return eval, (f"__import__('os').mkdir({self.canary!r})",)
        return open, (self.canary, "w")


_OPCODES = [code.code.encode("latin1") for code in __import__("pickletools").opcodes]
_PIECES = (
    *_OPCODES,
    *(
        b"cos\nsystem\n",
        b"cbuiltins\neval\n",
        b"cnumpy.core.multiarray\n_reconstruct\n",
        b"cnumpy\nndarray\n",
        b"R",
        b"b",
    ),
    *(b"ccollections\nOrderedDict\n", b"c_codecs\nencode\n", b"X\3\0\0\0hex", b"X\6\0\0\0latin1", b"K\2", b"K\0", b")"),
    *(
        b"r\xff\xff\xff\x7f",
        b"r\0\0\0\x10",
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x8b\xff\xff\xff\x7f",
        b"\x96",
        b".",
    ),
    *(
        b"cnumpy\ndtype\n",
        b"cnumpy.core.numeric\n_frombuffer\n",
        b"cnumpy.core.multiarray\nscalar\n",
        b"(",
        b"t",
        b"}",
        b"]",
    ),
    *(b"J\xff\xff\xff\x7f", b"\x88", b"N", b"C\1b", b"X\2\0\0\0f4", b"X\1\0\0\0O", b"0", b"2", b"1", b"q\0", b"h\0"),
)


def spoil_pickle(random: Random, data: bytes, canary: str) -> bytes:
    """A pickle of other things, of something that would run, or of operations in a random order."""
    kind = random.randrange(3)
    if kind == 0:
        operations = b"".join(random.choice(_PIECES) for _ in range(random.randint(1, 30)))
        return random.choice((b"\x80\2", b"\x80\4", b"")) + operations + b"."
    if kind == 1:
        at = random.randrange(2, len(data))
        return data[:at] + b"".join(random.choice(_PIECES) for _ in range(random.randint(1, 4))) + data[at:]
    tree = spoil_tree(random, pickle.loads(data), values=(*VALUES, Malicious(canary, random.randrange(3)), b"x" * 9))
    return pickle.dumps(tree, random.choice((0, 2, 4, 5)))


def spoil_safetensors(random: Random, data: bytes) -> bytes:
    """A safetensors file with another header, of a length that is right or not."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    if random.random() < 0.6:
        told = header["__metadata__"]
        name = random.choice(("crbp.net", "crbp.net", "crbp.net", "crbp.run"))
        told[name] = as_json(spoil_tree(random, json.loads(told[name]))).decode()
    else:
        header = spoil_tree(random, header)
    encoded = as_json(header)
    said = len(encoded) if random.random() < 0.9 else random.choice(NUMBERS) % 2**64
    return struct.pack("<Q", said) + encoded + data[8 + length :]


def spoil_zip(random: Random, data: bytes) -> bytes:
    """A zip file of which one member is changed, doubled, left out or blown up, with right checksums."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        names = old.namelist()
        chosen = random.choice(names)
        for name in names:
            content = old.read(name)
            if name == chosen:
                kind = random.choice((0, 0, 1, 2, 3, *[4] * 9))
                if kind == 0:
                    continue
                content = {1: b"", 2: content + content, 3: b"\0" * 20_000_000}.get(kind, spoil_bytes(random, content))
            new.writestr(name, content, zipfile.ZIP_DEFLATED if len(content) > 10**7 else zipfile.ZIP_STORED)
    return made.getvalue()
