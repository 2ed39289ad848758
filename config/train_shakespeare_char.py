# A small softmax GPT on the characters of Shakespeare: minutes on a GPU.
# Prepare the data first:  python data/shakespeare_char/prepare.py
#
#   python train.py config/train_shakespeare_char.py
# A smaller model, for a CPU:
#   python train.py train_shakespeare_char --eval_iters=20 --block_size=64 --batch_size=12 \
#       --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --dropout=0.0

out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"
n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.2

batch_size = 64
gradient_accumulation_steps = 1
max_iters = 5000
learning_rate = 1e-3  # small models tolerate large steps
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99  # slower averages, since a step has few tokens

eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # the model overfits; best.pt has the lowest validation loss
