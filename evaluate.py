"""
Loss and perplexity of a trained model on every token of whole data sets.

    python evaluate.py --out_dir=OUT                        # the data set that it was trained on
    python evaluate.py --out_dir=OUT --datasets=wikitext103,ptb,lambada
    python evaluate.py --init_from=gpt2 --datasets=wikitext2,lambada --out_dir=out-eval-gpt2
    python evaluate.py eval_gpt2                            # with config/eval_gpt2.py
    torchrun --standalone --nproc_per_node=8 evaluate.py eval_gpt2

The test split of each data set is scored, or the validation split if there is no other. The table
that is printed, and eval.json in out_dir, have these numbers:

    loss                  mean over the scored tokens of -ln p, in nats
    perplexity            exp(loss)
    word_perplexity       exp(sum of -ln p / number of words); white space separates words, in the
                          text as it was before any detokenizer. In WikiText and the Penn Treebank
                          line ends count as words too, as they do in the papers
    bits_per_byte         sum of -log2 p / number of bytes of the text in UTF-8
    last_word_accuracy    share of passages of which every token of the last word is the likeliest
    last_word_perplexity  exp(mean over passages of the last word's -ln p)

The last two apply only to data sets of passages, such as LAMBADA, which lack the two before them.
"""

import sys
from dataclasses import dataclass
from typing import Literal

import configurator
from configurator import UserError
from engine import runtime
from engine.loading import load_trained
from engine.scoring import run_evaluation


@dataclass
class Config:
    # Model
    init_from: str = "resume"  # resume (the run in out_dir), gpt2[-medium|...], or a folder
    out_dir: str = "out"  # Folder of the run; eval.json is written there
    checkpoint: str = "ckpt.pt"  # ckpt.pt: the last state of the run; best.pt: the best one

    # Data
    datasets: str | None = None  # Data sets, as in a,b,c; auto: the one that the run was trained on
    data_dir: str | None = None  # Folder that holds the data sets; auto: data/ beside evaluate.py
    eval_stride: int | None = None  # Tokens between windows; auto: block_size / 2
    batch_size: int = 12  # Windows that are scored at the same time
    eval_only: bool = True  # Lets config files of train.py be read; must be true

    # System
    device: str | None = None  # cpu, cuda, cuda:1 or mps; auto takes the best that there is
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # auto depends on the device
    attn_impl: str = "auto"  # Implementation: reference, blockwise, triton; auto takes the fastest


def main() -> None:
    config = Config(**configurator.parse(Config, sys.argv[1:]))
    if not config.eval_only:
        raise UserError("eval_only=False, but evaluate.py can't train; run train.py instead")
    if config.datasets is None and config.init_from != "resume":
        raise UserError("datasets is not set; name some, e.g. --datasets=wikitext2,lambada")
    source = config.out_dir, config.checkpoint, config.init_from, config.data_dir
    with runtime.session(config.device, config.dtype, compile=False, backend=None) as rt:
        trained = load_trained(*source, dropout=0.0, attn_impl=config.attn_impl)
        config.datasets = config.datasets or trained.dataset
        about = {"model": str(trained.source), "step": trained.step}
        model = trained.model.to(rt.device)
        sys.exit(run_evaluation(model, trained.tokenizer_meta, about, config, rt))


if __name__ == "__main__":
    configurator.run(main)
