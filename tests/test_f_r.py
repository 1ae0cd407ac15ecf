"The forward model: what it cannot see, on every split; repeats to the last bit; what is saved; what it refuses."
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from perturbnb.core import InputError, rng
from perturbnb.data.audit import audit, audit_fit
from perturbnb.data.split import split
from perturbnb.models.base import check_model, example_table, load_model
from perturbnb.models.f_r import ForwardModel, ensemble, fit_seeds
from perturbnb.models.means import LineMean
from perturbnb.models.sequence import ORDERS, control_states

SMILES = {"phenol": "Oc1ccccc1", "pyridine": "c1ccncc1C", "indole": "c1ccc2[nH]ccc2c1", "furan": "Cc1ccco1", "thiophene": "Cc1cccs1", "naphthalene": "Cc1ccc2ccccc2c1",
          "cyclohexane": "CC1CCCCC1", "imidazole": "Cc1c[nH]cn1", "phenol sodium": "[Na+].[O-]c1ccccc1", "nameless": None}
TINY = dict(size="demo", rank=4, width=8, heads=2, tokens=6, hidden=8, batch=32, epochs=4)
RULES = ("pair", "unseen_drug", "unseen_scaffold", "unseen_cell_line")


def world(n_lines=5, n_genes=24, noise=0.1):
    "Effects of ten drugs (two of one structure, one without) in some lines at two doses, one plate for each dose; and the controls."
    r = rng(0, "tests.f_r")
    lines, doses = [f"L{i}" for i in range(n_lines)], (0.5, 5.0)
    pattern = {d: r.normal(0, 1, n_genes) for d in SMILES}
    pattern["phenol sodium"] = pattern["phenol"]
    gain, level = r.uniform(0.4, 1.6, n_lines), r.uniform(0, 3, (n_lines, n_genes))
    rows = [(d, i, x) for d in SMILES for i in range(n_lines) for x in doses]
    x = np.array([pattern[d] * gain[i] * q / (q + 1) for d, i, q in rows]) + r.normal(0, noise, (len(rows), n_genes))
    a = example_table([d for d, _, _ in rows], x, [lines[i] for _, i, _ in rows], smiles=[SMILES[d] for d, _, _ in rows])
    a.obs["dose_um"], a.obs["batch"], a.obs["n_cells"] = [q for *_, q in rows], [f"p{q}" for *_, q in rows], r.integers(2, 200, len(rows))
    a.obs_names = [f"{d}|{lines[i]}|{q}" for d, i, q in rows]
    keys = [(i, q) for i in range(n_lines) for q in doses]
    obs = pd.DataFrame({"cell_line": [lines[i] for i, _ in keys], "batch": [f"p{q}" for _, q in keys], "pert_type": "control", "n_cells": 50}, [f"c{i}{q}" for i, q in keys])
    c = ad.AnnData(np.maximum(level[[i for i, _ in keys]] + r.normal(0, 0.1, (len(keys), n_genes)), 0), obs, a.var.copy(), uns={"perturbnb": {"scale": "log1p_cp10k"}})
    return a, c


@pytest.fixture(scope="module")
def data(): return world()


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the drug without a structure
        yield


def bytes_of(model): return {k: v.tobytes() for k, v in model.arrays.items()}


@pytest.mark.parametrize("rule", RULES)
def test_no_treated_profile_reaches_a_prediction(data, rule):
    table, controls = data
    s = split(rule, table, 1)
    assert audit(s, table).lines
    part = {p: np.flatnonzero(s.mask(table, p)) for p in ("train", "val", "test")}
    fit = lambda t: ForwardModel(controls, **TINY).fit(t[part["train"]], t[part["val"]])
    ask = table.obs.iloc[np.r_[part["val"], part["test"]]]
    model = fit(table)
    first = model.predict(ask)
    changed = table.copy()
    changed.X[part["test"]] = rng(1, "tests.f_r").permutation(changed.X[part["test"]]) * 3 + 1
    again = fit(changed)  # other test rows, and a second fit with the same seed
    assert bytes_of(again) == bytes_of(model)
    assert again.predict(ask).tobytes() == first.tobytes()
    after = changed.copy()
    after.X[part["val"]] = after.X[part["val"]][::-1]  # after training nothing reads val either
    assert model.predict(after.obs.loc[ask.index]).tobytes() == first.tobytes()
    with pytest.raises(InputError, match="must not see"): model.predict(table[part["test"]])


def test_the_fit_is_audited(data):
    table, controls = data
    s = split("unseen_drug", table, 0)
    small = dict(TINY, epochs=2)
    proof = audit_fit(lambda a, s: ForwardModel(controls, **small).fit(a[s.mask(a, "train")], a[s.mask(a, "val")]), table, s, state=lambda m: m.arrays,
                      may_see=("train", "val", "control"))
    assert any("stays equal" in line for line in proof.lines)


def test_the_order_of_rows_and_controls_does_not_matter(data):
    table, controls = data
    a = ForwardModel(controls, **TINY).fit(table)
    b = ForwardModel(controls[::-1], **TINY).fit(table[::-1])
    assert bytes_of(a) == bytes_of(b)


def test_it_learns_what_a_line_mean_cannot():
    table, controls = world(noise=0.05)
    held = (table.obs.pert == "indole") & (table.obs.cell_line == "L3")
    train, test = table[~held].copy(), table[held].copy()
    model = ForwardModel(controls, **{**TINY, "rank": 8, "width": 16, "epochs": 40}).fit(train)
    r = lambda p: np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(test.X, p)])
    assert r(model.predict(test.obs)) > 0.8 > r(LineMean().fit(train).predict(test.obs)) + 0.2


@pytest.mark.parametrize("change", [dict(order="ratio", link=False, drug="zeros"), dict(order="difference", dose="none", gain=False, cell="learned"),
    dict(control_error=False, svd=False, sequence=False, drug="descriptors"), dict(layers=0, cell="zeros", loss="huber", weight_cells=0), dict(tokens=99, lambda_rank=0.1, rank_loss="ranknet"),
    dict(lambda_rank=0.1, rank_loss="approx_ndcg", signed=False), dict(lambda_cosine=1.0, lambda_align=0.1, warmup=(0.5, 0.5))],
    ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()))
def test_every_part_can_be_switched_off_and_saved(data, tmp_path, change):
    table, controls = data
    model = ForwardModel(controls, **{**TINY, "epochs": 2, **change}).fit(table[:60], table[60:])
    p = model.predict(table.obs)
    assert np.isfinite(p).all() and p.shape == table.shape
    loaded = load_model(model.save(tmp_path / "m"))
    assert loaded.predict(table.obs).tobytes() == p.tobytes()
    assert (loaded.gene_embeddings() == model.gene_embeddings()).all().all() and (loaded.drug_vectors() == model.drug_vectors()).all().all()
    assert "f_r (condition model)" in check_model(tmp_path / "m")


def test_one_structure_has_one_vector_and_none_has_its_own(data):
    table, controls = data
    model = ForwardModel(controls, **TINY).fit(table[table.obs.pert != "nameless"])
    v = model.drug_vectors()
    assert (v.loc["phenol"] == v.loc["phenol sodium"]).all() and not (v.loc["phenol"] == v.loc["furan"]).any()
    obs = table.obs[table.obs.pert == "phenol"].copy()
    np.testing.assert_allclose(model.predict(obs.assign(pert="another name")), model.predict(obs), atol=1e-6)
    none = model.predict(obs.assign(pert="x", smiles=None))
    assert set(model.notes) == {"unseen drug without a structure: the unknown drug"}
    np.testing.assert_allclose(none, model.predict(obs.assign(pert="y", smiles="no structure")), atol=1e-6)


def test_a_larger_dose_has_a_larger_effect_and_an_odd_one_is_noted(data):
    table, controls = data
    model = ForwardModel(controls, **{**TINY, "link": False, "layers": 0}).fit(table)
    obs = pd.DataFrame({"pert": "furan", "smiles": SMILES["furan"], "cell_line": "L1", "batch": None, "dose_um": [0.01, 0.5, 1.0, 5.0, 500.0]}, list("abcde"))
    size = np.abs(model.predict(obs)).sum(1)
    assert (np.diff(size) > 0).all() or model.arrays["net.hill"][0] <= 0
    assert model.notes.str.contains("outside the training range").tolist() == [True, False, False, False, True]


def test_the_control_error_is_for_a_named_plate_only(data):
    table, controls = data
    model = ForwardModel(controls, **TINY).fit(table)
    obs = table.obs.iloc[:4]
    here, clean = model.predict(obs), model.predict(obs.assign(batch=None))
    assert model.notes.str.contains("no plate").all() and not np.allclose(here, clean)
    twin = model.predict(obs.assign(pert="furan", smiles=SMILES["furan"])) - model.predict(obs.assign(pert="furan", smiles=SMILES["furan"], batch=None))
    assert np.isfinite(twin).all()
    assert np.abs(control_states(controls).error).sum() > 0
    pooled = control_states(controls)
    assert all((pooled.error[i] == 0).all() for i, (_, p) in enumerate(pooled.rows) if p is None)


def test_what_is_refused(data, tmp_path):
    table, controls = data
    with pytest.raises(InputError, match="f_r without controls"): ForwardModel(**TINY).fit(table)
    with pytest.raises(InputError, match="no control state of cell line 'L4'"): ForwardModel(controls[controls.obs.cell_line != "L4"], **TINY).fit(table)
    with pytest.raises(InputError, match="the controls lack 1 of 24 genes"): ForwardModel(controls[:, 1:], **TINY).fit(table)
    with pytest.raises(InputError, match="is treated"): ForwardModel(ad.AnnData(table.X, table.obs, table.var, uns={"perturbnb": {"scale": "log1p_cp10k"}}), **TINY).fit(table)
    for bad in (dict(order="size"), dict(epochs=0), dict(rank_loss="x"), dict(lambda_mse=0.0), dict(warmup=(0.5, 0.2)), dict(dose="linear"), dict(tokens=0), dict(nothing=1)):
        with pytest.raises(InputError): ForwardModel(controls, **{**TINY, **bad})
    with pytest.raises(InputError, match="not fitted"): ForwardModel(controls, **TINY).predict(table.obs)


def test_seeds_differ_and_make_an_ensemble(data):
    table, controls = data
    models = fit_seeds(lambda seed: ForwardModel(controls, **dict(TINY, epochs=2), seed=seed), table, seeds=(0, 1))
    mean, sd = ensemble(models, table.obs)
    assert mean.shape == sd.shape == table.shape and (sd > 0).any()
    with pytest.raises(InputError, match="two or more"): ensemble(models[:1], table.obs)


def test_a_new_line_needs_its_controls_only(data, tmp_path):
    table, controls = data
    known = table[table.obs.cell_line != "L4"]
    few = ForwardModel(controls[controls.obs.cell_line != "L4"], **TINY).fit(known)
    obs = table.obs[table.obs.cell_line == "L4"]
    with pytest.raises(InputError, match="'L4'"): few.predict(obs)
    more = few.with_controls(controls[controls.obs.cell_line == "L4"])
    p = more.predict(obs)
    assert np.isfinite(p).all() and more.notes.str.contains("unseen line: its control state").all()
    assert load_model(more.save(tmp_path / "m")).predict(obs).tobytes() == p.tobytes()


def test_a_killed_fit_goes_on(data, tmp_path):
    table, controls = data
    class Stop(Exception): pass
    def stop(row):
        if row["epoch"] == 3: raise Stop
    make = lambda: ForwardModel(controls, **dict(TINY, epochs=6))
    whole = make().fit(table[:60], table[60:])
    with pytest.raises(Stop): make().fit_with(table[:60], table[60:], dir=tmp_path / "run", on_epoch=stop)
    resumed = make().fit_with(table[:60], table[60:], dir=tmp_path / "run")
    assert resumed.history.resumed and bytes_of(resumed) == bytes_of(whole)
