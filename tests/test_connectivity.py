"Connectivity scores: agreement with slow references on random cases, invariants, and refusals."
import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from perturbnb.core import ChangedFile, InputError, rng
from perturbnb.models import connectivity as c
from perturbnb.models.base import check_model, example_table, load_model


def slow_es(z, members):
    "The enrichment score from its definition: one step for each distinct value."
    s, best, worst = np.isin(np.arange(len(z)), members), 0.0, 0.0
    for v in sorted(set(z), reverse=True):
        above = z >= v
        r = np.abs(z[s & above]).sum() / np.abs(z[s]).sum() - (~s & above).sum() / (~s).sum()
        best, worst = max(best, r), min(worst, r)
    return 0.0 if abs(best + worst) < 1e-9 else best if best > -worst else worst


def slow_wtcs(z, up, down):
    a, b = slow_es(z, up), slow_es(z, down)
    return (a - b) / 2 if np.sign(a) != np.sign(b) else 0.0


def case(i):
    "Signature of 30 to 90 genes and two disjoint lists; every fourth has many ties."
    draw, n = rng(i, "test_connectivity"), 30 + i % 60
    order, k = draw.permutation(n), 1 + i % 12
    return draw.normal(0, 2, n).round(1 + i % 4) + 0.05, order[:k], order[k:2 * k]


def test_wtcs_agrees_with_the_slow_definition_on_1000_cases():
    found, want = [], []
    for i in range(1000):
        z, up, down = case(i)
        found.append(c.wtcs(z[None], c.Queries(["q"], up[None], down[None], len(z), None)).item())
        want.append(slow_wtcs(z, up, down))
    np.testing.assert_allclose(found, want, atol=1e-6)
    assert 0.1 < np.mean(np.array(want) == 0) < 0.9


def test_many_queries_at_once_are_the_queries_one_by_one(monkeypatch):
    draw = rng(0, "test_connectivity", "blocks")
    library, full = draw.normal(0, 1, (7, 120)), draw.normal(0, 1, (40, 120))
    queries = c.top_genes(full, 13)
    for score in (c.wtcs, c.lamb):
        whole = score(library, queries)
        monkeypatch.setattr(c, "_BLOCK", 30)  # two queries a block
        np.testing.assert_array_equal(score(library, queries), whole)
        monkeypatch.undo()
        one = [score(library, c.top_genes(q[None], 13))[0] for q in full]
        np.testing.assert_array_equal(whole, one)


def test_lists_of_unequal_length_are_padded_without_effect():
    draw = rng(1, "test_connectivity")
    library, genes = draw.normal(0, 1, (5, 80)), [f"g{i}" for i in range(80)]
    lists = {f"q{k}": (genes[:k], genes[40:40 + 2 * k]) for k in (1, 3, 17)}
    together = c.wtcs(library, c.gene_sets(lists, genes, min_overlap=1))
    alone = [c.wtcs(library, c.gene_sets({n: q}, genes, min_overlap=1))[0] for n, q in lists.items()]
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("score", [c.wtcs, c.lamb, lambda x, q: c.xsum(x, q, n_extreme=20)])
def test_order_of_genes_and_exchange_of_sides(score):
    draw = rng(2, "test_connectivity")
    x, full, p = draw.normal(0, 1, (6, 90)).round(1), draw.normal(0, 1, (8, 90)), draw.permutation(90)
    q = c.top_genes(full, 10)
    back = np.argsort(p)
    moved = q._replace(up=back[q.up], down=back[q.down])
    np.testing.assert_allclose(score(x[:, p], moved), score(x, q), atol=1e-12)
    np.testing.assert_allclose(score(x, q._replace(up=q.down, down=q.up)), -score(x, q), atol=1e-12)


@pytest.mark.parametrize("method", c.METHODS)
def test_a_signature_mimics_itself_and_reverses_its_negative(method):
    x = rng(3, "test_connectivity").normal(0, 1, (4, 200))
    table = lambda v: ad.AnnData(v, pd.DataFrame({"cell_line": "L", "pert_type": "compound"}, index=list("abcd")), pd.DataFrame(index=[f"g{i}" for i in range(200)]))
    m = c.Connectivity(method, n_top=20).fit(table(x))
    same, turned = m.predict(table(x)).to_numpy(), m.predict(table(-x)).to_numpy()
    assert (same.argmax(1) == np.arange(4)).all() and (turned.argmin(1) == np.arange(4)).all()
    assert (np.diag(same) > 0).all() and (np.diag(turned) < 0).all()
    assert method == "xsum" or (np.abs(same) <= 2).all()


def test_random_queries_score_zero_on_average():
    x = rng(4, "test_connectivity").normal(0, 1, (30, 300))
    w = c.wtcs(x, c.random_sets(300, 20, 20, 400, seed=5))
    assert abs(w.mean()) < 4 * w.std() / np.sqrt(w.size / 30)


def test_correlations_agree_with_scipy_on_1000_pairs():
    draw = rng(6, "test_connectivity")
    x, q = draw.normal(0, 1, (25, 50)).round(1), draw.normal(0, 1, (40, 50)).round(1)
    for kind, f in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        np.testing.assert_allclose(c.correlation(x, q, kind), [[f(a, b)[0] for b in x] for a in q], atol=1e-6)


def test_missing_values_stay_missing():
    flat = np.vstack([np.ones(40), np.zeros(40), np.arange(40.0)])
    q = c.top_genes(rng(7, "test_connectivity").normal(0, 1, (2, 40)), 5)
    for w in (c.wtcs(flat, q), c.lamb(flat, q), c.lamb(flat, q, scaled=True)):
        assert np.isnan(w[:, :2]).all() and np.isfinite(w[:, 2]).all()
    ncs, why = c.normalise([[0.5, np.nan, -0.2, 0.0]], pd.DataFrame({"cell_line": ["a", "a", "a", "b"]}), min_n=1)
    np.testing.assert_allclose(ncs, [[1, np.nan, -1, 0]])
    assert (why.reason != "").sum() == 2  # line b has no score of either sign
    best, n = c.summarise(np.full((1, 2), np.nan), ["x", "x"])
    assert np.isnan(best.x.item()) and n.x.item() == 0


def test_ncs_against_a_loop_and_with_a_reference_set():
    draw = rng(8, "test_connectivity")
    s = np.where(draw.random((5, 60)) < 0.3, 0, draw.normal(0, 0.4, (5, 60)))
    groups = pd.DataFrame({"cell_line": draw.choice(list("abc"), 60), "pert_type": draw.choice(["x", "y"], 60)})
    use = draw.random(60) < 0.7
    got, _ = c.normalise(s, groups, reference=use, min_n=1)
    for q in range(5):
        for r in range(60):
            kin = (groups == groups.iloc[r]).all(axis=1) & use & (np.sign(s[q]) == np.sign(s[q, r]))
            want = 0 if s[q, r] == 0 else s[q, r] / np.abs(s[q, kin]).mean() if kin.any() else np.nan
            np.testing.assert_allclose(got[q, r], want)


def test_tau_against_a_loop():
    draw = rng(9, "test_connectivity")
    s, ref = draw.normal(0, 1, (20, 4)), draw.normal(0, 1, (150, 4))
    ref[:60, 3] = np.nan  # 90 left: too few
    want = [[np.sign(v) * 100 * (np.abs(ref[:, j]) < abs(v)).mean() if j < 3 else np.nan for j, v in enumerate(row)] for row in s]
    np.testing.assert_allclose(c.tau(s, ref), want)


@pytest.mark.parametrize("call, words", [
    (lambda: c.tau(np.ones((1, 2)), np.ones((99, 2))), ["reference of 99", "at least 100"]),
    (lambda: c.tau(np.ones((1, 2)), np.full((500, 2), np.nan)), ["reference of 0"]),
    (lambda: c.gene_sets({}, "abc"), ["no query"]),
    (lambda: c.gene_sets({"q": (["a"] * 2, [])}, "abc"), ["stands twice"]),
    (lambda: c.enrichment(np.array([[1.0, np.inf, 2]]), [[0]]), ["library, row 0, gene number 1: inf"]),
    (lambda: c.enrichment(np.zeros((0, 3)), [[0]]), ["shape (0, 3)"]),
    (lambda: c.correlation(np.ones((1, 3)), np.ones((1, 4))), ["3 genes and queries of 4"]),
    (lambda: c.normalise(np.ones((1, 2)), pd.DataFrame({"g": ["a"]})), ["1 rows of groups for 2"]),
    (lambda: c.normalise(np.ones((1, 2)), pd.DataFrame({"g": ["a", None]})), ["signature number 1 has no g"]),
    (lambda: c.summarise(np.ones((1, 2)), ["a"]), ["1 labels for 2"]),
    (lambda: c.wtcs(np.ones((1, 5)), c.top_genes(np.arange(8.0)[None], 2)), ["library of 5 genes and queries for 8"]),
    (lambda: c.top_genes(np.ones((1, 8)), 2), ["same for every gene"]),
    (lambda: c.random_sets(10, 6, 5), ["6 + 5 genes of 10"]),
    (lambda: c.Connectivity(normalised=True, groups=["line"]).fit(ad.AnnData(np.eye(3))).predict({"q": ([], ["0"] * 0)}), ["has no genes"]),
])
def test_refusals_are_one_clear_line(call, words):
    with pytest.raises(InputError) as e: call()
    assert "\n" not in str(e.value)
    for w in words: assert w in str(e.value), str(e.value)


def library(seed=10, n_drugs=8, n_genes=240):
    "Drugs in five lines."
    draw = rng(seed, "test_connectivity", "library")
    mean = np.repeat(draw.normal(0, 1, (n_drugs, n_genes)), 5, axis=0)
    return example_table(np.repeat([f"drug {i}" for i in range(n_drugs)], 5), mean + draw.normal(0, 1, mean.shape), [f"L{i}" for i in range(5)] * n_drugs)


@pytest.mark.parametrize("settings", [{"method": m} for m in c.METHODS] + [{"method": "lamb", "scaled": True}, {"method": "xsum", "n_extreme": 7},
                                      {"normalised": True, "groups": ["pert_type"]}, {"method": "cosine", "normalised": True, "groups": ["pert"]}])
def test_the_model_keeps_the_contract(settings, tmp_path):
    "The numbers of Connectivity whatever the order of rows and genes, the same after a reload, and a changed byte is refused."
    table, draw = library(), rng(11, "test_connectivity")
    ask = table[draw.permutation(table.n_obs)[:9]].copy()
    model = c.ConnectivityModel(**settings, n_top=12)
    got = model.fit(table).predict(ask)
    plain = c.Connectivity(**{k: v for k, v in model.options.items() if k not in ("n_extreme", "scaled") or k in settings}).fit(table)
    np.testing.assert_allclose(got, plain.predict(ask)[model.classes_], atol=1e-12)
    mixed = table[draw.permutation(table.n_obs)][:, draw.permutation(table.n_vars)].copy()
    np.testing.assert_allclose(type(model)(**model.options).fit(mixed).predict(ask), got, atol=1e-9)
    again = load_model(model.save(tmp_path / "m"))
    np.testing.assert_array_equal(again.predict(ask), got, strict=True)
    assert again.classes_ == sorted(table.obs_names) and again.predict(ask[:0]).shape == (0, table.n_obs)
    assert check_model(tmp_path / "m").startswith("sound model: connectivity (profile model), 240 genes")
    weights = tmp_path / "m/weights.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(ChangedFile, match="SHA-256"): load_model(tmp_path / "m")


def test_gene_sets_of_a_loaded_model(tmp_path):
    table = library()
    table.var["symbol"] = [f"S{i}" for i in range(table.n_vars)]
    lists = {"q": ([f"S{i}" for i in range(15)], [f"S{i}" for i in range(50, 70)]), "up only": ([f"S{i}" for i in range(30)], [])}
    again = load_model(c.ConnectivityModel().fit(table).save(tmp_path / "m"))
    got = again.predict_sets(lists, "symbol")
    pd.testing.assert_frame_equal(got, c.Connectivity().fit(table, "symbol").predict(lists)[again.classes_])
    assert again.overlap.down_found.tolist() == [20, 0]
    for call, words in ((lambda: again.predict_sets(lists), "0 of 15 up genes"), (lambda: again.predict_sets(lists, "sybol"), "did you mean 'symbol'"),
                        (lambda: again.predict(table[:, :220]), "lacks 20 of 240 genes"), (lambda: c.ConnectivityModel(method="wtc"), "did you mean 'wtcs'"),
                        (lambda: c.ConnectivityModel(normalised=True, groups=["line"]).fit(table), "no column 'line'")):
        with pytest.raises(InputError) as e: call()
        assert words in str(e.value) and "\n" not in str(e.value)
