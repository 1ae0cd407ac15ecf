"Every metric has a golden value, agrees with it, and none has vanished; and the helper keeps its promises."
import json

import golden
import numpy as np
import pytest
from perturbnb.metrics.registry import METRICS, metric

KINDS = golden.kinds()
STORED = sorted(p.stem for p in golden.FOLDER.glob("*.json"))


@pytest.mark.parametrize("kind", sorted({*KINDS, *STORED}))
def test_golden(kind):
    assert golden.problems(kind, KINDS.get(kind, []), golden.read(kind)) == []


@pytest.mark.parametrize("kind", STORED)
def test_golden_values_say_something(kind):
    stored = golden.read(kind)
    for i, v in stored["values"].items():
        v = np.asarray(v, dtype=float).ravel()
        assert np.isfinite(v).any(), f"{i} is undefined on the whole golden input"
        assert v.size == 1 or len(set(v[np.isfinite(v)])) > 1, f"{i} is the same for every golden row"
        assert (v[np.isfinite(v)] >= METRICS[i].low - 1e-12).all() and (v[np.isfinite(v)] <= METRICS[i].high + 1e-12).all()


@pytest.fixture
def toy(tmp_path):
    "A metric that belongs to this test, and what to change about it."
    state = {"factor": 1.0}
    def toy_error(real, pred): return state["factor"] * np.abs(real - pred).max(1)
    metric("toy_golden@1", kind="effect", formula="x", unit="none", low=0, high=9e9, better="lower", null=None, undefined="never", source="this test")(toy_error)
    yield state, lambda: golden.add("effect", ["toy_golden@1"], tmp_path), tmp_path / "effect.json"
    del METRICS["toy_golden@1"]


def test_a_changed_value_is_refused_and_nothing_is_overwritten(toy):
    state, add, path = toy
    assert add() == ["toy_golden@1"] and add() == []
    before = path.read_bytes()
    state["factor"] = 1 + 1e-7
    with pytest.raises(SystemExit, match="needs a new version"): add()
    assert path.read_bytes() == before
    state["factor"] = 1 + 1e-11  # the last digits may differ between machines
    assert add() == []


def test_a_vanished_id_is_named(toy):
    state, add, path = toy
    add()
    assert golden.problems("effect", [], json.loads(path.read_text())) == ["toy_golden@1: stored, but no longer registered; old ids stay"]
    assert golden.problems("effect", ["toy_golden@1"], {"input": {}, "values": {}}) == ["toy_golden@1: no golden value; python tests/golden.py --add"]
