"""What a published model needs: a card that says what it is, and an upload to the hub."""

import json
import math
import shlex
from contextlib import suppress
from pathlib import Path

from configurator import UserError
from engine.files import text_table
from engine.loading import Trained
from engine.network import HUB, reachable
from engine.scoring import HEADINGS
from kernels.blockwise import family
from model import GPTConfig, parse_attn_type

GAUSSIAN = "Rho et al., Encryption-Friendly LLM Architecture, https://arxiv.org/abs/2410.02486"
PAPERS = {
    "SM": "Vaswani et al., Attention Is All You Need, https://arxiv.org/abs/1706.03762",
    "GK": GAUSSIAN,
    "GKpoly-n": GAUSSIAN,
    "PA_relu": "Wortsman et al., Replacing softmax with ReLU, https://arxiv.org/abs/2309.08586",
    "PA_sigmoid": "Ramapuram et al., Sigmoid Self-Attention, https://arxiv.org/abs/2409.04431",
}
CARD = """{front}
# {name}

A GPT whose attention is `{attn_type}`. The weight of token j <= i for token i is
{formula}

{facts}

## Load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})
```

{scores}## Cite

- Andrej Karpathy, nanoGPT, https://github.com/karpathy/nanoGPT
{paper}"""


def formula(config: GPTConfig) -> str:
    """The weight of token j for token i in this model, in Markdown, to end a sentence with."""
    variant, name = parse_attn_type(config.attn_type), config.attn_type
    decays = config.attn_decay != "none"
    if variant is None:
        bias = " - (i - j) / r_h" if decays else ""
        return f"`softmax over j of q_i.k_j / sqrt(hs){bias}`."
    n = name.rpartition("-")[2]
    f = {"GK": "exp(x)", f"GKpoly-{n}": f"(1 + x / 2^{n})^(2^{n})"}.get(name, f"{name[3:]}(x)")
    if decays:
        f += " exp(-(i - j) / r_h) / s_i"
    elif variant.by_length:
        f += f" / {config.pa_length}^{config.pa_length_power:g}"
    x = {"dot": "q_i.k_j / sqrt(hs)", "distance": "-|q_i - k_j|^2 / (2 sqrt(hs))"}[variant.score]
    what = f"`{f}` with `x = {x}`, where `hs` is the size of a head"
    if decays:
        what += ", `r_h` the reach of head h, and `s_i` the sum of exp(-d / r_h) over d <= i."
        if terms := config.attn_normalize:
            series = "1" if terms == 1 else f"1 + (1 - a_i) + ... + (1 - a_i)^{terms - 1}"
            what += (
                f" So that each row sums to 1, with `a_i` its sum, these weights are multiplied by "
                f"`{series}`, and `(1 - a_i)^{terms} exp(-(i - j) / r_h) / s_i` is added."
            )
        return what
    return f"{what}. The weights of a row are not normalised."


def score_table(results: dict) -> str:
    """The rows of eval.json, in Markdown."""
    cells = [["data set", "split", *HEADINGS.values()]]
    for data, row in results.items():
        values = ("" if row[key] is None else f"{row[key]:.4g}" for key in HEADINGS)
        cells.append([data, row["split"], *values])
    return text_table(cells, markdown=True)


def began_with(settings: dict) -> str | None:
    """The model whose weights a run with these settings began with; None if there was none, or if
    the run has been resumed, which is all that its settings say then. Of a folder only the name."""
    init_from = settings.get("init_from", "resume")
    if init_from in ("scratch", "resume"):
        return None
    name = settings.get({"finetune": "out_dir", "distill": "teacher"}.get(init_from, "init_from"))
    return Path(name).name if Path(name).is_dir() else name


def model_card(name: str, trained: Trained, run: Path, has_code: bool) -> str:
    """The model card, in Markdown, of the model that will be loaded as `name`: what it is, how it
    was trained, how good it is, how to load it. The folder of its `run` says part of that.
    `has_code` says whether transformers must run code that comes with the model."""
    from huggingface_hub import ModelCardData

    config, settings, scores = trained.model.config, {}, ""
    with suppress(OSError, ValueError, TypeError):
        settings = dict(json.loads((run / "config.json").read_text("utf-8")))
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        evaluation = json.loads((run / "eval.json").read_text("utf-8"))
        evaluated = Path(evaluation["model"]).name, evaluation["step"]
        if evaluated == (Path(trained.source).name, trained.step):  # and not an earlier state
            scores = f"## Scores\n\n{score_table(evaluation['results'])}\n\n"
    found, loss = settings.get("found") or {}, trained.best_val_loss
    facts = {
        "Parameters": f"{trained.model.get_num_params():,} without position embeddings",
        **{f"`{key}`": value for key, value in config.model_args().items()},
        "Training began with": began_with(settings),
        "Training data": trained.dataset,
        "Updates": trained.step,
        "Best validation loss": f"{loss:.4f} nats per token" if math.isfinite(loss) else None,
        **{f"`{key}`": settings.get(key) for key in ("optimizer", "learning_rate", "seed")},
        "Commit of the code": found.get("commit"),
        "torch": found.get("torch"),
    }
    rows = [[key, str(value)] for key, value in facts.items() if value is not None]
    tags = ["gpt2", config.attn_type]
    front = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags)
    paper = PAPERS.get(family(config.attn_type)[0])
    return CARD.format(
        front=f"---\n{front.to_yaml()}\n---",
        name=name,
        attn_type=config.attn_type,
        formula=formula(config),
        facts=text_table([["", ""], *rows], markdown=True),
        trust=", trust_remote_code=True" if has_code else "",
        scores=scores,
        paper=f"- {paper}\n" if paper else "",
    )


def check_repo(repo: str) -> None:
    """Raises UserError unless `repo` can be the name of a model on the hub."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
        valid = "/" in repo
    except HFValidationError:
        valid = False
    if not valid:
        raise UserError(f"push={repo!r} is not USER/NAME, as in --push=ada/gk-small")


def push(folder: Path, repo: str) -> str:
    """Upload the folder as the model `repo` of the hub, and return its address. Raises UserError if
    that is not possible; the folder stays."""
    from huggingface_hub import HfApi

    retry = f"{folder} is whole; once that is repaired, run "
    retry += shlex.join(["hf", "upload", repo, str(folder)])
    if not reachable(HUB):
        raise UserError(f"{HUB} can't be reached from here; {retry}")
    try:
        api = HfApi()
        address = api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder)
    except Exception as error:  # no token, no right to write, no network: of several libraries
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{repo} can't be written ({reason[:300]}); {retry}") from error
    return str(address)
