"Attributions of the T-cell model: sums, units, baselines, kinks, recovery, stability, and where it refuses."
import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from perturbnb.core import InputError
from perturbnb.interpret.attribution import (
    METHODS, OUTPUTS, TargetNet, Attribution, _ap, attribute, attributions, average_seeds, baseline_inputs, correlation_importance, enrichment, global_importance, importance,
    per_metabolite, recovery, recovery_differences, ridge_importance, stability, target_net)
from perturbnb.metrics.classify import average_precision
from perturbnb.models.base import load_model
from perturbnb.models.tcell import TCell
from perturbnb.models.tcell_baselines import WellRidge

SMALL = dict(width=16, heads=2, ff=16, groups=4, sketch=8, epochs=25, lr=3e-3, latent=6)


@pytest.fixture(scope="module")
def wells():
    "120 wells of 12 genes on two plates; genes 0 to 2 follow activation, gene 11 is constant."
    draw = np.random.default_rng(0)
    a = draw.normal(size=120)
    x = draw.normal(8, 1, (120, 12))
    x[:, :3] += 1.5 * a[:, None]
    x[:, 11] = 5
    obs = pd.DataFrame({"pert": [f"m{i // 2}" for i in range(110)] + ["DMSO"] * 10, "pert_type": ["metabolite"] * 110 + ["control"] * 10, "cell_line": "T cell", "batch": ["p1", "p2"] * 60, "n_cells": 1,
                        "pseudotime_z": np.tanh(a), "cytoscore_z": a, "Tscore_z": a, "label": (a > 0).astype(int), "activation_old": 3 * a}, index=[f"w{i:03d}" for i in range(120)])
    names = [f"G{j}" for j in range(12)]
    return ad.AnnData(x, obs, pd.DataFrame({"symbol": names}, names), uns={"perturbnb": {"scale": "vst", "reference": "none", "source": "test", "hash": "0" * 64}})


@pytest.fixture(scope="module")
def model(wells): return TCell(**SMALL).fit(wells, wells)


@pytest.mark.parametrize("target", [*OUTPUTS, "norm", "euclid", "cosine", "latent:5"])
@pytest.mark.parametrize("baseline", ["zero", "raw_zero", "dmso"])
def test_sums_give_the_change_of_what_the_model_predicts(wells, model, target, baseline):
    some = wells[::9]
    a = attribute(model, some, target, baseline=baseline, reference=wells, steps=400)
    z, c = model.latent(some), model.dmso_centre()
    seen = (model.predict(some)[:, OUTPUTS.index(target)] if target in OUTPUTS else np.linalg.norm(z, axis=1) if target == "norm" else np.linalg.norm(z - c, axis=1) if target == "euclid"
            else 1 - z @ c / (np.linalg.norm(z, axis=1) * np.linalg.norm(c)) if target == "cosine" else z[:, 5])
    at = baseline_inputs(model, baseline, wells)
    with torch.no_grad(): start = target_net(model, target)(at[None]).item()
    np.testing.assert_allclose(a.change, seen - start, atol=2e-5)
    assert a.complete and a.values.dtype == np.float64 and a.values.shape == (len(some), 12)
    np.testing.assert_allclose(a.values.sum(1), seen - start, atol=0.01 * np.abs(a.values).sum(1).max() + 2e-5)


def test_a_constant_gene_gets_nothing_and_a_well_that_is_the_baseline_too(wells, model):
    for baseline in ("zero", "raw_zero", "dmso"): assert (attribute(model, wells[:5], "logit", baseline=baseline, reference=wells, strict=False).values[:, 11] == 0).all()
    same = attribute(model, wells[:1], "logit", baseline=[wells.obs_names[0]], strict=False)
    assert np.abs(same.values).max() < 1e-5 and abs(same.change[0]) < 1e-5


def test_a_linear_network_is_explained_exactly_by_every_method():
    w, b = torch.tensor([2., -1., 0.5]).double(), torch.tensor([1., 1., 1.]).double()
    class Linear(nn.Module):
        def forward(self, x): return x @ w + 3
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()
    for method in METHODS:
        values, change = attributions(Linear(), x, b, method, steps=3, batch=2)
        np.testing.assert_allclose(values, (w if method == "gradient" else (x - b) * w).expand(5, 3).numpy(), rtol=1e-6)
        np.testing.assert_allclose(change, ((x - b) @ w).numpy(), rtol=1e-12)


def test_batches_change_nothing(wells, model):
    one, many = (attribute(model, wells[:20], "euclid", batch=n, strict=False).values for n in (7, 256))
    np.testing.assert_allclose(one, many, rtol=1e-9, atol=1e-12)


def test_input_and_model_stay_as_they_were(wells, model):
    before, weights, x = model.predict(wells), [p.requires_grad for p in model.network().parameters()], wells.X.copy()
    attribute(model, wells[:4], "norm", strict=False)
    np.testing.assert_array_equal(model.predict(wells), before)
    assert [p.requires_grad for p in model.network().parameters()] == weights and next(model.network().parameters()).dtype == torch.float32
    np.testing.assert_array_equal(wells.X, x)


def test_a_loaded_model_is_explained_the_same(wells, model, tmp_path):
    again = load_model(model.save(tmp_path / "m"))
    np.testing.assert_array_equal(attribute(again, wells[:4], "cosine", strict=False).values, attribute(model, wells[:4], "cosine", strict=False).values)


def test_genes_in_another_order_give_the_same_attributions(wells, model):
    np.testing.assert_allclose(attribute(model, wells[:4, ::-1], "logit", strict=False).values, attribute(model, wells[:4], "logit", strict=False).values, rtol=1e-12)


def test_a_model_without_standardised_genes_has_the_empty_well_as_zero(wells):
    raw = TCell(**SMALL, zscore=False).fit(wells, wells)
    np.testing.assert_array_equal(baseline_inputs(raw, "zero"), baseline_inputs(raw, "raw_zero"))
    np.testing.assert_allclose(baseline_inputs(raw, "dmso", wells), wells.X[-10:].mean(0))


def test_the_centre_can_be_a_plate_or_numbers(wells, model):
    plate = attribute(model, wells[:3], "euclid", centre="p2", strict=False)
    np.testing.assert_array_equal(plate.values, attribute(model, wells[:3], "euclid", centre=model.dmso_centre("p2"), strict=False).values)
    assert not np.array_equal(plate.values, attribute(model, wells[:3], "euclid", strict=False).values)
    with pytest.raises(InputError, match="a centre of shape"): attribute(model, wells[:3], "euclid", centre=np.zeros(3))


def test_slope_at_the_centre_is_the_stated_zero():
    class Same(nn.Module):
        def forward(self, x): return {"latent": x}
    c = np.array([1., 2.])
    values, _ = attributions(TargetNet(Same(), "euclid", c), torch.tensor(c[None]), torch.zeros(2).double(), "gradient")
    np.testing.assert_array_equal(values, [[0, 0]])


@pytest.mark.parametrize("call, words", [
    (lambda m, w: attribute(m, w, "Logit"), "target 'Logit'"), (lambda m, w: attribute(m, w, "latent:6"), "target 'latent:6'"), (lambda m, w: attribute(m, w, method="IG"), "method='IG'"),
    (lambda m, w: attribute(m, w, baseline="mean"), "baseline='mean'"), (lambda m, w: attribute(m, w[:5], baseline="dmso"), "no well for the baseline among 5 wells"),
    (lambda m, w: attribute(m, w, baseline=["q"]), "baseline well 'q'"), (lambda m, w: attribute(m, w[:, :11]), "lacks 1 of 12 genes"), (lambda m, w: attribute(m, w[:4], steps=0), "steps=0"),
    (lambda m, w: attribute(m, w[:40], "euclid", steps=1, tolerance=1e-4), "take more steps, such as steps=4"), (lambda m, w: importance(attribute(m, w[:0], method="gradient_input")), "attributions of no well"),
    (lambda m, w: attribute(TCell(**SMALL, old_weight=0.0).fit(w), w, "activation"), "explain the logit instead")])
def test_what_is_refused_in_one_line(wells, model, call, words):
    with pytest.raises(InputError) as e: call(model, wells)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_an_incomplete_attribution_can_be_kept_and_says_so(wells, model):
    a = attribute(model, wells[:40], "euclid", steps=1, tolerance=1e-4, strict=False)
    assert not a.complete and "NOT complete" in str(a)
    assert not attribute(model, wells[:4], method="gradient_input").complete and np.isnan(attribute(model, wells[:4], method="gradient").gap).all()


def test_tables_for_metabolites_and_genes(wells, model):
    a = attribute(model, wells, "activation", method="gradient_input")
    t = importance(a, n_boot=200)
    assert list(t) == ["Gene", "GradInputImportance", "SignedMean", "low", "high", "n_groups"] and t.GradInputImportance.is_monotonic_decreasing
    assert t.n_groups.eq(55 + 10).all() and ((t.low <= t.GradInputImportance) & (t.GradInputImportance <= t.high)).all()
    np.testing.assert_allclose(t.set_index("Gene").SignedMean[a.genes], a.values.mean(0))
    np.testing.assert_allclose(per_metabolite(a).loc["m3"], a.values[6:8].mean(0))
    assert set(t.Gene[:3]) == {"G0", "G1", "G2"}


def test_stability_of_equal_and_of_random_importances():
    draw = np.random.default_rng(0)
    x = draw.random(400)
    same = stability(pd.DataFrame({s: x for s in range(5)}))
    assert same.spearman.value == pytest.approx(1) and same.overlap.value == 1
    random = stability(pd.DataFrame(draw.random((400, 6))))
    assert abs(random.spearman.value) < 0.1 and random.spearman.low < 0 < random.spearman.high and abs(random.overlap.value - random.chance) < 0.06
    with pytest.raises(InputError, match="the same importance"): stability(pd.DataFrame({"a": [1., 1], "b": [1., 2]}))
    with pytest.raises(InputError, match="importances that sum to 0"): average_seeds(pd.DataFrame({"a": [0., 0], "b": [1., 2]}))


def test_average_precision_is_that_of_the_metrics_with_ties():
    for s in range(30):
        draw = np.random.default_rng(s)
        y, score = draw.random(25) < .4, draw.integers(0, 5, 25).astype(float)
        if y.any(): assert _ap(y, score) == pytest.approx(average_precision(y.astype(int), score))


def test_recovery_of_perfect_and_of_random_rankings():
    y = pd.Series(np.arange(200) < 20, [f"g{i}" for i in range(200)])
    draw = np.random.default_rng(1)
    r = pd.DataFrame({"perfect": y.astype(float), "random": draw.random(200), "backwards": np.arange(200.0), "gaps": np.where(y, 1.0, np.nan)}, y.index)
    t = recovery(r, y, n_boot=200)
    assert t.auprc["perfect"] == 1 and t.p["perfect"] < 0.01 and t.chance.eq(0.1).all() and t.p["random"] > 0.05 and t.auprc["backwards"] < t.auprc["random"]
    assert t.auprc["gaps"] == 1 and t.n_without["gaps"] == 180
    d = recovery_differences(r, y, ["random"], n_boot=200).set_index("ranking")
    assert d.low["perfect"] > 0 and d.difference["perfect"] == pytest.approx(1 - t.auprc["random"])
    np.testing.assert_allclose(recovery(r.sample(frac=1, random_state=0), y, n_boot=100).auprc, t.auprc)  # genes are matched by name


def test_correlation_and_ridge_rivals(wells):
    r = correlation_importance(wells, "cytoscore_z")
    assert r["G0"] == pytest.approx(abs(np.corrcoef(wells.X[:, 0], wells.obs.cytoscore_z)[0, 1])) and np.isnan(r["G11"])
    lifted = wells.copy()
    lifted.X[:, 5] += 10 * (wells.obs.batch == "p2").to_numpy()
    lifted.obs["cytoscore_z"] += 10 * (wells.obs.batch == "p2").to_numpy()
    assert correlation_importance(lifted, "cytoscore_z")["G5"] > 0.9 and correlation_importance(lifted, "cytoscore_z", within="batch")["G5"] < 0.4
    w = ridge_importance(WellRidge().fit(wells), "activation")
    assert set(w.nlargest(3).index) == {"G0", "G1", "G2"}


def test_enrichment_counts_and_its_universe():
    genes = [f"g{i}" for i in range(50)]
    r = pd.Series(np.arange(50, 0, -1.0), genes)
    e = enrichment(r, {"first": genes[:5], "last": genes[-5:]}, top=5).set_index("set")
    from scipy.special import comb
    assert e.n_both["first"] == 5 and e.p["first"] == pytest.approx(1 / comb(50, 5)) and e.fdr["first"] == pytest.approx(2 / comb(50, 5))
    assert e.n_both["last"] == 0 and e.p["last"] == 1 and e.t["first"] > 0 > e.t["last"]
    with pytest.raises(InputError, match="gene 'q'"): enrichment(r, {"s": ["q", "g1"]})
    with pytest.raises(InputError, match="1 different values"): enrichment(r * 0, {"s": ["g1", "g2"]})


def test_same_seed_same_interval(wells, model):
    a = attribute(model, wells, method="gradient_input")
    pd.testing.assert_frame_equal(importance(a, n_boot=200), importance(a, n_boot=200))
    assert isinstance(a, Attribution) and global_importance(a).name == "GradInputImportance"
