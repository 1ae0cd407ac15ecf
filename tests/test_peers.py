"Agreement with cell-eval and pertpy where they are installed; benchmarks/peers.py holds the comparison, benchmarks/peers.md its outcome on 1,000 cases."
import importlib.util
import re
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import peers

missing = [name for name in ("cell_eval", "pertpy") if importlib.util.find_spec(name) is None]
needs_peers = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}; they come with the extra 'peers' (pip install 'perturbnb[peers]')")


@needs_peers
@pytest.mark.parametrize("compare", [peers.cell_eval_effect, peers.cell_eval_de, peers.pertpy_distances], ids=lambda f: f.__name__)
def test_agreement(compare):
    worst = compare(100)
    assert worst and max(worst.values()) < 1e-6, worst


@needs_peers
def test_each_difference_is_one():
    rows = peers.differences()
    assert len(rows) >= 9
    for what, ours, theirs, why in rows: assert ours != theirs and why, what


def test_the_record_is_of_a_thousand_cases_and_below_the_bound():
    text = (ROOT / "benchmarks/peers.md").read_text()
    worst = [float(x) for x in re.findall(r"\| (\d\.\de[+-]\d\d) \|", text)]
    assert len(worst) == 25 and max(worst) < 1e-6
    assert re.findall(r"(\d+) cases each", text) == ["1000"] * 3 and peers.N_CASES == 1000
    assert np.isfinite(worst).all()
