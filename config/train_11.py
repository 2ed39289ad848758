# 1 layer, 1 head, Gaussian kernel, on the default data set: a few minutes on a laptop.
# train_11_tinystories.py trains the same architecture at the scale of the literature.
#
#   python train.py config/train_11.py

out_dir = "out-11"
dataset = "pydocs"
attn_type = "GK"
attn_decay = "fixed"  # weights fade with distance, see docs/results.md; "none" is the plain GK
n_layer = 1
n_head = 1
n_embd = 128
block_size = 256
bias = True

batch_size = 16
gradient_accumulation_steps = 1
max_iters = 2000
learning_rate = 3e-3  # small models tolerate large steps
min_lr = 3e-4
warmup_iters = 100
beta2 = 0.99

eval_interval = 500
eval_iters = 20
log_interval = 50
