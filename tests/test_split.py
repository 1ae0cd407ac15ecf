"Splits and audits on random tables: each rule keeps its promise, hashes hold, and what is tampered with or leaks is refused."
import collections
import dataclasses
import functools
import itertools
import json

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.feature_selection import VarianceThreshold
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from perturbnb.core import ChangedFile, InputError
from perturbnb.data.audit import PROMISES, LeakError, audit, audit_features, audit_fit, difference
from perturbnb.data.drugs import structure_key
from perturbnb.data.split import SPLITS, load, make_split, split

SEEDS = range(5)
CHEMICAL = {"pair": {}, "unseen_drug": {"stratify": "moa"}, "unseen_scaffold": {"test": 0.3}, "unseen_cell_line": {}, "grouped_well": {},
            "unseen_both": dict(test_drugs=0.3, test_lines=0.3), "replicate_out": dict(by="batch"), "donor": dict(controls="split"), "random_rows": {}}
GENETIC = {"unseen_gene": {}, "unseen_combo": {}, "gears": {}, "doubles": {}}
BOTH = [(n, o, "drugs") for n, o in CHEMICAL.items()] + [(n, o, "genes") for n, o in GENETIC.items()]
RINGS = ["c1ccccc1", "C1CCNCC1", "c1ccncc1", "c1ccoc1", "C1CCCC1", "c1ccsc1"]


def drugs(seed: int) -> pd.DataFrame:
    "About 20 drugs, some as salts of each other, some without structure, a part of all pairs with six lines, two plates, donors."
    draw = np.random.default_rng(seed)
    smiles = {f"d{i:02d}": f"{'C' * (1 + i % 5)}{RINGS[i % 6]}" if i < 15 else "C" * (i - 10) + "O" for i in range(18)}
    smiles |= {"d00 hydrochloride": smiles["d00"] + ".Cl", "d03 (hydrate)": None, "lone": None, "D05 ": smiles["d05"]}
    rows = [dict(pert=d, pert_type="compound", cell_line=f"L{k}", batch=f"p{b}", smiles=s, dose_um=1.0, replicate=str(b), donor=f"n{k % 4}")
            for d, s in smiles.items() for k in range(6) for b in (1, 2, 3) if draw.random() < 0.8]
    rows += [dict(pert="DMSO", pert_type="control", cell_line=f"L{k}", batch="p1", dose_um=0.0, replicate="1", donor=f"n{k % 4}") for k in range(6)]
    table = pd.DataFrame(rows)
    table["moa"] = table.pert.str.len().astype(str)
    return table.set_axis([f"row{i:04d}" for i in draw.permutation(len(table))])


def genes(seed: int) -> pd.DataFrame:
    "Twelve genes alone and 30 pairs of them in either order, three cells each."
    draw = np.random.default_rng(seed)
    names = [f"G{i:02d}" for i in range(12)]
    pairs = list(itertools.combinations(names, 2))
    some = [pairs[i] for i in draw.choice(len(pairs), 30, replace=False)]
    labels = names + ["+".join(p[:: draw.choice([1, -1])]) for p in some]
    table = pd.DataFrame({"pert": labels * 3 + ["control"] * 6})
    table["pert_type"] = np.where(table.pert == "control", "control", "crispra")
    return table.set_axis([f"cell{i}" for i in draw.permutation(len(table))])


TABLES = {"drugs": drugs, "genes": genes}


def test_every_rule_is_tried_and_has_a_promise():
    assert set(CHEMICAL) | set(GENETIC) == set(SPLITS) == set(PROMISES)


@pytest.mark.parametrize("name,options,kind", BOTH)
def test_rule_keeps_its_promise(name, options, kind):
    for seed in SEEDS:
        obs = TABLES[kind](seed)
        s = split(name, obs, seed=seed, **options)
        assert sorted(s.table.index) == sorted(obs.index) and s.table.index.is_monotonic_increasing
        assert s.sizes()["train"] and s.sizes()["test"]
        found = audit(s, ad.AnnData(np.zeros((len(obs), 1)), obs.astype({"pert": "category"})))
        assert len(found.proved) >= 1 + bool(PROMISES[name]) and all(isinstance(line, str) for line in found.lines)


@pytest.mark.parametrize("name,options,kind", BOTH)
def test_hash_knows_neither_order_nor_other_columns(name, options, kind):
    for seed in SEEDS:
        obs = TABLES[kind](seed)
        s = split(name, obs, seed=seed, **options)
        other = obs.sample(frac=1, random_state=seed).assign(extra=range(len(obs)))[["extra", *obs.columns[::-1]]]
        again = split(name, other.astype({"pert": "category", "pert_type": "category"}), seed=seed, **options)
        assert again.hash == s.hash
        pd.testing.assert_frame_equal(again.table, s.table)
    assert len({split(name, obs, seed=i, **options).hash for i in range(6)}) > 1


@pytest.mark.parametrize("name,options,kind", [b for b in BOTH if b[0] != "random_rows"])
def test_one_row_on_the_other_side_is_caught(name, options, kind):
    "A single row moved from test to train: its group is torn apart."
    obs = TABLES[kind](0)
    s = split(name, obs, seed=0, **options)
    facet = {"unseen_cell_line": "cell_line", "replicate_out": "batch", "donor": "donor", "pair": ["pert", "cell_line"]}.get(name, "pert")
    in_test = obs.loc[s.part("test")]
    row = in_test.index[in_test.groupby(facet)["pert"].transform("size") > 1][0]
    part = s.table.part.where(s.table.index != row, "train")
    with pytest.raises(LeakError) as e: audit(make_split(name, s.table.assign(part=part), params=s.params), obs)
    assert row in e.value.rows["row"].tolist() and "in two parts" in str(e.value) and "\n" not in str(e.value)


def test_promises_in_plain_pandas():
    "The same promises without the audit's own code."
    for seed in SEEDS:
        obs, part = drugs(seed), {}
        key = obs.smiles.map(structure_key).fillna(obs.pert.str.strip())
        for name, o in CHEMICAL.items(): part[name] = split(name, obs, seed=seed, **o).table.part.reindex(obs.index)
        sides = lambda name, values: [set(values[part[name] == p]) for p in ("train", "val", "test")]
        for name, values in [("unseen_drug", key), ("unseen_scaffold", key), ("grouped_well", key), ("unseen_cell_line", obs.cell_line), ("unseen_both", key),
                             ("unseen_both", obs.cell_line), ("pair", key + obs.cell_line), ("donor", obs.donor), ("replicate_out", obs.batch)]:
            a, b, c = sides(name, values)
            assert not (a & b or a & c or b & c) and a and c
        for name in ("unseen_drug", "unseen_scaffold"): assert obs.pert[part[name] == "test"].isin(["d03", "d03 (hydrate)"]).sum() in (0, obs.pert.isin(["d03", "d03 (hydrate)"]).sum())
        for values in (key, obs.cell_line):
            train, _, test = sides("pair", values)
            assert test <= train


def test_fractions_are_kept():
    obs = drugs(0)
    for f in (0.1, 0.25, 0.5):
        s = split("unseen_cell_line", obs, test=f, val=0)
        assert obs.cell_line[s.part("test")].nunique() == max(1, int(6 * f + 0.5))
        assert abs(split("random_rows", obs, test=f).sizes()["test"] - f * len(obs)) <= 0.5
    wells = pd.DataFrame({"pert": [f"d{i}" for i in range(100)], "pert_type": "compound", "moa": ["x"] * 80 + ["y"] * 20}, index=[f"r{i:03d}" for i in range(100)])
    for seed in SEEDS:
        test = split("grouped_well", wells, seed=seed, test=0.2, val=0.1, stratify="moa").part("test")
        assert wells.moa[test].value_counts().to_dict() == {"x": 16, "y": 4}


def test_named_hold_outs_pull_their_group():
    obs = drugs(1)
    s = split("unseen_drug", obs, test=["D00"], val=["d05"])
    assert set(obs.pert[s.part("test")]) == {"d00", "d00 hydrochloride"} and set(obs.pert[s.part("val")]) == {"d05", "D05 "}
    with pytest.raises(InputError, match="both val and test"): split("unseen_drug", obs, test=["d05"], val=["D05"])
    with pytest.raises(InputError, match="no drug 'd99'"): split("unseen_drug", obs, test=["d99"])


def test_save_load_and_tamper(tmp_path):
    s = split("unseen_drug", drugs(0), seed=3)
    path = s.save(tmp_path / "deep" / "split.parquet")
    again = load(path)
    assert (again.hash, again.params, again.notes, again.seed, again.name) == (s.hash, s.params, s.notes, 3, "unseen_drug")
    assert audit(again, drugs(0)).lines == audit(s, drugs(0)).lines
    table = pq.read_table(path)
    head = json.loads(table.schema.metadata[b"perturbnb_split"])
    for change in ({"seed": 4}, {"name": "pair"}, {"params": {}}, {"notes": ["other"]}):
        pq.write_table(table.replace_schema_metadata({"perturbnb_split": json.dumps(head | change)}), tmp_path / "t.parquet")
        with pytest.raises(ChangedFile): load(tmp_path / "t.parquet")
    frame = table.to_pandas()
    frame.loc[0, "part"] = "val" if frame.loc[0, "part"] != "val" else "train"
    import pyarrow as pa
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(table.schema.metadata), tmp_path / "t.parquet")
    with pytest.raises(ChangedFile): load(tmp_path / "t.parquet")
    raw = bytearray(path.read_bytes())
    for at in range(4, len(raw) - 8, 97):
        broken = raw.copy(); broken[at] ^= 0xFF
        (tmp_path / "b.parquet").write_bytes(broken)
        try: assert load(tmp_path / "b.parquet").hash == s.hash  # a byte that means nothing
        except (InputError, ChangedFile): pass
    with pytest.raises(InputError, match="was changed after"): dataclasses.replace(s, seed=9).save(tmp_path / "x.parquet")
    assert not (tmp_path / "x.parquet").exists()


def test_hash_is_the_one_it_was():
    "Golden values: a change of the dealing needs a word in the changelog."
    obs = pd.DataFrame({"pert": [f"d{i}" for i in range(10)], "pert_type": "compound", "cell_line": list("ab") * 5}, index=[f"r{i}" for i in range(10)])
    s = split("unseen_drug", obs, seed=1)
    assert list(s.part("test")) == ["r4", "r5"] and s.hash == "13df24a5a3fd5e7f44aad0411fb62e232b340cbd744e092ae09cba4462d9436e"
    labels = ["A", "B", "C", "D", "E", "A+B", "A+C", "A+D", "A+E", "B+C", "B+D", "B+E", "C+D"]
    s = split("doubles", pd.DataFrame({"pert": labels, "pert_type": "crispra"}, index=labels), seed=1)
    assert list(s.part("test")) == ["B+C", "B+D"] and s.hash == "c6784584c56af10bc55b1e59e1b841204f46517d2db7d7e6eeacac6deea35b8f"


def test_clear_errors():
    obs, one = drugs(0), pd.DataFrame({"pert": ["a"] * 4, "pert_type": "compound", "cell_line": "L"}, index=list("wxyz"))
    for name, o, words in [("unseen_drug", {}, "1 drug group for train"), ("unseen_cell_line", {}, "1 cell line group"), ("donor", {}, "no column 'donor'"),
                           ("unseen_scaffold", {}, "no column 'smiles'"), ("pair", {}, "too few pairs"), ("unseen_combo", {}, "no condition with two genes"),
                           ("doubles", {}, "0 combinations"), ("unseen_drug", {"test": -1}, "test=-1"), ("unseen_drug", {"test": True}, "test=True"),
                           ("unseen_drug", {"stratify": "mao"}, "no column 'mao'")]:
        with pytest.raises(InputError, match=words.replace("(", r"\(")) as e: split(name, one, **o)
        assert "\n" not in str(e.value)
    with pytest.raises(InputError, match="a genetic perturbation"): split("unseen_drug", genes(0))
    with pytest.raises(InputError, match="controls alone"): split("donor", obs[obs.pert_type == "control"])
    with pytest.raises(InputError, match="no column 'pert_type'"): split("donor", obs.drop(columns="pert_type"))
    with pytest.raises(InputError, match="no observation"): split("donor", obs[:0])
    with pytest.raises(InputError, match="cannot be read"): split("unseen_drug", obs.assign(smiles="C1CC"))
    with pytest.raises(InputError, match="a list"): split("donor", [1, 2])


@pytest.mark.parametrize("seed", [-1, None, "a", 1.7, 2**40, True])
@pytest.mark.parametrize("name", ["gears", "doubles", "unseen_gene"])
def test_odd_seeds_are_refused(name, seed):
    with pytest.raises(InputError, match="a whole number from 0") as e: split(name, genes(0), seed=seed)
    assert "\n" not in str(e.value)
    with pytest.raises(InputError, match="seed="): make_split("x", pd.Series({"a": "train"}), seed=seed)


def test_odd_options_are_refused(tmp_path):
    obs, two = drugs(0), pd.DataFrame({"pert": ["A", "B", "C", "A+B", "B+C"], "pert_type": "crispra"})
    for f, words in [(lambda: split("unseen_drug", obs, test=["d01", 3]), "no drug '3'"), (lambda: split("unseen_drug", obs, stratify=["a"]), "the name of the column"),
                     (lambda: split("replicate_out", obs, by=["batch"]), "the name of one column"), (lambda: split(["pair"], obs), "a rule of"),
                     (lambda: split("doubles", two), "three combinations or more"), (lambda: split("gears", genes(0), genes_train=True), "genes_train=True"),
                     (lambda: make_split("x", pd.Series({"a": "train"}), params={"a": np.int64(3)}), "JSON cannot hold"),
                     (lambda: make_split("x", pd.Series({"a": "train"}), params=[1]), "a dictionary"), (lambda: make_split("x", ["train"]), "a table or Series"),
                     (lambda: make_split(None, pd.Series({"a": "train"})), "a name"), (lambda: audit("x", obs), "a Split")]:
        with pytest.raises(InputError, match=words) as e: f()
        assert "\n" not in str(e.value)
    path = split("unseen_drug", obs).save(tmp_path / "s.parquet")
    table, head = pq.read_table(path), {"name": "x", "seed": 1, "params": {}, "notes": [], "hash": ""}
    for text in ["[]", "null", "[" * 100000, *(json.dumps(head | odd) for odd in ({"notes": None}, {"seed": "q"}, {"hash": None}, {"params": []}, {"name": 3}))]:
        pq.write_table(table.replace_schema_metadata({"perturbnb_split": text}), path)
        with pytest.raises((InputError, ChangedFile)) as e: load(path)
        assert "\n" not in str(e.value) and str(path) in str(e.value)


def test_strata_of_combinations_are_checked():
    obs = genes(2)
    for name in ("unseen_combo", "gears"):
        s = split(name, obs, seed=1)
        wrong = s.table.stratum.replace({"combo_seen2": "combo_seen1", "combo_seen1": "combo_seen2", "combo_seen0": "combo_seen2"})
        with pytest.raises(LeakError, match="its genes make it"): audit(make_split(name, s.table.assign(stratum=wrong), params=s.params), obs)
    s = split("doubles", obs)
    one = obs.index[obs.pert == "G00"]
    with pytest.raises(LeakError, match="single 'g00' is in test"): audit(make_split("doubles", s.table.assign(part=s.table.part.where(~s.table.index.isin(one), "test"))), obs)
    s = split("unseen_gene", obs)
    back = s.table.part.where(s.table.part != "test", "train")
    back[obs.index[obs.pert == "G00"]] = "test"
    with pytest.raises(LeakError): audit(make_split("unseen_gene", back), obs)


def test_audit_needs_the_column_it_proves():
    obs = drugs(0)
    s = split("donor", obs)
    with pytest.raises(InputError, match="no column for it"): audit(s, obs.drop(columns="donor"))
    with pytest.raises(InputError, match="have no donor"): audit(s, obs.assign(donor=obs.donor.where(obs.index != s.part("test")[0])))
    with pytest.raises(InputError, match="did you mean"): audit(make_split("unseen_drugs", s.table), obs)
    seen = audit(split("unseen_drug", obs.drop(columns="smiles")), obs.drop(columns="smiles"))
    assert any("by name alone" in line for line in seen.lines)
    with pytest.raises(LeakError, match="d00 hydrochloride"):  # names passed, structures do not
        named = split("unseen_cell_line", obs.assign(cell_line=obs.pert), test=["d00"], val=0)
        audit(make_split("unseen_drug", named.table), obs)


def pair_of(column, a, b, rule="unseen_drug", **more):
    "Audit of two rows, one in train and one in test, that differ in one column."
    obs = pd.DataFrame({"pert": ["x", "y"], "pert_type": "compound", "cell_line": "L", "batch": "b"} | more, index=["r0", "r1"]).astype(object)
    obs[column] = pd.Series([a, b], obs.index, dtype=object)
    return audit(make_split(rule, pd.Series(["train", "test"], obs.index)), obs)


@pytest.mark.parametrize("a,b", [("aspirin", "a\u200bspirin"), ("aspirin", "asp\u00adirin"), ("5-FU", "5\u2011FU"), ("caf\u00e9", "cafe\u0301"), ("\uff41spirin", "aspirin"),
                                 ("dox", "dox-hydrochloride"), ("dox", "Dox_HCl"), ("dox", "dox (hydrochloride salt)"), ("ibuprofen", "ibuprofen lysinate"), ("\u00b5-x", "\u03bc-x")])
def test_one_drug_in_two_spellings_is_caught(a, b):
    with pytest.raises(LeakError, match="stands in two parts"): pair_of("pert", a, b)
    names = [a, b, *(f"other{i}" for i in range(8))]
    obs = pd.DataFrame({"pert": names, "pert_type": "compound"}, index=[f"r{i}" for i in range(10)])
    for seed in SEEDS: audit(split("unseen_drug", obs, seed=seed), obs)  # the rule joins what the audit joins


METFORMIN, SULFADIAZINE, ASPIRIN = "CN(C)C(=N)N=C(N)N", "Nc1ccc(cc1)S(=O)(=O)Nc1ncccn1", "CC(=O)Oc1ccccc1C(=O)O"


@pytest.mark.parametrize("a,b", [(METFORMIN, METFORMIN + ".OC(=O)C1=CC(=O)NC(=O)N1"), (METFORMIN, METFORMIN + ".OC(=O)COc1ccc(Cl)cc1"),
                                 (SULFADIAZINE, "Nc1ccc(cc1)S(=O)(=O)N([Ag])c1ncccn1"), (ASPIRIN, "CC(=O)Oc1ccccc1C(=O)[O-].[Na+]")])
def test_one_structure_in_two_forms_is_caught(a, b):
    with pytest.raises(LeakError, match="no structure stands in two parts"): pair_of("smiles", a, b)


@pytest.mark.parametrize("kind,words", [("control", "is typed control, but is the same drug"), ("Control", "is typed control, but"), ("shrna", "is a genetic perturbation")])
def test_a_salt_under_another_type_is_caught(kind, words):
    obs = pd.DataFrame({"pert": ["aspirin", "ibu", "aspirin sodium"], "pert_type": ["compound", "compound", kind], "cell_line": "L",
                        "smiles": [ASPIRIN, "CC(C)Cc1ccc(cc1)C(C)C(=O)O", "CC(=O)Oc1ccccc1C(=O)[O-].[Na+]"]}, index=list("abc"))
    part = pd.Series(["test", "train", "control" if kind.lower() == "control" else "train"], obs.index)
    with pytest.raises(InputError, match=words): audit(make_split("unseen_drug", part), obs)
    if kind == "shrna":
        with pytest.raises(LeakError, match="no structure stands in two parts"): audit(make_split("grouped_well", part), obs)


def test_drugs_without_structure_are_counted():
    assert "1 of 2 drugs have no structure and were compared by name alone" in pair_of("smiles", ASPIRIN, None).notes


@pytest.mark.parametrize("rule,column,a,b", [("unseen_cell_line", "cell_line", "MCF7", "MCF-7"), ("unseen_cell_line", "cell_line", "A549", "a 549"), ("donor", "donor", "1", "1.0"),
                                             ("donor", "donor", 1, 1.0), ("donor", "donor", "donor_1", "donor-1"), ("donor", "donor", "donor 01", "donor1"),
                                             ("replicate_out", "replicate", "rep1", "Rep 1")])
def test_one_line_or_donor_in_two_spellings_is_caught(rule, column, a, b):
    with pytest.raises(LeakError, match="stands in two parts"): pair_of(column, a, b, rule)
    obs = pd.DataFrame({"pert": "x", "pert_type": "compound", column: pd.Series([a, b, "c", "d", "e"], dtype=object)})
    for seed in SEEDS:
        s = split(rule, obs, seed=seed, test=0.4, val=0)
        found = audit(s, obs)
        assert sum("taken as one value" in n for n in (*s.notes, *found.notes)) >= 1 or str(a) == str(b) or type(a) is not type(b)


@pytest.mark.parametrize("wells,batches,plates,leak", [(("A1", "A01"), "x", "P1", True), (("A01", "A01"), ["run1", "run2"], "P1", True), (("a01 ", "A01"), ["run1", "run2"], None, False),
                                                       (("A01", "A01"), "x", ["P1", "P2"], False), (("A01", "A-1"), "x", None, True), (("A1", "A10"), "x", "P1", False)])
def test_wells_are_places_on_plates(wells, batches, plates, leak):
    more = {"batch": batches, "replicate": ["1", "2"]} | ({"plate": plates} if plates else {})
    if not leak: assert pair_of("well", *wells, rule="replicate_out", **more).proved; return
    with pytest.raises(LeakError, match="no well stands in two parts"): pair_of("well", *wells, rule="replicate_out", **more)


@pytest.mark.parametrize("name", GENETIC)
def test_gene_rules_in_other_dialects(name):
    "A+ctrl, ctrl+A, another case and another order are the same condition, and the same split."
    obs = genes(3)
    single = ~obs.pert.str.contains("+", regex=False) & (obs.pert_type != "control")
    other = obs.assign(pert=[f"{p}+ctrl" if one and i % 2 else f"ctrl+{p}" if one else p.lower().replace("+", " + ") if i % 3 and p != "control" else p
                             for i, (p, one) in enumerate(zip(obs.pert, single))])
    for seed in (1, 2):
        s, t = split(name, obs, seed=seed), split(name, other, seed=seed)
        pd.testing.assert_frame_equal(s.table, t.table)
        assert [p.split("hash")[0] for p in audit(t, other).proved] == [p.split("hash")[0] for p in audit(s, obs).proved]
    if name == "doubles":
        assert any("all 12 single perturbations" in p for p in audit(t, other).proved)
        alone = obs[~single]
        found = audit(split(name, alone), alone)
        assert not any("single" in p for p in found.proved) and "nothing to prove about singles" in found.notes[-1]


def test_pair_knows_genes():
    obs = pd.DataFrame({"pert": ["A", "B", "B"], "pert_type": "crispra", "cell_line": ["L1", "L1", "L2"]}, index=list("xyz"))
    with pytest.raises(LeakError, match="perturbation 'a' of row 'x' has no row in train"): audit(make_split("pair", pd.Series(["test", "train", "train"], obs.index)), obs)


def test_audit_lines_fit_a_result(tmp_path):
    from perturbnb.report.results import Result
    obs = drugs(0)
    s = split("unseen_drug", obs)
    result = Result("page", {}, folder=tmp_path)
    result.split(s.name, s.sizes(), audit(s, obs).lines, s.hash)
    assert result.record["split"][0]["audit"][0].startswith("proved: each of")


def screen(kind=np.asarray) -> ad.AnnData:
    "40 cells, eight genes, five perturbations and controls, sorted by label; counts."
    draw = np.random.default_rng(0)
    obs = pd.DataFrame({"pert": np.repeat(["A", "B", "C", "D", "E", "control"], [8, 8, 7, 5, 6, 6])}).astype({"pert": "category"})
    obs["condition"] = obs.pert.astype(str) + "_copy"
    obs["pert_type"], obs["batch"] = np.where(obs.pert == "control", "control", "crispra"), list("xy") * 20
    obs["moa"], obs["score"] = obs.pert.map(lambda p: "m1" if p in "AB" else None), draw.normal(size=40)
    a = ad.AnnData(kind(draw.poisson(3.0, (40, 8)).astype(np.float32)), obs.set_axis([f"{p}_{i}" for i, p in enumerate(obs.pert)]))
    a.layers["counts"] = a.X.copy()
    a.obsm["X_pca"] = PCA(2, svd_solver="full").fit_transform(np.log1p(a.layers["counts"].toarray() if sparse.issparse(a.X) else a.X))
    return a


dense = lambda x: x.toarray() if sparse.issparse(x) else np.asarray(x)
treated = lambda a: (a.obs.pert_type != "control").to_numpy()
GOOD = {"reverse": (lambda a: np.log1p(dense(a.X)), "labels"), "reverse minus control": (lambda a: dense(a.X) - dense(a.X)[~treated(a)].mean(0), "labels"),
        "forward names": (lambda a: pd.get_dummies(a.obs.pert.astype(str)).astype(float), "X"), "batch": (lambda a: pd.get_dummies(a.obs.batch), ("labels", "X")),
        "control mean": (lambda a: np.tile(dense(a.X)[~treated(a)].mean(0), (a.n_obs, 1)), ("labels", "X")), "sparse": (lambda a: sparse.csr_matrix(a.X), "labels"),
        "zeros": (lambda a: np.zeros((a.n_obs, 3)), ("labels", "X"))}
LEAKY = {"target mean": (lambda a: np.tile(dense(a.X)[treated(a)].mean(0), (a.n_obs, 1)), "X"),
         "target maximum": (lambda a: np.full(a.n_obs, dense(a.X)[treated(a)].max()), "X"),
         "layer": (lambda a: dense(a.layers["counts"]), "X"), "embedding": (lambda a: a.obsm["X_pca"], "X"),
         "library size": (lambda a: dense(a.X).sum(1), "X"),
         "mean of the class": (lambda a: a.to_df().groupby(a.obs.pert.astype(str)).transform("mean").to_numpy(), "labels"),
         "order of labels": (lambda a: np.argsort(np.argsort(a.obs.pert.astype(str), kind="stable")), "labels"),
         "codes": (lambda a: a.obs.pert.astype("category").cat.codes, "labels"), "copy": (lambda a: a.obs.condition.str.len().to_numpy(), "labels"),
         "counts of labels": (lambda a: a.obs.pert.astype(str).map(a.obs.pert.astype(str).value_counts()).to_numpy(), "labels"),
         "number of labels": (lambda a: np.full(a.n_obs, a.obs.pert.nunique()), "labels"),
         "missing label": (lambda a: a.obs.moa.isna().to_numpy(), "labels"), "target score": (lambda a: a.obs.score.to_numpy(), ("score",)),
         "name": (lambda a: [ord(n[0]) for n in a.obs_names], "labels"), "row number": (lambda a: np.c_[dense(a.X), np.arange(a.n_obs)], "labels")}


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_matrix])
@pytest.mark.parametrize("name", GOOD)
def test_honest_features_pass(name, kind):
    builder, forbidden = GOOD[name]
    for seed in range(3): assert audit_features(builder, screen(kind), forbidden=forbidden, seed=seed).proved


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_matrix])
@pytest.mark.parametrize("name", LEAKY)
def test_leaky_features_are_caught(name, kind):
    builder, forbidden = LEAKY[name]
    for seed in range(3):
        with pytest.raises(LeakError) as e: audit_features(builder, screen(kind), forbidden=forbidden, seed=seed)
        assert "\n" not in str(e.value)


def test_a_builder_that_learns_from_train_passes_with_the_split_alone():
    a = screen()
    s = split("unseen_combo", a.obs.assign(pert=a.obs.pert.astype(str).replace({"D": "A+B", "E": "B+C"})), test=0.5, val=0)
    encode = lambda b, s: dense(b.X)[s.mask(b, "train")].mean(0) + np.zeros((b.n_obs, 8))
    assert audit_features(encode, a, split=s, forbidden="X").proved
    centre = lambda b, s: dense(b.X) - dense(b.X)[s.mask(b, "train")].mean(0)
    assert any("move with their rows" in p for p in audit_features(centre, a, split=s, forbidden="labels").proved)
    with pytest.raises(InputError, match="a builder of two arguments"): audit_features(encode, a, forbidden="X")
    with pytest.raises(LeakError, match="takes .adata, split. and the audit split="):
        audit_features(lambda b: dense(b.X)[s.mask(b, "train")].mean(0) + np.zeros((b.n_obs, 8)), a, split=s, forbidden="X")
    with pytest.raises(LeakError): audit_features(lambda b: dense(b.X)[s.mask(a, "train")].mean(0) + np.zeros((b.n_obs, 8)), a, forbidden="X")
    with pytest.raises(LeakError): audit_features(lambda b: dense(b.X)[treated(b)].mean(0) + np.zeros((b.n_obs, 8)), a, split=s, forbidden="X")


@pytest.mark.parametrize("tint", [0, 1e-4, 1e-9])
def test_a_row_number_under_an_allowed_column_is_caught(tint):
    a = screen()
    a.obs["n_cells"] = np.random.default_rng(1).integers(50, 500, a.n_obs)
    for number in (lambda b: np.arange(b.n_obs), lambda b: np.arange(b.n_obs) // 4, lambda b: np.arange(b.n_obs)[::-1] * 1e-2):
        with pytest.raises(LeakError, match="does not move with its row"):
            audit_features(lambda b: np.c_[dense(b.X), number(b) + tint * b.obs.n_cells.to_numpy()], a, forbidden="labels")
    assert audit_features(lambda b: b.obs.n_cells.to_numpy() * tint, a).proved
    assert any("place of a row was not checked" in n for n in audit_features(lambda b: np.arange(b.n_obs), a, places=False).notes)


def test_memories_under_allowed_content_are_caught():
    a, memory = screen(), {}
    a.obs["well"], a.obs["n_cells"] = [f"W{i:03d}" for i in range(40)], np.arange(40) * 7 % 40
    leak = lambda b: b.obs.groupby("pert", observed=True).score.transform("mean").to_numpy()
    for key in (lambda b: tuple(b.obs.well), lambda b: hash(tuple(b.obs.batch)), lambda b: b.obs.n_cells.to_numpy().tobytes()):
        memory.clear()
        with pytest.raises(LeakError): audit_features(lambda b: memory.setdefault(key(b), leak(b)), a, forbidden="labels")
    table = dict(zip(a.obs.well, a.obs.pert.cat.codes))  # a stored dictionary cannot be told from knowledge: the column is named
    found = audit_features(lambda b: b.obs.well.map(table).to_numpy(), a, forbidden="labels")
    assert found.notes[0] == "features depend on these columns of obs, as they may: well"
    a.uns["by_well"] = table
    found = audit_features(lambda b: [b.uns["by_well"][w] for w in b.obs.well], a, forbidden="labels")
    assert "features read uns/by_well: what stands there was taken as given" in found.notes


def test_builders_that_hide_something():
    a, memory, calls = screen(), {}, itertools.count()
    leak = lambda b: b.obs.pert.astype(str).map(ord_first).to_numpy()
    ord_first = lambda p: ord(p[0])
    for key in (id, lambda b: tuple(b.obs_names), lambda b: b.shape, lambda b: 0):
        memory.clear()
        with pytest.raises(LeakError): audit_features(lambda b: memory.setdefault(key(b), leak(b)), a, forbidden="labels")
    for bad, words in [(lambda b: np.full(b.n_obs, next(calls)), "not deterministic"), (lambda b: np.random.normal(size=b.n_obs), "not deterministic"),
                       (lambda b: [b.obs.insert(0, "new", 1), b.X][1], "changes its input"), (lambda b: [b.X.__setitem__((0, 0), 99), b.X][1], "changes its input"),
                       (lambda b: b.obs[["score"]][::-1], "index is not obs_names"), (lambda b: b.X[:3], "features of shape")]:
        with pytest.raises(InputError, match=words) as e: audit_features(bad, a)
        assert not isinstance(e.value, LeakError)
    with pytest.raises(InputError, match="'scroe' among the forbidden"): audit_features(GOOD["zeros"][0], a, forbidden=("scroe",))
    with pytest.raises(InputError, match="something to change"): audit_features(GOOD["zeros"][0], a, forbidden=())


@dataclasses.dataclass
class Kept:
    genes: list
    table: pd.DataFrame


X = lambda a, s=None: dense(a.X) if s is None else dense(a.X)[s.mask(a, "train")]
HONEST_FIT = {"scaler": lambda a, s: StandardScaler().fit(X(a, s)), "pca": lambda a, s: PCA(2, svd_solver="full").fit(X(a, s)),
              "dataclass": lambda a, s: Kept(list(np.argsort(-X(a, s).var(0))[:3]), a.to_df()[s.mask(a, "train")].describe()),
              "closure": lambda a, s: (lambda mean: lambda x: x - mean)(X(a, s).mean(0)),
              "minus control": lambda a, s: X(a, s).mean(0) - X(a)[~treated(a)].mean(0),
              "torch": lambda a, s: torch_linear(X(a, s).mean(0)), "encoder": lambda a, s: OneHotEncoder().fit(a.obs.loc[s.mask(a, "train"), ["pert"]].astype(str))}
LEAKY_FIT = {"scaler": lambda a, s: StandardScaler().fit(X(a)), "pca": lambda a, s: PCA(2, svd_solver="full").fit(X(a)),
             "genes": lambda a, s: VarianceThreshold(np.median(X(a).var(0))).fit(X(a)).get_support(),
             "target encoding": lambda a, s: a.to_df().groupby(a.obs.pert.astype(str)).mean(), "closure": lambda a, s: (lambda mean: lambda x: x - mean)(X(a).mean(0)),
             "rows": lambda a, s: {"mean": X(a, s).mean(0), "alpha": 1 / a.n_obs}, "classes": lambda a, s: sorted(a.obs.pert.astype(str).unique()),
             "torch": lambda a, s: torch_linear(X(a).mean(0)), "test too": lambda a, s: StandardScaler().fit(X(a)[s.mask(a, "train") | s.mask(a, "test")]),
             "encoder": lambda a, s: OneHotEncoder().fit(a.obs[["pert"]].astype(str))}


def torch_linear(w):
    import torch
    layer = torch.nn.Linear(len(w), 1)
    layer.load_state_dict({"weight": torch.as_tensor(np.asarray(w), dtype=torch.float32)[None], "bias": torch.zeros(1)})
    return layer


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_matrix])
def test_fits(kind):
    a = screen(kind)
    s = split("unseen_gene", a.obs, seed=0, test=0.4, val=0)
    for name, fit in HONEST_FIT.items(): assert len(audit_fit(fit, a, s).proved) == 2, name
    for name, fit in LEAKY_FIT.items():
        with pytest.raises(LeakError) as e: audit_fit(fit, a, s)
        assert "depends on rows outside train and control" in str(e.value) and "\n" not in str(e.value), name
    assert audit_fit(lambda a, s: StandardScaler().fit(X(a, s)), a, s, state=lambda f: f.transform(np.ones((1, 8)))).proved


def test_fits_that_hide_something():
    a, memory = screen(), {}
    s = split("unseen_gene", a.obs, seed=0, test=0.2, val=0.2)
    honest = HONEST_FIT["scaler"]
    with pytest.raises(InputError, match="does not change when the training rows change"): audit_fit(lambda b, s: memory.setdefault(tuple(b.obs_names)[:3], honest(b, s)), a, s)
    with pytest.raises(InputError, match="not deterministic"): audit_fit(lambda b, s: np.random.normal(size=3), a, s)
    with pytest.raises(LeakError, match="outside train and control"): audit_fit(lambda b, s: X(b)[s.mask(b, "train") | s.mask(b, "val")].mean(0), a, s)
    assert audit_fit(lambda b, s: X(b)[s.mask(b, "train") | s.mask(b, "val")].mean(0), a, s, may_see=("train", "val", "control")).proved


class NotedDict(dict): pass
class NotedList(list): pass
class NotedText(str): pass
class Slotted: __slots__ = ("mean", "z")
class SlottedAndMore(Slotted): pass
class OnTheClass: pass


def on_class(m, z):
    OnTheClass.z = z
    return OnTheClass()


def with_attributes(x, **more):
    for k, v in more.items(): setattr(x, k, v)
    return x


def net(m, z, how):
    import torch
    layer = torch_linear(m)
    if how == "attribute": layer.z = torch.as_tensor(z)
    if how == "buffer": layer.register_buffer("z", torch.as_tensor(z), persistent=False)
    if how == "on a parameter": layer.weight.z = z
    if how == "gradient": layer.weight.grad = torch.as_tensor(z, dtype=torch.float32)[None]
    return torch.nn.Sequential(layer)


def keyword(m, z):
    def f(x, *, scale=z): return (x - m) / scale
    return f


def duplicated(m, z): return pd.DataFrame(np.c_[z, m], columns=["a", "a"])
def unused(m, z): return {"m": m, "c": pd.Categorical(["a"], ["a", str(z[0])])}


HIDDEN = {"dict": lambda m, z: with_attributes(NotedDict(m=m), z=z), "list": lambda m, z: with_attributes(NotedList([m]), z=z), "text": lambda m, z: with_attributes(NotedText("t"), m=m, z=z),
          "slots": lambda m, z: with_attributes(Slotted(), mean=m, z=z), "slots and more": lambda m, z: with_attributes(SlottedAndMore(), w=m, z=z), "class": on_class,
          "keyword default": keyword, "function attribute": lambda m, z: with_attributes(lambda x, m=m: x, z=z), "attrs": lambda m, z: with_attributes(pd.DataFrame({"m": m}), attrs={"z": z}),
          "mask": lambda m, z: np.ma.array(m, mask=z > np.median(z)), "categories": unused, "double column": duplicated, "bound": lambda m, z: {"m": m, "z": z}.get,
          "partial": lambda m, z: with_attributes(functools.partial(np.add, m), z=z), "deque": lambda m, z: collections.deque([m, z]), "order": lambda m, z: {int(i): 0 for i in np.argsort(z)},
          "index": lambda m, z: pd.Series(m, pd.CategoricalIndex(list("abcdefgh"), [*"abcdefgh", str(z[0])])), "levels": lambda m, z: pd.MultiIndex.from_product([["a", str(z[0])], ["b"]])[:1],
          **{f"torch {how}": functools.partial(net, how=how) for how in ("attribute", "buffer", "on a parameter", "gradient")}}


@pytest.mark.parametrize("name", HIDDEN)
def test_fits_that_hide_statistics_are_caught(name):
    a = screen()
    s = split("unseen_gene", a.obs, seed=0, test=0.4, val=0)
    mean = lambda x: x.mean(0) + np.arange(8) * 1e-3
    with pytest.raises(LeakError, match="depends on rows outside train and control") as e: audit_fit(lambda b, s: HIDDEN[name](mean(X(b, s)), mean(X(b))), a, s)
    assert "\n" not in str(e.value)
    assert audit_fit(lambda b, s: (HIDDEN[name](mean(X(b, s)), mean(X(b, s))), X(b, s).mean(0)), a, s).proved  # the honest twin passes


def test_what_was_computed_before_is_refused():
    a = screen()
    a.varm["PCs"], a.var["highly_variable"] = np.ones((8, 2)) * X(a).std(), X(a).var(0) > np.median(X(a).var(0))
    a.uns["top"], a.uns["perturbnb"] = np.argsort(-X(a).var(0))[:3], {"scale": "vst"}
    s = split("unseen_gene", a.obs, seed=0, test=0.4, val=0)
    t = lambda b, s: s.mask(b, "train")
    for key, fit in {"obsm/X_pca": lambda b, s: b.obsm["X_pca"][t(b, s)].mean(0), "varm/PCs": lambda b, s: (X(b, s) @ b.varm["PCs"]).mean(0),
                     "var/highly_variable": lambda b, s: X(b, s)[:, b.var.highly_variable].mean(0), "uns/top": lambda b, s: X(b, s)[:, b.uns["top"]].mean(0)}.items():
        with pytest.raises(LeakError, match=f"what was fitted reads {key}, which may have been computed on all rows"): audit_fit(fit, a, s)
        assert f"{key}: made without the held-out rows, as you say" in audit_fit(fit, a, s, given=key).notes
    found = audit_fit(HONEST_FIT["scaler"], a, s)
    assert len(found.notes) == 1 and "taken as given" in found.notes[0]
    with pytest.raises(InputError, match="given='obsm/X_umap'"): audit_fit(HONEST_FIT["scaler"], a, s, given=["obsm/X_umap"])


def test_honest_models_of_many_kinds_pass():
    import torch
    from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestRegressor
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    a = screen()
    s = split("unseen_gene", a.obs, seed=0, test=0.4, val=0)
    y = lambda b, s: b.obs.pert.astype(str)[s.mask(b, "train")]
    def trained(kind):
        def fit(b, s):
            torch.manual_seed(0)
            model = kind()
            steps = torch.optim.Adam(model.parameters())
            out = model(torch.as_tensor(X(b, s)))
            ((out[0] if isinstance(out, tuple) else out) ** 2).mean().backward(); steps.step()
            return {"model": model, "optimiser": steps}
        return fit
    fits = {"pipeline": lambda b, s: make_pipeline(StandardScaler(), PCA(2, svd_solver="full"), KNeighborsClassifier(3)).fit(X(b, s), y(b, s)),
            "forest": lambda b, s: RandomForestRegressor(3, random_state=0).fit(X(b, s), X(b, s)[:, 0]), "boosting": lambda b, s: HistGradientBoostingRegressor(max_iter=3, random_state=0).fit(X(b, s), X(b, s)[:, 0]),
            "logistic": lambda b, s: LogisticRegression(C=0.1).fit(X(b, s), y(b, s)), "mlp": trained(lambda: torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Dropout(0.1))),
            "lstm": trained(lambda: torch.nn.LSTM(8, 3))}
    for name, fit in fits.items(): assert audit_fit(fit, a, s).proved, name


def test_difference_looks_inside():
    make = lambda: {"a": [np.arange(3), {"b": pd.DataFrame({"x": [1.0, np.nan]})}], "f": (lambda y: lambda x: x + y)(2), "s": {1, 2}}
    assert difference(make(), make()) is None
    circle = make(); circle["me"] = circle
    again = make(); again["me"] = again
    assert difference(circle, again) is None
    assert difference({"f": (lambda y: lambda x: x + y)(2)}, {"f": (lambda y: lambda x: x + y)(3)})
    assert difference(np.float32(1), np.float64(1)) and difference(np.zeros(2), np.zeros(3)) and difference([1], [1, 2]) and difference(None, 0)
    assert difference(np.random.default_rng(0), np.random.default_rng(1)) and difference(np.random.default_rng(0), np.random.default_rng(0)) is None
    assert difference(sparse.csr_matrix(np.eye(2)), sparse.csr_matrix(np.ones((2, 2)))) and difference(sparse.csr_matrix(np.eye(2)), sparse.csr_matrix(np.eye(2))) is None

