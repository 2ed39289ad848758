# Softmax and eight others in one layer with one head, on the embedded data: 54 runs of 1500 steps,
# half an hour on 2 CPU cores. At T = 64 all of them soon do better than a table of bigrams; at
# train_11's T = 256 those without softmax first spend more than 1000 steps on that level.
#
#   python compare.py config/compare_11.py

out_dir = "out-compare-11"
base = "train_11"
attn_types = "SM,GK,GKpoly-4,GKpoly-8,PA_relu,PA_gelu,PA_sigmoid,PA_square,PA_relu-square"
learning_rates = "1.5e-3,3e-3,6e-3"
seeds = "1,2"

block_size = 64
batch_size = 32
max_iters = 1500
min_lr = None  # a tenth of each learning rate, rather than train_11's
warmup_iters = 50
eval_interval = 100
eval_iters = 20
log_interval = 20
