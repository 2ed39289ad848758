# Evaluate a checkpoint, on the data it was trained with unless --dataset names others.
#
#   python train.py config/EVAL.py --out_dir=OUT

init_from = "resume"
eval_only = True
eval_iters = 200
