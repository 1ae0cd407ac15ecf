"What `perturbnb check` says of models and splits, sound and damaged."
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perturbnb.cli import check_path
from perturbnb.core import ChangedFile, InputError, MissingFile, PerturbError, rng
from perturbnb.data.split import split
from perturbnb.models.base import example_table
from perturbnb.models.means import LineMean


@pytest.fixture
def made(tmp_path):
    "A folder with a split and a model trained under it."
    table = example_table([f"drug {i}" for i in range(30)], rng(0, "tests.check").normal(size=(30, 4)), ["L1", "L2", "L3"] * 10)
    parts = split("unseen_cell_line", table, seed=5, test=0.34, val=0)
    parts.save(tmp_path / "split.parquet")
    LineMean().fit(table[parts.mask(table, "train")]).save(tmp_path / "model", split=parts)
    return tmp_path


def one_line(path, kind, *words):
    "The error of check_path, on one line with every word."
    with pytest.raises(kind) as e: check_path(path)
    assert "\n" not in str(e.value)
    for w in words: assert w in str(e.value), str(e.value)


def flip(path, i):
    sound = path.read_bytes()
    path.write_bytes(sound[:i] + bytes([sound[i] ^ 1]) + sound[i + 1:])
    return sound


def test_sound_files_are_named_with_their_size(made, cli):
    done = cli("check", made / "model")
    assert done.returncode == 0 and "sound model: line_mean (condition model), 4 genes" in done.stdout and "20 training rows" in done.stdout
    assert "split unseen_cell_line" in done.stdout
    done = cli("check", made / "split.parquet")
    head = json.loads(pq.read_schema(made / "split.parquet").metadata[b"perturbnb_split"])
    assert done.returncode == 0 and f"a split by unseen_cell_line, seed 5: train 20, test 10; hash {head['hash'][:12]}" in done.stdout
    assert check_path(made / "model/split.parquet").endswith("as recorded")
    assert len(done.stdout.splitlines()) == 1


def test_a_flipped_byte_of_the_weights(made, fails):
    weights = made / "model/weights.safetensors"
    for i in rng(1, "tests.check").integers(0, len(weights.read_bytes()), 10):
        sound = flip(weights, i)
        one_line(made / "model", ChangedFile, "weights.safetensors has SHA-256")
        weights.write_bytes(sound)
    assert "sound model" in check_path(made / "model")
    flip(weights, len(sound) - 1)
    fails("check", made / "model", words=["weights.safetensors has SHA-256", "save the model again"])


@pytest.mark.parametrize("name", ["config.json", "weights.safetensors", "genes.parquet", "split.parquet"])
def test_a_missing_file_of_a_model(made, name):
    (made / "model" / name).unlink()
    one_line(made / "model", MissingFile, f"no {made / 'model' / name}")


def test_edited_settings_of_a_model(made, fails):
    path = made / "model/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "n_train": 21}))
    fails("check", made / "model", words=["config.json was edited"])
    path.write_text("{")
    fails("check", made / "model", words=["is no JSON"])


def test_an_edited_split_table(made, fails):
    "With the record kept the hash tells; with the record lost it is still known for a split."
    path = made / "split.parquet"
    table = pq.read_table(path)
    frame = table.to_pandas()
    frame.loc[0, "part"] = {"train": "test", "test": "train"}[frame.part[0]]
    edited = pa.Table.from_pandas(frame, preserve_index=False)
    pq.write_table(edited.replace_schema_metadata(table.schema.metadata), path)
    one_line(path, ChangedFile, "is not the split that was saved")
    fails("check", path, words=["is not the split that was saved", "make the split again"])
    for lost in (lambda: pq.write_table(edited.replace_schema_metadata(None), path), lambda: frame.to_parquet(path),
                 lambda: frame.set_index("name").to_parquet(path)):
        lost()
        one_line(path, InputError, "cannot be read as a split")
    head = json.loads(table.schema.metadata[b"perturbnb_split"])
    for edit in ({"seed": 6}, {"name": "unseen_drug"}, {"notes": ["all is well"]}):
        pq.write_table(table.replace_schema_metadata({"perturbnb_split": json.dumps({**head, **edit})}), path)
        one_line(path, ChangedFile, "is not the split that was saved")


def test_any_flipped_byte_of_a_split_is_refused_or_changes_nothing(made):
    path = made / "split.parquet"
    said, refused = check_path(path), 0
    for i in rng(2, "tests.check").integers(0, len(path.read_bytes()), 150):
        sound = flip(path, i)
        try: assert check_path(path) == said
        except PerturbError as e:
            refused += 1
            assert "\n" not in str(e)
        path.write_bytes(sound)
    assert refused > 75


@pytest.mark.parametrize("content", [b"", b"PAR1", b"name,part\n"])
def test_a_parquet_file_that_is_none(tmp_path, content):
    (tmp_path / "x.parquet").write_bytes(content)
    one_line(tmp_path / "x.parquet", InputError, "cannot be read as Parquet")


def test_a_count_table_in_parquet_is_still_one(tmp_path):
    counts = pd.DataFrame({"drug": ["DMSO_TF", "a"], "cell_line_id": ["CVCL_0001"] * 2, "n_cells": np.array([7, 5])})
    counts.to_parquet(tmp_path / "counts.parquet")
    assert check_path(tmp_path / "counts.parquet").endswith("a table of 2 pairs; every line has control cells")


def test_help_imports_nothing_heavy():
    code = ("import sys; from typer.testing import CliRunner; from perturbnb.cli import app\n"
            "for c in ('list', 'check', 'simulate'): assert CliRunner().invoke(app, [c, '--help']).exit_code == 0\n"
            "assert 'Example: perturbnb check' in CliRunner().invoke(app, ['check', '--help']).output\n"
            "print(sorted({'torch', 'sklearn', 'rdkit', 'numpy', 'pandas', 'pyarrow', 'anndata'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_metrics_lists_the_whole_registry(cli, fails):
    "Every metric that any module of the package enters is listed once, with its fields."
    import importlib
    import pkgutil

    import perturbnb.metrics
    from perturbnb.metrics.registry import metric_table
    done = cli("metrics")
    assert done.returncode == 0, done.stderr
    for m in pkgutil.iter_modules(perturbnb.metrics.__path__): importlib.import_module(f"perturbnb.metrics.{m.name}")
    table = metric_table()
    table = table[[f.__module__.startswith("perturbnb.") for f in (perturbnb.metrics.registry.METRICS[i].fn for i in table.index)]]
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if "@" in line}
    assert sorted(lines) == sorted(table.index) and done.stdout.count("@") == len(lines)
    for i, m in table.iterrows(): assert m.better in lines[i] and lines[i].endswith(m.undefined) and f" {m.unit} " in lines[i]
    assert "0 to 1" in lines["centroid_accuracy@1"] and " 0.5 " in lines["centroid_accuracy@1"] and " data " in lines["mse@1"]
    assert [line.split()[0] for line in cli("metrics", "distribution").stdout.splitlines() if "@" in line] == list(metric_table("distribution").index)
    fails("metrics", "efect", words=["did you mean 'effect'"])


def test_splits_lists_every_rule_with_its_promise(cli, fails):
    from perturbnb.data.audit import EXTRA
    from perturbnb.data.split import SPLITS
    done = cli("splits")
    assert done.returncode == 0, done.stderr
    blocks = {b.split(":")[0]: b for b in done.stdout.strip().split("\n\n")}
    assert list(blocks) == list(SPLITS)
    for name, b in blocks.items():
        assert SPLITS[name].__doc__ in b and "proved by the audit: " in b and "options: " in b and EXTRA.get(name, "") in b and "{" not in b
    assert "proved by the audit: nothing" in blocks["random_rows"]
    assert "no perturbation, no structure, no well (where recorded) in two parts" in blocks["grouped_well"]
    assert cli("splits", "donor").stdout.strip() == blocks["donor"]
    fails("splits", "unseendrug", words=["did you mean 'unseen_drug'"])


@pytest.mark.parametrize("command, example", [("metrics", "perturbnb metrics effect"), ("splits", "perturbnb splits unseen_drug")])
def test_help_has_an_example(cli, command, example):
    assert f"Example: {example}" in cli(command, "--help").stdout and f"\n  {command} " in cli("--help").stdout
