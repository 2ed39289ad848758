# Pointwise attention on the default data set, with the model and budget of train_11.py.
#
#   python train.py config/PA.py --attn_type=PA_relu

out_dir = "out-PA"
dataset = "pydocs"
attn_type = "PA_gelu"
pa_length_power = 1.0  # A = f(c q.k) / block_size^power; 0.5 trains better in the literature
n_layer = 1
n_head = 1
n_embd = 128
block_size = 256
bias = True

batch_size = 16
gradient_accumulation_steps = 1
max_iters = 2000
learning_rate = 3e-3
min_lr = 3e-4
warmup_iters = 100
beta2 = 0.99

eval_interval = 500
eval_iters = 20
log_interval = 50
