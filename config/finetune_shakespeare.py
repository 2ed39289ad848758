# Fine-tune GPT-2 XL on Shakespeare with a few steps at a small constant learning rate.
# Prepare the data first:  python data/shakespeare/prepare.py
#
#   python train.py config/finetune_shakespeare.py
#   python train.py finetune_shakespeare --init_from=gpt2 --attn_type=GK

out_dir = "out-shakespeare"
dataset = "shakespeare"
init_from = "gpt2-xl"

# 1 sequence x 32 micro-steps x 1024 tokens = 32,768 tokens per step; the data set has 301,966
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
learning_rate = 3e-5
decay_lr = False

eval_interval = 5
eval_iters = 40
always_save_checkpoint = False
