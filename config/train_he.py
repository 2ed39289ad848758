# A GPT that is a polynomial: additions and multiplications only, as encrypted computation needs.
# GKpoly-4 for exp, a constant for LayerNorm's division, a x^2 + b x for GELU; one layer with one
# head. Three minutes on two CPU cores.
#
#   python train.py config/train_he.py
# The same model with GPT-2's parts, to see what that costs:
#   python train.py config/train_he.py --norm=layer --mlp_act=gelu --out_dir=out-he-gelu

out_dir = "out-he"
dataset = "pydocs"
attn_type = "GKpoly-4"
attn_decay = "fixed"  # constants that do not depend on the text
norm = "fixed"
mlp_act = "quad"
n_layer = 1
n_head = 1
n_embd = 128
block_size = 64
bias = True

batch_size = 32
gradient_accumulation_steps = 1
max_iters = 6000
optimizer = "muon"
learning_rate = 6e-3
warmup_iters = 50
beta2 = 0.99

eval_interval = 500
eval_iters = 20
log_interval = 50
