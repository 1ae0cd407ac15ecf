"Names of genes, pathways, embeddings, ablations and examples: what a notebook page does not try."
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from perturbnb.core import InputError, RunError, rng
from perturbnb.data.genes import GeneNames, as_network, gene_sets, gene_table, map_genes, read_gmt, read_signature
from perturbnb.interpret import embedding, pathways
from perturbnb.interpret.ablation import ablation, compare, simulated_run
from perturbnb.interpret.claims import answer
from perturbnb.interpret.examples import examples, examples_figure, nearest_drug, pick, structure_svg

REAL = Path(os.environ.get("PERTURBNB_REAL_DATA") or ROOT.parent / "shared" / "data")
real = pytest.mark.skipif(not (REAL / "genesets").is_dir(), reason="skipped: the real gene sets are not on this machine")
RUN = "perturbnb.interpret.ablation:simulated_run"
VAR = pd.DataFrame({"symbol": ["TP53", "MYC", "MARCHF1", "MYC"]}, index=[f"ENSG0000000000{i}" for i in range(1, 5)])
GENES = [f"g{i:02d}" for i in range(40)]
SETS = {f"S{j}": GENES[8 * j:8 * j + 8] for j in range(5)}


def effects(name, n=6):
    return pd.DataFrame(rng(0, "test.interpret", name).normal(size=(n, len(GENES))), [f"r{i}" for i in range(n)], GENES)


# genes

def test_windows_line_ends_gzip_and_byte_order_mark(tmp_path):
    text = "\ufeffS\tx\tTP53\tMARCHF1\r\n\r\nT\tx\tTP53\r\n"
    (tmp_path / "a.gmt").write_bytes(text.encode())
    (tmp_path / "a.gmt.gz").write_bytes(gzip.compress(text.encode()))
    assert read_gmt(tmp_path / "a.gmt").sets == read_gmt(tmp_path / "a.gmt.gz").sets == {"S": ("TP53", "MARCHF1"), "T": ("TP53",)}
    (tmp_path / "cut.gmt.gz").write_bytes(gzip.compress(text.encode())[:-9])
    with pytest.raises(InputError, match="cannot be unpacked"): read_gmt(tmp_path / "cut.gmt.gz")
    (tmp_path / "latin.gmt").write_bytes("S\tx\tTP53\xe9".encode("latin-1"))
    with pytest.raises(InputError, match="UTF-8"): read_gmt(tmp_path / "latin.gmt")


def test_every_name_has_a_fate_and_none_is_lost():
    names = ["TP53", "MYC", "1-Mar", "", "ENSG00000000003.7", "TP53"]
    found = map_genes(names, VAR)
    assert found.name.tolist() == names and found.how.tolist() == ["symbol", "ambiguous", "date", "unknown", "id", "symbol"]
    assert map_genes([], VAR).empty


def test_table_in_both_forms_reads_alike(tmp_path):
    df = pd.DataFrame({"ensembl_id": ["ENSG00000000001", "ENSG00000000009"], "gene_symbol": ["OLD1", "X"], "entrez": [7157, None]})
    df.to_parquet(tmp_path / "t.parquet")
    df.to_csv(tmp_path / "t.csv", index=False)
    a, b = gene_table(tmp_path / "t.parquet"), gene_table(tmp_path / "t.csv")
    assert a[["ensembl_id", "symbol"]].equals(b[["ensembl_id", "symbol"]])
    assert map_genes(["OLD1", "X"], VAR, a).how.tolist() == ["other name", "not measured"]


def test_signature_with_quotes_semicolons_and_order(tmp_path):
    (tmp_path / "s.csv").write_text('"gene";"logFC";"adj.P.Val"\n"MARCHF1";-2;0.1\n"TP53";1;0.2\n')
    got = read_signature(tmp_path / "s.csv", VAR)
    assert got.values.to_dict() == {"ENSG00000000001": 1.0, "ENSG00000000003": -2.0} and list(got.values.index) == sorted(got.values.index)
    assert got.kind == "logFC" and "2 of 4 measured genes" in str(got)
    (tmp_path / "r.csv").write_text(",log2FoldChange,padj\nTP53,1.5,0.1\nMYC,2,0.1\n")  # as DESeq2 in R writes it
    assert read_signature(tmp_path / "r.csv", VAR).values.tolist() == [1.5] and "1 ambiguous (MYC)" in str(read_signature(tmp_path / "r.csv", VAR))


@real
def test_real_sets_on_the_real_vocabulary():
    t = pd.read_parquet(REAL / "tahoe/gene_metadata.parquet").rename(columns={"gene_symbol": "symbol"}).set_index("ensembl_id")
    book = GeneNames(t)
    for name, n in (("hallmark", 50), ("go_mf", 1855)):
        found = gene_sets(REAL / f"genesets/human_{name}_v2025.gmt", book)
        assert len(found.report) == n and found.report.n_measured.le(found.report.n_listed).all() and len(found.fates) == found.fates.name.nunique()
    assert len(gene_sets(REAL / "genesets/human_hallmark_v2025.gmt", book)) == 50


# pathways

def test_activity_is_that_of_decoupler():
    dc = pytest.importorskip("decoupler")
    x = effects("decoupler")
    theirs, _ = dc.mt.ulm(x, as_network(SETS), tmin=1, empty=False)
    np.testing.assert_allclose(pathways.activity(x, SETS), theirs[list(SETS)], rtol=1e-9)


def test_activity_knows_no_scale_shift_or_gene_order():
    x = effects("scale")
    want = pathways.activity(x, SETS)
    np.testing.assert_allclose(pathways.activity(3 * x + 5, SETS), want, rtol=1e-9)
    np.testing.assert_allclose(pathways.activity(x[GENES[::-1]], SETS), want, rtol=1e-9)
    assert pathways.activity(x * 0 + .3, SETS).isna().all(axis=None)


def test_perfect_prediction_beats_random_sets_only_where_sets_mean_something():
    x = effects("meaning", 12)
    for name, members in SETS.items(): x[members] += rng(0, "test.sets", name).normal(size=(12, 1))
    noisy = x + effects("noise", 12) * 2
    t = pathways.against_random(x, {"noisy": noisy, "none": x * 0}, SETS, n_random=60).set_index(["model", "id"])
    assert t.loc[("noisy", "pearson_delta@1"), "p"] < .05 and t.loc[("noisy", "pearson_delta@1"), "low"] > 0
    assert t.loc[("none", "pearson_delta@1"), ["value", "random", "excess"]].tolist() == [0, 0, 0]
    with pytest.raises(InputError, match="same for all genes"): pathways.evaluate_pathways(x * 0, {"a": x}, SETS, audit="none", groups=False, obs=pd.DataFrame(index=x.index))


# embedding

def test_closeness_against_all_pairs_written_out():
    e = pd.DataFrame(rng(0, "test.embedding").normal(size=(40, 5)), GENES)
    u = e - e.mean()
    u = (u.T / np.sqrt((u ** 2).sum(axis=1))).T
    c = u.to_numpy() @ u.to_numpy().T
    pairs = lambda m: [c[GENES.index(a), GENES.index(b)] for a in m for b in m if a != b]
    np.testing.assert_allclose(embedding.closeness(e, SETS), [np.mean(pairs(m)) for m in SETS.values()], atol=1e-12)
    np.fill_diagonal(c, -2)
    near = np.argsort(-c, axis=1)[:, :4]
    want = [np.mean([np.isin([GENES[j] for j in near[GENES.index(a)]], m).mean() for a in m]) for m in SETS.values()]
    np.testing.assert_allclose(embedding.closeness(e, SETS, "neighbours", 4), want, atol=1e-12)


def test_turning_and_stretching_an_embedding_changes_nothing():
    e = pd.DataFrame(rng(1, "test.embedding").normal(size=(40, 5)), GENES)
    turn = np.linalg.qr(rng(2, "test.embedding").normal(size=(5, 5)))[0]
    np.testing.assert_allclose(embedding.closeness(pd.DataFrame(7 * e.to_numpy() @ turn + 3, GENES), SETS), embedding.closeness(e, SETS), atol=1e-12)


# claims and ablation

@pytest.mark.parametrize("low, high, want", [(0, .1, "cannot tell"), (1e-9, .1, "yes"), (-.1, .02, "cannot tell"), (-.1, .0199, "no"), (np.nan, .1, "cannot tell")])
def test_the_rule_at_its_edges(low, high, want):
    assert answer(low, high, .02) == want


def test_a_killed_ablation_goes_on_and_equals_one_that_was_not(tmp_path):
    variants = {"a": {}, "b": {"gain": .1, "variant": "b"}}
    want = ablation(RUN, variants, range(3))
    with pytest.raises(RunError, match="variant 'c', seed 0"):
        ablation(RUN, {**variants, "c": {"no_such_option": 1}}, range(3), folder=tmp_path)
    kept = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.json")}
    assert len(kept) == 6
    pd.testing.assert_frame_equal(ablation(RUN, variants, range(3), folder=tmp_path), want, check_exact=True)
    assert kept == {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.json")}
    one = json.loads(min(tmp_path.glob("*.json")).read_text())
    assert set(one) == {"key", "seed", "options", "rows", "values"} and len(one["rows"]) == 144


def test_processes_need_no_guarded_script(tmp_path):
    "A script without `if __name__ == '__main__'` is not run again by the processes it starts."
    (tmp_path / "plain.py").write_text(f"""print('once')
from perturbnb.interpret.ablation import ablation
t = ablation({RUN!r}, {{"a": {{}}, "b": {{"gain": .1}}}}, [0], jobs=2)
print(t.value.sum().hex())""")
    done = subprocess.run([sys.executable, tmp_path / "plain.py"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["once", float(ablation(simulated_run, {"a": {}, "b": {"gain": .1}}, [0]).value.sum()).hex()]


def test_comparison_by_hand_and_undefined_rows():
    rows = [f"r{i}" for i in range(8)]
    value = {("a", s): np.arange(8) + s for s in range(3)} | {("b", s): np.arange(8) + 2 * s - 1.0 for s in range(3)}
    t = pd.concat([pd.DataFrame(dict(variant=v, seed=s, row=rows, value=x)) for (v, s), x in value.items()])
    c = compare(t, "a", "b", "x", margin=.1)
    assert c.by_seed.tolist() == [1, 0, -1] and c.verdict.estimate.value == 0 and c.sd == 1
    np.testing.assert_allclose(c.verdict.estimate.high, 4.302652729911275 / np.sqrt(3))  # Student's t with two degrees of freedom
    gap = t.copy()
    gap.loc[(gap.variant == "a") & (gap.seed == 1) & (gap.row == "r0"), "value"] = np.nan
    with pytest.raises(InputError, match="null="): compare(gap, "a", "b", "x", margin=.1)
    assert compare(gap, "a", "b", "x", margin=.1, null=0.0).verdict.estimate.n == 8


# examples

def test_examples_follow_the_rule_and_draw():
    import matplotlib.pyplot as plt
    x = effects("examples", 7)
    obs = pd.DataFrame({"pert": [f"d{i}" for i in range(7)], "cell_line": "A$B_1", "dose_um": np.nan, "smiles": ["CCO", None, "C1CC", "CCN", "CCC", "CO", "CN"]}, x.index)
    table = ad.AnnData(x.to_numpy(), obs, pd.DataFrame(index=GENES))
    values = pd.Series([.1, .9, .9, .5, .2, .3, np.nan], x.index)
    shown = examples(table, x * .5, values, pd.DataFrame({"pert": ["t"], "smiles": ["CCCO"]}), n_genes=5)
    assert [e.row for e in shown] == ["r1", "r3", "r0"] and all(len(e.genes) == 5 and e.genes.se.isna().all() for e in shown)
    fig = examples_figure(shown, "pearson_delta@1")
    fig.canvas.draw()
    plt.close(fig)
    assert nearest_drug("q", "C1CC", obs)[2] == "no structure, so no nearest drug" and "<svg" in structure_svg(None)
    with pytest.raises(InputError, match="'zz'"): examples(table, x, pd.Series({"zz": 1.0}), obs)


def test_no_row_is_picked_twice():
    for n_rows in range(1, 8):
        for n in (1, 2, 3):
            t = pick(pd.Series(np.arange(n_rows, dtype=float), [f"r{i}" for i in range(n_rows)]), n=n)
            assert t.index.is_unique and len(t) == min(n_rows, len(t)) and t.iloc[0].kind == "best"
