"""From configs to what a run works with: the pairs on disk, the tokenizer, the language model."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from tokenizers import Tokenizer

from she_jax.cot import CotSchema
from she_jax.data.dataset import PreparedDataset, open_prepared, open_split, prepare
from she_jax.data.sources import DataConfig, make_builder
from she_jax.generate.language_model import (
    UNLIMITED,
    LanguageModel,
    LanguageModelConfig,
    check_context,
)
from she_jax.generate.prompts import EOS, PAD, PromptFormat, tokenizer_corpus, train_tokenizer
from she_jax.models.decoder import ModelConfig, build_model, init_params
from she_jax.models.sharding import MeshConfig, make_mesh, shardings
from she_jax.models.vocabulary import Vocabulary
from she_jax.models.weights import load_model
from she_jax.training.files import write_text
from she_jax.training.logging import Progress, log
from she_jax.types import UserError

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_PAIRS = 8_000  # enough to see every word of ShopWorld


def prepare_dataset(config: DataConfig, *, known: bool = False) -> PreparedDataset:
    """Prepares the data set of a config, or finds it prepared, and logs what is in it.

    Args:
      config: which data set.
      known: whether the user knows what is in it, if it is prepared.

    Raises:
      UserError: for a set with too many bad rows.
    """
    if config.name == "prepared":
        dataset = open_prepared(config.path)
        counts = ", ".join(f"{n:,} {split}" for split, n in dataset.splits.items())
        log(f"pairs: {counts}, in {dataset.path}")
        return dataset
    sizes = config.world.pairs if config.world else ()
    with Progress(f"data: {config.name}", total=sum(sizes) or None) as progress:
        dataset = prepare(make_builder(config), on_progress=progress.update)
        progress.update(sum(dataset.splits.values()))
        if known and dataset.reused:
            return dataset
        counts = ", ".join(f"{n:,} {split}" for split, n in dataset.splits.items())
        reused = " (prepared before)" if dataset.reused else ""
        progress.print(f"pairs: {counts}{reused}, in {dataset.path}")
        if dataset.bad_rows:
            reasons = ", ".join(f"{n} {reason}" for reason, n in dataset.bad_rows.items())
            progress.print(f"rows set aside: {reasons}; see {dataset.path / 'bad_rows.jsonl'}")
        if dataset.cut_fields:
            progress.print(f"fields cut for their length: {dataset.cut_fields}")
        for note in dataset.notes:
            progress.print(note)
    return dataset


def split_mesh(config: MeshConfig, reserved: int) -> tuple[Mesh, Mesh]:
    """The policy's mesh, and that of a process reward model.

    Args:
      config: sizes of the policy's mesh.
      reserved: devices set apart for the reward model; with 0 it shares the policy's mesh.

    Raises:
      UserError: if that leaves the policy none, or the sizes do not fit.
    """
    devices = jax.devices()
    if not 0 <= reserved < len(devices):
        raise UserError(
            f"reward.devices={reserved}: there are {len(devices)}, and the policy needs one at "
            "least"
        )
    mesh = make_mesh(**asdict(config), devices=devices[: len(devices) - reserved])
    return mesh, make_mesh(data=-1, devices=devices[-reserved:]) if reserved else mesh


def make_language_model(
    config: LanguageModelConfig,
    schema: CotSchema,
    mesh: Mesh,
    *,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
) -> tuple[LanguageModel, Any]:
    """The model of a config and its initial parameters, laid out on the mesh.

    Args:
      config: which model; with a length of 0 it has none yet (see ``with_lengths``).
      schema: the steps of its chains.
      mesh: the devices.
      seed: of new parameters; read for ``scratch`` only, as is the next.
      tokenizer: of the policy.
    """
    if config.name == "scratch":
        assert tokenizer is not None
        names = ModelConfig.__dataclass_fields__
        shape: dict[str, Any] = {k: v for k, v in asdict(config).items() if k in names}
        shape["vocab_size"] = tokenizer.get_vocab_size()
        length = config.prompt_length + config.completion_length
        shape["max_positions"] = max(ModelConfig.max_positions, length)
        model = ModelConfig(**shape)
        params = init_params(model, jax.random.PRNGKey(seed))
        vocabulary, stored_dtype = _trained_vocabulary(tokenizer), "float32"
    else:
        log(f"model: loading {config.name}")
        loaded = load_model(config.name)  # in float32: smaller types lose small updates
        model = replace(loaded.config, dtype=config.dtype, remat=config.remat)
        params, vocabulary, stored_dtype = loaded.params, loaded.vocabulary, loaded.stored_dtype
        for note in loaded.notes:
            log(f"model: {note}")
    if config.prompt_length and config.completion_length:
        check_context(model, config.prompt_length + config.completion_length)
    prompts = _prompt_format(config, schema, vocabulary)
    params = jax.device_put(params, shardings(params, mesh))
    lm = LanguageModel(
        model=build_model(model), prompts=prompts, mesh=mesh, stored_dtype=stored_dtype
    )
    return lm, params


def make_prompts(
    config: LanguageModelConfig, schema: CotSchema, tokenizer: Tokenizer | None = None
) -> tuple[PromptFormat, int]:
    """The prompt format of a config's model, and its context, without the model on a device."""
    if config.name == "scratch":
        assert tokenizer is not None
        return _prompt_format(
            config, schema, _trained_vocabulary(tokenizer)
        ), ModelConfig.max_positions
    loaded = load_model(config.name)
    return _prompt_format(config, schema, loaded.vocabulary), loaded.config.max_positions


def _trained_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    ids = tokenizer.get_vocab()
    return Vocabulary(tokenizer=tokenizer, eos_ids=(ids[EOS],), pad_id=ids[PAD])


def _prompt_format(
    config: LanguageModelConfig, schema: CotSchema, vocabulary: Vocabulary
) -> PromptFormat:
    try:
        prompts = PromptFormat(
            **vars(vocabulary),
            schema=schema,
            prompt_length=config.prompt_length or UNLIMITED,
            completion_length=config.completion_length or UNLIMITED,
            thinking=config.thinking,
        )
    except UserError as error:
        raise UserError(f"model.name={config.name}: {error}") from error
    if prompts.frame.closed_thought:
        log(
            f"model: the chat template of {config.name} opens a thought, which is closed at once "
            "(model.thinking=false)"
        )
    return prompts


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that a run keeps in its folder.

    Raises:
      FileNotFoundError: if it is missing.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the run's folder is not whole")
    return Tokenizer.from_file(str(path))


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Keeps a tokenizer in a run's folder."""
    write_text(folder / TOKENIZER_FILE, tokenizer.to_str(pretty=True))


def run_tokenizer(
    workdir: Path, dataset: PreparedDataset, vocab_size: int, init_from: str
) -> Tokenizer:
    """The tokenizer of a run with a model from scratch, kept in its folder.

    That of the run it starts from, or one trained on its pairs.

    Args:
      workdir: the run's folder.
      dataset: the pairs.
      vocab_size: at most.
      init_from: the checkpoints that the run starts from, or "".
    """
    if (workdir / TOKENIZER_FILE).is_file() and (workdir / "checkpoints").is_dir():
        return read_tokenizer(workdir)
    if init_from:
        tokenizer = read_tokenizer(Path(init_from).absolute().parent.parent)
    else:
        log(f"tokenizer: training on up to {TOKENIZER_PAIRS:,} pairs")
        source = open_split(dataset.path, "train")
        pairs = (source[i] for i in range(min(TOKENIZER_PAIRS, len(source))))
        tokenizer = train_tokenizer(tokenizer_corpus(pairs), vocab_size)
    write_tokenizer(workdir, tokenizer)
    return tokenizer
