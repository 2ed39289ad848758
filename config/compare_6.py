# Six layers: softmax and four attentions without it, with and without a public decay, with AdamW
# and with Muon, at two learning rates and with two seeds. With the decay, rows sum to 1: by eight
# terms for GK and GKpoly-6, by one for the others. 80 runs of 400 steps, three hours on 2 CPU
# cores; the same command goes on where it was stopped.
#
#   python compare.py config/compare_6.py
#   python compare.py config/compare_6.py --dataset=shakespeare_char --out_dir=out-shakespeare-6
# With the decay alone:
#   python compare.py config/compare_6.py --attn_normalize=0 --out_dir=out-decay-6
# A part of the runs, here six of them:
#   python compare.py config/compare_6.py --attn_types=SM,GK,GKpoly-6 --learning_rates=6e-3 \
#       --vary="attn_decay=fixed optimizer=adamw"
# The loss against the depth, at one width:
#   python compare.py config/compare_6.py --vary="n_layer=1,2,4,6,12" --attn_types=SM,GK \
#       --attn_decay=fixed --n_head=4 --n_embd=128 --block_size=128 --batch_size=16 \
#       --learning_rates=6e-3 --out_dir=out-depth    # and --optimizer=muon

out_dir = "out-compare-6"
base = "train_gk"
attn_types = "SM,GK,GKpoly-6,PA_relu,PA_square"  # scores leave the range of GKpoly-4 at 6e-3
vary = "attn_decay=none,fixed optimizer=adamw,muon"
learning_rates = "3e-3,6e-3"
seeds = "1,2"
jobs = 2  # runs at a time, with one thread each

n_layer = 6
n_head = 6
n_embd = 192
block_size = 256
dropout = 0.0
batch_size = 8
max_iters = 400
warmup_iters = 50
eval_interval = 100
eval_iters = 20
log_interval = 20
