# Evaluate a checkpoint on batches of its own data set, or of another with --dataset. With
# --datasets it is evaluated on every token of the data sets named there.
#
#   python train.py config/EVAL.py --out_dir=OUT
#   python train.py config/EVAL.py --out_dir=OUT --datasets=wikitext103,ptb,lambada

init_from = "resume"
eval_only = True
eval_iters = 200
