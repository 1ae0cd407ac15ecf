"""The study behind the report f_r, on a simulated screen with few genes and a network that trains for an epoch."""
import warnings

import numpy as np
import pandas as pd
import pytest

from perturbnb.core import InputError
from perturbnb.data.demo import demo_data
from perturbnb.interpret import forward_study as study
from perturbnb.report import f_r_words as words
from perturbnb.report.results import Result, problems, read_result

QUICK = dict(epochs=1, rank=8, width=16, heads=2, hidden=16, tokens=16)
RULES = ("pair", "unseen_cell_line")


@pytest.fixture(scope="module")
def screen():
    bulk, truth = study.demo_bulk_with_halves()
    table = study.study_table(bulk, n_genes=120, truth=truth)
    return bulk, table, study.study_controls(bulk, table.var_names)


@pytest.fixture(scope="module")
def finished(screen, tmp_path_factory):
    _, table, controls = screen
    folder = tmp_path_factory.mktemp("study")
    tasks = study.study_tasks(RULES, [0, 1], changes=QUICK, ablations=False)
    tasks |= {(v, s): (s, dict(kind="variant", name=v, size="demo", changes=QUICK)) for v in ("full", "no cell token") for s in (0, 1, 2)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        place = study.runs(tasks, folder, study.write_study(table, controls, folder), progress=False)
    return place, study.measured(place, table, RULES, n_boot=200)


def test_halves_share_no_cell(screen):
    bulk, table, _ = screen
    control = bulk[bulk.obs.pert_type == "control"]
    a, b = (study.control_half(bulk, h) for h in "ab")
    n = [t.obs.n_cells[control.obs_names].to_numpy() for t in (a, b)]
    assert (n[0] + n[1] == control.obs.n_cells.to_numpy()).all()
    x = [np.asarray(t[control.obs_names].X, float) for t in (a, b)]
    np.testing.assert_allclose((x[0] * n[0][:, None] + x[1] * n[1][:, None]) / (n[0] + n[1])[:, None], np.asarray(control.X, float), atol=1e-5)
    assert (np.abs(np.asarray(table.X) - table.layers["other"]).max(1) > 0).all()


@pytest.mark.parametrize("rule", [r for r in study.RULES if r != "pair"])
def test_five_seeds_hold_out_each_group_once(screen, rule):
    _, table, _ = screen
    column = "cell_line" if rule == "unseen_cell_line" else "pert"
    held = pd.concat([table.obs[column][study.hold_out(table, rule, s).mask(table, "test")].astype(str).drop_duplicates() for s in range(5)])
    assert held.is_unique and set(held) == set(table.obs[column].astype(str))


def test_a_model_that_sees_treated_cells_is_caught(screen):
    _, table, _ = screen
    rows, before = study.hold_out(table, "pair", 0).mask(table, "test"), np.array(table.X)

    class Peeks:
        def predict(self, obs): return np.asarray(table[obs.index].X)

    class Forward:
        def predict(self, obs): return np.tile(obs.dose_um.to_numpy(float)[:, None], 3)

    assert study.check_blind(Forward(), table, rows) == rows.sum()
    with pytest.raises(AssertionError, match="changed with the treated profiles"): study.check_blind(Peeks(), table, rows)
    assert np.array_equal(before, table.X)


def test_every_prediction_was_checked_and_scored(finished):
    place, found = finished
    f = found["facts"]
    assert (f.n_blind == f.n_test).all() and len(f) == 4
    rows = found["rows"]
    assert set(rows.protocol) == {"leak-free", "as measured", "truth"} and np.isfinite(rows[list(study.METRICS)].to_numpy()).all()
    assert set(rows.model) == {"f_r", *study.BASELINES, study.TRAP}
    worth = found["worth"].set_index(["rule", "model"])
    assert worth.low["pair", study.TRAP] > 0  # a mean that knows nothing of the drug rises when the control is shared


def test_same_seed_same_bytes(screen, finished, tmp_path):
    _, table, controls = screen
    place, _ = finished
    tasks = {("pair", 1): study.study_tasks(RULES, [0, 1], changes=QUICK, ablations=False)["pair", 1]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = study.runs(tasks, tmp_path, study.write_study(table, controls, tmp_path), progress=False)
    files = sorted(p.name for p in again["pair", 1].iterdir())
    assert {"rows.parquet", "inverse.parquet", "facts.parquet"} <= set(files)
    for name in files: assert (again["pair", 1] / name).read_bytes() == (place["pair", 1] / name).read_bytes(), name


def test_the_record_is_whole(screen, finished, tmp_path):
    _, table, controls = screen
    place, found = finished
    rows = study.gathered({k: p for k, p in place.items() if k[0] in study.VARIANTS}, "rows")
    claims = {"The cell token stabilises the ranking": study.cell_token_claim(rows, table.obs, n_boot=200)}
    result = Result("f_r", {}, seeds=[0, 1], folder=tmp_path)
    result.data(demo_data(), table.n_obs, table.n_vars)
    words.record(result, found, {"n_rows": table.n_obs}, claims, demo=True)
    result.write()
    read = read_result(tmp_path)
    assert not problems(read) and len(read["split"]) == 4 and read["facts"]["demo_data"]
    for r in [*read["metrics"], *read["comparisons"]]: assert r["ci95"] or r.get("note"), r
    assert read["verdict"][0]["answer"].startswith("The forward model")


def test_the_saved_model_answers_users(screen, finished):
    from perturbnb.interpret.domain import domain_of
    from perturbnb.models.base import load_model
    _, table, _ = screen
    place, _ = finished
    model = load_model(place["pair", 0] / "model")
    assert domain_of(model) is not None and "residuals" in model.names
    obs = table.obs.iloc[:3].assign(batch=None)
    assert np.isfinite(model.predict(obs)).all()


def test_errors_say_what_to_do(screen):
    bulk, table, _ = screen
    bare = bulk.copy()
    del bare.layers["half_a"]
    with pytest.raises(InputError, match="prepare tahoe"): study.study_table(bare)
    with pytest.raises(InputError, match="lower min_cells"): study.study_table(bulk, min_cells=10_000)
    with pytest.raises(InputError, match="one of pair"): study.hold_out(table, "random", 0)
