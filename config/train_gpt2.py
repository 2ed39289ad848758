# GPT-2 124M on OpenWebText: 12 sequences x 1024 tokens x 40 micro-steps = 491,520 tokens per step,
# 300 billion tokens in all. Softmax reaches a validation loss of about 2.85; choose another
# attention with --attn_type.
# Prepare the data first:  python data/openwebtext/prepare.py
#
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

out_dir = "out-gpt2"
dataset = "openwebtext"
attn_type = "SM"
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
bias = False

batch_size = 12
gradient_accumulation_steps = 5 * 8
max_iters = 600000
learning_rate = 6e-4
warmup_iters = 2000
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 200
log_interval = 10
wandb_project = "owt"
wandb_run_name = "gpt2-124M"
