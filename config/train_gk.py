# Six layers without softmax: the Gaussian kernel with a public decay, and with rows that sum to 1,
# on the default data set. Minutes on a GPU. Without the decay the model hardly learns with AdamW,
# and the sums bring it close to softmax with the same decay, see docs/results.md. The other values
# are those of train_shakespeare_char.py.
#
#   python train.py config/train_gk.py
# GKpoly-6 needs additions and multiplications only:
#   python train.py config/train_gk.py --attn_type=GKpoly-6 --stats_interval=250
# A smaller model, for a CPU:
#   python train.py train_gk --eval_iters=20 --block_size=128 --batch_size=16 --n_layer=4 \
#       --n_head=4 --n_embd=128 --max_iters=600 --learning_rate=3e-3 --min_lr=none --dropout=0.0

out_dir = "out-gk"
dataset = "pydocs"
attn_type = "GK"
attn_decay = "fixed"  # each head's weights fade with distance, over 2 to block_size / 2 tokens
attn_normalize = 8  # each row of weights sums to 1, by 8 terms of a series
n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.2  # the Triton kernels have none: with 0.0, a GPU uses them

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
always_save_checkpoint = False  # best.pt has the lowest validation loss
