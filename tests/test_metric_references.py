"""Agreement to 1e-6 with an independent reference on 1,000 random cases each: SciPy and scikit-learn where they have the metric, slow plain Python otherwise.

A case is one row (one perturbation); for the distributions it is one pair of clouds. Half of the tables are rounded to one decimal, so that ties are common.
"""
import math
from functools import cache

import numpy as np
import pytest
from perturbnb.core import rng
from perturbnb.metrics import discrimination, distribution, effect
from perturbnb.metrics.registry import METRICS
from scipy import spatial, stats
from sklearn import metrics as sk

N_CASES, TOL = 1000, 1e-6


@cache
def tables() -> list:
    "50 pairs of tables of 20 rows: 2 to 60 genes, several scales, every second one rounded."
    out = []
    for k in range(N_CASES // 20):
        draw = rng(k, "references.tables")
        genes, scale = int(draw.integers(4, 61)), 10.0 ** draw.integers(-3, 4)
        real, pred, ref, score = draw.normal(size=(4, 20, genes))
        pred = pred + draw.uniform(-1, 1) * real
        if k % 2: real, pred, ref = (x.round(1) for x in (real, pred, ref))
        out.append((real * scale, pred * scale, ref[0] * scale, score, draw.random((20, genes)) < draw.uniform(.1, .6), draw))
    return out


def compare(id: str, slow, **context) -> None:
    "The metric on every table against slow(real row, pred row, **context of that row); undefined must mean undefined."
    n = 0
    for real, pred, ref, score, deg, _ in tables():
        given = {k: f(real, pred, ref, score, deg) for k, f in context.items()}
        fast = METRICS[id](real, pred, **given)
        rows = [{k: v if np.ndim(v) < 2 else v[i] for k, v in given.items()} for i in range(len(real))]
        want = np.array([slow(r, p, **c) for r, p, c in zip(real, pred, rows)], dtype=float)
        np.testing.assert_allclose(fast, want, rtol=TOL, atol=TOL * (1e-9 if "squared" in METRICS[id].unit or METRICS[id].unit == "effect" else 1))
        n += len(fast)
    assert n == N_CASES


REF = dict(reference=lambda real, pred, ref, score, deg: ref)
WEIGHTS = dict(weights=lambda real, pred, ref, score, deg: score ** 2 * (score > -1))
DEG = dict(deg=lambda real, pred, ref, score, deg: deg)
TOP = dict(n_top=lambda real, pred, ref, score, deg: max(1, real.shape[1] // 4))


def pearson(a, b): return np.nan if len(a) < 2 or np.ptp(a) < 1e-12 * abs(a).max() or np.ptp(b) < 1e-12 * abs(b).max() else stats.pearsonr(a, b)[0]
def cosine(a, b): return 1 - spatial.distance.cosine(a, b)


EFFECT = {
    "mse@1": (sk.mean_squared_error, {}),
    "mae@1": (sk.mean_absolute_error, {}),
    "rmse@1": (sk.root_mean_squared_error, {}),
    "l2@1": (spatial.distance.euclidean, {}),
    "r2@1": (sk.r2_score, {}),
    "pearson_delta@1": (pearson, {}),
    "cosine_delta@1": (cosine, {}),
    "spearman_delta@1": (lambda r, p: stats.spearmanr(r, p)[0], {}),
    "pearson_delta_ref@1": (lambda r, p, reference: pearson(r - reference, p - reference), REF),
    "cosine_delta_ref@1": (lambda r, p, reference: cosine(r - reference, p - reference), REF),
    "spearman_delta_ref@1": (lambda r, p, reference: stats.spearmanr(r - reference, p - reference)[0], REF),
    "wmse@1": (lambda r, p, weights: sk.mean_squared_error(r, p, sample_weight=weights), WEIGHTS),
    "weighted_r2@1": (lambda r, p, weights: sk.r2_score(r, p, sample_weight=weights), WEIGHTS),
    "weighted_r2_ref@1": (lambda r, p, weights, reference: sk.r2_score(r - reference, p - reference, sample_weight=weights), {**WEIGHTS, **REF}),
    "de_auprc@1": (lambda r, p, deg: sk.average_precision_score(deg, abs(p)) if 0 < deg.sum() < deg.size else np.nan, DEG),
    "pearson_deg@1": (lambda r, p, deg: pearson(r[deg], p[deg]) if deg.sum() > 1 else np.nan, DEG),
    "mse_deg@1": (lambda r, p, deg: sk.mean_squared_error(r[deg], p[deg]) if deg.any() else np.nan, DEG)}


def share(values, n) -> list:
    "Expected membership of each value in the top n when ties are broken at random, counted one value at a time."
    out = []
    for v in values:
        above, tied = sum(w > v + 1e-9 * abs(v) for w in values), sum(abs(w - v) <= 1e-9 * abs(v) for w in values)
        out.append(min(1.0, max(0.0, (n - above) / tied)))
    return out


def overlap(r, p, n) -> float: return sum(a * b for a, b in zip(share(r, n), share(p, n))) / n


def signs(r, p, n_top) -> float:
    sign = lambda x: int(x > 0) - int(x < 0)
    pairs = [(t, 1.0 if sign(a) == sign(b) else 0.5 if sign(b) == 0 else 0.0) for t, a, b in zip(share(abs(r), n_top), r, p) if sign(a)]
    return sum(t * s for t, s in pairs) / sum(t for t, _ in pairs) if pairs else math.nan


EFFECT |= {
    "overlap_at_n@1": (lambda r, p, n_top: overlap(abs(r), abs(p), n_top), TOP),
    "overlap_up@1": (lambda r, p, n_top: overlap(r, p, n_top), TOP),
    "overlap_down@1": (lambda r, p, n_top: overlap(-r, -p, n_top), TOP),
    "sign_agreement@1": (signs, TOP),
    "de_recall@1": (lambda r, p, deg: overlap(1.0 * deg, abs(p), int(deg.sum())) if 0 < deg.sum() < deg.size else np.nan, DEG)}


@pytest.mark.parametrize("id", sorted(m.id for m in METRICS.values() if m.kind == "effect" and m.fn.__module__ == effect.__name__))
def test_effect(id):
    slow, context = EFFECT[id]
    compare(id, slow, **context)


def test_deg_weights():
    for _, _, _, score, _, _ in tables():
        for s, w in zip(abs(score), effect.deg_weights(score)):
            u = [((x - min(s)) / (max(s) - min(s))) ** 2 for x in s]
            np.testing.assert_allclose(w, [x / sum(u) for x in u], rtol=TOL)


def within(k, unbiased: bool) -> float: return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) if unbiased else k.mean()


def two_sample(x, y, kernel, unbiased: bool) -> float:
    "k(X,X) + k(Y,Y) - 2 k(X,Y); with minus a distance as the kernel it is the energy distance."
    return within(kernel(x, x), unbiased) + within(kernel(y, y), unbiased) - 2 * kernel(x, y).mean()


def median_gamma(x, y) -> float:
    d = sk.pairwise.euclidean_distances(np.r_[x, y], squared=True)
    return 1 / (2 * np.median(d[np.triu_indices(len(d), 1)]))


KERNELS = {"energy": lambda x, y: lambda a, b: -sk.pairwise.euclidean_distances(a, b),
           "energy_squared": lambda x, y: lambda a, b: -sk.pairwise.euclidean_distances(a, b, squared=True),
           "mmd2_linear": lambda x, y: sk.pairwise.linear_kernel,
           "mmd2_rbf": lambda x, y: lambda a, b: sk.pairwise.rbf_kernel(a, b, gamma=median_gamma(x, y))}


@pytest.mark.parametrize("id", sorted(m.id for m in METRICS.values() if m.fn.__module__ == distribution.__name__))
def test_distribution(id):
    name, variant = id.removesuffix("@1").rsplit("_", 1)
    for k in range(N_CASES):
        draw = rng(k, "references.cells")
        n, m, genes = (int(v) for v in draw.integers(2, 15, 3))
        x, y = draw.normal(size=(n, genes)), draw.normal(size=(m, genes)) * draw.uniform(.5, 2) + draw.normal()
        np.testing.assert_allclose(METRICS[id](x, y), two_sample(x, y, KERNELS[name](x, y), variant == "u"), rtol=TOL, atol=TOL)


DISTANCES = {"l1": lambda a, b: sum(abs(a - b)), "l2": lambda a, b: sum((a - b) ** 2) ** .5, "cosine": lambda a, b: -cosine(a, b) if a.any() and b.any() else 0.0}


def slow_pds(query, candidates, distance, target) -> list:
    out = []
    for i, q in enumerate(query):
        keep = [g for g in range(len(q)) if g != target[i]]
        d = [distance(q[keep], c[keep]) for c in candidates]
        tied = [abs(x - d[i]) <= 1e-10 * (1 + abs(x)) for x in d]
        closer = sum(x < d[i] and not t for x, t in zip(d, tied))
        out.append(1 - (closer + (sum(tied) - 1) / 2) / (len(d) - 1))
    return out


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("id", sorted(m.id for m in METRICS.values() if m.fn.__module__ == discrimination.__name__))
def test_discrimination(id):
    reverse, n = "reverse" in id or "inverse" in id, 0
    distance = next((f for k, f in DISTANCES.items() if f"_{k}@" in id), DISTANCES["l2"])
    for k, (real, pred, _, _, _, _) in enumerate(tables()):
        real, pred = real[:, :10] / abs(real).max(), pred[:, :10] / abs(pred).max()
        target = rng(k, "references.targets").integers(-1, real.shape[1], 20)
        context = {"target_index": target} if id.startswith("pds") else {}
        want = slow_pds(*((real, pred) if reverse else (pred, real)), distance, target if context else [-1] * 20)
        np.testing.assert_allclose(METRICS[id](real, pred, **context), want, rtol=TOL, atol=TOL)
        n += len(want)
    assert n == N_CASES
