"""progress.py: without tqdm nothing is shown, and train.py, evaluate.py and sample.py still run."""

from conftest import TINY, subprocess_run

WITHOUT_PACKAGES = """
import sys
for name in ("tqdm", "transformers", "datasets", "tiktoken", "matplotlib", "wandb"):
    sys.modules[name] = None  # its import fails
import configurator, evaluate, sample, train
def call(script, *args):
    sys.argv = [script.__name__, *args]
    try:
        configurator.run(script.main)
    except SystemExit as stop:
        assert not stop.code, stop.code
call(train, *sys.argv[1:])
call(evaluate, *sys.argv[-2:])
call(sample, *sys.argv[-2:-1], "--num_samples=2", "--max_new_tokens=3")
"""


def test_a_run_needs_no_package_but_torch_and_numpy(tmp_path, data_dir):
    args = [*TINY, "--dataset=abc", "--max_iters=2", "--eval_interval=1"]
    out = f"--out_dir={tmp_path / 'run'}"
    done = subprocess_run("-c", WITHOUT_PACKAGES, *args, out, f"--data_dir={data_dir}")
    assert done.returncode == 0, done.stderr
    assert "step 2: loss" in done.stdout and done.stderr.endswith("tokens/s\n")
