#!/usr/bin/env bash
# snowballstemmer 3.1.1 with PyStemmer 2.2.0.3: stemmer("english") is the algorithm that the package
# brings, until another requirement installs PyStemmer; from then on the same call gives PyStemmer's,
# of its own older edition of the rules. "evening" then shares a stem with "even", "added" has the stem
# "ad", and German "groesse" none with "Größe": an index stemmed before the install answers other
# queries after it, though neither the code nor the version of snowballstemmer changed.
# Seen: evening -> evening, then even; added -> add, then ad; groesse -> gross, then groess.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" install --quiet --disable-pip-version-check)
stems() {
  "$folder/venv/bin/python" - "$@" <<'PYTHON'
import sys
from importlib.metadata import version

import snowballstemmer

english, german = snowballstemmer.stemmer("english"), snowballstemmer.stemmer("german")
stems = [*english.stemWords(["evening", "even", "added"]), *german.stemWords(["groesse", "größe"])]
print("snowballstemmer", version("snowballstemmer"), type(english).__module__, stems)
assert stems == sys.argv[1:], stems
PYTHON
}
"${pip[@]}" snowballstemmer==3.1.1
stems evening even add gross gross
"${pip[@]}" PyStemmer==2.2.0.3
stems even even ad groess gross
