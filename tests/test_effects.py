"Effects: by hand, against a slow loop, written and read, and bad tables refused in one line."
import anndata as ad
import numpy as np
import pandas as pd
import pytest
from perturbnb.core import InputError, rng
from perturbnb.data import schema
from perturbnb.data.effects import average, effects, half, half_of, pooled_noise, pseudobulk_halves, shrink, why_dropped

TRAMETINIB = "Trametinib (DMSO_TF solvate)"


def cells(n=900, genes=6, seed=0):
    draw = rng(seed, "test.effects")
    obs = pd.DataFrame({"pert": draw.choice(["DMSO_TF", "a", "b", TRAMETINIB], n, p=[.4, .2, .2, .2]), "cell_line": draw.choice(["L1", "L2"], n), "batch": draw.choice(["p1", "p2"], n)})
    obs = obs.assign(pert_type=np.where(obs.pert == "DMSO_TF", "control", "compound"), dose_um=np.where(obs.pert == "DMSO_TF", 0.0, 5.0), time_h=24.0)
    obs.index = [f"cell{i}" for i in range(n)]
    rate = np.linspace(1, 20, genes) * np.where(obs.pert == "a", 1.5, 1)[:, None]
    return ad.AnnData(draw.poisson(rate).astype("float32") + (np.arange(genes) == 0), obs, pd.DataFrame({"symbol": [f"G{j}" for j in range(genes)]}, [f"G{j}" for j in range(genes)]))


BY = ["pert", "cell_line", "dose_um", "batch"]


@pytest.fixture(scope="module")
def bulk(): return pseudobulk_halves(cells(), BY, keep=["pert_type", "time_h"], source="test")


def fails(word, f, *args, **kw):
    with pytest.raises(InputError) as e: f(*args, **kw)
    assert word in str(e.value) and "\n" not in str(e.value), str(e.value)


def test_halves_follow_the_barcode():
    names = [f"c{i}" for i in range(4000)]
    h = half_of(names)
    assert abs(h.mean() - .5) < .03 and (half_of(names[::-1])[::-1] == h).all()
    c = cells()
    order = rng(0, "test.order").permutation(c.n_obs)
    a, b = (pseudobulk_halves(x, BY, keep=["pert_type", "time_h"]) for x in (c, c[order].copy()))
    for k in ("half_a", "half_b"): np.testing.assert_array_equal(a.layers[k], b.layers[k])


def test_effects_against_a_loop(bulk):
    c, e = cells(), effects(bulk, min_control_cells=40)
    x = schema.log1p_cp10k(c.X)
    h = half_of(c.obs_names)
    for i, r in enumerate(e.obs.itertuples()):
        treated = ((c.obs[BY[:2] + ["batch"]] == [r.pert, r.cell_line, r.batch]).all(axis=1)).to_numpy()
        ctrl = (c.obs.pert.eq("DMSO_TF") & c.obs.cell_line.eq(r.cell_line) & (c.obs.batch.eq(r.batch) | (r.control == "same_line"))).to_numpy()
        np.testing.assert_allclose(e.X[i], x[treated].mean(0) - x[ctrl].mean(0), atol=1e-5)
        np.testing.assert_allclose(e.layers["se_control"][i], x[ctrl].std(0, ddof=1) / np.sqrt(ctrl.sum()), atol=1e-5)
        for k, n, v in (("half_a", r.n_control_a, 0), ("half_b", r.n_control_b, 1)):
            np.testing.assert_allclose(e.layers[k][i], x[treated & (h == v)].mean(0) - x[ctrl & (h == v)].mean(0), atol=1e-5)
            assert n == (ctrl & (h == v)).sum()
    assert TRAMETINIB in set(e.obs.pert) and "DMSO_TF" not in set(e.obs.pert)


def test_fallbacks_are_flagged_and_counted(bulk):
    n = int(bulk.obs.n_cells[bulk.obs.pert == "DMSO_TF"].min())
    e = effects(bulk, min_control_cells=n + 1)
    f = e.uns["perturbnb"]["effects"]
    assert f["control_same_line"] == (e.obs.control == "same_line").sum() >= 3 and f["n_kept"] == e.n_obs
    fails("fewer than 100000 control cells", effects, bulk, min_control_cells=100_000)
    one = bulk[~(bulk.obs.pert.eq("DMSO_TF") & bulk.obs.cell_line.eq("L2")).to_numpy()].copy()
    fails("L2", effects, one, min_control_cells=10)
    assert effects(one, min_control_cells=10, missing="drop").uns["perturbnb"]["effects"]["n_no_control"] == 6


def test_filters(bulk):
    o = bulk.obs
    k = int(o.n_cells[o.pert_type == "compound"].median())
    e = effects(bulk, min_cells=k, min_control_cells=10)
    assert e.obs.n_cells.min() >= k and e.n_obs == (o.n_cells[o.pert_type == "compound"] >= k).sum()
    pairs = pd.DataFrame({"drug": ["A"], "cell_line_id": ["l1"], "weight": [2.5]})
    e = effects(bulk, pairs=pairs, min_control_cells=10)
    assert set(zip(e.obs.pert, e.obs.cell_line)) == {("a", "L1")} and e.obs.pair_weight.eq(2.5).all()
    assert e.uns["perturbnb"]["effects"]["dropped: pair not in the table"] == 10
    fails("no treated row is in the table", effects, bulk, pairs=pairs.assign(drug="z"))
    fails("no treated row is left", effects, bulk, min_cells=10**6)
    fails("name the columns so", why_dropped, o.drop(columns="cell_line"))


def test_bad_bulk(bulk):
    fails("several controls", effects, ad.AnnData(bulk.X, bulk.obs.assign(pert=np.where(bulk.obs.batch.eq("p1") & bulk.obs.pert.eq("DMSO_TF"), "DMSO", bulk.obs.pert)), bulk.var, uns=bulk.uns, layers=dict(bulk.layers)))
    wrong = bulk.copy()
    wrong.obs["pert_type"] = np.where(wrong.obs.pert == TRAMETINIB, "control", wrong.obs.pert_type)
    wrong.obs["dose_um"] = np.where(wrong.obs.pert == TRAMETINIB, 0.0, wrong.obs.dose_um)
    fails("marked as control", effects, wrong)  # a drug whose name holds the control's is no control
    fails("no row with pert_type control", effects, bulk[bulk.obs.pert_type == "compound"])
    fails("no treated row", effects, bulk[bulk.obs.pert_type == "control"])
    fails("0 rows", effects, bulk[:0])
    assert "half_a" not in effects(bulk, halves=False, min_control_cells=10).layers
    fails("no half_a in this table", half, effects(bulk, halves=False, min_control_cells=10), "a")


def test_average_against_simulation():
    "Two doses on one plate share their control: the stated error is that of many repeats."
    draw, n, m, repeats = rng(0, "test.average"), 20, 30, 4000
    t, c = draw.normal(0, 1, (repeats, 2)) / np.sqrt(n), draw.normal(0, 1, (repeats, 1)) / np.sqrt(m)
    seen = (t - c).mean(1).std()
    obs = pd.DataFrame({"pert": "a", "pert_type": "compound", "cell_line": "L", "dose_um": [1.0, 4.0], "time_h": 24.0, "batch": "p1", "n_cells": n, "control": "same_line_same_plate",
                        "n_control_cells": m, "control_group": "L|p1"}, index=["x", "y"])
    layers = {"se": np.full((2, 1), np.sqrt(1 / n + 1 / m)), "se_control": np.full((2, 1), np.sqrt(1 / m))}
    e = ad.AnnData(np.array([[1.0], [3.0]]), obs, pd.DataFrame({"symbol": ["G"]}, ["G"]),
                   uns={"perturbnb": {"scale": "delta_log1p_cp10k", "reference": "dmso_same_line", "source": "test", "hash": "0" * 64}}, layers=layers)
    a = average(e, "dose_um")
    np.testing.assert_allclose(a.layers["se"][0, 0], seen, rtol=.05)
    np.testing.assert_allclose([a.X[0, 0], a.obs.dose_um.iloc[0]], [2, 2])
    fails("over=''", average, e, [])
    fails("weight='n'", average, e, "dose_um", weight="n")


@pytest.mark.parametrize("weight", ["cells", "error", "equal"])
def test_average_keeps_single_rows_and_survives_a_file(bulk, weight, tmp_path):
    e = effects(bulk, min_control_cells=10)
    a = average(e, "batch", weight=weight)
    assert a.n_obs == 6 and a.obs.n_cells.sum() == e.obs.n_cells.sum() and a.obs.averaged.eq("p1+p2").all()
    again = schema.read(schema.write(a, tmp_path / "a.h5ad"))
    np.testing.assert_array_equal(again.X, a.X)
    one = e[e.obs.batch == "p1"].copy()
    b = average(one, "batch", weight=weight)
    order = [list(zip(one.obs.pert, one.obs.cell_line)).index(k) for k in zip(b.obs.pert, b.obs.cell_line)]
    for x, y in ((b.X, one.X), (b.layers["se"], one.layers["se"]), (b.layers["half_a"], one.layers["half_a"])): np.testing.assert_allclose(x, y[order])


def test_rows_of_one_cell_have_no_error_and_do_no_harm():
    c = cells()
    c = c[(c.obs.pert != "b") | (np.arange(c.n_obs) == np.flatnonzero(c.obs.pert == "b")[0])].copy()
    e = effects(pseudobulk_halves(c, BY, keep=["pert_type", "time_h"]), min_control_cells=10)
    lone = (e.obs.pert == "b").to_numpy()
    assert lone.sum() == 1 and np.isnan(e.layers["se"][lone]).all() and e.uns["perturbnb"]["effects"]["n_without_half"] == 1
    assert half(e, "a").n_obs + half(e, "b").n_obs == 2 * e.n_obs - 1
    assert np.isfinite(pooled_noise(e)).all() and np.isfinite(shrink(e).X).all()
    assert np.isfinite(average(e, weight="error").X).all()


def test_shrinkage_never_overshoots_and_leaves_other_rows_alone(bulk, tmp_path):
    e = effects(bulk, min_control_cells=10)
    for prior in ("row", "gene", "product"):
        s = shrink(e, prior=prior)
        assert (np.abs(s.X) <= np.abs(e.X) + 1e-12).all() and (s.X * e.X >= 0).all()
        assert ((s.layers["shrinkage"] >= 0) & (s.layers["shrinkage"] <= 1)).all()
        np.testing.assert_array_equal(s.layers["raw"], e.X)
    mask = (e.obs.pert != "a").to_numpy()
    changed = e.copy(); changed.X[~mask] += 5; changed.layers["se"][~mask] *= 3; changed.layers["se_control"][~mask] *= 3
    for towards in ("zero", "drug"):
        x, y = (shrink(t, towards=towards, rows=mask) for t in (e, changed))
        np.testing.assert_array_equal(x.X[mask], y.X[mask])
        np.testing.assert_array_equal(y.X[~mask], changed.X[~mask])
    schema.read(schema.write(shrink(e, towards="drug"), tmp_path / "s.h5ad"))
    for bad in (mask[:2], mask.astype(int), ~mask & mask): fails("a mask of", shrink, e, rows=bad)


def test_the_moments_find_the_variance_of_true_effects():
    draw, genes = rng(0, "test.moments"), 20_000
    from perturbnb.data.effects import _belief
    theta, s2 = draw.normal(0, .5, (1, genes)), np.full((1, genes), .2)
    x = theta + draw.normal(0, np.sqrt(s2))
    b = _belief(x, s2, "row", np.ones(1, bool))
    np.testing.assert_allclose(b, .25 / .45, atol=.02)
    assert ((b * x - theta) ** 2).mean() < ((x - theta) ** 2).mean() * .6  # by theory .25 * .2 / .45 against .2
    assert (_belief(draw.normal(0, .1, (1, genes)), s2, "row", np.ones(1, bool)) == 0).all()
