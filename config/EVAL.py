# Evaluate a checkpoint: on a few batches of the data it was trained with, or (--dataset) others, or
# on every token of the data sets that --datasets names.
#
#   python train.py config/EVAL.py --out_dir=OUT
#   python train.py config/EVAL.py --out_dir=OUT --datasets=wikitext103,ptb,lambada

init_from = "resume"
eval_only = True
eval_iters = 200
