"""
Loss and perplexity of a trained model on every token of whole data sets.

    python evaluate.py --out_dir=OUT                        # the data set that it was trained on
    python evaluate.py --out_dir=OUT --datasets=wikitext103,ptb,lambada
    python evaluate.py --init_from=gpt2 --datasets=wikitext2,lambada --out_dir=out-eval-gpt2
    python evaluate.py eval_gpt2                            # with config/eval_gpt2.py
    torchrun --standalone --nproc_per_node=8 evaluate.py eval_gpt2

Of each data set the test split is scored, or the validation split if there is no other. The table
that is printed, and eval.json in out_dir, have these numbers:

    loss                  mean over the scored tokens of -ln p, in nats
    perplexity            exp(loss)
    word_perplexity       exp(sum of -ln p / number of words); words are what white space separates
                          in the text before any detokenizer has changed it. In WikiText and the
                          Penn Treebank line ends count as words too, as they do in the papers
    bits_per_byte         sum of -log2 p / number of bytes of the text in UTF-8
    last_word_accuracy    share of passages of which every token of the last word is the likeliest
    last_word_perplexity  exp(mean over passages of the last word's -ln p)

The last two are of data sets of passages such as LAMBADA, which have no word_perplexity and no
bits_per_byte.
"""

import sys
from contextlib import closing
from dataclasses import dataclass

import torch

import configurator
from configurator import UserError
from engine import runtime
from engine.loading import load_pretrained, load_run
from engine.scoring import run_evaluation


@dataclass
class Config:
    # Model
    init_from: str = "resume"  # resume (the run in out_dir), gpt2[-medium|...], or a folder
    out_dir: str = "out"  # folder of the run, which eval.json is written to
    checkpoint: str = "ckpt.pt"  # ckpt.pt is the run's last state, best.pt the best one

    # Data
    datasets: str | None = None  # names separated by commas; auto: what the run was trained on
    data_dir: str | None = None  # folder that holds the data sets; auto: data/ beside this file
    eval_stride: int | None = None  # tokens between the starts of windows; auto: block_size / 2
    batch_size: int = 12  # windows that are scored at the same time
    eval_only: bool = True  # for config files that train.py reads too; evaluate.py never trains

    # System
    device: str | None = None  # cpu, cuda, cuda:1, mps; auto: the best one on this machine
    dtype: str | None = None  # float32, bfloat16 or float16; auto: what suits the device
    attn_impl: str = "auto"  # reference (the formula), blockwise or triton; auto: the fastest


def main() -> None:
    config = Config(**configurator.parse(Config, sys.argv[1:]))
    if not config.eval_only:
        raise UserError("eval_only=False, but evaluate.py can't train; run train.py instead")
    if config.datasets is None and config.init_from != "resume":
        raise UserError("datasets is not set; name some, e.g. --datasets=wikitext2,lambada")
    overrides = {"dropout": 0.0, "attn_impl": config.attn_impl}
    with closing(runtime.start(config.device, config.dtype, compile=False)) as rt:
        runtime.keep_freed_memory(rt.device_type)
        if config.init_from == "resume":
            trained = load_run(config.out_dir, config.checkpoint, config.data_dir, **overrides)
        else:
            trained = load_pretrained(config.init_from, **overrides)
        config.datasets = config.datasets or trained.dataset
        about = {"model": str(trained.source), "step": trained.step}
        model = trained.model.to(rt.device)
        try:
            code = run_evaluation(model, trained.tokenizer_meta, about, config, rt)
        except torch.OutOfMemoryError as error:
            message = f"out of memory; pass a --batch_size below {config.batch_size}"
            raise UserError(message, this_rank=True) from error
    sys.exit(code)


if __name__ == "__main__":
    configurator.run(main)
