"""What all tests share: eight virtual devices, checked shapes, no silent broadcasting."""

import atexit
import importlib.metadata
import os
import shutil
import tempfile

flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    flags += " --xla_force_host_platform_device_count=8"
# Without its fusion emitters XLA compiles in half the time or less. It does not start where it does
# not know a flag, and later versions no longer know this one.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    flags = f"--xla_cpu_use_fusion_emitters=false {flags}"
os.environ["XLA_FLAGS"] = flags
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the tests' time is XLA's compiler, and many compile the same: in pytest's other processes,
# which inherit this, and in those that tests start.
if "PYTEST_XDIST_WORKER" not in os.environ:
    cache = tempfile.mkdtemp(prefix="she_jax_tests_")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**33)  # with a bound JAX locks each access ...
# ... and reads the times of all entries to add one: few are kept, those worth it.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Programs as small as these are compiled for longer than they run: a quarter of the whole is saved.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

from jaxtyping import install_import_hook  # noqa: E402

# Shapes and dtypes in the signatures of these modules are enforced as long as the tests run. Not
# those of she_jax.types: JAX rebuilds records with shardings, shapes or a scan's leading axis in
# the fields.
CHECKED = (
    *("rl", "models", "generate.sampler", "rewards.verifier", "rewards.orm.loss"),
    "annotation.quotas",
)
install_import_hook([f"she_jax.{name}" for name in CHECKED], "beartype.beartype")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from she_jax.training import packing  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("tests", deadline=None, max_examples=100, derandomize=True)
hypothesis.settings.load_profile("tests")


# Files that take minutes go first, so that no core is left alone with one of them at the end.
LONGEST = (
    "process_reward",
    "update",
    "curriculum",
    "run",
    "offline",
    "colabs",
    "decoder",
    "sampler",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def one_width():
    """Rows of one length: the small runs would have three, and each is compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WIDTHS", (2.0,))
        yield


@pytest.fixture(scope="session")
def policy(tmp_path_factory):
    """The folder of a small policy's run, for whoever trains a reward model for it."""
    from recipes import config

    from she_jax.runs.run import run

    workdir = tmp_path_factory.mktemp("policy") / "run"
    run(config(rl__steps=1, rl__eval_every=1, eval__pass_k=0), workdir)
    return workdir
