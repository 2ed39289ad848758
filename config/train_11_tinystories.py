# 1 layer, 1 head of size 768, Gaussian kernel, on TinyStories with GPT-2's tokens:
# 12 sequences x 1024 tokens x 40 micro-steps = 491,520 tokens per step.
# Prepare the data first:  python data/tinystories/prepare.py
#
#   torchrun --standalone --nproc_per_node=8 train.py config/train_11_tinystories.py

out_dir = "out-11-tinystories"
dataset = "tinystories"
attn_type = "GK"
n_layer = 1
n_head = 1
n_embd = 768
block_size = 1024
bias = True

batch_size = 12
gradient_accumulation_steps = 40
max_iters = 10000
learning_rate = 6e-4
warmup_iters = 500

eval_interval = 500
eval_iters = 200
log_interval = 10
