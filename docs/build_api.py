"""Write docs/api.md from the docstrings of the public modules:  python docs/build_api.py"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from types import ModuleType

MODULES = [
    "stage1_tokenizer.quantizers.interface",
    "stage1_tokenizer.quantizers.soft_convex",
    "stage1_tokenizer.solver.solve",
    "stage1_tokenizer.quantizers.vq",
    "stage1_tokenizer.quantizers.library",
    "stage1_tokenizer.autoencoder",
    "stage1_tokenizer.train",
    "stage1_tokenizer.write_tokens",
    "stage2_prior.transformer",
    "stage2_prior.masking",
    "stage2_prior.likelihood",
    "stage2_prior.refiner",
    "stage2_prior.train",
    "stage2_prior.train_refiner",
    "sampling.pipeline",
    "sampling.storage",
    "sampling.scheduler",
    "sampling.samplers",
    "sampling.editing",
    "sampling.export",
    "data.pack",
    "data.stream",
    "data.tokens",
    "evaluation.evaluate",
    "evaluation.reference",
    "evaluation.neighbours",
    "evaluation.metrics.scores",
    "evaluation.metrics.fid_infinity",
    "evaluation.metrics.mixture_rate",
    "evaluation.metrics.networks",
    "evaluation.metrics.inception",
    "evaluation.metrics.dinov2",
    "evaluation.benchmark.run",
]
TARGET = Path(__file__).with_name("api.md")


def build() -> str:
    """The page's text."""
    parts = ["# API", "", "Written from the docstrings by `python docs/build_api.py`.", ""]
    parts += [f"- [{name}](#{name.replace('.', '')})" for name in MODULES]
    for name in MODULES:
        parts += ["", *_module(importlib.import_module(name))]
    return "\n".join(parts) + "\n"


def _module(module: ModuleType) -> list[str]:
    lines = [f"## {module.__name__}", "", inspect.getdoc(module) or ""]
    for name, member in vars(module).items():
        own = getattr(member, "__module__", None) == module.__name__
        if name.startswith("_") or not own or not (inspect.isclass(member) or inspect.isfunction(member)):
            continue
        lines += ["", f"### {name}", *_entry(name, member)]
        if inspect.isclass(member):
            for method_name, method in vars(member).items():
                function = inspect.unwrap(getattr(method, "__func__", method))
                if inspect.isfunction(function) and not method_name.startswith("_") and function.__doc__:
                    lines += ["", f"#### {name}.{method_name}", *_entry(method_name, function)]
    return lines


def _entry(name: str, member: object) -> list[str]:
    try:
        signature = f"{name}{inspect.signature(member)}"
    except (ValueError, TypeError):  # a NamedTuple's or a dataclass's, of which there is none to be had
        signature = name
    text = inspect.getdoc(member) if "__doc__" in vars(member) or inspect.isfunction(member) else None
    block = [f"    {line}".rstrip() for line in (text or "").splitlines()]
    return ["", "```python", signature, "```", *(["", *block] if text else [])]


if __name__ == "__main__":
    TARGET.write_text(build())
