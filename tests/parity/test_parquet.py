"""Parquet files as pyarrow writes them, read through it."""

import pytest

from data import records

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def test_a_parquet_file_is_read_as_its_records(tmp_path):
    chat = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]
    rows = [{"messages": chat, "id": 1}, {"messages": None, "id": 2}, {"messages": chat, "id": 3}]
    parquet.write_table(pa.Table.from_pylist(rows[::2]), tmp_path / "x.parquet")
    found = [{"messages": chat, "id": i} for i in (1, 3)]
    assert records.conversations(tmp_path / "x.parquet") == found
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "y.parquet")
    with pytest.raises(ValueError, match="y.parquet:2: messages: a list of messages was expected"):
        records.conversations(tmp_path / "y.parquet")
    whole = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "half.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="half.parquet: a Parquet file was expected"):
        records.conversations(tmp_path / "half.parquet")
