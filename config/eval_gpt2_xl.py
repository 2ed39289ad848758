# Losses and perplexities of OpenAI's gpt2-xl (1558M) on the data sets of its paper.
# Prepare those first that you want:  python data/wikitext103/prepare.py  and so on.
#
#   python train.py eval_gpt2_xl

init_from = "gpt2-xl"
out_dir = "out-eval-gpt2-xl"
eval_only = True
datasets = "wikitext2,wikitext103,ptb,lambada,openwebtext"
eval_stride = 1024  # windows side by side: each token once, with 512 tokens before it on average
batch_size = 8
