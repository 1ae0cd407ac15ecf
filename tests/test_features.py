"Features of drugs and cell lines: joined by name whatever the order, bad tables refused in one line, saved and read again."
import json
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from perturbnb.core import InputError, MissingFile, rng
from perturbnb.data.cell_features import CellFeatures, cell_features, controls_of
from perturbnb.data.drug_features import KINDS, DrugFeatures, collisions, drug_features, read_vectors, row_names, targets, use_weights

DRUGS = pd.DataFrame({"drug": ["Aspirin", "Caffeine", "Mystery", "Broken", "Ethanol"],
                      "smiles": ["CC(=O)Oc1ccccc1C(=O)O", "CN1C=NC2=C1C(=O)N(C(=O)N2C)C", None, "c1ccccc", "CCO"]})


def features(kind="morgan", drugs=DRUGS, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return drug_features(drugs, kind, **options)


def fails(word, f, *args, error=InputError, **kw):
    with pytest.raises(error) as e: f(*args, **kw)
    assert word in str(e.value) and "\n" not in str(e.value), str(e.value)


@pytest.fixture
def vectors(tmp_path):
    x = np.arange(8, dtype="float32").reshape(4, 2)  # the first row: not zero, since 1 is there
    np.save(tmp_path / "v.npy", x)
    return tmp_path / "v.npy", ["Ethanol", "Aspirin", "Mystery", "Elsewhere"], x


# --- drugs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["morgan", "descriptors", "learned", "zeros"])
def test_rows_do_not_depend_on_the_order_of_the_table(kind):
    options = {"columns": ["MolWt", "TPSA"]} if kind == "descriptors" else {}
    a, b = features(kind, **options), features(kind, DRUGS.iloc[[3, 0, 4, 2, 1]], **options)
    asked = ["Ethanol", "nobody", "aspirin", "Mystery", "Ethanol"]
    for x, y in zip(a.rows(asked), b.rows(asked)): np.testing.assert_array_equal(x, y, strict=True)
    assert a.rows(asked)[0].dtype == np.float32 and a.x.shape == (5, a.d)


def test_repeated_rows_of_a_drug_count_once():
    f = features(drugs=pd.concat([DRUGS, DRUGS.assign(drug=DRUGS.drug.str.upper(), smiles=None)]))
    assert f.names == ["ASPIRIN", "BROKEN", "CAFFEINE", "ETHANOL", "MYSTERY"] and f.known.tolist() == [True, False, True, True, False]


def test_one_warning_names_the_drugs_without_features():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        drug_features(DRUGS)
    assert [str(w.message).split(": ")[1] for w in said] == ["Broken (invalid SMILES), Mystery (no SMILES)"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ("learned", "zeros"): drug_features(DRUGS, kind)


def test_a_control_by_name_is_refused_and_a_drug_that_contains_it_is_not():
    fails("'DMSO_TF' among the drugs", drug_features, pd.DataFrame({"drug": ["DMSO_TF", "a"], "smiles": ["CS(C)=O", "C"]}))
    assert features(drugs=pd.DataFrame({"drug": ["Trametinib (DMSO_TF solvate)"], "smiles": ["CCO"]})).known.all()


@pytest.mark.parametrize("table, word", [
    (pd.DataFrame({"drug": []}), "no drug"), (pd.DataFrame({"name": ["a"]}), "no column 'drug'"), (["a"], "a list"),
    (pd.DataFrame({"drug": ["a", None]}), "row 2 has no drug name"), (pd.DataFrame({"drug": ["a", " "]}), "row 2"),
    (pd.DataFrame({"drug": ["a", "A "], "smiles": ["CCO", "CCC"]}), "2 structures")])
def test_bad_tables(table, word):
    fails(word, drug_features, table)


def test_bad_questions():
    f = features()
    fails("1 names and 2 structures", f.rows, ["a"], ["C", "C"])
    assert f.rows([])[0].shape == (0, 2048) and f.rows(["x"], ["not a smiles"])[1].tolist() == [False]
    assert f.rows("Aspirin")[1].tolist() == [True]
    fails("kind='chemberts'", drug_features, DRUGS, "chemberts")
    fails("option 'radius' of kind zeros", drug_features, DRUGS, "zeros", radius=2)


def test_salts_and_synonyms_share_group_and_row():
    both = pd.DataFrame({"drug": ["base", "salt", "other"], "smiles": ["CCN", "CCN.Cl", "CCO"]})
    f = features("learned", both)
    assert f.group[0] == f.group[2] != f.group[1]  # base, other, salt
    np.testing.assert_array_equal(f.rows(["synonym"], ["CC[NH3+].[Br-]"])[0], f.x[:1])
    assert len(collisions(features(drugs=both))) == 0


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_state_survives_json_and_safetensors(kind, vectors, tmp_path):
    from safetensors.numpy import load_file, save_file
    options = {"chemberta": {"path": vectors[0], "names": vectors[1]}, "descriptors": {"columns": ["MolWt"]}}.get(kind, {})
    f = features(kind, **options)
    arrays, names, settings = f.state("d.")
    save_file(arrays, tmp_path / "w.safetensors")
    g = DrugFeatures.from_state(load_file(tmp_path / "w.safetensors"), *json.loads(json.dumps([names, settings])), prefix="d.")
    for x, y in zip(f.rows(["Ethanol", "new"], [None, "CCCC"]), g.rows(["Ethanol", "new"], [None, "CCCC"])): np.testing.assert_array_equal(x, y)
    assert (g.kind, g.names, g.notes, list(g.group)) == (f.kind, f.names, f.notes, list(f.group))
    fails("different lengths", DrugFeatures.from_state, {**arrays, "d.x": arrays["d.x"][:1]}, names, settings, prefix="d.")


def test_descriptors_use_training_drugs_alone():
    f = features("descriptors", fit_drugs=["Aspirin", "Ethanol"], columns=["MolWt", "TPSA"])
    g = features("descriptors", DRUGS.replace({"CN1C=NC2=C1C(=O)N(C(=O)N2C)C": "C" * 30}), fit_drugs=["aspirin", "Ethanol"], columns=["MolWt", "TPSA"])
    np.testing.assert_array_equal(f.rows(["Aspirin", "Ethanol"])[0], g.rows(["Aspirin", "Ethanol"])[0])
    np.testing.assert_allclose(f.rows(["Aspirin", "Ethanol"])[0][:, 0], [1, -1], atol=1e-6)
    fails("none of fit_drugs", drug_features, DRUGS, "descriptors", fit_drugs=["nobody"], warn=False)
    fails("descriptor 'MolWeight'", drug_features, DRUGS, "descriptors", columns=["MolWeight"], warn=False)


def test_a_descriptor_without_a_value_counts_as_the_mean():
    f = features("descriptors", pd.DataFrame({"drug": ["a", "b", "tin"], "smiles": ["CCO", "CCCN", "C[Sn](C)(C)C"]}))
    assert np.isfinite(f.x).all() and np.abs(f.x).max() <= 10


def test_vectors_are_joined_by_name_in_every_format(vectors, tmp_path):
    import torch
    from safetensors.numpy import save_file
    path, names, x = vectors
    table = pd.DataFrame(x, columns=["x0", "x1"]).assign(drug=names)
    table.sample(frac=1, random_state=1).to_csv(tmp_path / "v.csv", index=False)
    table.to_parquet(tmp_path / "v.parquet")
    pd.DataFrame({"drug": names, "vector": list(x)}).to_parquet(tmp_path / "lists.parquet")
    save_file({"v": x}, tmp_path / "v.safetensors", {"names": json.dumps(names)})
    torch.save({"names": names, "vectors": torch.tensor(x)}, tmp_path / "v.pt")
    want = features("chemberta", path=path, names=names).rows(DRUGS.drug)
    for name in ("v.csv", "v.parquet", "lists.parquet", "v.safetensors", "v.pt"):
        for a, b in zip(features("chemberta", path=tmp_path / name).rows(DRUGS.drug), want): np.testing.assert_array_equal(a, b, err_msg=name)
    assert want[1].tolist() == [True, False, True, False, True]  # Mystery has a vector though it has no structure


@pytest.mark.parametrize("x, names, word", [
    (np.ones((2, 3)), ["a", "A"], "names two rows"), (np.ones((2, 3)), ["a"], "1 names for 2 rows"), (np.ones((2, 3)), None, "has no names"),
    (np.array([[1, np.nan], [1, 1]]), ["a", "b"], "'a' of v.npy has a value that is not finite"), (np.ones(3), ["a", "b", "c"], "shape (3,)"),
    (np.ones((2, 0)), ["a", "b"], "shape (2, 0)"), (np.array([["x", "y"]]), ["a"], "numbers"), (np.ones((2, 3)), ["a", None], "row 1 of v.npy has no name")])
def test_bad_vectors(x, names, word, tmp_path):
    np.save(tmp_path / "v.npy", x)
    fails(word, read_vectors, tmp_path / "v.npy", names)


def test_bad_vector_files(vectors, tmp_path):
    path, names, _ = vectors
    fails("no common name", features, "chemberta", path=path, names=["x", "y", "z", "w"])
    (tmp_path / "v.npz").write_bytes(b"")
    fails("v.npz", read_vectors, tmp_path / "v.npz", names)
    (tmp_path / "cut.npy").write_bytes(path.read_bytes()[:90])
    fails("cut.npy cannot be read", read_vectors, tmp_path / "cut.npy", names)
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    fails("objects.npy cannot be read", read_vectors, tmp_path / "objects.npy", ["a"])
    fails("no file", read_vectors, tmp_path / "none.npy", names, error=MissingFile)
    pd.DataFrame({"id": ["a"], "x": [1.0]}).to_csv(tmp_path / "t.csv", index=False)
    fails("no column with names", read_vectors, tmp_path / "t.csv")
    fails("gaps or repeats", row_names, pd.DataFrame({"n": ["a", "b"], "row": [0, 2]}))
    fails("no ", use_weights, tmp_path, error=MissingFile)


def test_targets():
    drugs = pd.DataFrame({"drug": ["a", "b "], "targets": ["X, Y,X", None]})
    genes = pd.DataFrame({"gene_symbol": ["X", "Z"], "ensembl_id": ["1", "2"]})
    assert targets(drugs, genes).to_numpy().tolist() == [["a", "X", "1"]]
    assert targets(drugs, genes, measured=False).gene_id.tolist() == ["1", None]
    fails("symbol of several genes", targets, drugs, pd.DataFrame({"gene_symbol": ["X", "X"], "ensembl_id": ["1", "2"]}))
    fails("no column 'targets'", targets, drugs[["drug"]], genes)
    assert targets(drugs.assign(targets=None), genes).empty


# --- cell lines ---------------------------------------------------------------------------------------------------------


def table(n_lines=5, genes=7, treated=True, seed=0):
    draw = rng(seed, "test.cell_features")
    rows = [(p, t, f"L{i}", b, d) for i in range(n_lines) for b in ("p1", "p2")
            for p, t, d in [("DMSO_TF", "control", 0.0), ("Trametinib (DMSO_TF solvate)", "compound", 5.0)][:1 + treated]]
    obs = pd.DataFrame(rows, columns=["pert", "pert_type", "cell_line", "batch", "dose_um"]).assign(n_cells=50, time_h=24.0)
    obs.index = [f"r{i}" for i in range(len(obs))]
    var = pd.DataFrame({"symbol": [f"G{j}" for j in range(genes)]}, [f"G{j}" for j in range(genes)])
    return ad.AnnData(draw.uniform(0, 3, (len(obs), genes)), obs, var, uns={"perturbnb": {"scale": "log1p_cp10k", "reference": "none"}})


def test_pca_is_blind_to_treated_cells_to_order_and_to_held_out_lines():
    a = table()
    want = cell_features(controls_of(a), fit_lines=["L0", "L1", "L2"])
    b = a[rng(0, "test.order").permutation(a.n_obs)].copy()
    b.X[(b.obs.pert_type != "control").to_numpy()] = 7
    np.testing.assert_array_equal(cell_features(controls_of(b), fit_lines=["L2", "l1", "L0"]).x, want.x)
    b.X[b.obs.cell_line.isin(["L3", "L4"]).to_numpy()] *= 2
    np.testing.assert_array_equal(cell_features(controls_of(b), fit_lines=["L0", "L1", "L2"]).x[:3], want.x[:3])
    some = cell_features(controls_of(a[a.obs.cell_line.isin(["L0", "L1", "L2"]).to_numpy()]))
    np.testing.assert_array_equal(some.rows(["L4", "L0"], controls=controls_of(a))[0], want.rows(["L4", "L0"])[0])


def test_pca_against_sklearn():
    from sklearn.decomposition import PCA
    from perturbnb.data.cell_features import line_means
    c = controls_of(table(8))
    f, m = cell_features(c, n=3), line_means(c).to_numpy()
    theirs = PCA(3, svd_solver="full").fit(m)
    np.testing.assert_allclose(np.abs(f.arrays["components"]), np.abs(theirs.components_), atol=1e-10)
    np.testing.assert_allclose(f.arrays["spread"], theirs.explained_variance_ratio_)
    np.testing.assert_allclose(np.abs(f.x) * f.arrays["scale"], np.abs(theirs.transform(m)), atol=1e-5)
    assert (f.arrays["components"][np.arange(3), np.abs(f.arrays["components"]).argmax(1)] > 0).all()
    np.testing.assert_allclose((f.x**2).mean(), 1, rtol=1e-5)


def test_bad_controls():
    a = table()
    fails("is treated", cell_features, a)
    fails("no control row", controls_of, a[a.obs.pert_type == "compound"])
    c = controls_of(a)
    fails("1 to 4", cell_features, c, n=5)
    fails("1 training line", cell_features, c, fit_lines=["L0"])
    fails("training line 'l9' has no controls", cell_features, c, fit_lines=["L0", "L9"])
    fails("kind='pcs'", cell_features, c, "pcs")
    fails("option 'k' of kind pca", cell_features, c, k=2)
    bad = c.copy(); bad.X[0, 0] = np.nan
    fails("'r0' has a value that is not finite", cell_features, bad)
    moved = c.copy(); moved.uns["perturbnb"] = {"scale": "delta_log1p_cp10k"}
    fails("controls in delta_log1p_cp10k", cell_features, moved)
    fails("do not differ", cell_features, ad.AnnData(np.ones(c.shape), c.obs, c.var, uns=c.uns))
    fails("no cell line", cell_features, [], "learned")
    fails("a DataFrame", cell_features, c.obs)


@pytest.mark.parametrize("kind", ["pca", "learned", "zeros", "file"])
def test_cell_state_survives(kind, tmp_path):
    np.save(tmp_path / "v.npy", np.ones((2, 3)))
    c = controls_of(table())
    f = cell_features(c, kind, **({"path": tmp_path / "v.npy", "names": ["L1", "L3"]} if kind == "file" else {}))
    arrays, names, options = f.state()
    g = CellFeatures.from_state(arrays, *json.loads(json.dumps([names, options])))
    for x, y in zip(f.rows(["l1", "L9"]), g.rows(["l1", "L9"])): np.testing.assert_array_equal(x, y, strict=True)
    if kind == "pca":
        new = table(7)
        np.testing.assert_array_equal(f.rows(["L6"], controls_of(new))[0], g.rows(["L6"], controls_of(new))[0])
    if kind == "file": assert "leak cannot be excluded" in g.notes[0] and g.known.tolist() == [False, True, False, True, False]
