"""What of nnU-Net this package builds on, parameter by parameter: a change there fails here, by name.

``nnunet_signatures.json`` holds, for every function and class that the package imports from nnunetv2 and
batchgeneratorsv2, and for every method of theirs that a class of ours replaces, the parameters as they were when the
package was last made to fit. After a look at what changed, ``python tests/test_signatures.py`` writes it anew.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path

FILE = Path(__file__).with_name("nnunet_signatures.json")
PACKAGE = Path(__file__).parents[1] / "nnunet_lgms"
BASES = ("nnunetv2", "batchgeneratorsv2")
TRAINER = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer.nnUNetTrainer"


def imports() -> Iterator[tuple[str, str]]:
    """(module, name) of everything that the package imports from nnU-Net."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in BASES:
                for alias in node.names:
                    yield node.module, alias.name


def subclasses() -> Iterator[type]:
    """Classes of ours that inherit from nnU-Net's."""
    for file in sorted(PACKAGE.rglob("*.py")):
        if not any(base in file.read_text() for base in (*BASES, "nnunet_lgms.nnunet")):
            continue
        module = importlib.import_module(".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts))
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ == module.__name__:
                yield cls


def parameters(function) -> list[str]:
    """Names, with ``*`` and ``**`` where they are, and ``=`` where there is a default. Annotations do not matter."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return [
        stars.get(p.kind, "") + p.name + ("=" if p.default is not inspect.Parameter.empty else "")
        for p in inspect.signature(function).parameters.values()
    ]


def replaced() -> Iterator[str]:
    """Qualified names of nnU-Net's methods that classes of ours replace."""
    for cls in subclasses():
        theirs = [base for base in cls.__mro__ if base.__module__.split(".")[0] in BASES]
        for attribute, ours in vars(cls).items():
            special = attribute.startswith("__") and attribute != "__init__"
            base = next((base for base in theirs if attribute in vars(base)), None)
            if base and not special and callable(getattr(ours, "__func__", ours)):
                yield f"{base.__module__}.{base.__qualname__}.{attribute}"


def installed(name: str) -> list[str]:
    """Parameters of ``module.function``, ``module.Class`` or ``module.Class.method`` as it is installed."""
    parts = name.split(".")
    for n in range(len(parts) - 1, 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:n]))
            for part in parts[n:]:
                thing = getattr(thing, part)
        except (ImportError, AttributeError):
            continue
        return parameters(thing) if callable(thing) else ["a value"]
    return ["is gone"]


def differences(stored: dict[str, list[str]]) -> list[str]:
    """One line for every name whose parameters are not those that are stored."""
    lines = []
    for name, before in stored.items():
        now = installed(name)
        if now != before:
            lost, new = [p for p in before if p not in now], [p for p in now if p not in before]
            lines.append(f"{name}: lost {lost}, new {new}; was ({', '.join(before)}), is ({', '.join(now)})")
    return lines


def test_nnunet_is_as_the_package_knows_it():
    changed = differences(json.loads(FILE.read_text()))
    assert not changed, "nnU-Net changed:\n" + "\n".join(changed)


def test_every_replaced_method_is_in_the_list():
    stored, names = json.loads(FILE.read_text()), set(replaced())
    assert {f"{TRAINER}.{method}" for method in ("__init__", "train_step", "save_checkpoint", "do_split")} <= names
    assert not names - set(stored), "write the list anew: python tests/test_signatures.py"


def test_a_change_is_named():
    name = f"{TRAINER}.build_network_architecture"
    stored = {name: ["architecture_class_name", *installed(name)[1:]]}
    (line,) = differences(stored)
    assert line.startswith(f"{name}: lost ['architecture_class_name'], new ['plans_manager']")
    (line,) = differences({f"{TRAINER}.of_another_version": ["self"]})
    assert "new ['is gone']" in line


if __name__ == "__main__":
    sys.path.insert(0, str(PACKAGE.parent))
    names = {*(f"{module}.{name}" for module, name in imports()), *replaced()}
    content = {name: installed(name) for name in sorted(names)}
    FILE.write_text(json.dumps(content, indent=1) + "\n")
