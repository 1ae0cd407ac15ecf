"Intervals, differences, ceilings and verdicts against slow references, invariants, and data that try to break them."
import importlib

import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

from perturbnb.core import InputError
from perturbnb.metrics import uncertainty as u
from perturbnb.metrics.calibration import calibrate, calibration_plot
from perturbnb.metrics.ceiling import (_sure, ceiling, control_blocks, control_predictions, half_effects, moments, over_splits, scaled_score, screen,
                                       spearman_brown, split_halves)
from perturbnb.metrics.registry import Metric


@pytest.fixture
def gen():
    return np.random.default_rng(7)


def plain_bootstrap_t(v, code, weights):
    "Ends of the bootstrap-t interval by loops over resampled rows, for one column."
    g = code.max() + 1
    def fit(rows_of):  # list of arrays of values, one for each drawn group
        sums, sizes = np.array([r.sum() for r in rows_of]), np.array([len(r) for r in rows_of])
        theta = sums.sum() / sizes.sum()
        return theta, np.sqrt(g / (g - 1) * ((sums - theta * sizes)**2).sum()) / sizes.sum()
    groups = [v[code == k] for k in range(g)]
    theta, error = fit(groups)
    t = np.sort([(a - theta) / b for a, b in (fit([groups[k] for k in range(g) for _ in range(int(w[k]))]) for w in weights)])
    return theta - np.quantile(t, .975, method="higher") * error, theta - np.quantile(t, .025, method="lower") * error


def test_bootstrap_t_and_jackknife_are_what_the_page_says(gen):
    code = np.repeat(np.arange(9), gen.integers(1, 8, 9))
    v = gen.standard_normal(len(code)) + gen.standard_normal(9)[code]
    weights = np.concatenate(list(u._draws(9, 300, 3)))
    boot = u.mean_interval(v, code, method="bootstrap_t", n_boot=300, seed=3)
    np.testing.assert_allclose([boot.low, boot.high], plain_bootstrap_t(v, code, weights), rtol=1e-9)
    without = np.array([v[code != k].mean() for k in range(9)])
    reach = stats.t.ppf(.975, 8) * np.sqrt(8 / 9 * ((without - v.mean())**2).sum())
    jack = u.mean_interval(v, code, method="jackknife_t")
    np.testing.assert_allclose([jack.low, jack.high], [v.mean() - reach, v.mean() + reach])
    wider = u.mean_interval(v, code, n_boot=300, seed=3)
    assert wider.low == min(boot.low, jack.low) and wider.high == max(boot.high, jack.high)


def test_two_way_error_against_loops(gen):
    drug, line = np.nonzero(gen.random((9, 7)) < .7)
    drug, line = np.repeat(drug, 2), np.repeat(line, 2)  # two doses of each pair
    v = gen.standard_normal(len(drug))
    theta, e = v.mean(), v - v.mean()
    def jack(c): return sum(((e[c == k].sum()) / (len(v) - (c == k).sum()))**2 for k in set(c)) * (len(set(c)) - 1) / len(set(c))
    pairs = pd.Series(e).groupby([drug, line]).sum()
    both = jack(drug) + jack(line) - len(pairs) / (len(pairs) - 1) * (pairs**2).sum() / len(v)**2
    expected = np.sqrt(max(both, jack(drug), jack(line)))
    codes = [pd.factorize(c)[0] for c in (drug, line)]
    np.testing.assert_allclose(u._two_way(v, np.ones(len(v)), codes, .95, 100, 0, "jackknife_t")[3], expected)


def test_two_way_against_statsmodels(gen):
    sm = pytest.importorskip("statsmodels.api")
    drug, line = (c.ravel() for c in np.indices((15, 8)))
    v = gen.standard_normal((15, 8)) + gen.standard_normal((15, 1)) + gen.standard_normal(8)
    fit = sm.OLS(v.ravel(), np.ones(120)).fit(cov_type="cluster", cov_kwds=dict(groups=np.column_stack([drug, line]), use_correction=False))
    x, m = v - v.mean(), np.ones((15, 8))
    a, b, c = ((x.sum(1)**2).sum(), (x.sum(0)**2).sum(), (x**2).sum())
    np.testing.assert_allclose(fit.cov_params()[0, 0], (a + b - c) / 120**2)
    ours = u._two_way_draws(x, m, np.ones((1, 15)), np.ones((1, 8)))[1][0]
    np.testing.assert_allclose(ours**2, max(15 / 14 * a + 8 / 7 * b - c, 15 / 14 * a, 8 / 7 * b) / 120**2)


def holm_by_hand(p):
    "Step-down: the i-th smallest times how many are left, never below an earlier one."
    order, out, top = sorted(range(len(p)), key=lambda i: p[i]), [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        top = max(top, min(1.0, (len(p) - rank) * p[i]))
        out[i] = top
    return out


def test_adjusted_p_on_1000_cases(gen):
    multi = importlib.import_module("statsmodels.stats.multitest") if importlib.util.find_spec("statsmodels") else None
    for case in range(1000):
        p = gen.random(gen.integers(1, 20))**gen.integers(1, 4)
        p[gen.random(len(p)) < .2] = .03  # ties
        np.testing.assert_allclose(u.adjust_p(p), holm_by_hand(p), atol=1e-12)
        if multi and case < 50:  # statsmodels takes 20 ms a call
            for ours, theirs in (("holm", "holm"), ("bonferroni", "bonferroni"), ("bh", "fdr_bh"), ("by", "fdr_by")):
                np.testing.assert_allclose(u.adjust_p(p, ours), multi.multipletests(p, method=theirs)[1], atol=1e-9)


def test_sign_flips_against_scipy(gen):
    for n in (1, 2, 5, 9, 12):
        d = gen.standard_normal(n) + .5
        expected = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue if n > 1 else 1.0
        np.testing.assert_allclose(u.permutation_test(d)[0], expected)
    code = np.array([0, 0, 1, 1, 1, 2, 3, 3])
    d = gen.standard_normal(8)
    totals = pd.Series(d).groupby(code).sum().to_numpy()
    all_ = [abs(sum(s * t for s, t in zip(signs, totals))) for signs in np.array(np.meshgrid(*[[-1, 1]] * 4)).reshape(4, -1).T]
    assert u.permutation_test(d, code)[0] == np.mean(np.array(all_) >= abs(totals.sum()) - 1e-12)


def test_invariants_of_the_interval(gen):
    v, code = pd.Series(gen.standard_normal(50)), pd.Series(gen.integers(0, 8, 50))
    base = u.mean_interval(v, code)
    renamed = u.mean_interval(v, code.map(lambda k: f"drug {k}"))
    assert base == renamed
    order = gen.permutation(50)
    moved = u.mean_interval(v.iloc[order], code)  # groups follow by name
    np.testing.assert_allclose(moved.value, base.value)
    np.testing.assert_allclose([moved.high - moved.low], [base.high - base.low], rtol=.15)  # other order of groups, other draws
    down = u.mean_interval(-v, code, method="jackknife_t"), u.mean_interval(v, code, method="jackknife_t")
    np.testing.assert_allclose([down[0].low, down[0].high], [-down[1].high, -down[1].low])
    huge = u.mean_interval(v + 1e9, code)
    np.testing.assert_allclose(huge.high - huge.low, base.high - base.low, rtol=1e-4)
    twice = u.mean_interval(np.tile(v, 2), np.tile(code, 2))  # copies of rows are no evidence
    np.testing.assert_allclose([twice.low, twice.high], [base.low, base.high], rtol=1e-6)
    assert u.mean_interval(v, level=.8).high < u.mean_interval(v).high


def test_more_copies_in_crossed_groups_are_no_evidence():
    v, who = u.simulate_crossed(10, 8, 1)
    one, two = u.mean_interval(v, who), u.mean_interval(np.tile(v, 2), pd.concat([who, who], ignore_index=True))
    np.testing.assert_allclose([one.low, one.high], [two.low, two.high], rtol=1e-6)
    for average in u.AVERAGES: assert u.mean_interval(v, who, average=average).n_groups == 8
    same = u.mean_interval(np.full(80, 3.), who)
    assert same.low == same.high == 3


def test_public_functions_cover_the_truth(gen):
    "300 data sets each, through the functions a user calls; three standard errors of the count."
    margin = 3 * np.sqrt(.95 * .05 / 300)
    names = [f"P{i}" for i in range(30)]
    held = [(e := u.paired_difference(pd.Series(gen.standard_normal(30), names) + (hard := pd.Series(gen.standard_normal(30) * 3, names)), hard, n_boot=300, n_perm=100)).low <= 0 <= e.high for _ in range(300)]
    assert abs(np.mean(held) - .95) < margin
    held = []
    for _ in range(300):
        code = np.repeat(np.arange(15), gen.integers(1, 30, 15))
        d = .7 * gen.standard_normal(15)[code] + .7 * gen.standard_normal(len(code))
        held.append((e := u.mean_interval(d, code, n_boot=300)).low <= 0 <= e.high)
    assert abs(np.mean(held) - .95) < margin


def test_ratio_covers_and_refuses(gen):
    held = [(e := u.ratio_interval((b := 2 + gen.standard_normal(40)) * .4 + gen.standard_normal(40), b, n_boot=300)).low <= .4 <= e.high for _ in range(300)]
    assert .9 < np.mean(held) < .99
    assert "cannot be told from 0" in u.ratio_interval(gen.standard_normal(40), gen.standard_normal(40)).note


def test_undefined_rows_are_never_dropped_in_silence():
    base = pd.Series([.1, .2, .3, .4, .5, .6, np.nan], list("abcdefg"))
    model = base.copy(); model["a"] = np.nan
    with pytest.raises(InputError, match="1 rows where only one"): u.paired_difference(model, base)
    with pytest.raises(InputError, match="1 rows where only one"): u.compare_all(pd.DataFrame({"m": model, "b": base}), ["b"])
    e = u.paired_difference(model, base, null=0.0)
    assert (e.n, e.n_left_out, e.n_filled) == (6, 1, 1) and e.value == pytest.approx(-.1 / 6)
    table = u.compare_all(pd.DataFrame({"m": model, "b": base}), ["b"], null=0.0)
    assert table.n_filled[0] == 1 and table.n_left_out[0] == 1
    with pytest.raises(InputError, match="infinite"): u.paired_difference([1, np.inf], [1, 1])
    nothing = u.paired_difference(pd.Series(dtype=float), pd.Series(dtype=float))
    assert np.isnan(nothing.value) and np.isnan(nothing.p) and nothing.n == 0


def test_records_fit_the_result_schema(gen):
    jsonschema = pytest.importorskip("jsonschema")
    from perturbnb.report.results import COMPARISON, METRIC, _row_problems
    where = dict(split="unseen_drug", part="test", stratum="all", model="ridge")
    cases = [gen.standard_normal(30), [1., 2, 3], [], [2.] * 8, [1., np.nan, 3, 4, 5, 6, 7], np.exp(3 * gen.standard_normal(8))]
    for v in cases:
        m = u.metric_record(u.mean_interval(v), id="mse@1", kind="model", **where)
        c = u.comparison_record(u.paired_difference(v, np.array(v) * 0), id="mse@1", baseline="mean", **where)
        for kind, schema, row in (("metrics", METRIC, m), ("comparisons", COMPARISON, c)):
            jsonschema.validate(row, schema)
            assert not _row_problems(kind, 0, row)


def test_bootstrap_of_a_table(gen):
    table = pd.DataFrame({"x": gen.standard_normal(40), "y": gen.standard_normal(40)}, [f"r{i}" for i in range(40)])
    slope = lambda t: np.polyfit(t.x, t.y, 1)[0]
    ref = stats.bootstrap((np.arange(40),), lambda i: slope(table.iloc[i]), vectorized=False, n_resamples=999, method="percentile", random_state=0).confidence_interval
    e = u.bootstrap(slope, table, method="percentile", n_boot=999)
    np.testing.assert_allclose([e.low, e.high], [ref.low, ref.high], atol=.08)
    assert u.bootstrap(slope, table, n_boot=200) == u.bootstrap(slope, table, n_boot=200)
    assert "at least 5" in u.bootstrap(slope, table, groups=np.arange(40) // 10, n_boot=100).note
    with pytest.raises(InputError, match="method 'wider'"): u.bootstrap(slope, table, method="wider")


def cells(gen, strength=0.0, n_perts=8, n=24, n_control=60, genes=30):
    pert = np.repeat(["control", *(f"P{i}" for i in range(n_perts)), "thin"], [n_control, *[n] * n_perts, 3])
    true = {p: strength * gen.standard_normal(genes) * (p != "control") for p in dict.fromkeys(pert)}
    return np.array([true[p] for p in pert]) + gen.standard_normal((len(pert), genes)), pert


def test_halves_share_no_cell(gen):
    x, pert = cells(gen, 1.)
    s = screen(x, pert, "control", strata=gen.integers(0, 3, len(pert)))
    for seed in range(20):
        half = split_halves(s, seed)
        assert set(half[pert == "thin"]) == {-1} and abs((half == 0).sum() - (half == 1).sum()) <= len(set(pert))
        block = control_blocks(s)
        before = half_effects(s, moments(s, half, block))
        other = x.copy(); other[half == 1] += gen.standard_normal((int((half == 1).sum()), x.shape[1]))  # cells and controls of the second half change
        after = half_effects(changed := screen(other, pert, "control", strata=s.strata), moments(changed, half, block))
        np.testing.assert_array_equal(before[0], after[0])
        assert not np.isclose(before[1], after[1]).any(axis=1).all()
    a, b = (control_predictions(t, e, moments(t, half, block)) for t, e in ((s, np.stack([before[0], before[1]])), (s, np.stack([before[0] + 9, before[1]]))))
    for k in a: np.testing.assert_array_equal(a[k], b[k])  # predictions know nothing of the first half


def test_order_of_cells_and_sparsity_do_not_matter(gen):
    x, pert = cells(gen, 1.)
    x = np.where(np.abs(x) > .5, x, 0)
    a, b = ceiling(screen(x, pert, "control"), n_splits=5), ceiling(screen(sparse.csr_matrix(x), pert, "control"), n_splits=5)
    np.testing.assert_allclose([a.r.value, a.r.low, a.r.high], [b.r.value, b.r.low, b.r.high])
    order = gen.permutation(len(x))
    c = ceiling(screen(x[order], pert[order], "control"), n_splits=30)
    assert abs(c.r.value - a.r.value) < .03 and list(c.table.index) == list(a.table.index)
    assert a.left_out.unit.tolist() == ["thin"] and a.table.n_undefined.sum() == 0


def test_a_gene_without_variance_and_a_constant_unit(gen):
    x, pert = cells(gen, 1.)
    x[:, 0] = 3.0
    s = screen(x, pert, "control")
    sums = moments(s, split_halves(s), control_blocks(s))
    assert (_sure(s, sums)[:, 0] == 0).all()
    flat = screen(np.zeros_like(x), pert, "control")
    none = ceiling(flat, n_splits=5)
    assert np.isnan(none.r.value) and none.r.n == 0 and (none.table.n_undefined == 5).all() and np.isnan(none.table.ceiling).all()


def test_contexts_use_their_own_controls(gen):
    x, pert = cells(gen, 1.)
    both, line = np.vstack([x, x + 100]), np.repeat(["A", "B"], len(x))  # a shift of a whole line is no effect
    s = screen(both, np.tile(pert, 2), "control", context=line)
    assert len(s.names) == 16 and s.names[8] == "B|P0" and set(s.left_out.unit) == {"A|thin", "B|thin"}
    e = half_effects(s, moments(s, split_halves(s), control_blocks(s)))
    assert np.abs(e).max() < 10
    lonely = np.where(line == "B", np.where(np.tile(pert, 2) == "control", "P0", np.tile(pert, 2)), np.tile(pert, 2))
    assert "fewer than 20 control cells" in set(screen(both, lonely, "control", context=line).left_out.reason)


def test_noise_gives_no_ceiling_and_signal_does():
    held = []
    for seed in range(40):
        gen = np.random.default_rng(seed)
        r = ceiling(screen(*cells(gen), "control"), n_splits=5, n_boot=200).r
        held.append(r.low <= 0 <= r.high)
    assert np.mean(held) >= .95 - 3 * np.sqrt(.95 * .05 / 40)
    assert ceiling(screen(*cells(gen, 1.), "control"), n_splits=5).r.low > .5


def test_verdicts_on_known_effects():
    about = dict(kind="effect", formula="x", unit="none", undefined="never", source="tests")
    error = Metric("t_error@1", lambda r, p: ((r - p)**2).mean(1), low=0, high=np.inf, better="lower", null=None, **about)
    blind = Metric("t_blind@1", lambda r, p: np.full(len(r), .5), low=0, high=1, better="higher", null=None, **about)
    unbounded = Metric("t_gain@1", lambda r, p: (r * p).sum(1), low=-np.inf, high=np.inf, better="higher", null=0., **about)
    for seed in range(8):
        gen = np.random.default_rng(seed)
        quiet = calibrate(screen(*cells(gen), "control"), [error, unbounded], n_splits=5, n_boot=200)
        assert (quiet.verdicts.verdict != "yes").all()
    loud = calibrate(screen(*cells(gen, 1.), "control"), [error, blind, unbounded], n_splits=5, n_boot=200)
    verdicts = loud.verdicts.set_index("metric").verdict
    assert (verdicts["t_error@1"] == "yes").all() and (verdicts["t_blind@1"] == "no").all() and (verdicts["t_gain@1"] == "yes").all()
    assert loud.pairs[loud.pairs.metric == "t_gain@1"].drf.isna().all()
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    assert calibration_plot(loud.pairs, plt.figure().subplots()) is not None
    plt.close("all")


def test_scaled_score_and_spearman_brown():
    assert spearman_brown(np.array([-1., 0, 1]))[1:].tolist() == [0, 1] and np.isnan(spearman_brown(-1.))
    names = list("abcdefgh")
    neg, pos = pd.Series(np.linspace(.1, .3, 8), names), pd.Series(np.linspace(.7, .9, 8), names)
    model = (neg + .75 * (pos - neg)).iloc[::-1]
    e = scaled_score(model, neg, pos)
    assert e.value == pytest.approx(.75) and e.low == pytest.approx(.75)
    with pytest.raises(InputError, match="n_splits=2"): over_splits(None, None, n_splits=2)
