"""From a config to what a run works with: the pairs on disk, the policy and its prompts."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from she_jax.cot import CotSchema
from she_jax.data.dataset import ExampleBuilder, Prepared, open_prepared, open_split, prepare
from she_jax.data.readers.esci import Esci, EsciConfig
from she_jax.data.readers.jsonl import Jsonl, JsonlConfig
from she_jax.data.readers.wands import Wands, WandsConfig
from she_jax.data.shopworld.builder import CHECKS, ShopWorld, ShopWorldConfig, TeacherErrors, World
from she_jax.generate.language_model import Policy
from she_jax.generate.prompts import EOS, PAD, PromptFormat, train_tokenizer, training_texts
from she_jax.models.decoder import ModelConfig, build_model, init_params
from she_jax.models.sharding import make_mesh, shardings
from she_jax.models.weights import load_model
from she_jax.training.checkpoint import Checkpoints
from she_jax.training.files import write_text
from she_jax.training.logging import Progress, say
from she_jax.training.workdir import Config

TOKENIZER_PAIRS = 8_000  # enough to see every word of ShopWorld
ASKED = "she_jax.json"  # beside an exported model: what it was trained to be asked
SETS = ("shopworld", "esci", "wands", "jsonl", "made")


def make_data(config: Config, workdir: Path) -> Prepared:
    """Makes the data set of the config, or finds it made, and says what is in it.

    Raises:
      ValueError: for an unknown set, or one with too many bad rows.
    """
    if config.data.name == "made":
        made = open_prepared(config.data.path)
        counts = ", ".join(f"{n:,} {split}" for split, n in made.splits.items())
        say(f"pairs: {counts}, in {made.path}")
        return made
    builder = make_builder(config, workdir)
    sizes = config.shopworld.pairs if config.data.name == "shopworld" else ()
    with Progress(f"data: {config.data.name}", total=sum(sizes) or None) as progress:
        made = prepare(builder, on_progress=progress.update)
        progress.update(sum(made.splits.values()))
        counts = ", ".join(f"{n:,} {split}" for split, n in made.splits.items())
        progress.print(f"pairs: {counts}{' (made before)' if made.reused else ''}, in {made.path}")
        if made.bad_rows:
            reasons = ", ".join(f"{n} {reason}" for reason, n in made.bad_rows.items())
            progress.print(f"rows set aside: {reasons}; see {made.path / 'bad_rows.jsonl'}")
        if made.cut_fields:
            progress.print(f"fields cut for their length: {made.cut_fields}")
    return made


def make_builder(config: Config, workdir: Path) -> ExampleBuilder:
    """The data set of the config, not made yet.

    Raises:
      ValueError: for an unknown set, or options that do not fit.
      FileNotFoundError: if its files are not there.
    """
    folder = Path(config.data.dir or workdir / "data")
    name, path, share = config.data.name, config.data.path, config.data.max_bad_share
    if name not in SETS:
        raise ValueError(f"data.name={name!r}: expected one of {SETS}")
    if name != "shopworld" and not path:
        raise ValueError(f"data.name={name!r} needs --config.data.path")
    if name == "esci":
        return Esci(data_dir=folder, config=EsciConfig(path=path, max_bad_share=share))
    if name == "wands":
        return Wands(data_dir=folder, config=WandsConfig(path=path, max_bad_share=share))
    if name == "jsonl":
        own = {"evaluation": config.kind == "evaluate"} | config.chain.to_dict()
        settings = JsonlConfig(path=path, max_bad_share=share, **own)
        return Jsonl(data_dir=folder, config=settings)
    if config.chain.checks not in CHECKS:
        choices = " or ".join(map(str, CHECKS))
        raise ValueError(f"chain.checks={config.chain.checks}: ShopWorld takes {choices}")
    options = config.shopworld.to_dict()
    world = World(
        **options
        | {
            "pairs": tuple(options["pairs"]),
            "class_balance": tuple(options["class_balance"]),
            "errors": TeacherErrors(**options["errors"]),
            "checks": config.chain.checks,
            "label_first": config.chain.label_first,
        }
    )
    return ShopWorld(data_dir=folder, config=ShopWorldConfig(world=world))


def policy_mesh(config: Config) -> Mesh:
    """The mesh of the config, over all devices but those that are set apart for an examiner.

    Raises:
      ValueError: if that leaves none, or the sizes do not fit.
    """
    apart, devices = config.get("reward", {}).get("devices", 0), jax.devices()
    if not 0 <= apart < len(devices):
        raise ValueError(
            f"reward.devices={apart}: there are {len(devices)}, and the policy needs one at least"
        )
    return make_mesh(**config.mesh.to_dict(), devices=devices[: len(devices) - apart])


def examiner_mesh(config: Config) -> Mesh:
    """The devices that are set apart for an examiner, or else the policy's mesh."""
    mesh, apart = policy_mesh(config), config.reward.devices
    return make_mesh(data=-1, devices=jax.devices()[-apart:]) if apart else mesh


def make_policy(
    config: Config, workdir: Path, made: Prepared | None = None, mesh: Mesh | None = None
) -> Policy:
    """The policy of the config before any training, its parameters laid out on the mesh.

    Args:
      config: of the run.
      workdir: its folder; a tokenizer that is trained is kept there, and read again later.
      made: the pairs to train a tokenizer on, where there is none yet.
      mesh: another one than the config's.
    """
    sizes = config.model.to_dict()
    lengths = {name: sizes.pop(name) for name in ("prompt_length", "completion_length")}
    name = sizes.pop("name")
    schema = CotSchema.build(**config.chain.to_dict())
    if name == "scratch":
        tokenizer = _tokenizer(config, workdir, made)
        own = ModelConfig(**sizes | {"vocab_size": tokenizer.get_vocab_size()})
        params = init_params(own, jax.random.PRNGKey(config.seed))
        vocab = tokenizer.get_vocab()
        eos_ids, pad_id = (vocab[EOS],), vocab[PAD]
        chat: dict[str, Any] = {}
    else:
        say(f"model: loading {name}")
        loaded = load_model(name)  # in float32: smaller types lose small updates
        own = replace(loaded.config, dtype=sizes["dtype"], remat=sizes["remat"])
        params, tokenizer = loaded.params, loaded.tokenizer
        eos_ids, pad_id = loaded.eos_ids, loaded.pad_id
        chat = {"chat_template": loaded.chat_template, "specials": loaded.specials}
    prompts = PromptFormat(
        tokenizer=tokenizer, schema=schema, eos_ids=eos_ids, pad_id=pad_id, **lengths, **chat
    )
    mesh = policy_mesh(config) if mesh is None else mesh
    params = jax.device_put(params, shardings(params, mesh))
    return Policy(model=build_model(own), params=params, format=prompts, mesh=mesh)


def _tokenizer(config: Config, workdir: Path, made: Prepared | None) -> Tokenizer:
    path = workdir / "tokenizer.json"
    if path.is_file() and (made is None or (workdir / "checkpoints").is_dir()):
        return Tokenizer.from_file(str(path))
    if made is None:
        raise FileNotFoundError(f"{path} is missing: the run's folder is not whole")
    if config.start:
        tokenizer = Tokenizer.from_file(
            str(Path(config.start).absolute().parent.parent / path.name)
        )
    else:
        say(f"tokenizer: training on up to {TOKENIZER_PAIRS:,} pairs")
        source = open_split(made.path, "train")
        pairs = (source[i] for i in range(min(TOKENIZER_PAIRS, len(source))))
        tokenizer = train_tokenizer(training_texts(pairs), config.model.vocab_size)
    write_text(path, tokenizer.to_str(pretty=True))
    return tokenizer


def load_policy(config: Config, phases: Sequence[str] = ("srpo", "sft")) -> tuple[Policy, str]:
    """The policy that ``config.checkpoint`` names, and what exactly that was.

    The checkpoint is a run's folder, or a model in files.

    A run's folder brings its own model, chain and lengths, and the best checkpoint of the first of
    the phases that it has.

    Raises:
      FileNotFoundError: if there is no such checkpoint.
    """
    folder = Path(config.checkpoint)
    if not config.checkpoint:
        raise ValueError("evaluating needs --config.checkpoint: a run's folder or a model's")
    path = folder / "config.json"
    run: Any = ConfigDict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    if "kind" not in run:
        own = config.copy_and_resolve_references()
        own.model.name = config.checkpoint
        if (folder / ASKED).is_file():  # exported by a run: asked as it was trained
            told = json.loads((folder / ASKED).read_text(encoding="utf-8"))
            own.model.update(told["model"])
            own.chain.update(told["chain"])
        return make_policy(own, folder), config.checkpoint
    if run.kind == "curriculum":
        raise ValueError(
            f"checkpoint={folder} has stages: give one, {folder / max(run.stages)} say"
        )
    policy = make_policy(run, folder, mesh=policy_mesh(config))
    for phase in phases:
        if (folder / "checkpoints" / phase).is_dir():
            found = Checkpoints(folder / "checkpoints" / phase).restore_params(policy.params)
            if found is not None:
                source = f"{folder}, {phase} step {found[0]}"
                return Policy(**vars(policy) | {"params": found[1]}), source
    raise FileNotFoundError(f"{folder / 'checkpoints'} holds no whole checkpoint: train first")


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW under a cosine schedule with linear warm-up, the gradient clipped by its norm."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=min(config.warmup, config.steps - 1),
        decay_steps=config.steps,
        end_value=config.learning_rate * config.final_share,
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay),
    )
