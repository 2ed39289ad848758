"""pretrained.py: GPT-2 as transformers saves it, with the logits of transformers."""

import json

import pytest
import torch

from model import GPT

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture
def hf_folder(tmp_path):
    """A tiny random GPT-2 in transformers' own format."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=37, n_positions=24, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2
    )
    hf = transformers.GPT2LMHeadModel(config).eval()
    hf.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf", hf


def imports_as(folder, hf):
    """Whether from_pretrained(folder) computes what `hf` does."""
    model = GPT.from_pretrained(str(folder)).eval()
    idx = torch.randint(hf.config.vocab_size, (2, hf.config.n_positions))
    with torch.no_grad():
        logits, _ = model(idx, idx)
        expected = hf(idx).logits
    return (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def write_bin(folder, hf, state):
    hf.config.save_pretrained(folder)
    torch.save(state, folder / "pytorch_model.bin")


def test_from_pretrained_gives_the_logits_of_transformers(hf_folder):
    assert imports_as(*hf_folder)


@pytest.mark.parametrize("shape", [{"n_layer": 6}, {"vocab_size": 64}, {"vocab_size": 50257}])
def test_from_pretrained_takes_any_depth_and_vocabulary(tmp_path, shape):
    config = {"vocab_size": 37, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2, **shape}
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
    hf.save_pretrained(tmp_path)
    assert imports_as(tmp_path, hf)


def test_from_pretrained_takes_a_bin_file_and_a_body_saved_without_its_head(hf_folder, tmp_path):
    _, hf = hf_folder
    write_bin(tmp_path / "bin", hf, hf.state_dict())
    hf.transformer.save_pretrained(tmp_path / "body")  # names without the prefix `transformer.`
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 24, 24).tril() for i in range(2)}
    write_bin(tmp_path / "old", hf, {**hf.transformer.state_dict(), **masks})
    for name in ("bin", "body", "old"):
        assert imports_as(tmp_path / name, hf), name


def test_an_output_layer_of_its_own_is_refused_whatever_the_config_says(hf_folder, tmp_path):
    _, hf = hf_folder
    state = {**hf.state_dict(), "lm_head.weight": torch.randn(37, 32)}
    for tied in (True, False):
        hf.config.tie_word_embeddings = tied
        write_bin(tmp_path / "untied", hf, state)
        with pytest.raises(ValueError, match="output layer of its own"):
            GPT.from_pretrained(str(tmp_path / "untied"))
    write_bin(tmp_path / "tied", hf, hf.state_dict())  # the config says False, the weights are one
    assert imports_as(tmp_path / "tied", hf)


def test_from_pretrained_reads_the_attention_that_config_json_names(hf_folder):
    folder = str(hf_folder[0])
    path = hf_folder[0] / "config.json"
    plain = json.loads(path.read_text())
    ours = {"attn_type": "PA_relu", "pa_length": 16, "pa_length_power": 0.5}
    path.write_text(json.dumps({**plain, **ours}))

    def attention_args(*args):
        config = GPT.from_pretrained(folder, *args).config
        return config.attn_type, config.pa_length, config.pa_length_power

    assert attention_args({}, 8) == ("PA_relu", 16, 0.5)
    assert attention_args({"attn_type": "PA_gelu", "pa_length": 4}) == ("PA_gelu", 4, 0.5)
    assert attention_args({"attn_type": "GK"}) == ("GK", None, 1.0)
    path.write_text(json.dumps({**plain, "attn_type": "PA_relu"}))
    assert attention_args({}, 8) == ("PA_relu", 8, 1.0)


@pytest.mark.parametrize(
    "wrong",
    [{"attn_type": "eval"}, {"attn_type": None}, {"attn_type": ["GK"]}, {"pa_length_power": "1"}]
    + [{"attn_type": "PA_relu", "pa_length": L} for L in ("3", 0, True, 10**400)]
    + [{"n_head": "2"}, {"n_layer": 3}, {"n_embd": 10**12}, {"add_cross_attention": True}],
)
def test_a_config_json_that_can_not_be_is_a_value_error(hf_folder, wrong):
    path = hf_folder[0] / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **wrong}))
    with pytest.raises(ValueError):
        GPT.from_pretrained(str(hf_folder[0]))


def test_from_pretrained_takes_another_attention_and_dropout(hf_folder):
    model = GPT.from_pretrained(str(hf_folder[0]), {"attn_type": "GK", "dropout": 0.1})
    assert model.config.attn_type == "GK" and model.config.dropout == 0.1
    with pytest.raises(ValueError, match="n_layer"):
        GPT.from_pretrained(str(hf_folder[0]), {"n_layer": 1})


def test_from_pretrained_says_where_it_looked():
    with pytest.raises(OSError, match="HF_HOME"):
        GPT.from_pretrained("nobody/has-this-model")
