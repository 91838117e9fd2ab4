"""Models by their name on the hub: what is asked, what is fetched, and what is said without it."""

import huggingface_hub
import pytest
from recipes import GOLDEN

from she_jax.models.hub import locate_model
from she_jax.models.weights import load_model
from she_jax.types import UserError


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that knows one model; ``online`` and ``cached`` can be changed."""
    monkeypatch.chdir(tmp_path)
    state = {"online": True, "cached": False}

    class Api:
        def model_info(self, name, timeout):
            if not state["online"]:
                raise ConnectionError("no route to the hub\nat all")
            return type("Info", (), {"sha": "0" * 40})

    def snapshot_download(name, revision=None, local_files_only=False, allow_patterns=None, **_):
        assert name == "Qwen/Qwen3-0.6B"
        assert not {"*.py", "*.bin", "*.pt"} & set(allow_patterns)
        if local_files_only and not state["cached"]:
            raise FileNotFoundError("not in the cache")
        assert local_files_only or revision == "0" * 40
        return str(GOLDEN / "qwen3")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


def test_a_name_of_the_hub_is_downloaded_and_loaded(hub):
    assert load_model("Qwen/Qwen3-0.6B").config == load_model(GOLDEN / "qwen3").config


def test_without_a_network_an_earlier_download_is_taken(hub):
    hub |= {"online": False, "cached": True}
    assert locate_model("Qwen/Qwen3-0.6B") == GOLDEN / "qwen3"


def test_without_network_and_download_the_reason_is_one_line(hub):
    hub["online"] = False
    with pytest.raises(UserError, match=r"\(no route to the hub\); without a network") as error:
        locate_model("Qwen/Qwen3-0.6B")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["runs/stage1", "./Qwen/Qwen3", "Qwen", "a/b/c", "/Qwen/Qwen3"])
def test_what_can_only_be_a_path_is_not_asked_for(hub, tmp_path, name):
    (tmp_path / "runs").mkdir()
    with pytest.raises(FileNotFoundError, match="expected a directory with"):
        locate_model(name)
