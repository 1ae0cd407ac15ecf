"Models: loops over all baselines and damage to saved folders that are too long for the pages."
import subprocess
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from perturbnb.core import PerturbError, rng
from perturbnb.models.base import example_table, load_model
from perturbnb.models.baselines import BASELINES, baseline
from perturbnb.models.bilinear import solve_bilinear
from perturbnb.models.genes import example_doubles
from perturbnb.models.means import Additive

SMILES = {"ethanol": "CCO", "propanol": "CCCO", "benzene": "c1ccccc1", "aspirin": "CC(=O)OC1=CC=CC=C1C(=O)O", "phenol": "Oc1ccccc1", "gap": None}


def drugs(seed: int, n_genes: int = 12):
    "Six drugs, one without a structure, in three lines at two doses; some rows are missing."
    r = rng(seed, "tests.models")
    o = pd.MultiIndex.from_product([SMILES, ["L1", "L2", "L3"], [.5, 5.]]).to_frame(index=False, name=["pert", "cell_line", "dose_um"])
    o = o[r.random(len(o)) < .8]
    return example_table(o.pert, r.normal(size=(len(o), n_genes)), o.cell_line.to_numpy(), dose_um=o.dose_um.to_numpy(), smiles=o.pert.map(SMILES).astype(object).to_numpy())


OPTIONS = {"knn_pca": {"label": "cell_line"}, "logistic_pca": {"label": "cell_line"}}


def tables(name: str):
    "Train and test for a baseline."
    if name in ("additive_genes", "matching_mean", "latent_additive", "bilinear", "target_z"):
        t = example_doubles()
        double = t.obs.pert.str.contains("+", regex=False).to_numpy()
        return (t, t[double].copy()) if BASELINES[name].input == "profile" else (t[~double].copy(), t[double].copy())
    return drugs(0), drugs(1)


def asked(model, test): return test if model.input == "profile" else test.obs


@pytest.fixture(params=BASELINES)
def fitted(request):
    "A fitted baseline, its training and its test table."
    train, test = tables(request.param)
    return baseline(request.param, **OPTIONS.get(request.param, {})).fit(train), train, test


def test_test_effects_reach_no_condition_model(fitted):
    model, _, test = fitted
    if model.input == "profile": return
    want = model.predict(test.obs)
    other = test.copy(); other.X = rng(9, "tests.models").normal(size=test.shape)
    np.testing.assert_array_equal(model.predict(other.obs), want)
    r = rng(8, "tests.models").permutation(test.n_obs)
    np.testing.assert_allclose(model.predict(test.obs.iloc[r]), want[r], atol=1e-12)


def test_the_kind_of_array_does_not_matter(fitted):
    model, train, test = fitted
    want = model.predict(asked(model, test))
    again = ad.AnnData(sparse.csr_matrix(train.X), train.obs, train.var, uns=train.uns)
    np.testing.assert_array_equal(type(model)(**model.options).fit(again).predict(asked(model, test)), want, strict=True)


def test_order_of_genes(fitted):
    model, train, test = fitted
    if model.name == "random": return  # draws belong to places in the row
    perm = rng(7, "tests.models").permutation(train.n_vars)
    got = type(model)(**model.options).fit(train[:, perm].copy()).predict(asked(model, test))
    want = model.predict(asked(model, test))
    np.testing.assert_allclose(got, want if model.input == "profile" else want[:, perm], atol=1e-7)


def test_nothing_asked_nothing_given(fitted):
    model, train, test = fitted
    columns = len(model.classes_) if model.input == "profile" else train.n_vars
    assert model.predict(asked(model, test[:0])).shape == (0, columns)
    assert model.fallbacks().empty


def test_nan_rows_have_a_reason(fitted):
    model, _, test = fitted
    if model.input == "profile": return
    strange = pd.concat([test.obs, test.obs.assign(pert="ZZZ9", cell_line="L77", smiles="rubbish")])
    out = model.predict(strange)
    bad = np.isnan(out).any(1)
    assert (model.notes[bad].str.startswith("not predicted")).all() and np.isfinite(out[~bad]).all()
    if model.name not in ("no_change", "mean", "random", "bilinear"): assert (model.notes.iloc[len(test):] != "").all()


def test_equal_bytes_and_damage(fitted, tmp_path):
    "Two saves are equal; one flipped byte anywhere, a missing or an empty file is one clear line."
    model, train, test = fitted
    for name in ("a", "b"): model.save(tmp_path / name, split=pd.DataFrame({"part": "train"}, train.obs_names))
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == ["config.json", "genes.parquet", "split.parquet", "weights.safetensors"]
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    r = rng(0, "tests.models.damage")
    for f in files:
        path = tmp_path / "b" / f
        sound = path.read_bytes()
        for i in r.integers(0, len(sound), 12):
            path.write_bytes(sound[:i] + bytes([sound[i] ^ 1]) + sound[i + 1:])
            with pytest.raises(PerturbError) as e: load_model(tmp_path / "b")
            assert "\n" not in str(e.value)
        path.write_bytes(b"")
        with pytest.raises(PerturbError): load_model(tmp_path / "b")
        path.unlink()
        with pytest.raises(PerturbError, match="no "): load_model(tmp_path / "b")
        path.write_bytes(sound)
    np.testing.assert_array_equal(load_model(tmp_path / "b").predict(asked(model, test)), model.predict(asked(model, test)), strict=True)


SALTS = {"butylamine": ["CCCCN", "CCCC[NH3+].[Cl-]", "CCCCN.OS(O)(=O)=O"], "benzoate": ["OC(=O)c1ccccc1Cl", "[Na+].[O-]C(=O)c1ccccc1Cl"]}


@pytest.mark.parametrize("name", ["nearest_compound", "ridge_morgan", "zeros_drug"])
def test_a_salt_is_its_parent(name):
    "Written as salts in training, in the question or in both, the predictions and the notes are those of the parents."
    base = {**SMILES, **{k: v[0] for k, v in SALTS.items()}}
    r = rng(3, "tests.models.salts")
    table = lambda smiles: example_table(list(smiles), effects, ["L1", "L2"] * 4, smiles=list(smiles.values()))
    effects = r.normal(size=(len(base), 5))
    salted = {**base, **{k: v[1] for k, v in SALTS.items()}}
    strange = pd.DataFrame({"cell_line": "L1", "smiles": [*SALTS["butylamine"], *SALTS["benzoate"], "rubbish", None, np.nan, ""]})
    want = baseline(name).fit(table(base))
    out = want.predict(strange)
    for group in (out[:3], out[3:5]): np.testing.assert_array_equal(group, np.repeat(group[:1], len(group), 0))
    assert (want.notes.iloc[:5] == "").all() and want.notes.iloc[5:].str.startswith("no structure").all()
    np.testing.assert_array_equal(baseline(name).fit(table(salted)).predict(strange), out)


def test_bits_of_a_parent_are_those_of_rdkit():
    "For structures without salt or charge the features are what RDKit makes of the text as written."
    from rdkit import Chem
    from rdkit.Chem import rdFingerprintGenerator
    texts = [s for s in SMILES.values() if s] + [v[0] for v in SALTS.values()]
    for radius, n_bits in ((2, 2048), (3, 512)):
        make = rdFingerprintGenerator.GetMorganGenerator(radius=radius, fpSize=n_bits)
        model = baseline("ridge_morgan", radius=radius, n_bits=n_bits)
        bits, has = model._bits(pd.DataFrame({"smiles": texts}))
        assert has.all()
        np.testing.assert_array_equal(bits, [make.GetFingerprintAsNumPy(Chem.MolFromSmiles(s)) for s in texts])


def test_a_fresh_process_finds_the_class(tmp_path):
    "No module of a model is imported beforehand, and importing the registry loads no heavy package."
    baseline("ridge_morgan").fit(drugs(0)).save(tmp_path / "m")
    code = ("import sys, perturbnb.models.base as b; assert 'perturbnb.models.structure' not in sys.modules; print(b.check_model(sys.argv[1]));"
            "import perturbnb.models.baselines; print(sorted({'torch', 'sklearn', 'rdkit'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("sound model: ridge_morgan") and done.stdout.splitlines()[1] == "[]"


def test_bilinear_against_the_kronecker_solution():
    "500 random sizes, to 1e-8."
    r, worst = rng(0, "tests.bilinear"), 0.0
    for _ in range(500):
        n, d, e, m = (int(v) for v in r.integers([2, 1, 1, 2], [30, 7, 7, 25]))
        y, g, p, ridge = r.normal(size=(n, m)), r.normal(size=(n, d)), r.normal(size=(e, m)), float(r.choice([.01, .1, 1, 10]))
        big = np.kron(np.hstack([p, ridge ** .5 * np.eye(e)]).T, np.vstack([g, ridge ** .5 * np.eye(d)]))
        rhs = np.zeros((n + d, m + e)); rhs[:n, :m] = y
        want = np.linalg.lstsq(big, rhs.T.ravel(), rcond=None)[0].reshape(e, d).T
        worst = max(worst, np.abs(solve_bilinear(y, g, p, ridge) - want).max())
    assert worst < 1e-8, worst


def test_additive_against_lstsq_with_islands():
    "100 sparse designs: fitted values agree, and the note stands exactly where the rank says that the data leave the answer open."
    r = rng(0, "tests.additive")
    for _ in range(100):
        n = int(r.integers(2, 14))
        o = pd.DataFrame({"pert": r.choice(list("abcd"), n), "cell_line": r.choice(["L1", "L2", "L3"], n)})
        t = example_table(o.pert, r.normal(size=(n, 2)), o.cell_line.to_numpy(), replicate=[f"r{i}" for i in range(n)])
        model = Additive().fit(t)
        seen = [sorted(set(o[c])) for c in o]
        ask = pd.MultiIndex.from_product(seen, names=["pert", "cell_line"]).to_frame(index=False)
        code = lambda f: np.column_stack([np.ones(len(f)), *((f[c] == v).astype(float) for c, levels in zip(o, seen) for v in levels)])
        m, q = code(o), code(ask)
        np.testing.assert_allclose(model.predict(o), m @ np.linalg.lstsq(m, t.X, rcond=None)[0], atol=1e-9)
        fixed = [np.linalg.matrix_rank(np.vstack([m, row])) == np.linalg.matrix_rank(m) for row in q]
        model.predict(ask)
        assert model.notes.eq("").tolist() == fixed
