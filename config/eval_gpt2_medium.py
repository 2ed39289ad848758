# The loss of OpenAI's gpt2-medium (350M parameters) on OpenWebText.
# Prepare the data first:  python data/openwebtext/prepare.py
#
#   python train.py eval_gpt2_medium

init_from = "gpt2-medium"
dataset = "openwebtext"
eval_only = True
batch_size = 8
eval_iters = 500  # 500 x 8 x 1024 tokens
