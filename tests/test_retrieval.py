"Retrieval, classification and calibration metrics against independent references on 1,000 random cases each; adversaries at chance; golden values."
import warnings
from functools import lru_cache
from itertools import permutations

import golden_retrieval as golden
import numpy as np
import pytest
from scipy.stats import kendalltau, spearmanr
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve
from perturbnb.core import InputError, rng
from perturbnb.metrics import classify
from perturbnb.metrics.registry import METRICS
from perturbnb.metrics.retrieval import average_precision, evaluate, ndcg, precision_at_k, reciprocal_rank
from perturbnb.metrics.retrieve import SIMILARITIES, retrieve

N = 1000


# --- retrieval against every order of the ties -------------------------------------------------------------------------------------------------------


def ranks(g): return [i for i, x in enumerate(g, 1) if x > 0]


def dcg(g, k, gain): return sum(gain(x) / np.log2(i + 1) for i, x in enumerate(g[:k], 1))


def ndcg_slow(g, k, gain): return dcg(g, k, gain) / dcg(sorted(g, reverse=True), k, gain)


SLOW = {"precision_at_1@1": lambda g: g[0] > 0, "precision_at_5@1": lambda g: sum(x > 0 for x in g[:5]) / min(5, len(g)),
        "recall_at_1@1": lambda g: (g[0] > 0) / len(ranks(g)), "recall_at_5@1": lambda g: sum(x > 0 for x in g[:5]) / len(ranks(g)),
        "hit_at_1@1": lambda g: g[0] > 0, "hit_at_5@1": lambda g: any(x > 0 for x in g[:5]),
        "ap@1": lambda g: sum(i / p for i, p in enumerate(ranks(g), 1)) / len(ranks(g)),
        "ap_at_5@1": lambda g: sum(i / p for i, p in enumerate(ranks(g), 1) if p <= 5) / min(5, len(ranks(g))),
        "ap_over_r_at_5@1": lambda g: sum(i / p for i, p in enumerate(ranks(g), 1) if p <= 5) / len(ranks(g)),
        "ap_over_r_at_1@1": lambda g: (g[0] > 0) / len(ranks(g)),
        "reciprocal_rank@1": lambda g: 1 / ranks(g)[0], "first_rank@1": lambda g: ranks(g)[0],
        "ndcg@1": lambda g: ndcg_slow(g, 99, float), "ndcg_at_5@1": lambda g: ndcg_slow(g, 5, float), "ndcg_at_1@1": lambda g: ndcg_slow(g, 1, float),
        "ndcg_exp@1": lambda g: ndcg_slow(g, 99, lambda x: 2.0 ** x - 1), "ndcg_exp_at_5@1": lambda g: ndcg_slow(g, 5, lambda x: 2.0 ** x - 1)}


def slow(scores, grades):
    "Mean of each metric over all orders of the candidates that agree with the scores; pairs that are left out are not there."
    kept = [(s, int(g)) for s, g in zip(scores, grades) if g >= 0]
    if not any(g > 0 for _, g in kept): return [np.nan] * len(SLOW)
    runs = [[[g for t, g in kept if t == s]] for s in sorted({s for s, _ in kept}, reverse=True)]
    orders = [[]]
    for (run,) in runs: orders = [o + list(p) for o in orders for p in permutations(run)]
    return np.mean([[f(o) for f in SLOW.values()] for o in orders], axis=0)


def test_retrieval_is_the_mean_over_all_orders_of_ties():
    draw = rng(0, "test.retrieval.orders")
    scores, grades = draw.integers(0, 4, (N, 6)).astype(float), draw.integers(-1, 4, (N, 6))
    grades[draw.random((N, 6)) < .3] = 0
    mine = evaluate(scores, grades, metrics=SLOW).values.to_numpy()
    want = np.array([slow(s, g) for s, g in zip(scores, grades)])
    np.testing.assert_allclose(mine, want, atol=1e-10)
    assert 0 < np.isnan(want[:, 0]).sum() < N / 5 and (grades == -1).any()


def test_chance_is_the_mean_over_random_orders():
    draw = rng(0, "test.retrieval.chance")
    grades = np.array([[2, 1, 0, 0, 0, 0, -1, -1], [1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 3, -1]])
    ids = [*SLOW, "ap_normalised@1"]
    exact = evaluate(draw.normal(size=grades.shape), grades, metrics=ids).chance
    drawn = [evaluate(draw.normal(size=(3 * 4000, 8)), np.repeat(grades[[i]], 3 * 4000, 0), metrics=ids).values for i in range(3)]
    for i, d in enumerate(drawn): assert (np.abs(d.mean() - exact.iloc[i]) <= 4 * d.std() / np.sqrt(len(d)) + 1e-12).all()
    np.testing.assert_allclose(evaluate(np.zeros((3, 8)), grades, metrics=ids).values, exact, atol=1e-12)


# --- retrieval against scikit-learn --------------------------------------------------------------------------------------------------------------


def cases(name, n_candidates=12, ties=True, masked=True):
    "1,000 queries with grades; ties and pairs left out if asked."
    draw = rng(0, "test.retrieval", name)
    s, y = draw.normal(size=(N, n_candidates)), draw.integers(0, 4, (N, n_candidates)) * (draw.random((N, n_candidates)) < .4)
    if masked: y[draw.random(y.shape) < .2] = -1
    return s.round(0) if ties else s, y


def rows(s, y):
    "Scores and grades of each query without the pairs that are left out."
    return ((s[i][y[i] >= 0], y[i][y[i] >= 0]) for i in range(len(y)))


@pytest.mark.parametrize("k", [None, 3])
def test_ndcg_with_ties_and_masks(k):
    s, y = cases("ndcg")
    want = [sk.ndcg_score([g], [x], k=k) if (g > 0).any() else np.nan for x, g in rows(s, y)]
    np.testing.assert_allclose(ndcg(s, y, k=k), want, atol=1e-10)


def test_average_precision_without_ties_and_where_it_differs_with_them():
    s, y = cases("ap", ties=False)
    want = [sk.average_precision_score(g > 0, x) if (g > 0).any() else np.nan for x, g in rows(s, y)]
    np.testing.assert_allclose(average_precision(s, y), want, atol=1e-10)
    want = [sk.label_ranking_average_precision_score([g > 0], [x]) if (g > 0).any() else np.nan for x, g in rows(s[:200], y[:200])]
    np.testing.assert_allclose(average_precision(s[:200], y[:200]), want, atol=1e-10)
    # two tied candidates, one right: scikit-learn takes the tie as one threshold, ours is the mean of both orders
    assert sk.average_precision_score([1, 0], [1, 1]) == sk.label_ranking_average_precision_score([[1, 0]], [[1, 1]]) == 1 / 2
    assert average_precision([[1., 1.]], [[1, 0]])[0] == 3 / 4 == average_precision([[1., 1.]], [[0, 1]])[0]


def test_one_right_candidate_against_top_k_accuracy():
    draw = rng(0, "test.retrieval.top k")
    s, own = draw.normal(size=(N, 9)), draw.integers(0, 9, N)
    y = np.eye(9, dtype=int)[own]
    found = evaluate(s, y).values
    for k in (1, 5): assert np.isclose(found[f"hit_at_{k}@1"].mean(), sk.top_k_accuracy_score(own, s, k=k, labels=range(9)))
    np.testing.assert_allclose(found["reciprocal_rank@1"], found["ap@1"])
    np.testing.assert_allclose(found["recall_at_5@1"], found["hit_at_5@1"])
    np.testing.assert_allclose(found["first_rank@1"] + (s < np.take_along_axis(s, own[:, None], 1)).sum(1), 9)


def test_what_is_left_out_changes_nothing():
    s, y = cases("masked", ties=True)
    junk = np.where(y == -1, np.where(rng(0, "junk").random(y.shape) < .5, np.nan, 1e9), s)
    np.testing.assert_array_equal(evaluate(junk, y).values, evaluate(s, y).values)
    order = rng(0, "order").permutation(12)
    np.testing.assert_allclose(evaluate(s[:, order], y[:, order]).values, evaluate(s, y).values, atol=1e-12)  # nor does the order of the file


# --- adversaries -----------------------------------------------------------------------------------------------------------------------------------


BLIND = {"constant": lambda s, d: np.full(s.shape, 7.), "permuted": lambda s, d: d.permuted(s, axis=1), "one list for all": lambda s, d: np.tile(s.mean(0), (len(s), 1)),
         "another query's list": lambda s, d: s[d.permutation(len(s))]}


@pytest.mark.parametrize("name", BLIND)
def test_what_knows_nothing_is_at_chance_over_seeds(name):
    gaps = []
    for seed in range(60):
        d = rng(seed, "test.retrieval.blind", name)
        y = (d.permutation(np.repeat(np.arange(6), 10))[:, None] == d.permutation(np.repeat(np.arange(6), 4))).astype(int)  # equal classes: else the mean list knows the large one
        found = evaluate(BLIND[name](2.0 * y + d.normal(size=y.shape), d), y).table()
        gaps.append(found.value - found.chance)
    # the list of another query holds whole classes together: right in the mean for counts, not for AP, which is no mean over single candidates
    gaps = np.array([[x for i, x in g.items() if "another" not in name or i.startswith(("precision", "recall"))] for g in gaps])
    assert (np.abs(gaps.mean(0)) <= 4 * gaps.std(0) / np.sqrt(len(gaps)) + 1e-12).all()
    if name == "constant": assert np.abs(gaps).max() < 1e-12


def test_a_wrong_sign_is_below_chance_and_the_truth_at_the_top():
    d = rng(0, "test.retrieval.sign")
    y = (d.random((200, 30)) < .2).astype(int)
    y[:, 0] = 1
    s = 2.0 * y + d.normal(size=y.shape)
    wrong, right = evaluate(-s, y).table(), evaluate(y.astype(float), y).table()
    better = np.array([METRICS[i].better == "higher" for i in wrong.index])
    assert np.where(better, wrong.value < wrong.chance, wrong.value > wrong.chance).all()
    np.testing.assert_allclose(right.value[[i for i in right.index if not i.startswith(("recall", "precision", "ap_over_r"))]], 1)


# --- the pass ----------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_the_pass_agrees_with_scipy_distances(similarity):
    from scipy.spatial.distance import cdist
    kind = {"cosine": "cosine", "pearson": "correlation", "neg_l2": "euclidean"}.get(similarity)
    for seed in range(20):
        d = rng(seed, "test.retrieve", similarity)
        q, c = d.normal(size=(50, 20)), d.normal(size=(30, 20))
        a, b, y = d.integers(-1, 4, 50), d.integers(-1, 4, 30), d.integers(-1, 3, (50, 30))
        s = q @ c.T if kind is None else -cdist(q, c, kind)
        np.testing.assert_allclose(retrieve(q, c, y, similarity=similarity, block=17).values, evaluate(s, y).values, atol=1e-9)
        np.testing.assert_allclose(retrieve(q, c, (a, b), similarity=similarity, dtype="float64").values, evaluate(s, (a[:, None] == b) & (a[:, None] >= 0)).values, atol=1e-9)


def test_a_missing_profile_is_named():
    q = np.ones((3, 4))
    q[1, 2] = np.nan
    with pytest.raises(InputError, match="query 1 that are not finite"): retrieve(q, np.eye(4), np.eye(4)[:3])


# --- classification against scikit-learn and SciPy -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def quick():
    "scikit-learn without its checks of parameters, which take longer than the work."
    import sklearn
    with sklearn.config_context(skip_parameter_validation=True, assume_finite=True): yield


def compare(cases):
    "Each (ours, theirs) of the cases to 1e-6; warnings of ours are errors."
    ours, theirs = np.array(list(cases)).T
    assert np.isfinite(ours).mean() > 0.5
    ok = np.isfinite(ours)
    np.testing.assert_allclose(ours[ok], theirs[ok], atol=1e-6)
    return ~ok


@lru_cache
def labelled():
    "1,000 tests of 25 rows and three classes: truth, labels, scores."
    draw, out = rng(0, "test.classify"), []
    for _ in range(N):
        t = draw.integers(0, 3, 25)
        out.append((t, np.where(draw.random(25) < .5, t, draw.integers(0, 3, 25)), np.eye(3)[t] + draw.normal(size=(25, 3))))
    return out


def matthews(t, p):
    "Covariance of the tables of indicators, over its largest possible value."
    a, b = np.eye(3)[t], np.eye(3)[p]
    cov = lambda x, y: ((x - x.mean(0)) * (y - y.mean(0))).sum()
    return cov(a, b) / np.sqrt(cov(a, a) * cov(b, b))


PAIRS = {"mcc": matthews, "balanced_accuracy": sk.balanced_accuracy_score, "f1_micro": lambda t, p: (t == p).mean(),
         "quadratic_kappa": lambda t, p: sk.cohen_kappa_score(t, p, weights="quadratic")}


@pytest.mark.parametrize("name", PAIRS)
def test_labels(name): compare((getattr(classify, name)(t, p), PAIRS[name](t, p)) for t, p, _ in labelled())


def test_precision_recall_f1():
    found = [((classify.precision_macro(t, p), classify.recall_macro(t, p), classify.f1_macro(t, p)), sk.precision_recall_fscore_support(t, p, average="macro", zero_division=0)[:3]) for t, p, _ in labelled()]
    for i in range(3): compare((ours[i], theirs[i]) for ours, theirs in found)


def area(y, s):
    "Share of pairs of a positive and a negative row in the right order, ties one half."
    d = s[y][:, None] - s[~y]
    return np.mean((d > 0) + .5 * (d == 0))


def test_scores():
    classes, softmax = [0, 1, 2], lambda s: np.exp(s) / np.exp(s).sum(1, keepdims=True)
    compare((classify.roc_auc_ovr_macro(t, s, classes=classes), np.mean([area(t == c, s[:, c]) for c in classes]) if len(set(t)) == 3 else np.nan) for t, _, s in labelled())
    compare((classify.log_loss(t, softmax(s), classes=classes), sk.log_loss(t, softmax(s), labels=classes)) for t, _, s in labelled())
    compare((classify.top_k_accuracy(t, s, classes=classes, k=2), sk.top_k_accuracy_score(t, s, k=2, labels=classes)) for t, _, s in labelled())
    compare((classify.brier(t == 1, softmax(s)[:, 1], positive=True), sk.brier_score_loss(t == 1, softmax(s)[:, 1])) for t, _, s in labelled())


def test_binary_scores_with_ties():
    compare((classify.roc_auc(t > 0, s[:, 1].round(0), positive=True), area(t > 0, s[:, 1].round(0))) for t, _, s in labelled())
    steps = lambda y, s: sum(((y & (s == x)).sum() / y.sum()) * (y & (s >= x)).sum() / (s >= x).sum() for x in np.unique(s))
    compare((classify.average_precision(t > 0, s[:, 1].round(0), positive=True), steps(t > 0, s[:, 1].round(0))) for t, _, s in labelled())


def test_numbers():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare((classify.concordance(t, p), np.mean([.5 if p[i] == p[j] else float((t[i] - t[j]) * (p[i] - p[j]) > 0) for i in range(12) for j in range(i) if t[i] != t[j]])) for t, p in ((t[:12], p[:12]) for t, p, _ in labelled()))
        compare((classify.spearman(t, s[:, 0]), spearmanr(t, s[:, 0]).statistic) for t, _, s in labelled())
        compare((classify.kendall_tau_b(t, s[:, 0]), kendalltau(t, s[:, 0]).statistic) for t, _, s in labelled())
        compare((classify.r2_score(t, s[:, 0]), 1 - ((t - s[:, 0]) ** 2).sum() / ((t - t.mean()) ** 2).sum()) for t, _, s in labelled())


def test_several_labels():
    draw = rng(0, "test.classify.multilabel")
    tables = [((draw.random((15, 4)) < .5).astype(int), (draw.random((15, 4)) < .5).astype(int), draw.normal(size=(15, 4)).round(0)) for _ in range(N)]
    for y, _, _ in tables: y[:, 0] |= y.sum(1) == 0
    compare((classify.multilabel_f1_micro(y, p), sk.f1_score(y.ravel(), p.ravel())) for y, p, _ in tables)
    compare((classify.multilabel_f1_macro(y, p), np.mean([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in zip(y.T, p.T)])) for y, p, _ in tables)
    compare((classify.subset_accuracy(y, p), sk.accuracy_score(y, p)) for y, p, _ in tables)
    slow_ap = lambda y, s: np.mean([np.mean([(s[i][y[i] > 0] >= x).sum() / (s[i] >= x).sum() for x in s[i][y[i] > 0]]) for i in range(len(y))])
    slow_depth = lambda y, s: np.mean([(s[i] >= s[i][y[i] > 0].min()).sum() for i in range(len(y))])
    compare((classify.label_ranking_ap(y, s), slow_ap(y, s)) for y, _, s in tables)
    compare((classify.coverage_depth(y, s), slow_depth(y, s)) for y, _, s in tables)  # these two are scikit-learn's own


def test_calibration_curve_and_error():
    draw = rng(0, "test.classify.calibration")
    for _ in range(N):
        p = draw.random(80)
        y = (draw.random(80) < p).astype(int)
        table = classify.calibration_table(y, p)
        observed, predicted = calibration_curve(y, p, n_bins=10)
        np.testing.assert_allclose(table[["observed", "predicted"]], np.c_[observed, predicted], atol=1e-12)
        assert np.isclose(classify.ece_width_10(y, p), (table.n / 80 * np.abs(observed - predicted)).sum())
        parts = np.array_split(np.argsort(p), 10)
        assert np.isclose(classify.ece_mass_10(y, p), sum(len(b) / 80 * abs(y[b].mean() - p[b].mean()) for b in parts))


def test_undefined_is_nan_and_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan([classify.precision_macro([0, 1, 2], [0, 1, 1]), classify.recall_macro([0, 1, 1], [0, 1, 2]), classify.mcc([0, 0], [0, 1]), classify.roc_auc([1, 1], [1, 2]),
                         classify.average_precision([0, 0], [1, 2]), classify.spearman([1, 2], [3, 3]), classify.brier([], []), classify.balanced_accuracy([1, 1], [1, 0])]).all()
        assert classify.f1_macro([0, 1], [1, 0]) == 0  # all wrong is 0, and that is defined


# --- golden values -------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", golden.KIND_INPUTS)
def test_golden(kind):
    stored = golden.read(kind)
    cut = lambda i: kind != "retrieval" or i.split("@")[0].rsplit("_at_", 1)[-1] in ("1", "5", "10", "20") or "_at_" not in i  # other cut-offs are made on demand
    assert set(stored) == {i for i in golden._ids(kind) if cut(i)}
    for i, entry in stored.items():
        new, old = (np.asarray(x, dtype=float) for x in (golden.value(i, entry), entry["value"]))
        np.testing.assert_allclose(new, old, rtol=1e-9, atol=1e-12, err_msg=f"{i}: a changed definition needs a new version")
        assert np.isfinite(old).any() and (old.size == 1 or len(set(old[np.isfinite(old)])) > 1)
        assert (old[np.isfinite(old)] >= METRICS[i].low - 1e-12).all() and (old[np.isfinite(old)] <= METRICS[i].high + 1e-12).all()


def test_plain_functions_are_the_registered_ones():
    s, y = cases("plain")
    np.testing.assert_array_equal(precision_at_k(s, y, k=5), METRICS["precision_at_5@1"](s, y))
    np.testing.assert_array_equal(reciprocal_rank(s, y), METRICS["reciprocal_rank@1"](s, y))
    np.testing.assert_array_equal(average_precision(s, y, k=5, over="R"), METRICS["ap_over_r_at_5@1"](s, y))
