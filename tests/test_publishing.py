"""publishing.py: the model card, and an upload that loses nothing when it fails."""

import json
import re

import pytest
from conftest import Failed

from engine import publishing
from model import GPTConfig

pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture
def hub(monkeypatch):
    """A hub that can be reached, and what was asked of it."""
    asked = []

    class Hub:
        def create_repo(self, repo, **options):
            asked.append(("create", repo, options))
            return f"https://hub/{repo}"

        def upload_folder(self, repo_id, folder_path):
            asked.append(("upload", repo_id, {path.name for path in folder_path.iterdir()}))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(publishing, "reachable", lambda url: True)
    return asked


def test_the_exported_folder_is_uploaded_with_its_card(hub, run, run_train, tmp_path):
    run_train("--out_dir=run", "--attn_type=GK", "--seed=7")
    run("evaluate", "--out_dir=run", "--data_dir=data")
    out = run("export", "--out_dir=run", "--to=hf", "--push=ada/small")
    assert hub == [
        ("create", "ada/small", {"exist_ok": True}),
        ("upload", "ada/small", {path.name for path in (tmp_path / "hf").iterdir()}),
    ]
    assert "README.md" in hub[1][2] and "https://hub/ada/small" in out
    card = (tmp_path / "hf" / "README.md").read_text()
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    score = json.loads((tmp_path / "run" / "eval.json").read_text())["results"]["abc"]
    for part in (
        "library_name: transformers",
        'AutoModelForCausalLM.from_pretrained("ada/small", trust_remote_code=True)',
        "`exp(x)` with `x = -|q_i - k_j|^2 / (2 sqrt(hs))`",
        "| Training data | abc |",
        "| `seed` | 7 |",
        "| Updates | 4 |",
        f"| Commit of the code | {settings['found']['commit']} |",
        f"| abc | val | {score['loss']:.4g} |",
        "arxiv.org/abs/2410.02486",
    ):
        assert part in card, part
    assert re.search(r"Best validation loss \| \d\.\d{4} nats", card)


def test_a_softmax_model_is_loaded_without_code(run, run_train, tmp_path):
    run_train("--out_dir=run", "--max_iters=0")
    run("export", "--out_dir=run", "--to=hf")
    assert 'AutoModelForCausalLM.from_pretrained("hf")\n' in (tmp_path / "hf/README.md").read_text()


@pytest.mark.parametrize(
    "args, expected",
    [
        ({"attn_type": "SM"}, "`softmax over j of q_i.k_j / sqrt(hs)`."),
        ({"attn_type": "SM", "attn_decay": "fixed"}, "sqrt(hs) - (i - j) / r_h`"),
        ({"attn_type": "GKpoly-4"}, "`(1 + x / 2^4)^(2^4)` with `x = -|q_i"),
        ({"attn_type": "PA_relu-square", "pa_length": 9}, "`relu-square(x) / 9^1` with `x = q_i."),
        ({"attn_type": "GK", "attn_decay": "learned"}, "`exp(x) exp(-(i - j) / r_h) / s_i`"),
        (
            {"attn_type": "GK", "attn_decay": "fixed", "attn_normalize": 8},
            "`1 + (1 - a_i) + ... + (1 - a_i)^7`, and `(1 - a_i)^8 exp(-(i - j) / r_h) / s_i` is",
        ),
    ],
)
def test_the_formula_is_that_of_the_model(args, expected):
    assert expected in publishing.formula(GPTConfig(**args))


@pytest.mark.parametrize("name", ["small", "ada/small/one", "ada/", "a b/c"])
def test_a_name_that_the_hub_refuses_is_one_line_before_anything_is_written(
    hub, run, run_train, tmp_path, name
):
    run_train("--out_dir=run", "--max_iters=0")
    with pytest.raises(Failed, match="is not USER/NAME") as failed:
        run("export", "--out_dir=run", "--to=hf", f"--push={name}")
    assert failed.value.stderr.count("\n") == 1 and not (tmp_path / "hf").exists() and not hub


def test_without_a_hub_the_folder_stays(run, run_train, tmp_path):
    run_train("--out_dir=run", "--max_iters=0")  # HF_HUB_OFFLINE is set, or there is no network
    with pytest.raises(Failed, match="run hf upload ada/small hf") as failed:
        run("export", "--out_dir=run", "--to=hf", "--push=ada/small")
    assert failed.value.code == 2 and failed.value.stderr.count("\n") == 1
    assert (tmp_path / "hf" / "model.safetensors").exists()


def test_a_missing_token_is_one_line(hub, run, run_train, monkeypatch):
    from huggingface_hub.errors import LocalTokenNotFoundError

    def refuse(*args, **options):
        raise LocalTokenNotFoundError("no token;\nlog in first")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    run_train("--out_dir=run", "--max_iters=0")
    with pytest.raises(Failed, match="can't be written .no token; log in first") as failed:
        run("export", "--out_dir=run", "--to=hf", "--push=ada/small")
    assert failed.value.stderr.count("\n") == 1


def test_a_connection_that_breaks_is_one_line(hub, run, run_train, monkeypatch, tmp_path):
    class ConnectError(Exception):  # of the libraries below huggingface_hub, which are no OSErrors
        pass

    def break_off(*args, **options):
        raise ConnectError

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", break_off)
    run_train("--out_dir=run", "--max_iters=0")
    with pytest.raises(Failed, match="ConnectError.* hf upload ada/small 'my folder'") as failed:
        run("export", "--out_dir=run", "--to=my folder", "--push=ada/small")
    assert failed.value.code == 2 and failed.value.stderr.count("\n") == 1
    assert (tmp_path / "my folder" / "model.safetensors").exists()


def test_the_card_of_a_finetune_says_what_it_began_with(run, run_train, tmp_path):
    run_train("--out_dir=some/run", "--max_iters=0")
    run_train("--init_from=finetune", "--out_dir=some/run", "--save_dir=new", "--attn_type=GK")
    run("export", "--out_dir=new", "--to=hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| Training began with | run |" in card
    run("export", "--out_dir=some/run", "--to=other")
    assert "began" not in (tmp_path / "other" / "README.md").read_text()


@pytest.mark.parametrize("text", ["[]", "{", '{"found": null}', "3"])
def test_a_damaged_config_of_the_run_costs_only_what_it_said(run, run_train, tmp_path, text):
    run_train("--out_dir=run", "--max_iters=0")
    (tmp_path / "run" / "config.json").write_text(text)
    run("export", "--out_dir=run", "--to=hf")
    assert "| Training data | abc |" in (tmp_path / "hf" / "README.md").read_text()


def test_scores_of_another_checkpoint_are_not_those_of_this_one(run, run_train, tmp_path):
    run_train("--out_dir=run")
    run("evaluate", "--out_dir=run", "--data_dir=data")
    for key, value in (("step", 3), ("model", "gpt2")):
        path = tmp_path / "run" / "eval.json"
        whole = path.read_text()
        path.write_text(json.dumps(json.loads(whole) | {key: value}))
        run("export", "--out_dir=run", f"--to={key}")
        assert "Scores" not in (tmp_path / key / "README.md").read_text()
        path.write_text(whole)
    run("export", "--out_dir=run", "--to=hf")
    assert "## Scores" in (tmp_path / "hf" / "README.md").read_text()
