"""Makes the code in an export, with which `trust_remote_code` works where this package is not installed.

It is this package's own code: the modules of `caduceus.hub.auto` and those that they import, as flat files with
relative `import`s. Ops in plain torch replace the kernels of `caduceus.ops`.
"""

import ast
import re
from importlib.util import find_spec
from pathlib import Path

TOKENIZER = "tokenization_caduceus.CaduceusTokenizer"
_ROOTS = tuple(f"caduceus.hub.auto.{name}_caduceus" for name in ("configuration", "modeling", "tokenization"))
_INSTEAD = dict.fromkeys(("caduceus.ops", "caduceus.ops.backends"), "caduceus.ops.portable")
_INSTEAD["caduceus.config"] = "caduceus.config.model"
"""Modules that replace others, which import more than the model needs."""
_IMPORT = re.compile(r"^(\s*)from (caduceus[\w.]*) import", re.MULTILINE)


def remote_code() -> dict[str, str]:
    """The files of the code, by name."""
    files: dict[str, str] = {}
    waiting = list(_ROOTS)
    while waiting:
        module = waiting.pop()
        if _file_name(module) in files:
            continue
        source = _source(module)
        imported = [_INSTEAD.get(name, name) for name in _imports(source)]
        files[_file_name(module)] = _IMPORT.sub(_as_relative, source)
        waiting += imported
    for root in _ROOTS:
        files[_file_name(root)] += _naming_all_that_is_needed(files, _file_name(root))
    return files


def _naming_all_that_is_needed(files: dict[str, str], name: str) -> str:
    """Lines for the end of a file that import further ones: old versions of `transformers` copy only the files that a
    file imports directly.
    """
    needed: set[str] = set()
    waiting = [name]
    while waiting:
        named = set(re.findall(r"^\s*from \.(\w+) import", files[waiting.pop()], re.MULTILINE)) - needed
        needed |= named
        waiting += [f"{module}.py" for module in named]
    return "\n" + "".join(f"from .{module} import __doc__ as _  # noqa\n" for module in sorted(needed))


def _file_name(module: str) -> str:
    return f"{_flat(module)}.py"


def _flat(module: str) -> str:
    """The name of a module's file without its ending: roots keep their own names, others have their whole path."""
    module = _INSTEAD.get(module, module)
    return module.rpartition(".")[2] if module in _ROOTS else module.replace(".", "_")


def _as_relative(found: re.Match) -> str:
    return f"{found[1]}from .{_flat(found[2])} import"


def _source(module: str) -> str:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{module}: not a module of this package")
    return Path(spec.origin).read_text()


def _imports(source: str) -> list[str]:
    """The modules of this package that a source imports from."""
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return [node.module for node in found if node.module is not None and node.module.partition(".")[0] == "caduceus"]
