"""runtime.py: signals as flags, and what several ranks share."""

import os
import platform
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, subprocess_run

from configurator import UserError
from engine.runtime import Interrupt, Runtime, limit_threads, lost_rank


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_a_flag_while_the_context_is_open(number, code):
    before, rt = signal.getsignal(number), Runtime("cpu", "float32", False)
    with Interrupt() as interrupt:
        assert interrupt.poll(rt) == 0
        os.kill(os.getpid(), number)
        assert interrupt.poll(rt) == code
    assert signal.getsignal(number) is before


def test_a_second_signal_ends_the_process_unless_it_is_the_first_one_again():
    code = (
        "import os, time\nfrom engine import runtime\nwith runtime.Interrupt():\n"
        "    for _ in range(9): os.kill(os.getpid(), 15)\n"
        "    print('still here', flush=True); time.sleep(2.5)\n"
        "    os.kill(os.getpid(), 15); print('no longer', flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, capture_output=True)
    assert done.returncode == 143 and done.stdout == b"still here\n"


def test_micro_steps_are_shared_in_order_and_without_rest():
    ranks = [Runtime("cpu", "float32", False, rank, 4) for rank in range(4)]
    assert [i for rt in ranks for i in rt.share(10)] == list(range(10))


def test_one_process_needs_no_process_group():
    rt = Runtime("cpu", "float32", False)
    assert rt.sum([1.5, 2.0]) == [1.5, 2.0] and rt.sum(torch.ones(2)) == [1.0, 1.0]
    assert rt.from_main(lambda: 7) == 7 and rt.gather("a") == ["a"]
    with pytest.raises(UserError):
        rt.from_main(lambda: (_ for _ in ()).throw(UserError("told")))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_numbers_are_read_as_they_were_while_the_gpu_goes_on():
    rt = Runtime("cuda:0", "bfloat16", False)
    vector = rt.total(torch.ones(3, device="cuda"))
    numbers = rt.read(vector)
    torch.cuda._sleep(10_000_000)
    vector.fill_(5.0)
    assert numbers() == [1.0, 1.0, 1.0] and rt.sum(vector) == [5.0, 5.0, 5.0]


def test_several_gpus_say_a_signal_one_call_later_unless_they_are_waited_for(monkeypatch):
    rt = Runtime("cuda:0", "float32", False, rank=0, world_size=2)
    monkeypatch.setattr(Runtime, "total", lambda self, flags: torch.tensor(flags))
    interrupt = Interrupt()
    assert interrupt.poll(rt, wait=False) == 0
    interrupt.signal = signal.SIGTERM
    assert [interrupt.poll(rt, wait=False) for _ in range(2)] == [0, 143]
    assert interrupt.poll(rt) == 143


def test_ranks_share_what_the_main_one_has_and_its_errors(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(
        "import torch, configurator\nfrom engine import runtime\n"
        "rt = runtime.start('cpu', None, None)\n"
        "assert rt.sum([1.0, rt.rank]) == [2.0, 1.0]\n"
        "assert rt.from_main(lambda: {'rank': rt.rank}) == {'rank': 0}\n"
        "assert rt.gather(f'rank {rt.rank}') == ['rank 0', 'rank 1']\n"
        "t = torch.tensor([rt.rank + 5.0]); rt.broadcast([t]); assert t.item() == 5\n"
        "def fail(): raise configurator.UserError('told once')\n"
        "def main():\n"
        "    try: rt.from_main(fail)\n"
        "    finally: rt.close()\n"
        "configurator.run(main)\n"
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    done = subprocess_run(*torchrun, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stderr.count("error: told once") == 1 and "AssertionError" not in done.stderr
    assert "exitcode  : 2" in done.stderr


def test_a_lost_rank_is_told_from_other_errors():
    assert lost_rank(RuntimeError("gloo: Connection closed by peer [127.0.0.1]:1"))
    assert lost_rank(RuntimeError("Timed out waiting 600000ms for recv"))
    assert not lost_rank(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept():
    """Blocks of 64 MB, taken again and again, cost page faults only the first times."""
    code = (
        "import resource, sys, torch\nfrom engine import runtime\n"
        "runtime.keep_freed_memory(sys.argv[1])\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for i in range(20):\n"
        "    if i == 10: before = faults()\n"
        "    torch.ones(2**24).sum()\n"
        "print(faults() - before)\n"
    )
    kept, returned = (int(subprocess_run("-c", code, device).stdout) for device in ("cpu", "cuda"))
    assert 2 * kept < returned


@pytest.mark.parametrize("parameters, given, threads", [(4160, False, 1), (4160, True, 2)])
def test_a_tiny_model_uses_one_thread_unless_told(monkeypatch, parameters, given, threads):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: chosen.append(n))
    chosen = [2]
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
    else:
        monkeypatch.delenv("OMP_NUM_THREADS")
    limit_threads(parameters, tokens=64)
    limit_threads(10**6, tokens=4096)
    assert chosen[-1] == threads
