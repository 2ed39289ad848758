# A GPT that is a polynomial: additions and multiplications only, as encrypted computation needs.
# GKpoly-3 for exp, a constant for LayerNorm's division, a polynomial of degree four for GELU; one
# layer with one head. LayerNorm and GELU turn into them during 90 % of the steps; until then, the
# validation loss, which is that of the polynomial, is huge. Three minutes on two CPU cores.
#
#   python train.py config/train_he.py
# The same model with GPT-2's parts, to see what that costs:
#   python train.py config/train_he.py --norm=layer --mlp_act=gelu --out_dir=out-he-gelu

out_dir = "out-he"
dataset = "pydocs"
attn_type = "GKpoly-3"
attn_decay = "fixed"  # constants that do not depend on the text
norm = "fixed"
mlp_act = "quartic"
n_layer = 1
n_head = 1
n_embd = 128
block_size = 64
bias = True

batch_size = 32
gradient_accumulation_steps = 1
max_iters = 4000
anneal_iters = 3600
optimizer = "muon"
learning_rate = 12e-3
warmup_iters = 50
beta2 = 0.99

eval_interval = 500
eval_iters = 20
log_interval = 50
