#!/usr/bin/env bash
# tensorflow-datasets 4.9.10: making a builder of a data set of one's own that is not prepared yet, even
# with a data_dir of one's own, leaves an empty folder "...tfds" in the system's temporary one for good:
# it is for what the public bucket says of the data set, though this version never asks the bucket.
# A test suite or a service that makes builders fills /tmp with them.
# Seen: 20 builders, 20 folders.
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
paths = [os.path.join(tempfile.gettempdir(), name) for name in left]
print(tfds.__version__, len(left), "folders left, all empty:", not any(map(os.listdir, paths)))
assert len(left) == 20 and all(name.endswith("tfds") for name in left)
PYTHON
