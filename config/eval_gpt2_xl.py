# Losses and perplexities of OpenAI's gpt2-xl (1558M) on the data sets of its paper.
# First prepare the data sets that you want:  python data/wikitext103/prepare.py  and so on.
#
#   python train.py eval_gpt2_xl

init_from = "gpt2-xl"
out_dir = "out-eval-gpt2-xl"
eval_only = True
datasets = "wikitext2,wikitext103,ptb,lambada,openwebtext"
eval_stride = 1024  # adjacent windows: a token has 512 tokens of context on average
batch_size = 8
