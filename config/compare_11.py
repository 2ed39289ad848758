# Softmax and eight others in one layer with one head, on the embedded data: 54 runs of 700 steps,
# about 45 minutes on 2 CPU cores.
#
#   python compare.py config/compare_11.py

out_dir = "out-compare-11"
base = "train_11"
attn_types = "SM,GK,GKpoly-4,GKpoly-8,PA_relu,PA_gelu,PA_sigmoid,PA_square,PA_relu-square"
learning_rates = "1e-3,3e-3,1e-2"
seeds = "1,2"

max_iters = 700
min_lr = None  # a tenth of each learning rate, rather than train_11's
warmup_iters = 50
eval_interval = 100
eval_iters = 10
log_interval = 20
