# Compare softmax with eight other attentions in one layer with one head, on the default data set:
# 54 runs of 1500 steps, half an hour on 2 CPU cores. At T = 64 every attention soon predicts better
# than bigram frequencies do. At T = 256, as in train_11, the attentions without softmax need more
# than 1000 steps to get there.
#
#   python compare.py config/compare_11.py

out_dir = "out-compare-11"
base = "train_11"
attn_decay = "none"  # the attentions alone; "fixed" gives all of them, softmax too, the same decay
attn_types = "SM,GK,GKpoly-4,GKpoly-8,PA_relu,PA_gelu,PA_sigmoid,PA_square,PA_relu-square"
learning_rates = "1.5e-3,3e-3,6e-3"
seeds = "1,2"

block_size = 64
batch_size = 32
max_iters = 1500
min_lr = None  # a tenth of each learning rate, instead of the value in train_11
warmup_iters = 50
eval_interval = 100
eval_iters = 20
log_interval = 20
