"""Tables of facts that the readers need: item maps, code lists, published splits."""

from __future__ import annotations

from importlib.resources import files

import polars as pl


def load(name: str, **dtypes: pl.DataType | type[pl.DataType]) -> pl.DataFrame:
    """The table `name`.csv of this package; columns are text unless `dtypes` says otherwise."""
    text = files(__name__).joinpath(f"{name}.csv").read_bytes()
    frame = pl.read_csv(text, infer_schema=False)
    return frame.with_columns(pl.col(column).cast(dtype) for column, dtype in dtypes.items())
