"""Golden vectors: for each metric id a stored input and the value it had when the id was new. A value never changes; a definition that does gets a new id.

    python tests/golden.py          compare all metrics with what is stored
    python tests/golden.py --add    store the values of ids that have none yet; what is stored stays as it is

There is one file for each kind of metric, tests/golden/<kind>.json: the input, stored in full, and the values by id. A new kind needs one function in
INPUTS that makes its first input; afterwards the stored input is what counts. NaN is stored as null. The kinds of golden_retrieval.py store an input of
its own for each id.
"""
import importlib
import inspect
import json
import pkgutil
import sys
from pathlib import Path

import golden_retrieval
import numpy as np

import perturbnb.metrics
from perturbnb.core import atomic_file, rng
from perturbnb.metrics.registry import METRICS

FOLDER = Path(__file__).parent / "golden"
RTOL, ATOL = 1e-9, 1e-12


def effect_input() -> dict:
    "Six ordinary rows and six that are hard: a constant, zeros, ties, the reference itself, a tiny and a huge row."
    draw = rng(0, "golden.effect").normal
    real, pred, reference, scores = draw(size=(12, 15)), draw(size=(12, 15)), draw(size=15), draw(size=(12, 15))
    pred[:6] += real[:6]
    real, pred, reference, scores = (x.round(3) for x in (real, pred, reference, scores))
    pred[6], pred[7], real[8], pred[9] = 0.3, 0.0, 0.0, reference
    real[10], pred[10] = real[10].round(0), pred[10].round(0)
    real[11], pred[11] = real[11] * 1e-6, pred[11] * 1e6
    deg = np.abs(scores) > 1
    deg[4], deg[5] = False, True
    return {"first": real, "second": pred, "context": {"reference": reference, "weights": scores ** 2 * deg, "deg": deg, "n_top": 4}}


def distribution_input() -> dict:
    "Nine cells against seven, four genes."
    draw = rng(0, "golden.distribution").normal
    return {"first": draw(size=(9, 4)).round(3), "second": (draw(size=(7, 4)) * 1.5 + .5).round(3), "context": {}}


def discrimination_input() -> dict:
    "Ten perturbations, twelve genes; two equal predictions, one of zeros, one truth of zeros, some targets."
    draw = rng(0, "golden.discrimination").normal
    real, pred = draw(size=(2, 10, 12)).round(3)
    pred[:6] += real[:6]
    pred[7], pred[8], real[9] = pred[6], 0, 0
    return {"first": real, "second": pred.round(3), "context": {"target_index": np.array([0, 1, 2, -1, -1, 5, 6, 7, -1, 11])}}


INPUTS = {"effect": effect_input, "distribution": distribution_input, "discrimination": discrimination_input}


def load_all() -> None:
    "Import every module of perturbnb.metrics, so that METRICS is complete."
    for m in pkgutil.iter_modules(perturbnb.metrics.__path__): importlib.import_module(f"perturbnb.metrics.{m.name}")


def kinds() -> dict:
    "Ids of the package by kind; metrics that a page or a test entered for itself are left out."
    load_all()
    ours = [m for m in METRICS.values() if m.fn.__module__.startswith("perturbnb.")]
    return {k: sorted(m.id for m in ours if m.kind == k) for k in sorted({m.kind for m in ours})}


def read(kind: str, folder: Path = FOLDER) -> dict:
    "What is stored for a kind; empty if nothing is."
    path = folder / f"{kind}.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"input": {}, "values": {}}
    return {"entries": stored, "values": {i: e["value"] for i, e in stored.items()}} if kind in golden_retrieval.KIND_INPUTS and "values" not in stored else stored


def again(id: str, stored: dict):
    "The value that a metric has now on what is stored for it."
    return golden_retrieval.value(id, stored["entries"][id]) if "entries" in stored else value(id, stored["input"])


def value(id: str, stored: dict):
    "The value of a metric on a stored input, as lists and numbers; NaN is None."
    fn, asks = METRICS[id].fn, {p.name for p in inspect.signature(METRICS[id].fn).parameters.values() if p.kind is p.KEYWORD_ONLY}
    numbers = lambda x: np.asarray(x) if isinstance(x, list) else x
    out = np.asarray(fn(numbers(stored["first"]), numbers(stored["second"]), **{k: numbers(v) for k, v in stored["context"].items() if k in asks}), dtype=float)
    return np.where(np.isnan(out), None, out.astype(object)).tolist()


def same(new, old) -> bool:
    "Whether two values agree to 1e-9, undefined places included."
    new, old = (np.asarray(x, dtype=float) for x in (new, old))
    return new.shape == old.shape and np.allclose(new, old, rtol=RTOL, atol=ATOL, equal_nan=True)


def problems(kind: str, ids: list, stored: dict) -> list:
    "What is wrong between the registry and the stored values: one line each."
    lost = [f"{i}: stored, but no longer registered; old ids stay" for i in sorted(set(stored["values"]) - set(ids))]
    new = [f"{i}: no golden value; python tests/golden.py --add" for i in ids if i not in stored["values"]]
    changed = [f"{i}: the value changed; a changed definition needs a new version" for i in ids if i in stored["values"] and not same(again(i, stored), stored["values"][i])]
    return lost + new + changed


def _plain(x):
    "Arrays as lists, at any depth."
    return {k: _plain(v) for k, v in x.items()} if isinstance(x, dict) else x.tolist() if isinstance(x, np.ndarray) else x


def add(kind: str, ids: list, folder: Path = FOLDER) -> list:
    "Store what has no value yet; returns the ids. Refuses if a stored value does not hold any more."
    stored = read(kind, folder)
    if "entries" in stored:
        if broken := [p for p in problems(kind, ids, stored) if "no golden value" not in p]: raise SystemExit("\n".join(broken))
        return golden_retrieval.add(kind)
    fresh = _plain(INPUTS[kind]()) if kind in INPUTS else {}
    stored["input"] = {**fresh, **stored["input"], "context": {**fresh.get("context", {}), **stored["input"].get("context", {})}}  # keywords may join, nothing changes
    broken = [p for p in problems(kind, ids, stored) if "no golden value" not in p]
    if broken: raise SystemExit("\n".join(broken))
    new = [i for i in ids if i not in stored["values"]]
    stored["values"].update({i: value(i, stored["input"]) for i in new})
    if new:
        folder.mkdir(exist_ok=True)
        with atomic_file(folder / f"{kind}.json") as tmp: tmp.write_text(_text(stored), encoding="utf-8")
    return new


def _text(stored: dict) -> str:
    "JSON with one row of a table or one value list to a line."
    row = lambda x: json.dumps(x, allow_nan=False)
    table = lambda x: "[\n  " + ",\n  ".join(map(row, x)) + "]" if isinstance(x, list) and x and isinstance(x[0], list) else row(x)
    part = lambda d: "{\n " + ",\n ".join(f"{row(k)}: {part(v) if isinstance(v, dict) and v else table(v)}" for k, v in sorted(d.items())) + "}"
    return part(stored) + "\n"


if __name__ == "__main__":
    for kind, ids in kinds().items():
        if "--add" in sys.argv[1:]: print(kind, "added:", ", ".join(add(kind, ids)) or "nothing")
    found = [p for kind, ids in kinds().items() for p in problems(kind, ids, read(kind))]
    print("\n".join(found) or f"{sum(map(len, kinds().values()))} metrics agree with their golden values")
    sys.exit(bool(found))
