"""Golden vectors of the retrieval, classification and calibration metrics: {id: {"args": [...], "kwargs": {...}, "value": ...}} in tests/golden/<kind>.json, NaN as null.

    python tests/golden_retrieval.py --add    store the values of ids that have none yet; what is stored stays as it is
"""
import json
import sys
from pathlib import Path

import numpy as np

from perturbnb.core import atomic_file, rng
from perturbnb.metrics import classify  # noqa: F401  enters its metrics
from perturbnb.metrics.registry import METRICS
from perturbnb.metrics.retrieval import ON_RANKING

FOLDER = Path(__file__).parent / "golden"


def retrieval_inputs() -> dict:
    "Ten queries, fourteen candidates (forty where the first twenty count): no ties, some ties, a constant, pairs left out, all right, none right, graded."
    small, large = _queries(14, .25), _queries(40, .06)
    return {i: large if "_at_20@" in i else small for i in sorted(ON_RANKING)}


def _queries(n: int, right: float) -> dict:
    draw = rng(0, "golden.retrieval")
    scores, relevance = draw.normal(size=(10, n)).round(3), (draw.random((10, n)) < right).astype(int)
    relevance[:, 3] += 1 if n == 14 else 0
    scores[2:5] = scores[2:5].round(0)
    scores[5] = 0.5
    relevance[3:7][draw.random((4, n)) < .2] = -1
    relevance[7], relevance[8] = 1, 0
    relevance[0, :5] = [3, 0, 2, 1, 0]
    return {"args": [scores.tolist(), relevance.tolist()], "kwargs": {}}


def classification_inputs() -> dict:
    "Forty rows of three unequal classes, with scores; tables of labels; numbers with ties."
    draw = rng(0, "golden.classification")
    names = np.array(["dead", "resting", "active"])
    true = draw.choice(3, 40, p=[.2, .5, .3])
    pred = np.where(draw.random(40) < .6, true, draw.integers(0, 3, 40))
    scores = (np.eye(3)[true] + draw.normal(size=(40, 3))).round(2)
    labels = [names[true].tolist(), names[pred].tolist()]
    several = {"args": [labels[0], scores.tolist()], "kwargs": {"classes": names.tolist()}}
    two = {"args": [(true == 2).astype(int).tolist(), scores[:, 2].tolist()], "kwargs": {}}
    y = (draw.random((20, 4)) < .4).astype(int)
    y[:, 0] |= y.sum(1) == 0
    table = {"args": [y.tolist(), np.where(draw.random(y.shape) < .8, y, 1 - y).tolist()], "kwargs": {}}
    ranked = {"args": [y.tolist(), (y + draw.normal(size=y.shape)).round(1).tolist()], "kwargs": {}}
    number = draw.integers(0, 5, 30)
    ordered = {"args": [number.tolist(), (number + draw.integers(-1, 2, 30)).tolist()], "kwargs": {}}
    by_name = {"roc_auc@1": two, "average_precision@1": two, "roc_auc_ovr_macro@1": several, "top_k_accuracy@1": {**several, "kwargs": {**several["kwargs"], "k": 2}},
               **{f"{i}@1": table for i in ("multilabel_f1_micro", "multilabel_f1_macro", "subset_accuracy")}, "label_ranking_ap@1": ranked, "coverage_depth@1": ranked,
               **{f"{i}@1": ordered for i in ("spearman", "kendall_tau_b", "r2_score", "quadratic_kappa", "concordance")}}
    return {i: by_name.get(i, {"args": labels, "kwargs": {}}) for i in _ids("classification")}


def calibration_inputs() -> dict:
    "Sixty probabilities, some of them equal; for the log loss three classes."
    draw = rng(0, "golden.calibration")
    p = draw.random(60).round(1)
    three = draw.dirichlet([1, 1, 1], 30).round(3)
    three[:, 2] = (1 - three[:, 0] - three[:, 1]).round(3)
    assert (three > 0).all()
    two = {"args": [(draw.random(60) < p ** 2).astype(int).tolist(), p.tolist()], "kwargs": {}}
    return {i: {"args": [draw.integers(0, 3, 30).tolist(), three.tolist()], "kwargs": {"classes": [0, 1, 2]}} if i == "log_loss@1" else two for i in _ids("calibration")}


def _ids(kind: str) -> list:
    return sorted(m.id for m in METRICS.values() if m.kind == kind and m.fn.__module__.startswith("perturbnb."))


KIND_INPUTS = {"retrieval": retrieval_inputs, "classification": classification_inputs, "calibration": calibration_inputs}


def value(id: str, entry: dict):
    "The value of a metric on a stored input, as a list or a number; NaN is None."
    out = np.asarray(METRICS[id].fn(*entry["args"], **entry["kwargs"]), dtype=float)
    return np.where(np.isnan(out), None, out.astype(object)).tolist()


def read(kind: str) -> dict:
    path = FOLDER / f"{kind}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def add(kind: str) -> list:
    "Store what has no value yet; the new ids."
    stored, inputs = read(kind), KIND_INPUTS[kind]()
    new = [i for i in inputs if i not in stored]
    stored.update({i: {**inputs[i], "value": value(i, inputs[i])} for i in new})
    FOLDER.mkdir(exist_ok=True)
    text = "{\n" + ",\n".join(f" {json.dumps(i)}: {json.dumps(stored[i], allow_nan=False)}" for i in sorted(stored)) + "\n}\n"
    if new:
        with atomic_file(FOLDER / f"{kind}.json") as tmp: tmp.write_text(text, encoding="utf-8")
    return new


if __name__ == "__main__":
    if "--add" in sys.argv[1:]:
        for kind in KIND_INPUTS: print(kind, "added:", ", ".join(add(kind)) or "nothing")
