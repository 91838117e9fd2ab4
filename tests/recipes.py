"""Small recipes, data, states and readers that several tests share."""

import base64
import dataclasses
import functools
import json
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from she_jax.data.dataset import ExampleBuilder, ExampleConfig, prepare
from she_jax.data.intake import Row
from she_jax.recipes import base, evaluate
from she_jax.runs.config import parse
from she_jax.runs.load import load_policy
from she_jax.runs.scalars import meaning
from she_jax.training.checkpoint import Checkpoints
from she_jax.training.optimizer import make_optimizer
from she_jax.training.setup import make_language_model, read_tokenizer, split_mesh
from she_jax.training.sft import new_state
from she_jax.types import Example, TrainState

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
SHARED_DATA = ROOT.parent / "shared" / "data"  # real labels, where there are any

SMALL = {
    "shopworld.pairs": (200, 16, 32, 16),
    "model.layers": 1,
    "model.dim": 32,
    "model.heads": 2,
    "model.head_dim": 16,
    "model.ffn": 32,
    "model.vocab_size": 700,
    "model.prompt_length": 48,
    "model.completion_length": 24,
    "mesh.data": 1,
    "mesh.fsdp": -1,
    "sft.steps": 6,
    "sft.batch_size": 16,
    "sft.micro_batches": 1,
    "sft.checkpoint_every": 2,
    "rl.steps": 4,
    "rl.prompts": 8,
    "rl.group_size": 2,
    "rl.loss.micro_batches": 1,
    "rl.eval_every": 2,
    "rl.checkpoint_every": 1,
    "rl.sample_every": 2,
    "eval.batch_size": 16,
    "eval.pass_k": 2,
    "eval.pass_pairs": 8,
}


FOUR_STEPS = {  # of a reward model's training
    "mesh.data": 1,
    "mesh.fsdp": -1,
    "sft.steps": 4,
    "sft.batch_size": 16,
    "sft.micro_batches": 1,
    "sft.checkpoint_every": 2,
}


def changed(recipe, values, **more):
    """A recipe with other values, ``more`` of them with ``__`` for the dots."""
    more = {key.replace("__", "."): value for key, value in more.items()}
    recipe.update_from_flattened_dict(values | more)
    return recipe.lock()


def config(**changes):
    """A recipe that takes seconds."""
    return changed(base.get_config(), SMALL, **changes)


def lines(workdir, *, explained=True):
    """metrics.jsonl without its timings; whatever a run of any kind logs must have a meaning."""
    with (workdir / "metrics.jsonl").open() as file:
        rows = [json.loads(line) for line in file]
    names = {name for row in rows for name in row} - {"phase", "step"}
    assert all(map(meaning, names)) or not explained
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


HOSTILE = (
    "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&lt;\u202edesrever\u2066\x00\ud800"
)


class Page(HTMLParser):
    """An HTML page's tags with their attributes, and its text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text = [], ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    @property
    def plots(self):
        """The SVG of each plot by its title."""
        images = [attrs for tag, attrs in self.tags if tag == "img"]
        svgs = [base64.b64decode(image["src"].partition("base64,")[2]) for image in images]
        return {image["alt"]: svg for image, svg in zip(images, svgs, strict=True)}


def untrained_policy(workdir, **changes):
    """The language model of a small run's folder, and parameters that nobody trained."""
    parsed = parse(config(**changes), workdir)
    mesh, _ = split_mesh(parsed.mesh, 0)
    return make_language_model(
        parsed.model,
        parsed.schema,
        mesh,
        seed=parsed.seed,
        tokenizer=read_tokenizer(workdir),
    )


def load_checkpoint(checkpoint, **changes):
    """The policy of a checkpoint as evaluation loads it, and where it is from."""
    recipe = changed(evaluate.get_config(), {"checkpoint": str(checkpoint)}, **changes)
    parsed = parse(recipe, Path())
    mesh, _ = split_mesh(parsed.mesh, 0)
    return load_policy(parsed, parsed.checkpoint, mesh)


def last_state(workdir):
    """The last checkpoint: its step, every array, and the host's part."""
    online = parse(config(), workdir).online
    lm, params = untrained_policy(workdir)
    template = new_state(params, lm.mesh, make_optimizer(online.optimizer, online.steps), 0)
    restored = Checkpoints(workdir / "checkpoints" / "policy").restore(template)
    assert restored is not None
    step, state, host = restored
    return step, jax.device_get([state.params, state.opt_state, state.key]), host


def assert_same_run(expected, actual, files=("summary.json", "tokenizer.json")):
    """Asserts that two runs have equal metrics, last checkpoints and files."""
    assert lines(actual) == lines(expected)
    (step, state, host), (other_step, other_state, other_host) = map(last_state, (expected, actual))
    assert (other_step, other_host) == (step, host)
    jax.tree.map(np.testing.assert_array_equal, other_state, state)
    for name in files:
        assert (actual / name).read_bytes() == (expected / name).read_bytes(), name


def random_groups(groups=3, size=4, steps=5, seed=0):
    """Rewards on a coarse grid, so that ties and steps without spread occur."""
    rng = np.random.default_rng(seed)
    rewards = rng.integers(0, 3, (groups * size, steps)).astype(np.float32) / 2
    mask = rng.random((groups * size, steps)) < 0.8
    outcome = rng.integers(0, 2, groups * size).astype(np.float32)
    return rewards, mask, outcome


OPTIMIZER = optax.MultiSteps(
    optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-2, 0.0, 50))),
    every_k_schedule=2,
)


@functools.cache
def make_state(seed: int = 0, size: int = 40) -> TrainState:
    key = jax.random.PRNGKey(seed)
    params = {
        "embed": jax.random.normal(key, (size, 8)),
        "layers": {"half": jax.random.normal(key, (3, 8), jnp.bfloat16)},
        "odd": jnp.array([jnp.nan, jnp.inf, -0.0, 1e-45], jnp.float32),
    }
    state = TrainState(
        step=jnp.zeros((), jnp.int32), params=params, opt_state=OPTIMIZER.init(params), key=key
    )
    return train_some(state, 3)


def train_some(state: TrainState, steps: int) -> TrainState:
    for _ in range(steps):
        state = _update(state)
    return state


@jax.jit
def _update(state: TrainState) -> TrainState:
    key = jax.random.fold_in(state.key, state.step)
    grads = jax.tree.map(lambda p: jax.random.normal(key, p.shape, p.dtype), state.params)
    updates, opt_state = OPTIMIZER.update(grads, state.opt_state, state.params)
    return TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        key=state.key,
    )


EXAMPLE = Example(
    uid="a",
    query="ふちなしメガネ",
    product={"title": "Gafas sin montura", "brand": "Ñandú", "bullets": "👩‍👩‍👧 light; 10 g"},
    label=3,
    steps={"category": "match", "attributes": "unstated"},
    kind="plain",
    annotations=("category",),
    rationale="query: a\nproduct: b\ncategory: match\nattributes: met\nlabel: 3",
)


@dataclasses.dataclass(kw_only=True, eq=False)
class GivenConfig(ExampleConfig):
    rows: tuple = ()
    path: str = ""


class Given(ExampleBuilder):
    """Rows that a test gives."""

    def rows(self):
        for row in self.builder_config.rows:
            if isinstance(row, Exception):
                raise row
            yield row


def good_rows(n: int, **changes) -> tuple[Row, ...]:
    """n good training rows with different uids."""
    return tuple(
        Row(
            split="train",
            example=dataclasses.replace(EXAMPLE, uid=str(i), **changes),
            file="f",
            line=i + 1,
        )
        for i in range(n)
    )


def make_dataset(tmp_path, given: Iterable, **options):
    return prepare(Given(data_dir=tmp_path, config=GivenConfig(rows=tuple(given), **options)))


def fresh_state(params, optimizer):
    return TrainState(
        step=jnp.zeros((), dtype=jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        key=jax.random.PRNGKey(7),
    )


def assert_trees_close(got, want, rtol=1e-4, atol=1e-6):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def byte_level(merges=(), added=(), pre_tokenizer=None):
    """A tokenizer of the 256 bytes, some merges and some added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(list(added))
    return tokenizer
