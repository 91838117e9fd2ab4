"""Where a model's files are: on this machine, or first on the Hugging Face hub.

Only safetensors, JSON and templates are fetched, no pickles and no code.
"""

import re
from pathlib import Path

from she_jax.models.gguf import smollm2_file
from she_jax.types import UserError

FILES = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "tokenizer.model"]
ELSEWHERE = ["*/*", "consolidated*"]  # the same weights in other formats
TIMEOUT = 10.0  # seconds without an answer


def locate_model(name: str) -> Path:
    """The path of a model's files, which are downloaded first if ``name`` is one of the hub.

    Args:
      name: a directory, a ``.gguf`` file, ``smollm2``, or ``ORGANIZATION/MODEL`` as the hub names
        it; what has a folder ORGANIZATION here is a path.

    Raises:
      FileNotFoundError: if there is no such path.
      UserError: if the hub does not give the model, and it was not downloaded before.
    """
    path = Path(name)
    if name == "smollm2":
        return smollm2_file()
    if path.exists():
        return path
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not path.parent.exists():
        return _download(name)
    raise FileNotFoundError(
        f"{path}: expected a directory with config.json, a .gguf file, 'smollm2', or the name of a "
        "model on the Hugging Face hub, ORGANIZATION/MODEL"
    )


def _download(name: str) -> Path:
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError as error:
        raise UserError(
            f"{name}: there is no such path, and fetching it from the Hugging Face hub needs pip "
            "install 'she_jax[hf]'"
        ) from error
    try:
        # Asked first, with a limit: a download has none, and can wait for minutes for a network.
        commit = HfApi().model_info(name, timeout=TIMEOUT).sha
    except Exception as error:  # whatever its HTTP library raises
        try:
            return Path(snapshot_download(name, local_files_only=True, allow_patterns=FILES))
        except Exception:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"{name}: there is no such path, and the Hugging Face hub did not give a model of "
                f"that name ({reason}); without a network give the path of a directory"
            ) from error
    return Path(
        snapshot_download(name, revision=commit, allow_patterns=FILES, ignore_patterns=ELSEWHERE)
    )
