"""wherry: compress a trained model, prove it on the runtime that will run it, export it, serve it.

The verbs (`inspect`, `capture`, `compress`, `export`, `verify`, `evaluate`, `compare`, `serve`) and the nouns are
imported when they are first used, so that `import wherry` costs nothing and needs no optional wheel.
"""

import importlib
import sys
from types import ModuleType

__version__ = "0.1.0"

_PUBLIC = {
    "inspect": "api", "capture": "api", "compress": "api", "export": "api", "verify": "api", "evaluate": "api",
    "compare": "api", "explain": "api", "serve": "api", "chat": "api", "doctor": "api", "demo": "api", "plan": "api",
    "Scheme": "scheme", "QTensor": "scheme", "Checkpoint": "checkpoint", "Task": "task",
    "Recipe": "recipe", "Pass": "recipe", "Plan": "recipe", "Artifact": "artifact",
    "Session": "session", "Score": "session", "Report": "report",
    "Error": "errors", "Unsupported": "errors", "BadInput": "errors", "Missing": "errors",
    "Corrupt": "errors", "Diverged": "errors", "Exhausted": "errors", "Refused": "errors",
}  # fmt: skip

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"wherry.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'wherry' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _Verb(ModuleType):
    """A module that has the name of a verb: it can be called as the verb."""

    def __call__(self, *args: object, **options: object) -> object:
        return getattr(importlib.import_module("wherry.api"), self.__name__.rpartition(".")[2])(*args, **options)


class _Package(ModuleType):
    """Once the folder `wherry.evaluate` is imported, Python puts it over the verb of that name; so both must work."""

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, ModuleType) and _PUBLIC.get(name) == "api":
            value.__class__ = _Verb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
