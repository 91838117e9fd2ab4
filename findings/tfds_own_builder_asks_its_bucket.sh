#!/usr/bin/env bash
# tensorflow-datasets 4.9.10: whoever makes a builder of a data set of their own that is not prepared
# yet, with a local data_dir and try_gcs nowhere, still has its name looked up in TFDS's public bucket
# (gs://tfds-data/dataset_info/NAME/CONFIG/VERSION), and each such call leaves an empty folder in the
# system's temporary one for good, network or not. A name or config derived from private data goes
# out, and a service or test suite that makes builders fills /tmp: 20 builders, 20 folders.
# Seen: 20 folders left, asked for dataset_info/my_pairs/1.0.0
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  tensorflow-datasets==4.9.10 importlib_resources numpy
mkdir "$folder/temporary"
TMPDIR="$folder/temporary" "$folder/venv/bin/python" - "$folder" <<'PYTHON'
import logging
import os
import sys
import tempfile

logging.disable(logging.WARNING)
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils import gcs_utils

asked = []
gcs_utils.exists = lambda path: bool(asked.append(str(path)))  # no network is needed to see it


class MyPairs(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"n": np.int64}))

    def _split_generators(self, manager):
        return {}

    def _generate_examples(self):
        yield from ()


before = set(os.listdir(tempfile.gettempdir()))
for _ in range(20):
    MyPairs(data_dir=f"{sys.argv[1]}/data")
left = set(os.listdir(tempfile.gettempdir())) - before
print(tfds.__version__, len(left), "folders left, asked for", asked[0])
assert len(left) == 20 and all(name.endswith("tfds") for name in left)
assert len(asked) == 20 and asked[0].endswith("tfds-data/dataset_info/my_pairs/1.0.0"), asked[0]
PYTHON
