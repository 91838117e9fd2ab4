#!/usr/bin/env bash
# pyarrow 26.0.1: a float64 column cast to text writes whole numbers of eleven digits and more in
# scientific notation, and those of ten as they are. A column of article numbers (GTIN, EAN: 12 or 13
# digits) with one gap is float64 once pandas has had it; cast to text for a join, "4006381333931"
# becomes "4.006381333931e+12" and finds no product, while shorter numbers of the same column still do.
# In float32 columns and for small numbers nothing is to be seen.
# Seen: 1234567890 -> '1234567890', 12345678901 -> '1.2345678901e+10'
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pyarrow==26.0.1
"$folder/venv/bin/python" - <<'PYTHON'
import pyarrow as pa

numbers = [20130215.0, 1234567890.0, 12345678901.0, 4006381333931.0]
texts = pa.array(numbers).cast(pa.string()).to_pylist()
print(pa.__version__, texts)
assert texts == ["20130215", "1234567890", "1.2345678901e+10", "4.006381333931e+12"]
assert [str(int(number)) for number in numbers] == pa.array(numbers).cast(pa.int64()).cast(pa.string()).to_pylist()
PYTHON
