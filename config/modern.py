# What is usual today, for any attention: rotary positions, RMSNorm, queries and keys of one learned
# length, ReLU^2, no biases. Four layers on the default data set, minutes on a CPU. GPT-2's forms,
# to compare with:  --norm=layer --mlp_act=gelu --position=learned --qk_norm=False
#
#   python train.py config/modern.py --attn_type=GK --attn_decay=fixed
# With qk_norm GKpoly-n stays in range as long as every gain is at most 2^(n/2):
#   python train.py config/modern.py --attn_type=GKpoly-4 --attn_decay=fixed --stats_interval=100

out_dir = "out-modern"
dataset = "pydocs"
norm = "rms"
mlp_act = "relu-square"
position = "rope"
qk_norm = True
n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
bias = False

batch_size = 16
gradient_accumulation_steps = 1
max_iters = 600
learning_rate = 3e-3  # small models tolerate large steps
warmup_iters = 100
beta2 = 0.99

eval_interval = 100
eval_iters = 20
log_interval = 50
