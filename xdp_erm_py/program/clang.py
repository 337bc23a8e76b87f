"""From C to a BPF object, by bcc: what compiler.py runs in a process of its own. It imports nothing of the package.

Standard input has the request, {"text", "options", "headers"}, standard output the answer: {"compiler", "license",
"maps", "functions"} as module.py takes it, or {"error"}. Without a text it is asked what compiler there is.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

#: Root's alone, unlike what TMPDIR may name.
DIRECTORY = "/run"

# BPF_LD | BPF_IMM | BPF_DW with BPF_PSEUDO_MAP_FD as source register: the instruction that names a map.
_LOAD_MAP = (0x18, 1)


class Failed(Exception):
    """Said to who runs the command."""


def main() -> None:
    request = json.load(sys.stdin)
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)  # bcc has things to say on standard output
        try:
            bcc = _bcc()
            answered: dict[str, Any] = {"compiler": f"bcc {bcc.__version__}"}
            if "text" in request:
                answered.update(_compiled(bcc, request))
        except Failed as failed:
            answered = {"error": str(failed)}
        json.dump(answered, answer)


def _bcc() -> Any:
    try:
        import bcc
    except ImportError:
        bcc = None
    except Exception as error:  # no memory for it, a library that does not fit: it says all kinds of things
        raise Failed(f"bcc does not import: {str(error) or type(error).__name__}") from None
    if not hasattr(bcc, "BPF"):  # PyPI has an unrelated package of the same name
        raise Failed("bcc is missing for this Python: install python3-bpfcc (Debian, Ubuntu) or python3-bcc (RHEL, "
                     "Fedora)")
    return bcc


def _compiled(bcc: Any, request: dict[str, Any]) -> dict[str, Any]:
    try:
        with tempfile.TemporaryDirectory(prefix="xdp-erm-compile-", dir=DIRECTORY) as directory:
            for name, header in request["headers"].items():
                path = Path(directory, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(header)
            # bcc looks for headers where it stands before it looks into the kernel's.
            os.chdir(directory)
            os.environ["BCC_KERNEL_SOURCE"] = directory
            try:
                module = bcc.BPF(text=request["text"].encode(), cflags=request["options"])
            except Exception as error:
                raise Failed(f"the program does not compile: {error}") from None
            finally:
                os.chdir("/")
    except OSError as error:
        raise Failed(f"the headers cannot be written to {DIRECTORY}: {error.strerror}") from None
    return _object(bcc.lib, module)


def _object(lib: Any, module: Any) -> dict[str, Any]:
    def table(name: str, index: int, result: Any = ctypes.c_size_t) -> Any:
        function = getattr(lib, f"bpf_table_{name}")
        function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t), result
        return function(module.module, index)

    lib.bpf_num_tables.argtypes, lib.bpf_num_tables.restype = (ctypes.c_void_p,), ctypes.c_size_t
    maps, names = {}, {}
    for index in range(lib.bpf_num_tables(module.module)):
        name = table("name", index, ctypes.c_char_p).decode()
        names[table("fd_id", index, ctypes.c_int)] = name
        maps[name] = {"type": table("type_id", index, ctypes.c_int), "key_size": table("key_size_id", index),
                      "value_size": table("leaf_size_id", index), "max_entries": table("max_entries_id", index),
                      "flags": table("flags_id", index, ctypes.c_int)}
    functions = {}
    for index in range(lib.bpf_num_functions(module.module)):
        name = lib.bpf_function_name(module.module, index)
        functions[name.decode()] = _function(module.dump_func(name), names)
    return {"license": lib.bpf_module_license(module.module).decode(), "maps": maps, "functions": functions}


def _function(text: bytes, names: dict[int, str]) -> dict[str, Any]:
    """Its instructions, with 0 for each map, and which map that is."""
    instructions, maps = bytearray(text), []
    for offset in range(0, len(instructions), 8):
        code, registers, _, immediate = struct.unpack_from("=BBhi", instructions, offset)
        if (code, registers >> 4) == _LOAD_MAP:
            maps.append([offset // 8, names[immediate]])
            struct.pack_into("=i", instructions, offset + 4, 0)
    return {"instructions": instructions.hex(), "maps": maps}


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError, json.JSONDecodeError):  # who asks is gone
        sys.exit(1)
