"""The figures of `index_structure` as a text table."""

from collections.abc import Iterator, Mapping
from typing import Any


def report(found: Mapping[str, Any]) -> Iterator[str]:
    """A block of lines a coordinate system, then every prediction with its verdict."""
    settings = found["settings"]
    yield (
        f"share of energy that f explains, less that of Gaussian matrices with the same rows' and columns' variances "
        f"({settings['seeds']} seeds), +- standard error over units, at shares of the numbers"
    )
    yield (
        f"bits/weight of f + r less r alone, at the error of {settings['bits']:g} bits/weight in the original "
        "coordinates, +- standard error; best size of every unit"
    )
    for basis, system in found["systems"].items():
        alone = system["alone"]
        yield (
            f"{basis}: r alone {alone['mean']:.4f} +- {alone['error']:.4f} bits/weight; "
            f"with one spread a matrix {alone['flat']:.4f}"
        )
        for name, family in system["families"].items():
            best = family["best"]
            yield (
                f"  {name:38s} f + r {best['difference']:+.4f} +- {best['error']:.4f} bits/weight with "
                f"{100 * best['numbers']:.1f} % of the numbers"
            )
            yield "    " + "  ".join(_size(s) for s in family["sizes"] if s["numbers"])
    for p in found["predictions"]:
        yield f"{p['verdict']:11s} {p['claim']}: {p['mean']:+.4f} +- {p['error']:.4f}"


def _size(s: Mapping[str, Any]) -> str:
    return f"{100 * s['numbers']:.2g} %: {s['explained']:.3f} ({s['excess']:+.4f} +- {s['error']:.4f})"
